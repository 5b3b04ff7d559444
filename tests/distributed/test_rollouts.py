import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import ray

from tt_ray.distributed import rollouts
from tt_ray.distributed.leases import LeaseQueue
from tt_ray.distributed.rollouts import WorkerFactory, evaluate_seeds
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult, run_episodes

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import test modules


def nothing(seed: int) -> None:
    """What happens at an episode's start, by default."""


class Walk(gym.Env):
    """Lasts 2 + seed % 7 steps; the reward depends on the action and on the episode's own random numbers."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, step_seconds: float, at_start: Callable[[int], None]) -> None:
        self.step_seconds, self.at_start = step_seconds, at_start

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        assert seed is not None
        self.at_start(seed)
        self.seed, self.time = seed, 0
        return np.array([seed, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self.step_seconds)
        self.time += 1
        reward = float(action[0]) + self.np_random.normal()
        return np.array([self.seed, self.time], np.float32), reward, False, self.time > 1 + self.seed % 7, {}


class SeedAndTime:
    """Acts with sin(seed + time)."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.live: dict[int, np.ndarray] = {}

    def add(self, episode: int, seed: int, observation: np.ndarray) -> None:
        self.live[episode] = observation

    def act(self) -> dict[int, np.ndarray]:
        return {key: np.sin(x.sum(keepdims=True)) for key, x in self.live.items()}

    def observe(self, episode: int, action: np.ndarray, reward: float, next_observation: np.ndarray) -> None:
        self.live[episode] = next_observation

    def remove(self, episode: int) -> None:
        del self.live[episode]


@dataclass
class Factory:
    """Makes workers; each writes its process id as a file's name in `folder`."""

    folder: Path
    slots: int = 3
    step_seconds: float = 0.0
    at_start: Callable[[int], None] = nothing

    def __call__(self) -> tuple[SeedAndTime, Callable[[], gym.Env]]:
        (self.folder / str(os.getpid())).touch()
        return SeedAndTime(self.slots), lambda: Walk(self.step_seconds, self.at_start)

    def pids(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]


def here(factory: WorkerFactory, seeds: range) -> list[EpisodeResult]:
    """The same episodes without Ray."""
    waiting = iter(seeds)
    results = run_episodes(*factory(), lambda: next(waiting, None))
    return sorted(results, key=lambda result: result.seed)


@dataclass
class Arrivals:
    """Counts results on the driver, and kills actors when the `after`-th arrives."""

    pids: Callable[[], list[int]]
    after: int = 0

    def __post_init__(self) -> None:
        self.seen: Counter[int] = Counter()
        self.killed: list[int] = []

    def __call__(self, result: EpisodeResult) -> None:
        self.seen[result.seed] += 1
        if self.after and self.seen.total() == self.after:
            self.killed = [pid for pid in self.pids() if pid != os.getpid()]
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


def test_leases_are_given_once_and_taken_back():
    leases = LeaseQueue([5, 6, 7])
    assert [leases.take(0), leases.take(1), leases.take(0), leases.take(0)] == [5, 6, 7, None]
    assert leases.revoke(0) == [5, 7]
    leases.put([7])
    assert leases.take(0) is None  # declared dead: whatever is left of it gets nothing more
    assert leases.waiting() == [7]
    assert leases.take(1) == 7
    assert leases.waiting() == []
    assert leases.revoke(2) == []


def test_only_actors_that_have_not_begun_are_let_go():
    leases = LeaseQueue([5, 6, 7])
    assert leases.take(0) == 5
    assert leases.not_begun([3, 0, 2, 1]) == [3, 2, 1]
    assert leases.let_go([3, 0, 2], 2, spare=2) == []
    assert leases.let_go([3, 0, 2, 1], 2, spare=1) == [3, 2]
    assert [leases.take(3), leases.take(2)] == [None, None]
    assert [leases.take(1), leases.take(0)] == [6, 7]


def test_a_seed_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        evaluate_seeds([1, 2, 1], Factory(tmp_path), actors=1)


