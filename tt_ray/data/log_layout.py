"""Which columns of somebody's log are what: as the user says, or told by their names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tt_ray.errors import UserError
from tt_ray.plain import build

NONE = "none"
"""Said in place of a column: there is none, and none is to be guessed."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the user says of the columns; None: to be guessed from the names that are usual for it.

    The first three are names or patterns with commas between (`obs_*`, `x,y,vx`) or a tuple of them, the
    others one name each.
    """

    observations: str | tuple[str, ...] | None = None
    actions: str | tuple[str, ...] | None = None
    next_observations: str | tuple[str, ...] | None = None
    reward: str | None = None
    episode: str | None = None
    terminated: str | None = None
    truncated: str | None = None
    done: str | None = None
    time: str | None = None


VECTORS = ("observations", "actions", "next_observations")
"""Roles that many columns, or one column of vectors, may have."""
SINGLES = tuple(field.name for field in fields(Columns) if field.name not in VECTORS)
REQUIRED = ("observations", "actions", "reward")
OPTIONS = {role: f"--{role.replace('_', '-')}" for role in (*VECTORS, *SINGLES)}
"""How the command line calls them."""

_STEMS = {
    "observations": ("observations", "observation", "obs", "states", "state", "observation.state"),
    "actions": ("actions", "action", "act"),
    "next_observations": (
        *("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
        *("next.observation.state", "next.observation"),
    ),
}
_NAMES = {
    "reward": ("reward", "rewards", "next.reward", "r"),
    "episode": (
        *("episode", "episode_id", "episode_index", "ep", "trajectory", "trajectory_id", "traj", "traj_id"),
        *("run", "run_id"),
    ),
    "terminated": ("terminated", "terminations", "termination", "terminals", "terminal"),
    "truncated": ("truncated", "truncations", "truncation", "timeouts", "timeout"),
    "done": ("done", "dones", "next.done"),
    "time": ("step", "time", "t", "timestep", "time_step", "timesteps", "frame_index", "timestamp"),
}
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a log by what they are; a column of vectors has several dimensions."""

    observations: tuple[str, ...]
    actions: tuple[str, ...]
    reward: str | None = None
    next_observations: tuple[str, ...] = ()
    episode: str | None = None
    terminated: str | None = None
    truncated: str | None = None
    done: str | None = None
    time: str | None = None
    guessed: tuple[str, ...] = ()
    """Roles whose columns the user has not named."""
    unused: tuple[str, ...] = ()

    def columns_of(self, role: str) -> tuple[str, ...]:
        """The columns that have a role; empty for none."""
        found = getattr(self, role)
        return found if role in VECTORS else (found,) if found else ()

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that have a role."""
        return tuple(column for role in (*VECTORS, *SINGLES) for column in self.columns_of(role))

    def as_columns(self) -> Columns:
        """What to say so that another file is read in the same way."""
        vectors: dict[str, Any] = {role: self.columns_of(role) or NONE for role in VECTORS}
        return Columns(**vectors, **{role: getattr(self, role) or NONE for role in SINGLES})

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Inverse of `to_json`; `TypeError` or `ValueError` where `data` is no such thing."""
        return build(cls, data)


def find_layout(names: Sequence[str], wanted: Columns, where: str) -> Layout:
    """What each of the columns `names` of the file `where` is.

    `UserError`: a column that is asked for is not there, one has two roles, or observations, actions or the
    reward (unless it is said to be `none`) cannot be told.
    """
    found: dict[str, Any] = {}
    guessed = []
    for role in OPTIONS:
        said = getattr(wanted, role)
        if said is None:
            columns = _guess(role, names)
            if columns:
                guessed.append(role)
        else:
            columns = () if said == NONE else _matching(role, said, names, where)
        if role in REQUIRED and not columns and (role != "reward" or said != NONE):
            raise UserError(_unknown(role, names, where))
        found[role] = columns if role in VECTORS else next(iter(columns), None)
    _drop_double_guesses(found, guessed)
    layout = Layout(**found, guessed=tuple(guessed))
    _check_roles(layout, where)
    return replace(layout, unused=tuple(name for name in names if name not in layout.used))


def _matching(role: str, said: str | Sequence[str], names: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns that a user's list of names and patterns means, in its order."""
    if not isinstance(said, str):
        parts = list(said)
    else:
        parts = [part.strip() for part in said.split(",")] if role in VECTORS else [said]
    columns: list[str] = []
    for part in parts:
        matches = [part] if part in names else _in_order(fnmatch.filter(names, part))
        if not matches:
            near = difflib.get_close_matches(part, names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {_listed(names)}"
            raise UserError(f"{where} has no column {part!r} ({OPTIONS[role]}): {hint}")
        if role not in VECTORS and len(matches) > 1:
            raise UserError(f"{where}: {OPTIONS[role]} {part!r} means several columns: {_listed(matches)}")
        columns += [match for match in matches if match not in columns]
    return tuple(columns)


def _guess(role: str, names: Sequence[str]) -> tuple[str, ...]:
    """Columns whose names are usual for a role: one of that name, or numbered and dotted ones."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    if role not in VECTORS:
        return tuple(lower[name] for name in _NAMES[role] if name in lower)[:1]
    for stem in _STEMS[role]:
        if stem in lower:
            return (lower[stem],)
        grouped = [name for name in names if re.match(rf"{re.escape(stem)}(_|\.|\[|\d)", name.lower())]
        if grouped:
            return _in_order(grouped)
    return ()


def _in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Columns that differ in one number by that number, others as they stand in the file."""
    parts = [_NUMBERED.fullmatch(name) for name in names]
    if all(parts) and len({(part[1], part[3]) for part in parts if part}) == 1:
        return tuple(sorted(names, key=lambda name: int(_NUMBERED.fullmatch(name)[2])))  # type: ignore[index]
    return tuple(names)


def _drop_double_guesses(found: dict[str, Any], guessed: list[str]) -> None:
    """A guess gives way to what the user has named."""
    said: set[str | None] = set()
    for role in OPTIONS:
        if role not in guessed:
            said.update(found[role] if role in VECTORS else [found[role]])
    for role in list(guessed):
        columns = found[role] if role in VECTORS else (found[role],)
        left = tuple(column for column in columns if column not in said)
        if left != columns and role not in REQUIRED[:2]:
            found[role] = left if role in VECTORS else None
            guessed.remove(role)
        elif left != columns:
            found[role] = left


def _check_roles(layout: Layout, where: str) -> None:
    for role in REQUIRED[:2]:
        if not layout.columns_of(role):
            raise UserError(_unknown(role, layout.used, where))
    seen: dict[str, str] = {}
    for role in OPTIONS:
        for column in layout.columns_of(role):
            if column in seen:
                raise UserError(
                    f"{where}: column {column!r} is given twice: {OPTIONS[seen[column]]} and {OPTIONS[role]}"
                )
            seen[column] = role


def _unknown(role: str, names: Sequence[str], where: str) -> str:
    example = {"observations": "'obs_*'", "actions": "'act_*'", "reward": "NAME (or none)"}[role]
    return (
        f"{where}: no column looks like {role.rstrip('s')}s; "
        f"say which with {OPTIONS[role]} {example}; it has {_listed(names)}"
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most]) or 'no columns'}{more}"
