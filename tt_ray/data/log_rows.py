"""The rows of somebody's log, and how they are put in order and cut into episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tt_ray.data.limited import Arrays
from tt_ray.data.log_layout import VECTORS, Layout
from tt_ray.errors import UserError


class Part(NamedTuple):
    """What one file holds: T rows in the arrays that `Log` has, and what they are."""

    path: Path
    arrays: Arrays
    layout: Layout
    dimensions: Mapping[str, Sequence[str]]
    labels: Sequence[str]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Log:
    """T rows of one or several files, as they stand there."""

    files: tuple[Path, ...]
    starts: NDArray[np.int64]  # [F + 1] rows of file f: starts[f]:starts[f + 1]
    layout: Layout
    dimensions: Mapping[str, Sequence[str]]
    """Names of the single dimensions of observations, actions and next_observations."""
    observations: NDArray[np.float32]  # [T, N] NaN where a cell is empty
    actions: NDArray[np.float32]  # [T, M]
    rewards: NDArray[np.float32]  # [T]
    next_observations: NDArray[np.float32] | None = None  # [T, N]
    terminals: NDArray[np.bool_] | None = None  # [T]
    timeouts: NDArray[np.bool_] | None = None  # [T]
    times: NDArray[np.float64] | None = None  # [T]
    episodes: NDArray[np.int64] | None = None  # [T] a number for each name, in the order of the files
    shared_labels: int = 0
    """Names of episodes that stand in several files."""
    joined: bool = False
    """Whether an episode may go on in the next file."""

    @property
    def terminated(self) -> NDArray[np.bool_]:
        """Whether the environment ended the episode after a row, [T]; no where nothing says so."""
        return _or_no(self.terminals, len(self.rewards))

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """Whether a time limit ended it, [T]."""
        return _or_no(self.timeouts, len(self.rewards))

    def place(self, row: int) -> str:
        """Where a row stands: file, and row counted from 0."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.files[file]}, row {row - int(self.starts[file])}"


@dataclass(frozen=True)
class Cut:
    """Which rows of a log form which episode."""

    rows: NDArray[np.int64]  # [T'] rows of the log in order, one for each transition
    offsets: NDArray[np.int64]  # [E + 1]
    finals: NDArray[np.int64]  # [E] the row that holds nothing but the final observation; -1: there is none

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def episode_of(self) -> NDArray[np.int64]:
        """The episode of each of `rows`, [T']."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def first(self) -> NDArray[np.bool_]:
        """Whether each of `rows` begins an episode, [T']."""
        return _marked(self.offsets[:-1], len(self.rows))

    @property
    def last(self) -> NDArray[np.bool_]:
        """Whether each of `rows` is its episode's last, [T']."""
        return _marked(self.offsets[1:] - 1, len(self.rows))

    def keeping(self, kept: NDArray[np.bool_]) -> Cut:
        """The same with those of `rows` alone that are kept, [T']; episodes without any are gone."""
        counts = np.bincount(self.episode_of[kept], minlength=len(self))
        there = counts > 0
        return Cut(self.rows[kept], _offsets(counts[there]), self.finals[there])


def join(parts: Sequence[Part], joined: bool) -> Log:
    """The rows of several files, one after the other; `UserError` where their columns differ."""
    first = parts[0]
    for part in parts[1:]:
        for role in VECTORS:
            here, there = (len(each.dimensions[role]) for each in (part, first))
            if here != there or (role in part.arrays) != (role in first.arrays):
                raise UserError(
                    f"{part.path} has {here} {role} a row, but {first.path} {there}: "
                    "all files of a set have the same columns"
                )
    codes, shared = _joined_codes(parts, joined)
    columns: dict[str, Any] = {
        name: np.concatenate([part.arrays[name] for part in parts])
        for name in first.arrays
        if name != "episodes"
    }
    return Log(
        files=tuple(part.path for part in parts),
        starts=_offsets(np.array([len(part.arrays["rewards"]) for part in parts])),
        layout=first.layout,
        dimensions=first.dimensions,
        episodes=codes,
        shared_labels=shared,
        joined=joined,
        **columns,
    )


def cut(log: Log) -> Cut:
    """The log's episodes.

    With a column that names them: the rows of each name, in order of time where there is one; a name means
    another episode in another file unless the files are `joined`. Without: an episode ends after a terminal
    or a timeout, before time falls back, and with its file.
    """
    total = len(log.rewards)
    if log.episodes is not None:
        order = np.lexsort((log.episodes,) if log.times is None else (log.times, log.episodes))
        begins = np.flatnonzero(np.diff(log.episodes[order])) + 1
    else:
        order = np.arange(total)
        over = (log.terminated | log.truncated)[:-1]
        if log.times is not None:
            over = over | (np.diff(log.times) < 0)
        begins = np.flatnonzero(over) + 1
        if not log.joined:
            begins = np.union1d(begins, log.starts[1:-1])
    offsets = np.concatenate([[0], begins, [total]]).astype(np.int64)
    return _without_finals(log, Cut(order.astype(np.int64), offsets, np.full(len(offsets) - 1, -1)))


def _without_finals(log: Log, whole: Cut) -> Cut:
    """Take out each episode's last row where it holds an observation and no action."""
    last = whole.rows[whole.offsets[1:] - 1]
    silent = np.isnan(log.actions[last]).all(axis=1) & np.isfinite(log.observations[last]).all(axis=1)
    silent &= np.isnan(log.rewards[last]) | (log.rewards[last] == 0)
    silent &= np.diff(whole.offsets) > 1
    marked = replace(whole, finals=np.where(silent, last, -1))
    return marked.keeping(~_marked((whole.offsets[1:] - 1)[silent], len(whole.rows)))


def _joined_codes(parts: Sequence[Part], joined: bool) -> tuple[NDArray[np.int64] | None, int]:
    """The episode of every row of all files, and how many names stand in several files."""
    if parts[0].layout.episode is None:
        return None, 0
    known: dict[tuple[int, str], int] = {}
    codes = []
    for index, part in enumerate(parts):
        table = [known.setdefault((0 if joined else index, label), len(known)) for label in part.labels]
        codes.append(np.array(table, np.int64)[part.arrays["episodes"]])
    counts = Counter(label for part in parts for label in part.labels)
    return np.concatenate(codes), sum(n > 1 for n in counts.values())


def _or_no(flags: NDArray[np.bool_] | None, total: int) -> NDArray[np.bool_]:
    return np.zeros(total, bool) if flags is None else flags


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _marked(places: NDArray[np.int64], total: int) -> NDArray[np.bool_]:
    marked = np.zeros(total, bool)
    marked[places] = True
    return marked