def test_no_seeds_need_no_actors(tmp_path):
    assert evaluate_seeds([], Factory(tmp_path), actors=1) == []


@pytest.mark.ray
def test_results_do_not_depend_on_the_number_of_actors(ray_local, tmp_path):
    seeds = range(100, 140)
    factory = Factory(tmp_path, step_seconds=0.002)
    expected = here(factory, seeds)
    for actors in (1, 2, 3):  # the third has no CPU to run on, and is not waited for
        arrivals = Arrivals(factory.pids)
        assert evaluate_seeds(seeds, factory, actors=actors, on_result=arrivals) == expected
        assert arrivals.seen == Counter(seeds)


@pytest.mark.ray
def test_few_episodes_are_spread_over_the_actors(ray_local, tmp_path):
    def wait_for_both(seed: int) -> None:
        while seed >= 2 and sum(path.name.isdigit() for path in tmp_path.iterdir()) < 2:
            time.sleep(0.01)

    factory = Factory(tmp_path, slots=8, step_seconds=0.05, at_start=wait_for_both)
    assert len(evaluate_seeds(range(4), factory, actors=2)) == 4
    assert len(factory.pids()) == 2


@pytest.mark.ray
def test_results_are_in_the_order_of_the_seeds(ray_local, tmp_path):
    seeds = [9, 2, 30, 4]
    assert [result.seed for result in evaluate_seeds(seeds, Factory(tmp_path), actors=2)] == seeds


@pytest.mark.ray
def test_steps_are_told_also_while_results_stream_in(ray_local, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "_POLL", 0.3)  # on the driver; a result comes every 0.05 s
    told: list[int] = []
    evaluate_seeds(range(70), Factory(tmp_path, step_seconds=0.02), actors=2, on_steps=told.append)
    assert told
    assert 0 < told[0] <= 350
    assert told == sorted(set(told))


@pytest.mark.ray
@pytest.mark.parametrize("victims", [1, 2])
def test_killed_actors_change_nothing(ray_local, tmp_path, victims):
    seeds = range(60)
    factory = Factory(tmp_path, step_seconds=0.01)
    arrivals = Arrivals(lambda: factory.pids()[:victims], after=10)
    results = evaluate_seeds(seeds, factory, actors=2, on_result=arrivals)
    assert len(arrivals.killed) == victims
    assert len(factory.pids()) == 2 + victims  # each was replaced
    assert arrivals.seen == Counter(seeds)
    assert results == here(factory, seeds)


@pytest.mark.ray
def test_a_killed_queue_changes_nothing(ray_local, tmp_path):
    def queues() -> list[int]:
        processes = psutil.Process().children(recursive=True)
        return [process.pid for process in processes if process.cmdline()[:1] == ["ray::LeaseQueue"]]

    factory = Factory(tmp_path, step_seconds=0.01)
    arrivals = Arrivals(queues, after=5)
    results = evaluate_seeds(range(30), factory, actors=2, on_result=arrivals)
    assert len(arrivals.killed) == 1
    assert arrivals.seen == Counter(range(30))
    assert results == here(factory, range(30))


@pytest.mark.ray
def test_an_actor_killed_when_the_queue_is_empty_leaves_its_episodes_to_the_others(ray_local, tmp_path):
    factory = Factory(tmp_path, slots=2, step_seconds=0.05)
    arrivals = Arrivals(lambda: factory.pids()[:1], after=1)
    results = evaluate_seeds(range(4), factory, actors=2, on_result=arrivals)
    assert arrivals.killed
    assert arrivals.seen == Counter(range(4))
    assert results == here(factory, range(4))


