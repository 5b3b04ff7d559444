import json
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tt_ray.evaluation.policies import LinearPolicy, RandomPolicy
from tt_ray.evaluation.rollout import EpisodeResult, run_episodes


class Walk(gym.Env):
    """Lasts 1 + seed % 5 steps; odd seeds terminate, even ones are cut; the reward is the first action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    made: list["Walk"]

    def __init__(self) -> None:
        self.over, self.closed, self.seeds = True, False, []
        type(self).made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        assert seed is not None
        self.seeds.append(seed)
        self.seed, self.time, self.over = seed, 0, False
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert not self.over, "stepped after the end"
        assert self.action_space.contains(action)
        self.time += 1
        self.over = self.time > self.seed % 5
        odd = self.seed % 2 == 1
        return self._observation(), float(action[0]), self.over and odd, self.over and not odd, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.seed, self.time], dtype=np.float32)

    def close(self) -> None:
        self.closed = True


class Recorder:
    """Acts with 10 x (seed + time), clipped by the rollout, and checks that it is called as agreed."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.live: dict[int, np.ndarray] = {}
        self.most, self.decisions = [], 0
        self.observed: list[tuple[np.ndarray, float]] = []

    def add(self, episode: int, seed: int, observation: np.ndarray) -> None:
        assert episode not in self.live
        assert len(self.live) < self.slots
        assert observation[0] == seed
        self.live[episode] = observation

    def act(self, episodes: Collection[int] | None = None) -> dict[int, np.ndarray]:
        self.decisions += 1
        self.most.append(len(self.live))
        chosen = self.live if episodes is None else episodes
        return {key: np.full(3, 10 * self.live[key].sum(), dtype=np.float32) for key in chosen}

    def observe(self, episode: int, action: np.ndarray, reward: float, next_observation: np.ndarray) -> None:
        self.observed.append((action, reward))
        self.live[episode] = next_observation

    def remove(self, episode: int) -> None:
        del self.live[episode]


@pytest.fixture(autouse=True)
def no_environments_yet() -> None:
    Walk.made = []


def queue(seeds: Iterable[int]) -> Callable[[], int | None]:
    waiting = iter(list(seeds))
    return lambda: next(waiting, None)


def by_seed(results: Iterable[EpisodeResult]) -> dict[int, EpisodeResult]:
    results = list(results)
    assert len({result.seed for result in results}) == len(results)
    return {result.seed: result for result in results}


def test_every_seed_is_run_once_and_told_apart():
    results = by_seed(run_episodes(Recorder(3), Walk, queue(range(20))))
    assert sorted(results) == list(range(20))
    for seed, result in results.items():
        assert result.length == result.decisions == 1 + seed % 5
        assert result.terminated == (seed % 2 == 1)
        assert result.environment_seconds > 0
        assert result.planning_seconds > 0


def test_actions_are_clipped_and_the_clipped_one_is_observed():
    planner = Recorder(1)
    (result,) = run_episodes(planner, Walk, queue([4]))
    assert result.episode_return == 5.0  # five steps of an action of 40 or more, clipped to 1
    assert [reward for _, reward in planner.observed] == [1.0] * 4  # not called for the last step
    assert all((action == 1).all() for action, _ in planner.observed)


