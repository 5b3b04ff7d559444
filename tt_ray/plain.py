"""Plain JSON data from files that others may have damaged: values of the types that a dataclass declares."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MALFORMED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
)
"""What reading a damaged file of plain data raises; RuntimeError and SafetensorError come with tensors."""

T = TypeVar("T")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; one of `MALFORMED` where there is none."""
    data = json.loads(file.read_bytes())
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, found {type(data).__name__}")
    return data


def build(kind: Callable[..., T], data: Any) -> T:
    """The dataclass `kind` of a JSON object with its fields; `ValueError` or `TypeError` for other data."""
    if not isinstance(data, Mapping):
        raise TypeError(f"expected an object, found {type(data).__name__}")
    hints = _hints(kind)
    unknown = sorted(set(map(str, data)) - hints.keys())
    if unknown:
        raise TypeError(f"unknown key {unknown[0]!r}")
    values = {}
    for name, value in data.items():
        try:
            values[name] = convert(hints[name], value)
        except (TypeError, OverflowError) as error:
            raise TypeError(f"{name}: {error}") from None
    return kind(**values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind) if item.init}


def convert(hint: Any, value: Any) -> Any:
    """JSON data as a value of the type `hint`, lists as tuples where it says so; `TypeError` otherwise."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_that_fits(inner, value)
    if origin is Literal:
        fits = value in inner
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(inner[0], item) for item in value)
        fits = False
    elif origin in (list, Sequence):
        if isinstance(value, list):
            return [convert(inner[0], item) for item in value]
        fits = False
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {key: convert(inner[1], item) for key, item in value.items()}
        fits = False
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        fits = False
    else:
        fits = isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
    if not fits:
        raise TypeError(f"expected {getattr(hint, '__name__', hint)}, found {str(value)[:40]!r}")
    return value


def _first_that_fits(hints: Sequence[Any], value: Any) -> Any:
    for hint in hints:
        try:
            return convert(hint, value)
        except TypeError:
            continue
    raise TypeError(f"expected {' or '.join(str(hint) for hint in hints)}, found {str(value)[:40]!r}")