@pytest.mark.ray
def test_what_a_dead_actor_held_waits_for_no_running_episode(ray_local, tmp_path):
    over = tmp_path / "over"

    def at_start(seed: int) -> None:
        (tmp_path / f"seed {seed} {os.getpid()}").touch()
        patience = time.monotonic() + 60
        while seed == 0 and not over.exists() and time.monotonic() < patience:
            time.sleep(0.05)

    arrived: list[int] = []

    def on_result(result: EpisodeResult) -> None:
        arrived.append(result.seed)
        if len(arrived) == 3:  # one actor would do for what is missing, and has begun what takes long
            os.kill(int(next(tmp_path.glob("seed 13 *")).name.split()[-1]), signal.SIGKILL)
        if result.seed == 13:
            over.touch()

    factory = Factory(tmp_path, slots=2, step_seconds=0.3, at_start=at_start)
    evaluate_seeds([0, 1, 2, 3, 13], factory, actors=2, slots=2, on_result=on_result)
    assert arrived == [1, 2, 3, 13, 0]
    assert len(list(tmp_path.glob("seed *"))) == 6  # 13 again, and none twice at once


@pytest.mark.ray
def test_an_episode_that_kills_its_actor_once_is_run_again(ray_local, tmp_path):
    def die_once(seed: int) -> None:
        mark = tmp_path / f"died-{seed}"
        if seed in (3, 8) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    results = evaluate_seeds(range(12), Factory(tmp_path, at_start=die_once), actors=2)
    assert results == here(Factory(tmp_path), range(12))


@pytest.mark.ray
def test_an_episode_that_always_kills_its_actor_is_named(ray_local, tmp_path):
    def die(seed: int) -> None:
        if seed == 7:
            (tmp_path / f"try-{time.monotonic_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    # 6 may be named too: it ends in the same actor a moment before, and its result may not have left in time
    with pytest.raises(UserError, match=r"^episodes with seeds (6, )?7: the actors .* died, 2 times each"):
        evaluate_seeds(range(10), Factory(tmp_path, slots=1, at_start=die), actors=2, max_tries=2)
    assert len(list(tmp_path.glob("try-*"))) == 2


@pytest.mark.ray
def test_actors_that_die_at_once_are_given_up(ray_local):
    def make_worker() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="die before they start an episode"):
        evaluate_seeds(range(3), make_worker, actors=1, max_tries=2)


@pytest.mark.ray
def test_an_error_in_the_environment_stops_at_once_with_one_line(ray_local, tmp_path):
    def fail(seed: int) -> None:
        if seed == 2:
            (tmp_path / f"try-{time.monotonic_ns()}").touch()
            raise ValueError("no such joint\nsecond line")

    with pytest.raises(UserError) as caught:
        evaluate_seeds(range(6), Factory(tmp_path, at_start=fail), actors=1)
    assert str(caught.value) == "evaluation stopped by ValueError: no such joint"
    assert "second line" in str(caught.value.__cause__)  # the whole story is kept for a log
    assert len(list(tmp_path.glob("try-*"))) == 1


@pytest.mark.ray
def test_a_user_error_comes_through_as_it_is(ray_local):
    def make_worker() -> Any:
        raise UserError("checkpoint is damaged: model.safetensors")

    with pytest.raises(UserError, match=r"^checkpoint is damaged: model.safetensors$"):
        evaluate_seeds(range(2), make_worker, actors=1)


@pytest.mark.ray
def test_an_error_on_the_driver_ends_the_actors(ray_local, tmp_path):
    factory = Factory(tmp_path, step_seconds=0.01)

    def disk_full(result: EpisodeResult) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        evaluate_seeds(range(50), factory, actors=1, on_result=disk_full)
    (pid,) = factory.pids()
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    assert not psutil.pid_exists(pid) or gone


@pytest.mark.ray
@pytest.mark.slow
def test_memory_stays_flat_over_many_episodes(ray_local, tmp_path):
    factory = Factory(tmp_path, slots=8)
    sizes: list[list[int]] = []  # driver, actors

    def measure(result: EpisodeResult) -> None:
        if result.seed % 500 == 0 and result.seed >= 1000:
            sizes.append([psutil.Process(pid).memory_info().rss for pid in [os.getpid(), *factory.pids()]])

    assert len(evaluate_seeds(range(10_000), factory, actors=2, on_result=measure)) == 10_000
    growth = np.array(sizes[-1]) - np.array(sizes[0])
    assert growth.max() < 40_000_000, growth  # 9,000 results are under 5 MB
