"""What the sections' rules are made of: each check names the key at fault in its `UserError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tt_ray.errors import UserError

MAX_BINS = 32766  # int16 tokens, with one value left for the stop token


def require(condition: bool, key: str, message: str) -> None:
    """Raise a `UserError` naming the configuration key `key` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: {message}")


def each(section: str, config: Any, names: str, fine: Callable[[Any], bool], must: str) -> None:
    """Refuse `config` unless each of `names` is None, "auto" or `fine`; `must` says what it has to do."""
    for name in names.split():
        value = getattr(config, name)
        require(value in (None, "auto") or fine(value), f"{section}.{name}", f"must {must}, not {value}")


def at_least(minimum: int, section: str, config: Any, names: str) -> None:
    """Refuse values below `minimum`."""
    each(section, config, names, lambda value: value >= minimum, f"be at least {minimum}")


def positive(section: str, config: Any, names: str) -> None:
    """Refuse values that are not above 0."""
    each(section, config, names, lambda value: value > 0, "be positive")


def fraction(section: str, config: Any, names: str) -> None:
    """Refuse values outside [0, 1)."""
    each(section, config, names, lambda value: 0 <= value < 1, "lie in [0, 1)")
