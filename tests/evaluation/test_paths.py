from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tt_ray.evaluation.paths import PathRecorder
from tt_ray.evaluation.policies import RandomPolicy
from tt_ray.evaluation.rollout import EpisodeResult, run_episodes


class Counting(gym.Env):
    """Observations [goal, steps, 10 * steps], the goal being the seed; ends after three steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _seen(self) -> np.ndarray:
        return np.array([self.goal, self.steps, 10 * self.steps], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.goal, self.steps = seed, 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._seen(), 1.0, self.steps == 3, False, {}


def play(record: tuple[int, ...] | None) -> list[EpisodeResult]:
    def make() -> gym.Env:
        return Counting() if record is None else PathRecorder(Counting(), record, goal_dim=1)

    seeds = iter([5, 6])
    results = run_episodes(RandomPolicy([-1.0], [1.0], slots=1), make, lambda: next(seeds, None))
    return sorted(results, key=lambda result: result.seed)


def test_every_observation_is_kept_the_last_one_too() -> None:
    first, second = play((1, 0))
    assert first.path == ((0.0, 0.0), (10.0, 1.0), (20.0, 2.0), (30.0, 3.0))
    assert second.path == first.path
    assert (first.goal, second.goal) == ((5.0,), (6.0,))


def test_a_path_survives_being_written_down() -> None:
    (first, _) = play((0,))
    assert EpisodeResult.from_json(first.to_json()) == first


@pytest.mark.parametrize("name", ["path", "goal"])
def test_without_recording_nothing_is_kept(name: str) -> None:
    (first, _) = play(None)
    assert getattr(first, name) == ()
    assert name not in first.to_json()
    assert EpisodeResult.from_json(first.to_json()) == first
