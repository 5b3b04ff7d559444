"""Where episodes went: chosen observation dimensions of every step, kept with the episode's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

Point = tuple[float, ...]


class PathRecorder(gym.Wrapper):
    """Keeps the observation dimensions `dims` of the episode under way, and its goal where it has one.

    Observations are those of `make_environment`, [goal (G), observation (N)]; `dims` counts from the
    observation's first.
    """

    def __init__(self, env: gym.Env, dims: Sequence[int], goal_dim: int = 0) -> None:
        super().__init__(env)
        self._dims, self._goal_dim = goal_dim + np.array(dims, dtype=np.int64), goal_dim
        self.path: list[Point] = []
        """A point for each observation, the first and the last included."""
        self.goal: Point = ()
        """The goal of the last observation."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin an episode, and its path."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.path = []
        self._note(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step, and one point more."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._note(observation)
        return observation, reward, terminated, truncated, info

    def _note(self, observation: np.ndarray) -> None:
        self.path.append(_point(observation[self._dims]))
        self.goal = _point(observation[: self._goal_dim])


def _point(values: np.ndarray) -> Point:
    # Four digits: a picture needs no more, and a result is read as text.
    return tuple(round(float(value), 4) for value in values)
