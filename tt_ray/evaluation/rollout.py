"""Closed-loop episodes: a policy that acts for many episodes at once, and environments stepped one by one.

The batching is continuous: the moment an episode ends, its slot goes to the next seed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One finished episode. Two results are equal when the episodes are; measured times are not compared."""

    seed: int
    episode_return: float
    """Undiscounted sum of rewards."""
    length: int
    """Environment steps."""
    terminated: bool
    """The environment ended the episode; False: its time limit did."""
    decisions: int
    """Plans made; one for every `plan_every` steps."""
    environment_seconds: float = field(compare=False)
    planning_seconds: float = field(compare=False)
    """This episode's share: a batched decision's time is divided evenly among the episodes in it."""
    latency_p50: float = field(default=0.0, compare=False)
    """Median seconds from observation to action, over the episode's decisions; all slots wait together."""
    latency_p95: float = field(default=0.0, compare=False)
    score: float | None = None
    """Normalised return, where the data set has reference scores."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`; `episode_return` is called `return` there."""
        data = asdict(self)
        return {"seed": data.pop("seed"), "return": data.pop("episode_return"), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EpisodeResult:
        """Inverse of `to_json`."""
        return cls(**{"episode_return" if key == "return" else key: value for key, value in data.items()})


class Policy(Protocol):
    """What acts: a planner or a baseline. Episodes are known by a key that the caller chooses."""

    @property
    def slots(self) -> int:
        """Episodes that it can act for at once."""

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode in a free slot; its random numbers come from `seed` alone."""

    def act(self) -> Mapping[int, NDArray[np.float32]]:
        """An action [M] for every live episode."""

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """What came of the action; not called after an episode's last step."""

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""


@dataclass
class _Live:
    """An episode under way."""

    seed: int
    environment: gym.Env
    total: float = 0.0
    length: int = 0
    environment_seconds: float = 0.0
    planning_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def result(self, terminated: bool, plan_every: int) -> EpisodeResult:
        return EpisodeResult(
            seed=self.seed,
            episode_return=self.total,
            length=self.length,
            terminated=terminated,
            decisions=math.ceil(self.length / plan_every),
            environment_seconds=self.environment_seconds,
            planning_seconds=self.planning_seconds,
            latency_p50=float(np.quantile(self.latencies, 0.5)),
            latency_p95=float(np.quantile(self.latencies, 0.95)),
        )


def run_episodes(
    planner: Policy,
    make_environment: Callable[[], gym.Env],
    next_seed: Callable[[], int | None],
    *,
    limit: int | None = None,
    on_steps: Callable[[int], None] | None = None,
) -> Iterator[EpisodeResult]:
    """Run an episode for every seed that `next_seed` gives, until it gives None; results as they finish.

    Environments must give flat observations [N] and take Box actions [M]; each is reset with its episode's
    seed and reused for the next. Actions are clipped to the bounds, and the planner observes the clipped one.
    `limit` fills fewer slots than the planner has. `EpisodeResult.decisions` follows the planner's attribute
    `plan_every`, 1 where it has none. `on_steps` is told how many environment steps each round took.
    """
    slots = min(planner.slots, limit or planner.slots)
    runner = _Runner(planner, make_environment, next_seed, slots, on_steps)
    try:
        yield from runner.run()
    finally:
        runner.close()


class _Runner:
    def __init__(
        self,
        planner: Policy,
        make_environment: Callable[[], gym.Env],
        next_seed: Callable[[], int | None],
        slots: int,
        on_steps: Callable[[int], None] | None,
    ) -> None:
        self._planner = planner
        self._on_steps = on_steps
        self._make_environment = make_environment
        self._next_seed = next_seed
        self._slots = slots
        self._plan_every = int(getattr(planner, "plan_every", 1))
        self._keys = itertools.count()
        self._live: dict[int, _Live] = {}
        self._idle: list[gym.Env] = []
        self._more_seeds = True

    def run(self) -> Iterator[EpisodeResult]:
        self._fill()
        while self._live:
            actions = self._decide()
            if self._on_steps is not None:
                self._on_steps(len(self._live))
            for key in list(self._live):
                result = self._step(key, actions[key])
                if result is not None:
                    self._fill()
                    yield result

    def close(self) -> None:
        """Leave the planner empty, also when the caller stops early, and the environments closed."""
        for key in list(self._live):
            self._end(key)
        for environment in self._idle:
            environment.close()

    def _fill(self) -> None:
        while self._more_seeds and len(self._live) < self._slots:
            seed = self._next_seed()
            if seed is None:
                self._more_seeds = False
            else:
                self._start(seed)

    def _start(self, seed: int) -> None:
        environment = self._idle.pop() if self._idle else self._make_environment()
        episode = _Live(seed, environment)
        started = time.perf_counter()
        observation, _ = environment.reset(seed=seed)
        reset = time.perf_counter()
        key = next(self._keys)
        self._planner.add(key, seed, np.asarray(observation, dtype=np.float32))
        self._live[key] = episode
        episode.environment_seconds += reset - started
        episode.planning_seconds += time.perf_counter() - reset

    def _decide(self) -> Mapping[int, NDArray[np.float32]]:
        started = time.perf_counter()
        actions = self._planner.act()
        latency = time.perf_counter() - started
        for episode in self._live.values():
            episode.planning_seconds += latency / len(self._live)
            if episode.length % self._plan_every == 0:
                episode.latencies.append(latency)
        return actions

    def _step(self, key: int, action: NDArray[np.float32]) -> EpisodeResult | None:
        """One environment step; the result when it was the episode's last."""
        episode = self._live[key]
        space = episode.environment.action_space
        assert isinstance(space, gym.spaces.Box)
        action = np.clip(action, space.low, space.high).astype(np.float32)
        started = time.perf_counter()
        observation, reward, terminated, truncated, _ = episode.environment.step(action.astype(space.dtype))
        stepped = time.perf_counter()
        episode.environment_seconds += stepped - started
        episode.total += float(reward)
        episode.length += 1
        if terminated or truncated:
            self._end(key)
            return episode.result(bool(terminated), self._plan_every)
        self._planner.observe(key, action, float(reward), np.asarray(observation, dtype=np.float32))
        episode.planning_seconds += time.perf_counter() - stepped
        return None

    def _end(self, key: int) -> None:
        self._planner.remove(key)
        self._idle.append(self._live.pop(key).environment)


class RandomPolicy:
    """Actions uniform within the bounds: the baseline whose return is normalised score 0."""

    def __init__(self, low: ArrayLike, high: ArrayLike, slots: int = 1) -> None:
        self.slots = slots
        self._low = np.asarray(low, dtype=np.float32)
        self._high = np.asarray(high, dtype=np.float32)
        self._streams: dict[int, np.random.Generator] = {}

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode with a random stream of its own."""
        # The environment draws its start from default_rng(seed): the extra word keeps the two streams apart.
        self._streams[episode] = np.random.default_rng([seed, 1])

    def act(self) -> dict[int, NDArray[np.float32]]:
        """An action [M] for every live episode."""
        return {key: self._draw(stream) for key, stream in self._streams.items()}

    def _draw(self, stream: np.random.Generator) -> NDArray[np.float32]:
        return stream.uniform(self._low, self._high).astype(np.float32)

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Nothing to learn."""

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        del self._streams[episode]


class LinearPolicy:
    """Actions weights @ ((observation - mean) / std), the form that random search learns."""

    def __init__(self, weights: ArrayLike, mean: ArrayLike, std: ArrayLike, slots: int = 1) -> None:
        self.slots = slots
        self._weights = np.asarray(weights, dtype=np.float64)  # [M, N]
        self._mean = np.asarray(mean, dtype=np.float64)  # [N]
        self._std = np.asarray(std, dtype=np.float64)  # [N]
        self._observations: dict[int, NDArray[np.float32]] = {}

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode; the policy is deterministic and leaves `seed` alone."""
        self._observations[episode] = observation

    def act(self) -> dict[int, NDArray[np.float32]]:
        """An action [M] for every live episode."""
        # One product per episode: a batched one would round differently with the number of neighbours.
        return {key: self._apply(observation) for key, observation in self._observations.items()}

    def _apply(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        return (self._weights @ ((observation - self._mean) / self._std)).astype(np.float32)

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Remember where the episode is now."""
        self._observations[episode] = next_observation

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        del self._observations[episode]
