"""Which parts of a data set's observations a model is given."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tt_ray.data.goals import DESIRED, leaves_of
from tt_ray.errors import UserError


@dataclass(frozen=True)
class Selection:
    """What is kept of flat observations of which each leaf is some columns."""

    keys: tuple[str, ...]
    """Leaves of a Dict observation that are kept, at least in part; () for a Box."""
    columns: NDArray[np.int64]
    """[N] columns that are kept."""
    cropped: bool
    """Whether other columns are not."""
    goal_keys: tuple[str, ...] = ()
    leaf_sizes: tuple[int, ...] = ()
    """Columns of each of goal_keys and then of each of keys; only with goals."""

    def of(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The kept columns [L, N] of whole observations [L, ...]."""
        return np.ascontiguousarray(observations[:, self.columns] if self.cropped else observations)


def select(
    leaves: Sequence[tuple[str, int]],
    dataset_id: str,
    dims: int | None = None,
    wanted: Sequence[str] | None = None,
    with_goal: bool = False,
) -> Selection:
    """The leaves `wanted` (None: all; with a goal, all but the desired one), and their first `dims` columns.

    `leaves` are name and size of each in order, the name "" for a Box. `UserError` where they are not there.
    """
    names = [name for name, _ in leaves if name]
    goal_keys = leaves_of(DESIRED, names) if with_goal else ()
    _check_keys(names, wanted, dataset_id)
    kept = {name for name, _ in leaves if name not in goal_keys and (wanted is None or name in wanted)}
    if not kept:
        raise UserError(
            f"dataset.observation_keys: nothing of {dataset_id} is left to observe but {DESIRED}, "
            "which is the goal"
        )
    ends = np.cumsum([size for _, size in leaves])
    total = int(ends[-1])
    starts = zip(leaves, ends, strict=True)
    columns = np.concatenate([np.arange(end - size, end) for (name, size), end in starts if name in kept])
    if dims is not None and not 1 <= dims <= len(columns):
        raise UserError(
            f"dataset.observation_dims: must lie between 1 and {len(columns)}, the observation dimensions of "
            f"{dataset_id}, not {dims}"
        )
    keys = tuple(name for name in names if name in kept)
    sizes = dict(leaves)
    return Selection(
        keys=keys,
        columns=columns[:dims],
        cropped=len(columns[:dims]) < total,
        goal_keys=goal_keys,
        leaf_sizes=tuple(sizes[key] for key in goal_keys + keys) if with_goal else (),
    )


def _check_keys(names: Sequence[str], wanted: Sequence[str] | None, dataset_id: str) -> None:
    """`UserError` unless all of `wanted` are names of leaves."""
    unknown = sorted(set(wanted or ()) - set(names))
    if not unknown:
        return
    if not names:
        raise UserError(
            f"dataset.observation_keys: the observations of {dataset_id} are plain vectors, without keys: "
            "leave it out (dataset.observation_dims keeps the first dimensions)"
        )
    near = difflib.get_close_matches(unknown[0], names, n=3) or sorted(names)
    raise UserError(
        f"dataset.observation_keys: the observations of {dataset_id} have no {unknown[0]!r}: "
        f"did you mean {' or '.join(near)}?"
    )