def test_slots_are_refilled_at_once_and_environments_reused():
    planner = Recorder(4)
    results = list(run_episodes(planner, Walk, queue(range(40))))
    steps = sum(result.length for result in results)
    # every slot is busy until the queue is empty: only the tail's decisions are for fewer than four
    assert planner.most[: steps // 4 - 4] == [4] * (steps // 4 - 4)
    assert planner.decisions <= steps // 4 + 5
    assert len(Walk.made) == 4
    assert sorted(seed for environment in Walk.made for seed in environment.seeds) == list(range(40))


def test_results_are_given_as_they_end():
    asked = []

    def next_seed() -> int | None:
        asked.append(len(asked))
        return [4, 0, 1, 2][asked[-1]] if asked[-1] < 4 else None

    rollout = run_episodes(Recorder(2), Walk, next_seed)
    assert next(rollout).seed == 0  # one step long, begun second
    assert len(asked) == 3  # its slot has been filled already, and nothing asked beyond that
    assert [result.seed for result in rollout] == [1, 4, 2]


def test_an_empty_queue_makes_no_environment():
    assert list(run_episodes(Recorder(2), Walk, queue([]))) == []
    assert Walk.made == []


class Splitting(Recorder):
    """Can act for some of the episodes; notes for whom, and that each is asked for in turn."""

    splits = True

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.groups: list[set[int]] = []
        self.moving: set[int] = set()

    def act(self, episodes: Collection[int] | None = None) -> dict[int, np.ndarray]:
        group = set(self.live if episodes is None else episodes)
        assert not group & self.moving, "asked for an action while its environment moves"
        self.groups.append(group)
        self.moving |= group
        return super().act(episodes)

    def observe(self, episode: int, action: np.ndarray, reward: float, next_observation: np.ndarray) -> None:
        self.moving.discard(episode)
        super().observe(episode, action, reward, next_observation)

    def remove(self, episode: int) -> None:
        self.moving.discard(episode)
        super().remove(episode)


class SlowWalk(Walk):
    """Its steps take time, and note on which thread they ran."""

    threads: set[str]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        type(self).threads.add(threading.current_thread().name)
        time.sleep(0.002)
        return super().step(action)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_overlapping_halves_give_the_same_episodes(slots: int):
    expected = by_seed(run_episodes(Splitting(slots), Walk, queue(range(20)), overlap=False))
    planner = Splitting(slots)
    assert by_seed(run_episodes(planner, Walk, queue(range(20)), overlap=True)) == expected
    whole = max(len(group) for group in planner.groups)
    assert whole <= max(1, slots - slots // 2)


def test_halves_overlap_where_stepping_is_slow():
    SlowWalk.threads = set()
    planner = Splitting(4)
    results = by_seed(run_episodes(planner, SlowWalk, queue(range(40))))
    assert sorted(results) == list(range(40))
    assert len(SlowWalk.threads) == 2  # on the caller's for a few rounds, then beside it
    assert {len(group) for group in planner.groups[-20:-5]} <= {1, 2, 3}


def test_a_policy_that_cannot_split_is_asked_for_all():
    SlowWalk.threads = set()
    assert len(list(run_episodes(Recorder(4), SlowWalk, queue(range(40))))) == 40
    assert SlowWalk.threads == {threading.current_thread().name}


def test_an_error_beside_the_planner_comes_through():
    class Breaks(Walk):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            if self.seed == 7:
                raise RuntimeError("the simulator broke")
            return super().step(action)

    with pytest.raises(RuntimeError, match="the simulator broke"):
        list(run_episodes(Splitting(4), Breaks, queue(range(20)), overlap=True))
    assert all(environment.closed for environment in Walk.made)


def test_idle_time_is_that_of_the_empty_slot():
    def slow_queue() -> int | None:
        time.sleep(0.02)
        return next(waiting, None)

    waiting = iter(range(6))
    results = list(run_episodes(Recorder(2), Walk, slow_queue))
    assert all(result.idle_seconds >= 0.02 for result in results)
    assert all(result.slot_seconds > 0 for result in results)
    quick = list(run_episodes(Recorder(2), Walk, queue(range(6))))
    assert sum(result.idle_seconds for result in quick) < sum(result.idle_seconds for result in results) / 2


def test_limit_leaves_slots_empty():
    planner = Recorder(4)
    assert len(list(run_episodes(planner, Walk, queue(range(10)), limit=2))) == 10
    assert max(planner.most) == 2


def test_plan_every_gives_the_decisions():
    planner = Recorder(2)
    planner.plan_every = 2  # type: ignore[attr-defined]
    results = by_seed(run_episodes(planner, Walk, queue(range(5))))
    assert [results[seed].decisions for seed in range(5)] == [1, 1, 2, 2, 3]


def test_stopping_early_closes_environments_and_empties_the_planner():
    planner = Recorder(3)
    rollout = run_episodes(planner, Walk, queue(range(10)))
    next(rollout)
    rollout.close()
    assert planner.live == {}
    assert all(environment.closed for environment in Walk.made)


def test_an_error_in_the_environment_comes_through_and_closes_it():
    class Broken(Walk):
        def step(self, action: np.ndarray) -> Any:
            raise RuntimeError("a wheel came off")

    planner = Recorder(2)
    with pytest.raises(RuntimeError, match="a wheel came off"):
        list(run_episodes(planner, Broken, queue([1, 2])))
    assert planner.live == {}
    assert all(environment.closed for environment in Walk.made)


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=30)


def test_random_policy_does_not_depend_on_neighbours_or_order():
    def run(slots: int, seeds: list[int]) -> dict[int, EpisodeResult]:
        return by_seed(run_episodes(RandomPolicy([-2], [2], slots), pendulum, queue(seeds)))

    alone = run(1, [0, 1, 2, 3, 4])
    assert run(3, [4, 2, 0, 1, 3]) == alone
    assert len({result.episode_return for result in alone.values()}) == 5


def test_random_actions_are_uniform_and_not_the_environments_own_numbers():
    policy = RandomPolicy([-1, 0], [1, 10])
    policy.add(0, 7, np.zeros(2, np.float32))
    actions = np.array([policy.act()[0] for _ in range(4000)])
    assert actions.min(axis=0) == pytest.approx([-1, 0], abs=0.01)
    assert actions.max(axis=0) == pytest.approx([1, 10], abs=0.01)
    assert actions.mean(axis=0) == pytest.approx([0, 5], abs=0.2)
    assert np.abs(np.corrcoef(actions.T)[0, 1]) < 0.05
    reset_numbers = np.random.default_rng(7).uniform(size=2)
    assert not np.allclose((actions[0] - [-1, 0]) / [2, 10], reset_numbers)


def test_linear_policy_applies_its_weights_to_the_normalised_observation():
    policy = LinearPolicy(weights=[[1.0, 2.0]], mean=[1.0, 0.0], std=[2.0, 4.0], slots=2)
    policy.add(5, 0, np.array([3.0, 4.0], np.float32))
    policy.add(6, 0, np.array([1.0, 0.0], np.float32))
    actions = policy.act()
    np.testing.assert_allclose(actions[5], [3.0])
    np.testing.assert_allclose(actions[6], [0.0])
    policy.observe(6, actions[6], 0.0, np.array([5.0, 0.0], np.float32))
    policy.remove(5)
    assert {key: action.tolist() for key, action in policy.act().items()} == {6: [2.0]}


def test_linear_policy_is_the_same_alone_and_in_company():
    def run(slots: int) -> dict[int, EpisodeResult]:
        policy = LinearPolicy([[-1.3, -0.7, -0.4]], [0.1, 0.2, 0.3], [1.1, 0.9, 2.0], slots)
        return by_seed(run_episodes(policy, pendulum, queue(range(6))))

    assert run(1) == run(4)


def test_an_episode_survives_json():
    (result,) = run_episodes(RandomPolicy([-2], [2]), pendulum, queue([3]))
    data = json.loads(json.dumps(result.to_json()))
    assert data["return"] == result.episode_return
    assert "episode_return" not in data
    back = EpisodeResult.from_json(data)
    assert back == result
    assert back.planning_seconds == result.planning_seconds
