"""Which part of an observation is the goal that is asked for, and which of the rest forms a goal."""

from __future__ import annotations

from collections.abc import Sequence

from tt_ray.config import GoalConfig
from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError

DESIRED, ACHIEVED = "desired_goal", "achieved_goal"
"""Keys of a goal environment's observations, as Gymnasium-Robotics names them."""


def leaves_of(key: str, paths: Sequence[str]) -> tuple[str, ...]:
    """The leaves of a Dict observation among `paths` that are `key` or lie under it."""
    return tuple(path for path in paths if path == key or path.startswith(f"{key}/"))


def goal_slots(goal: GoalConfig | None, spec: DataSpec) -> tuple[int, ...]:
    """Observation slots that form a goal, in order; () for a model without goals.

    `spec` is that of episodes which were loaded with the same `goal`. `UserError`: dimensions that are not
    there, or another number of them than the environment's own goals have.
    """
    if goal is None:
        return ()
    size = spec.observation_dim
    if goal.dims is not None and max(goal.dims) >= size:
        raise UserError(
            f"goal.dims: {max(goal.dims)} is none of the observation dimensions 0 to {size - 1} of "
            f"{spec.dataset_id}"
        )
    slots = goal.dims or _achieved(spec) or tuple(range(size))
    if spec.goal_dim not in (0, len(slots)):
        raise UserError(
            f"goal.dims: {len(slots)} of the observation dimensions form a goal, but the environment of "
            f"{spec.dataset_id} asks for goals of {spec.goal_dim}: name the dimensions that it means"
        )
    return slots


def _achieved(spec: DataSpec) -> tuple[int, ...]:
    """Slots of the achieved goal, () where it is not kept."""
    wanted = leaves_of(ACHIEVED, spec.observation_keys)
    slots: list[int] = []
    start = 0
    for key, size in zip(spec.observation_keys, spec.leaf_sizes[len(spec.goal_keys) :], strict=True):
        slots += range(start, start + size) if key in wanted else ()
        start += size
    if slots and slots[-1] >= spec.observation_dim:
        raise UserError(
            f"dataset.observation_dims: {spec.observation_dim} cuts off a part of {ACHIEVED}, which forms "
            f"the goal: keep at least {slots[-1] + 1}, or name goal.dims"
        )
    return tuple(slots)
