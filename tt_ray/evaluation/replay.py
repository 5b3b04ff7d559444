"""One episode step by step, with the plans behind it: what is drawn and filmed of it.

An episode that is watched is the one that is evaluated for its seed: it goes through `run_episodes` too, and
watching takes notes only. Shape letters: T steps, N observation, M action, K plans, H horizon, D slots.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult, Policy, run_episodes
from tt_ray.files import whole_file
from tt_ray.planning.engine import PlanningEngine

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """An episode, whole or as far as it came."""

    seed: int
    observations: Floats
    """[T + 1, N], without the goal that a goal model is given."""
    actions: Floats
    """[T, M], as the policy gave them."""
    rewards: NDArray[np.float64]
    """[T]."""
    planned_at: NDArray[np.int64]
    """[K], the step that each plan was made at; none for a policy that does not plan."""
    plans: Floats
    """[K, H, D], each plan's observations, actions, rewards and values; NaN from where it stops."""
    latency: NDArray[np.float64]
    """[T] seconds from an observation to its action."""
    result: EpisodeResult | None
    """None where the episode was broken off."""

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards so far, added up as an evaluation does."""
        return float(sum(self.rewards.tolist()))

    def save(self, path: Path) -> None:
        """Write it as npz, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        facts = {"seed": self.seed, "result": None if self.result is None else self.result.to_json()}
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Inverse of `save`; `UserError` for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                arrays = {name: file[name] for name in _ARRAYS}
            result = facts["result"] and EpisodeResult.from_json(facts["result"])
            return cls(seed=int(facts["seed"]), result=result, **arrays)
        except Exception as error:  # zip, JSON and array errors alike
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: no recording ({reason}); remove it, and it is made again") from error


_ARRAYS = ("observations", "actions", "rewards", "planned_at", "plans", "latency")


class Recorder(gym.Wrapper):
    """An environment that takes notes of the episode under way; `watch` is called after every step."""

    def __init__(self, env: gym.Env, watch: Callable[[Recorder], None] | None = None) -> None:
        super().__init__(env)
        self.goal_dim = int(getattr(env, "goal_dim", 0))
        self._watch = watch
        self._since = 0.0
        self._clear()

    def _clear(self) -> None:
        self.observations: list[Floats] = []
        self.actions: list[Floats] = []
        self.rewards: list[float] = []
        self.plans: list[tuple[int, Floats]] = []
        self.latency: list[float] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin an episode, and its notes."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._clear()
        self._note(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step, and one note more."""
        self.latency.append(time.perf_counter() - self._since)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(np.asarray(action, dtype=np.float32))
        self.rewards.append(float(reward))
        self._note(observation)
        return observation, reward, terminated, truncated, info

    def note_plan(self, episode: int, plan: Floats) -> None:
        """A plan [H, D] for the present step; for `PlanningEngine.on_plan`."""
        self.plans.append((len(self.actions), plan))

    def _note(self, observation: Any) -> None:
        self.observations.append(np.asarray(observation, dtype=np.float32)[self.goal_dim :])
        if self._watch is not None and self.actions:
            self._watch(self)
        self._since = time.perf_counter()

    def recording(self, seed: int, result: EpisodeResult | None) -> Recording:
        """The notes of the last episode, of its whole steps."""
        steps = len(self.observations) - 1  # noted last, should Ctrl-C come in between
        made = [(step, plan) for step, plan in self.plans if step < steps]
        return Recording(
            seed=seed,
            observations=np.stack(self.observations),
            actions=np.stack(self.actions[:steps]),
            rewards=np.array(self.rewards[:steps]),
            planned_at=np.array([step for step, _ in made], dtype=np.int64),
            plans=np.stack([plan for _, plan in made]) if made else np.zeros((0, 0, 0), np.float32),
            latency=np.array(self.latency[:steps]),
            result=result,
        )


def record_episode(
    policy: Policy, env: gym.Env, seed: int, watch: Callable[[Recorder], None] | None = None
) -> Recording:
    """The episode of `policy` for `seed`, watched. Ctrl-C breaks it off: what there is until then.

    Raises `KeyboardInterrupt` where there is not even one step.
    """
    recorder = Recorder(env, watch)
    if isinstance(policy, PlanningEngine):
        policy.on_plan = recorder.note_plan
    seeds = iter([seed])
    # One episode has nothing to overlap; and some environments draw only in the thread that made them.
    episodes = run_episodes(policy, lambda: recorder, lambda: next(seeds, None), limit=1, overlap=False)
    result = None
    try:
        (result,) = episodes
    except KeyboardInterrupt:
        if len(recorder.observations) < 2:
            raise
    finally:
        if isinstance(policy, PlanningEngine):
            policy.on_plan = None
    return recorder.recording(seed, result)
