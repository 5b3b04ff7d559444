"""Closed-loop episodes: a policy that acts for many episodes at once, and environments stepped one by one.

The batching is continuous: the moment an episode ends, its slot goes to the next seed. Where environments are
slow, the live episodes are two halves: while the policy acts for one, the other's environments are stepped.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tt_ray.evaluation.paths import PathRecorder, Point
from tt_ray.plain import build


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
    """Median seconds of the policy's call, over the episode's decisions; all that are in it wait for it."""
    latency_p95: float = field(default=0.0, compare=False)
    slot_seconds: float = field(default=0.0, compare=False)
    """Wall-clock seconds that the episode held its slot."""
    idle_seconds: float = field(default=0.0, compare=False)
    """Wall-clock seconds that its slot stood empty before it."""
    score: float | None = None
    """Normalised return, where the data set has reference scores."""
    path: tuple[Point, ...] = ()
    """Where the episode went, with evaluation.record."""
    goal: Point = ()
    """The goal that it had, with evaluation.record."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`; `episode_return` is called `return` there, and no path is left out."""
        data = {name: value for name, value in asdict(self).items() if name not in _PATH or value}
        return {"seed": data.pop("seed"), "return": data.pop("episode_return"), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EpisodeResult:
        """Inverse of `to_json`; `TypeError` where `data` is no such thing."""
        return build(
            cls, {"episode_return" if key == "return" else key: value for key, value in data.items()}
        )


_PATH = ("path", "goal")


class Policy(Protocol):
    """What acts: a planner or a baseline. Episodes are known by a key that the caller chooses."""

    @property
    def slots(self) -> int:
        """Episodes that it can act for at once."""

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode in a free slot from observation [N]; its random numbers come from `seed` alone."""

    def act(self, episodes: Collection[int] | None = None) -> Mapping[int, NDArray[np.float32]]:
        """An action [M] for each of `episodes`; None: for every live one."""

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """What came of the action [M]: the next observation [N]; not called after an episode's last step."""

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""


@dataclass
class _Live:
    """An episode under way."""

    seed: int
    environment: gym.Env
    started: float
    idle_seconds: float
    total: float = 0.0
    length: int = 0
    environment_seconds: float = 0.0
    planning_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def result(self, terminated: bool, plan_every: int) -> EpisodeResult:
        recorder = self.environment if isinstance(self.environment, PathRecorder) else None
        return EpisodeResult(
            path=tuple(recorder.path) if recorder else (),
            goal=recorder.goal if recorder else (),
            seed=self.seed,
            episode_return=self.total,
            length=self.length,
            terminated=terminated,
            decisions=math.ceil(self.length / plan_every),
            environment_seconds=self.environment_seconds,
            planning_seconds=self.planning_seconds,
            latency_p50=float(np.quantile(self.latencies, 0.5)),
            latency_p95=float(np.quantile(self.latencies, 0.95)),
            slot_seconds=time.perf_counter() - self.started,
            idle_seconds=self.idle_seconds,
        )


@dataclass(frozen=True)
class _Outcome:
    """What one environment step brought."""

    key: int
    action: NDArray[np.float32]
    observation: NDArray[np.float32]
    reward: float
    terminated: bool
    truncated: bool


def run_episodes(
    planner: Policy,
    make_environment: Callable[[], gym.Env],
    next_seed: Callable[[], int | None],
    *,
    limit: int | None = None,
    on_steps: Callable[[int], None] | None = None,
    overlap: bool | None = None,
) -> Iterator[EpisodeResult]:
    """Run an episode for every seed that `next_seed` gives, until it gives None; results as they finish.

    Environments must give flat observations [N] and take Box actions [M]; each is reset with its episode's
    seed and reused for the next. Actions are clipped to the bounds, and the planner observes the clipped one.
    `limit` fills fewer slots than the planner has. `EpisodeResult.decisions` follows the planner's attribute
    `plan_every`, 1 where it has none. `on_steps` is told how many environment steps each round took.
    `overlap` steps one half's environments while the planner acts for the other; None: where the planner's
    attribute `splits` says that it may and stepping takes more than a tenth of the time.
    """
    slots = min(planner.slots, limit or planner.slots)
    with ThreadPoolExecutor(max_workers=1) as stepper:
        runner = _Runner(planner, make_environment, next_seed, slots, on_steps, overlap, stepper)
        try:
            yield from runner.run()
        finally:
            runner.close()


_TRIAL_ROUNDS = 8
_WORTH_OVERLAPPING = 0.1


class _Runner:
    def __init__(
        self,
        planner: Policy,
        make_environment: Callable[[], gym.Env],
        next_seed: Callable[[], int | None],
        slots: int,
        on_steps: Callable[[int], None] | None,
        overlap: bool | None,
        stepper: ThreadPoolExecutor,
    ) -> None:
        self._planner = planner
        self._on_steps = on_steps
        self._make_environment = make_environment
        self._next_seed = next_seed
        self._slots = slots
        self._plan_every = int(getattr(planner, "plan_every", 1))
        self._overlap = overlap if getattr(planner, "splits", False) or overlap else False
        self._stepper = stepper
        self._seconds = {"acting": 0.0, "stepping": 0.0}
        self._keys = itertools.count()
        self._live: dict[int, _Live] = {}
        self._idle: list[gym.Env] = []
        self._emptied = deque([time.perf_counter()] * slots)  # when each free slot became free
        self._more_seeds = True

    def run(self) -> Iterator[EpisodeResult]:
        self._fill()
        stepping: Future[list[_Outcome]] | None = None
        moving: set[int] = set()
        for turn in itertools.count():
            if not self._live:
                return
            if self._overlap is None and turn == _TRIAL_ROUNDS:
                self._overlap = self._seconds["stepping"] > _WORTH_OVERLAPPING * sum(self._seconds.values())
            group = [key for key in self._live if key not in moving]
            if self._overlap and not moving:
                group = group[: max(1, len(group) // 2)]
            actions = self._decide(group)
            if stepping is not None:
                yield from self._absorb(stepping.result())
            if self._overlap:
                stepping, moving = self._stepper.submit(self._step, actions), set(actions)
            else:
                yield from self._absorb(self._step(actions))

    def close(self) -> None:
        """Leave the planner empty, also when the caller stops early, and the environments closed."""
        self._stepper.shutdown()  # a step under way ends first
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
        started = time.perf_counter()
        observation, _ = environment.reset(seed=seed)
        reset = time.perf_counter()
        episode = _Live(seed, environment, reset, reset - self._emptied.popleft())
        key = next(self._keys)
        self._planner.add(key, seed, np.asarray(observation, dtype=np.float32))
        self._live[key] = episode
        episode.environment_seconds += reset - started
        episode.planning_seconds += time.perf_counter() - reset

    def _decide(self, group: list[int]) -> Mapping[int, NDArray[np.float32]]:
        if not group:
            return {}
        started = time.perf_counter()
        # A policy that cannot split is asked as ever: for all.
        actions = self._planner.act(group) if self._overlap else self._planner.act()
        latency = time.perf_counter() - started
        self._seconds["acting"] += latency
        for key in group:
            episode = self._live[key]
            episode.planning_seconds += latency / len(group)
            if episode.length % self._plan_every == 0:
                episode.latencies.append(latency)
        return actions

    def _step(self, actions: Mapping[int, NDArray[np.float32]]) -> list[_Outcome]:
        """One step of each environment; touches nothing else, so that it may run beside the planner."""
        outcomes = []
        for key, action in actions.items():
            episode = self._live[key]
            space = episode.environment.action_space
            assert isinstance(space, gym.spaces.Box)
            action = np.clip(action, space.low, space.high).astype(np.float32)
            started = time.perf_counter()
            observation, reward, terminated, truncated, _ = episode.environment.step(
                action.astype(space.dtype)
            )
            seconds = time.perf_counter() - started
            episode.environment_seconds += seconds
            self._seconds["stepping"] += seconds
            seen = np.asarray(observation, dtype=np.float32)
            outcomes.append(_Outcome(key, action, seen, float(reward), bool(terminated), bool(truncated)))
        return outcomes

    def _absorb(self, outcomes: list[_Outcome]) -> Iterator[EpisodeResult]:
        """Tell the planner what came of its actions; the results of the episodes that have ended."""
        if self._on_steps is not None:
            self._on_steps(len(outcomes))
        for outcome in outcomes:
            episode = self._live[outcome.key]
            episode.total += outcome.reward
            episode.length += 1
            if outcome.terminated or outcome.truncated:
                result = episode.result(outcome.terminated, self._plan_every)
                self._end(outcome.key)
                self._fill()
                yield result
            else:
                started = time.perf_counter()
                self._planner.observe(outcome.key, outcome.action, outcome.reward, outcome.observation)
                episode.planning_seconds += time.perf_counter() - started

    def _end(self, key: int) -> None:
        self._planner.remove(key)
        self._idle.append(self._live.pop(key).environment)
        self._emptied.append(time.perf_counter())
