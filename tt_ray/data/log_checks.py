"""What is odd about somebody's log: what forbids to use it, and what its owner should know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tt_ray.data.log_layout import OPTIONS, VECTORS
from tt_ray.data.log_rows import Cut, Log

GAP = 1.5
"""A time step that is so many times the usual one has others missing before it."""
DROP_HINT = "repair it, or leave such episodes out with --drop-incomplete"


@dataclass(frozen=True)
class Finding:
    """One thing about a log."""

    level: Literal["error", "warning", "note"]
    """An error forbids to write the data set."""
    kind: str
    """A word for programs: missing, repeated-time, after-end, dimensions, order, final-rows, duplicate-rows,
    duplicate-episodes, left-out, gaps, constant, bounds, unused, endings, names, environment."""
    text: str


@dataclass(frozen=True)
class Target:
    """What the rows are to fit."""

    environment: str = ""
    """Environment id; "" for none."""
    observation_dim: int | None = None
    action_space: gym.spaces.Box | None = None


def repeated_rows(log: Log, cut: Cut) -> NDArray[np.bool_]:
    """Which of the cut's rows repeat the one before in everything, its time included, [T']."""
    if log.times is None:
        return np.zeros(len(cut.rows), bool)
    same = np.zeros(len(cut.rows), bool)
    values = _values(log, cut)
    equal = (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
    same[1:] = equal.all(axis=1) & (np.diff(log.times[cut.rows]) == 0) & ~cut.first[1:]
    return same


def faults(log: Log, cut: Cut) -> Iterator[tuple[str, int, str]]:
    """What is wrong with single episodes: a kind, the episode, and a line that names the first place."""
    episode_of = cut.episode_of
    values = _values(log, cut)
    names = [*log.dimensions["observations"], *log.dimensions["actions"], log.layout.reward or "reward"]
    if log.times is not None:
        values, names = np.column_stack([values, log.times[cut.rows]]), [*names, log.layout.time or "time"]
    for index, column in _first_in_each(~np.isfinite(values), episode_of):
        kind = "missing or no number (NaN)" if np.isnan(values[index, column]) else "infinite"
        yield "missing", int(episode_of[index]), f"{log.place(cut.rows[index])}: {names[column]} is {kind}"
    for episode, row in enumerate(cut.finals.tolist()):
        if row >= 0 and log.times is not None and not np.isfinite(log.times[row]):
            yield "missing", episode, f"{log.place(row)}: {log.layout.time} is missing or no number (NaN)"
    if log.times is not None:
        again = np.concatenate([[False], np.diff(log.times[cut.rows]) == 0]) & ~cut.first
        for index, _ in _first_in_each(again[:, None], episode_of):
            place, time = log.place(cut.rows[index]), log.times[cut.rows[index]]
            line = f"{place}: {log.layout.time} {time:.12g} stands twice in one episode, with other values"
            yield "repeated-time", int(episode_of[index]), line
    over = (log.terminated | log.truncated)[cut.rows] & ~cut.last
    for index, _ in _first_in_each(over[:, None], episode_of):
        place = log.place(cut.rows[index + 1])
        line = f"{place}: the row before has ended the episode, and this one belongs to it too"
        yield "after-end", int(episode_of[index]), line


def misfits(log: Log, target: Target) -> Iterator[Finding]:
    """Dimensions that are not those of the environment."""
    wanted = {
        "observations": target.observation_dim,
        "actions": None if target.action_space is None else target.action_space.shape[0],
    }
    for role, width in wanted.items():
        found = getattr(log, role).shape[1]
        if width is not None and found != width:
            text = f"{log.files[0]}: {role} have {found} dimensions, but {target.environment} has {width}"
            yield Finding("error", "dimensions", f"{text}; choose the columns with {OPTIONS[role]}")


def remarks(log: Log, cut: Cut, target: Target) -> Iterator[Finding]:
    """What is no error."""
    if log.episodes is not None and (np.diff(cut.rows) < 0).any():
        how = "is not in order of episode" + (" and time" if log.times is not None else "")
        yield Finding("note", "order", f"the log {how}: its rows were sorted")
    if log.shared_labels:
        yield Finding(
            "warning",
            "names",
            f"names of episodes that stand in several files: {log.shared_labels}, "
            + ("taken as one episode each" if log.joined else "taken as different ones; else say --joined"),
        )
    if count := int((cut.finals >= 0).sum()):
        text = f"episodes whose last row has no action, and is taken as the final observation: {count}"
        yield Finding("note", "final-rows", text)
    if log.terminals is None and log.timeouts is None:
        text = "no column says how an episode ended: every one counts as cut off by a time limit (truncated)"
        yield Finding("warning", "endings", text)
    yield from _gaps(log, cut)
    yield from _duplicates(log, cut)
    for name, low, high in column_ranges(log, cut):
        if low == high:
            yield Finding("warning", "constant", f"{name} is {low:.6g} in every row")
    yield from _out_of_bounds(log, cut, target)
    if log.layout.unused:
        yield Finding("note", "unused", f"not used: {', '.join(log.layout.unused)}")
    if not target.environment:
        text = "no environment: models can be trained and predict, but not be evaluated; --env names one"
        yield Finding("warning", "environment", text)


def column_ranges(log: Log, cut: Cut) -> Iterator[tuple[str, float, float]]:
    """Every column with its least and largest number."""
    for name, values in columns_of(log, cut):
        finite = values[np.isfinite(values)]
        if len(finite):
            yield name, float(finite.min()), float(finite.max())


def columns_of(log: Log, cut: Cut) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every dimension of observations and actions, and the reward, over the cut's rows."""
    for role in VECTORS[:2]:
        values = getattr(log, role)
        for index, name in enumerate(log.dimensions[role]):
            yield name, values[cut.rows, index]
    yield log.layout.reward or "reward", log.rewards[cut.rows]


