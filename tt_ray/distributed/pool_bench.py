"""What the pool of evaluation actors costs by itself: many actors, short episodes, nothing to compute."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tt_ray.config import ResourcesConfig
from tt_ray.distributed.cluster import connect, offer
from tt_ray.distributed.rollouts import evaluate_seeds
from tt_ray.errors import UserError
from tt_ray.evaluation.policies import RandomPolicy
from tt_ray.evaluation.rollout import EpisodeResult

_PATIENCE = 900.0  # seconds that an actor waits for the others to have started
# An actor's file has one of these for each of its episodes; the moment is of the host's monotonic clock.
_EPISODE = np.dtype([("started", "f8"), ("torch", "?")])


@dataclass(frozen=True, kw_only=True)
class PoolReport:
    """One measurement of the pool, in seconds and bytes."""

    actors: int
    episodes: int
    step_seconds: float
    start_seconds: float
    """From the call until every actor was ready for its first seed; they begin together then."""
    episodes_per_second: float
    """From then until the last result was on the driver."""
    overhead_per_episode: float
    """Of a slot's wall time, what went neither into its environment nor into its planner."""
    refill_p50: float
    """From a free slot to the start of its next episode: a lease and a reset."""
    refill_p95: float
    refill_max: float
    driver_cpu_per_episode: float
    """From 10 % of the episodes on, so that starting is not in it."""
    lease_cpu_per_episode: float
    driver_rss_10: int
    """At 10 % of the episodes."""
    driver_rss_50: int
    driver_rss_100: int
    lease_rss_10: int
    lease_rss_50: int
    lease_rss_100: int
    actor_rss: int
    """Mean over actors, at the end."""
    fewest_episodes: int
    most_episodes: int
    """Of one actor."""
    each_once: bool
    """Every seed's result came to the driver exactly once."""
    actors_with_torch: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)


def measure_pool(
    actors: int = 64, episodes: int = 10_000, *, step_seconds: float = 0.04, cpus_per_actor: float = 0.01
) -> PoolReport:
    """Run stub episodes of 1 to 39 steps with the pool's own leases and streams, on the Ray of `connect`.

    A step sleeps for `step_seconds`, as an actor waits for its GPU; with 0 the pool runs as fast as it can.
    `UserError` where Ray has a second host (actors report through files), or cannot start every actor.
    """
    if actors < 1 or episodes < max(10, actors):
        raise UserError("measuring the pool needs at least 10 episodes, and one for each actor")
    with connect(ResourcesConfig()), tempfile.TemporaryDirectory(prefix="tt-ray-pool-") as temporary:
        if offer().hosts > 1:
            raise UserError("the pool is measured on one host: unset RAY_ADDRESS, and Ray is started here")
        folder = Path(temporary)
        driver = _Driver(folder, episodes)
        worker = partial(_make_worker, folder, actors, step_seconds)
        called = time.monotonic()
        results = evaluate_seeds(
            range(episodes), worker, actors=actors, cpus_per_actor=cpus_per_actor, on_result=driver
        )
        ended = time.monotonic()
        written = [np.fromfile(file, _EPISODE) for file in folder.iterdir()]
    began = min(float(each["started"].min(initial=ended)) for each in written)
    return PoolReport(
        actors=len(written),
        episodes=episodes,
        step_seconds=step_seconds,
        start_seconds=began - called,
        episodes_per_second=episodes / (ended - began),
        fewest_episodes=min(map(len, written)),
        most_episodes=max(map(len, written)),
        actors_with_torch=sum(bool(each["torch"].any()) for each in written),
        **_slots(results),
        **driver.report(),
    )


def _slots(results: list[EpisodeResult]) -> dict[str, Any]:
    """How the slots' wall time was spent, as fields of the report."""
    empty = np.array([result.idle_seconds for result in results])
    held = np.array([result.slot_seconds for result in results])
    used = np.array([result.environment_seconds + result.planning_seconds for result in results])
    return {
        "overhead_per_episode": float((empty + held - used).mean()),
        "refill_p50": float(np.quantile(empty, 0.5)),
        "refill_p95": float(np.quantile(empty, 0.95)),
        "refill_max": float(empty.max()),
    }


class _Driver:
    """Is told of every result, and looks at the processes on the way."""

    def __init__(self, folder: Path, episodes: int) -> None:
        self._folder = folder
        self._seen = np.zeros(episodes, dtype=np.int64)
        self._marks = {math.ceil(percent * episodes / 100): percent for percent in (10, 50, 100)}
        self._looks: dict[str, list[tuple[int, float]]] = {"driver": [], "lease": []}  # bytes, CPU seconds
        self._count = self._actor_rss = 0

    def __call__(self, result: EpisodeResult) -> None:
        self._seen[result.seed] += 1
        self._count += 1
        if self._count in self._marks:
            self._look()

    def report(self) -> dict[str, Any]:
        """The report's fields that were seen from here."""
        fields: dict[str, Any] = {"actor_rss": self._actor_rss, "each_once": bool((self._seen == 1).all())}
        for name, looks in self._looks.items():
            for percent, (rss, _) in zip(self._marks.values(), looks, strict=True):
                fields[f"{name}_rss_{percent}"] = rss
            fields[f"{name}_cpu_per_episode"] = (looks[-1][1] - looks[0][1]) / (0.9 * len(self._seen))
        return fields

    def _look(self) -> None:
        pids = [int(file.name) for file in self._folder.iterdir()]
        actors = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        self._actor_rss = int(np.mean([actor.memory_info().rss for actor in actors]))
        # One raylet started them all, and Ray gives each process its class's name.
        siblings = actors[0].parent().children()
        leases = next(each for each in siblings if "".join(each.cmdline()).startswith("ray::LeaseQueue"))
        for name, process in (("driver", psutil.Process()), ("lease", leases)):
            self._looks[name].append((process.memory_info().rss, sum(process.cpu_times()[:2])))


def _make_worker(folder: Path, actors: int, step_seconds: float) -> tuple[_StubPolicy, Callable[[], gym.Env]]:
    """An actor's stub planner and environments, as soon as all the actors have started."""
    planner = _StubPolicy(folder / str(os.getpid()), step_seconds)
    given_up = time.monotonic() + _PATIENCE
    while (started := len(os.listdir(folder))) < actors:
        if time.monotonic() > given_up:
            raise UserError(f"only {started} of {actors} evaluation actors could be started")
        time.sleep(0.2)
    return planner, _Countdown


class _StubPolicy(RandomPolicy):
    """Acts for one episode at a time, and writes down when each started."""

    def __init__(self, file: Path, step_seconds: float) -> None:
        super().__init__([-1], [1])
        self._file = file.open("ab", buffering=0)
        self._step_seconds = step_seconds

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        super().add(episode, seed, observation)
        self._file.write(np.array([(time.monotonic(), "torch" in sys.modules)], dtype=_EPISODE).tobytes())

    def act(self, episodes: Collection[int] | None = None) -> dict[int, NDArray[np.float32]]:
        time.sleep(self._step_seconds)
        return super().act(episodes)


class _Countdown(gym.Env):
    """Ends after 1 to 39 steps, as the seed says; 20 on average."""

    observation_space = gym.spaces.Box(0, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict]:
        assert seed is not None
        self._left = 1 + seed * 7919 % 39
        return np.array([self._left], dtype=np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict]:
        self._left -= 1
        return np.array([self._left], dtype=np.float32), 1.0, not self._left, False, {}
