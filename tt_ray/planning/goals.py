"""The goal of an episode as tokens: what the environment asks for, or what the planner's settings say."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError
from tt_ray.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class Goals:
    """Splits what an environment gives into goal tokens [G] and the observation [N]."""

    def __init__(self, checkpoint: Checkpoint, fixed: tuple[float, ...] | None) -> None:
        """`fixed` is PlannerConfig.goal. `UserError` where it is missing, too much, or of another size."""
        layout, self.asked = checkpoint.model.layout, bool(checkpoint.spec.goal_keys)
        self.dim, self.bins = layout.goal_dim, checkpoint.discretizer
        self.slots = np.array(layout.goal_slots, dtype=np.int64)
        self.fixed = None if fixed is None else np.array(fixed, dtype=np.float32)
        self.low = self.bins.edges[self.slots, 0]
        self.high = self.bins.edges[self.slots, self.bins.bins_in_use[self.slots]]
        self._warned = False
        if self.fixed is not None and len(self.fixed) != self.dim:
            has = f"goals of {self.dim} dimensions" if self.dim else "none, as it was trained without goals"
            raise UserError(f"planner.goal has {len(self.fixed)} dimensions, but the model has {has}")
        if self.dim and self.fixed is None and not self.asked:
            raise UserError(
                f"{checkpoint.spec.environment.get('id', 'the environment')} asks for no goal, and the model "
                f"needs one: give planner.goal, values of observation dimensions {list(layout.goal_slots)}"
            )

    def split(self, observation: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Goal tokens [G] and a copy of the observation [N]: an environment may write all into one array."""
        present = np.array(observation[self.dim :] if self.asked else observation)
        goal = self.fixed if self.fixed is not None else observation[: self.dim]
        return self._encode(goal), present

    def _encode(self, goal: NDArray[np.float32]) -> NDArray[np.int64]:
        goal = goal[: self.dim]
        outside = np.flatnonzero((goal < self.low) | (goal > self.high))
        if len(outside) and not self._warned:
            self._warned, at = True, outside[0]
            logger.warning(
                "the goal %.4g in observation dimension %d is outside the data (%.4g to %.4g), and clipped",
                *(goal[at], self.slots[at], self.low[at], self.high[at]),
            )
        row = np.zeros(self.bins.dims, dtype=np.float32)
        row[self.slots] = goal
        return self.bins.encode(row)[self.slots].astype(np.int64)