def _values(log: Log, cut: Cut) -> NDArray[np.float32]:
    """Observations, actions and rewards side by side, [T', N + M + 1]."""
    return np.column_stack([log.observations[cut.rows], log.actions[cut.rows], log.rewards[cut.rows]])


def _first_in_each(marked: NDArray[np.bool_], episode_of: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Row and column of the first mark in every episode that has one."""
    rows = np.flatnonzero(marked.any(axis=1))
    firsts = rows[np.unique(episode_of[rows], return_index=True)[1]]
    return [(int(row), int(np.flatnonzero(marked[row])[0])) for row in firsts]


def _gaps(log: Log, cut: Cut) -> Iterator[Finding]:
    """Missing time steps, measured by the usual one."""
    if log.times is None:
        return
    steps = np.diff(log.times[cut.rows])
    steps[cut.first[1:]] = np.nan
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    wide = np.flatnonzero(steps > GAP * usual) if usual else np.array([], np.int64)
    if len(wide):
        missing = int(np.rint(steps[wide] / usual).sum()) - len(wide)
        place = log.place(cut.rows[wide[0] + 1])
        episodes = len(np.unique(cut.episode_of[wide]))
        text = f"gaps in {log.layout.time}: {len(wide)}, missing steps of {usual:.6g}: {missing}, episodes "
        yield Finding("warning", "gaps", f"{text}that have some: {episodes}; the first before {place}")


def _duplicates(log: Log, cut: Cut) -> Iterator[Finding]:
    """Rows and whole episodes that equal an earlier one in observation, action and reward."""
    hashes = pd.util.hash_pandas_object(pd.DataFrame(_values(log, cut)), index=False)
    rows = pd.DataFrame({"episode": cut.episode_of, "row": hashes.to_numpy()}).duplicated().to_numpy()
    if rows.any():
        place = log.place(cut.rows[int(np.flatnonzero(rows)[0])])
        text = f"rows that equal an earlier one of their episode: {int(rows.sum())}; the first: {place}"
        yield Finding("warning", "duplicate-rows", text)
    parts = np.split(hashes.to_numpy(), cut.offsets[1:-1])
    episodes = pd.Series([part.tobytes() for part in parts]).duplicated().to_numpy()
    if episodes.any():
        place = log.place(cut.rows[cut.offsets[int(np.flatnonzero(episodes)[0])]])
        text = f"episodes that equal an earlier one: {int(episodes.sum())}; the first begins at {place}"
        yield Finding("warning", "duplicate-episodes", text)


def _out_of_bounds(log: Log, cut: Cut, target: Target) -> Iterator[Finding]:
    space, actions = target.action_space, log.actions[cut.rows]
    if space is None or space.shape[0] != actions.shape[1]:
        return
    slack = 1e-6 * np.maximum(1.0, np.minimum(np.abs(space.high), np.abs(space.low)))
    outside = (actions < space.low - slack) | (actions > space.high + slack)
    for column in np.flatnonzero(outside.any(axis=0)).tolist():
        values, where = actions[:, column], np.flatnonzero(outside[:, column])
        text = f"{log.dimensions['actions'][column]} lies outside {target.environment}'s bounds "
        text += f"[{space.low[column]:.6g}, {space.high[column]:.6g}] in {len(where)} rows (from "
        text += (
            f"{np.nanmin(values):.6g} to {np.nanmax(values):.6g}); the first: {log.place(cut.rows[where[0]])}"
        )
        yield Finding("warning", "bounds", text)
