"""Collecting data: the search's arithmetic, the same data after any interruption, what the metadata tells."""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from minari.dataset.minari_storage import MinariStorage

from tt_ray.config import CollectConfig, to_dict
from tt_ray.data.episodes import best_tenth
from tt_ray.data.minari_sets import load_episodes
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.errors import UserError
from tt_ray.evaluation import collect as module
from tt_ray.evaluation.collect import WorkFolder, collect
from tt_ray.evaluation.environments import make_environment
from tt_ray.evaluation.random_search import (
    LinearPolicy,
    Search,
    advance,
    learning_episode,
    linear_policy_action,
    roll_out,
    start,
    trials,
    undiscounted_return,
)
from tt_ray.fingerprints import fingerprint

ID = "ars/hopper/test-v0"
CONFIG = CollectConfig(
    environment="Hopper-v5", steps=600, directions=3, top_directions=2, max_steps=20, final_episodes=2, seed=5
)


@pytest.fixture(autouse=True)
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private Minari folder, and shards small enough that a short collection has several."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(module, "STEPS_PER_SHARD", 150)
    return tmp_path


def episode(rewards: list[float], observations: np.ndarray) -> RecordedEpisode:
    length = len(rewards)
    return RecordedEpisode(
        observations=observations.astype(np.float32),
        actions=np.zeros((length, 1), np.float32),
        rewards=np.array(rewards, np.float32),
        terminations=np.zeros(length, bool),
        truncations=np.arange(length) == length - 1,
        behavior_policy="made up",
    )


def metadata_of(dataset_id: str, folder: Path) -> dict[str, Any]:
    return MinariStorage.read_raw_metadata(folder / dataset_id / "data")["tt_ray"]["metadata"]


class InterruptionError(Exception):
    """Stands for a crash."""


class CountingMap:
    """The builtin map that counts its calls and is interrupted in the one numbered `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls = 0
        self.stop = stop

    def __call__(self, function: Any, items: Iterable[Any]) -> list[Any]:
        self.calls += 1
        results = list(map(function, items))
        if self.calls == self.stop:
            raise InterruptionError
        return results


def test_an_iteration_moves_along_the_best_directions_scaled_by_their_spread() -> None:
    config = dataclasses.replace(CONFIG, directions=3, top_directions=2, step_size=0.5, noise=0.1)
    search = Search(np.zeros((1, 2)), np.zeros(2), np.zeros(2))
    returns = [[1.0, 2.0], [7.0, 3.0], [4.0, 5.0]]  # by direction: forwards, backwards
    rng = np.random.default_rng(0)
    episodes = [episode([r], rng.normal(size=(2, 2))) for pair in returns for r in pair]
    moved = advance(config, search, episodes)
    shape = search.weights.shape
    # What a trial adds to a policy of zeros, seen through the actions it takes, is noise * direction.
    deltas = [np.random.SeedSequence(config.seed, spawn_key=(0, 0, d)) for d in range(3)]
    directions = [np.random.default_rng(seed).standard_normal(shape) for seed in deltas]
    used = np.array([7.0, 3.0, 4.0, 5.0])
    expected = 0.5 / (2 * used.std()) * ((7 - 3) * directions[1] + (4 - 5) * directions[2])
    np.testing.assert_allclose(moved.weights, expected, rtol=1e-12)


def test_normalisation_is_that_of_all_observations_acted_on() -> None:
    rng = np.random.default_rng(1)
    search = Search(np.zeros((1, 3)), np.zeros(3), np.zeros(3))
    seen = []
    for _ in range(3):
        episodes = []
        for length in (1, 5, 9, 2, 3, 4):
            rows = rng.normal(50.0, 2.0, size=(length + 1, 3)).astype(np.float32)
            rows[:, 2] = 7.0
            episodes.append(episode([0.0] * length, rows))
            seen.append(rows[:-1])
        search = advance(CONFIG, search, episodes)
    everything = np.concatenate(seen).astype(np.float64)
    assert search.steps == len(everything)
    np.testing.assert_allclose(search.policy.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(search.policy.std[:2], everything.std(axis=0)[:2], rtol=1e-9)
    assert search.policy.std[2] == 1.0  # a constant dimension
    np.testing.assert_array_equal(search.weights, 0.0)  # equal returns say nothing


def test_the_alive_bonus_is_taken_off_while_learning_only() -> None:
    config = dataclasses.replace(CONFIG, directions=1, top_directions=1, alive_bonus=1.0)
    search = Search(np.zeros((1, 1)), np.zeros(1), np.zeros(1))
    rows = np.zeros((5, 1))
    standing, moving = episode([1.0] * 4, rows), episode([3.0], rows[:2])
    moved = advance(config, search, [moving, standing])  # 2 against 0 without the bonus, 3 against 4 with it
    opposite = advance(dataclasses.replace(config, alive_bonus=0.0), search, [moving, standing])
    assert np.sign(moved.weights) == -np.sign(opposite.weights) != 0
    plain = [
        learning_episode(c, start(c).policy, trials(c, 0)[0])
        for c in (CONFIG, dataclasses.replace(CONFIG, alive_bonus=1.0))
    ]
    np.testing.assert_array_equal(plain[0].rewards, plain[1].rewards)


def test_linear_policy() -> None:
    weights = np.array([[1.0, 2.0]])
    action = linear_policy_action(weights, np.array([1.0, 1.0]), np.array([2.0, 4.0]), np.array([3.0, 9.0]))
    assert action == [1.0 + 4.0]


def test_the_data_set_is_the_learning_history_and_can_be_lived_again(minari_folder: Path) -> None:
    messages: list[tuple[int, int, str]] = []
    report = collect(ID, CONFIG, progress=lambda *message: messages.append(message))
    data = load_episodes(ID)
    storage = MinariStorage.read(minari_folder / ID / "data")
    recorded = list(storage.get_episodes(range(storage.total_episodes)))
    about = list(storage.get_episode_metadata(range(storage.total_episodes)))
    assert report.episodes == len(data) == len({m["seed"] for m in about})
    assert report.steps == len(data.rewards) == messages[-1][0] >= CONFIG.steps > messages[-2][0]
    assert report.mean_return == pytest.approx(data.returns.mean(), rel=1e-6)
    best = best_tenth(data.returns)
    assert report.best_tenth_return == pytest.approx(best.mean(), rel=1e-6)
    assert about[7]["behavior_policy"] == "ars iteration 1 direction 0 -"
    assert "iteration 1:" in messages[0][2]
    assert np.abs(data.actions).max() <= 1
    env = make_environment({"id": "Hopper-v5"}, max_steps=20)
    for index in (0, len(data) - 1):
        first, _ = env.reset(seed=int(about[index]["seed"]))
        lived = [first] + [env.step(action)[0] for action in recorded[index]["actions"]]
        np.testing.assert_array_equal(np.stack(lived), recorded[index]["observations"])


def test_the_final_policy_can_be_run_again_from_the_metadata(minari_folder: Path) -> None:
    report = collect(ID, CONFIG)
    about = metadata_of(ID, minari_folder)
    assert about["collect"] == to_dict(CONFIG)
    assert about["final_policy_returns"] == list(report.final_policy_returns)
    assert len(about["random_returns"]) == 20
    policy = LinearPolicy(**{key: np.array(value) for key, value in about["final_policy"].items()})
    env = make_environment({"id": "Hopper-v5"}, max_steps=20)
    seed = int(np.random.SeedSequence(CONFIG.seed, spawn_key=(2, 1)).generate_state(1)[0])
    assert undiscounted_return(roll_out(env, policy, seed, "again")) == report.final_policy_returns[1]


@pytest.mark.parametrize("stop", [1, 4, 6, -1])
def test_interrupted_and_continued_is_the_same_data_set(minari_folder: Path, stop: int) -> None:
    whole = CountingMap()
    collect(ID, CONFIG, map=whole)
    expected, told = load_episodes(ID), metadata_of(ID, minari_folder)
    other = "ars/hopper/other-v0"
    with pytest.raises(InterruptionError):
        collect(other, CONFIG, map=CountingMap(stop if stop > 0 else whole.calls))
    rest = CountingMap()
    collect(other, CONFIG, map=rest)
    assert load_episodes(other).spec.fingerprint == expected.spec.fingerprint
    assert metadata_of(other, minari_folder) == told
    assert rest.calls < whole.calls or stop == 1
    assert not (minari_folder / ".collecting").exists()


@pytest.mark.parametrize(
    ("instant", "entry"),
    [("os.fsync", 2), ("os.replace", 2), ("collect.advance", 4), ("collect.write_dataset", 1)],
)
def test_killed_and_continued_is_the_same_data_set(minari_folder: Path, instant: str, entry: int) -> None:
    """A process that is killed when it enters the function `instant` for the nth time."""
    config = f"from tt_ray.config import CollectConfig\nCONFIG = {CONFIG!r}"
    script = f"""
import itertools, os, signal
{config}
from tt_ray.evaluation import collect
calls = itertools.count(1)
before = {instant}
def killed(*args, **kwargs):
    if next(calls) == {entry}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **kwargs)
collect.STEPS_PER_SHARD = 150
{instant} = killed
collect.collect("ars/hopper/other-v0", CONFIG)
"""
    killed = subprocess.run([sys.executable, "-c", script])
    assert killed.returncode == -signal.SIGKILL
    rest = CountingMap()
    collect("ars/hopper/other-v0", CONFIG, map=rest)
    whole = CountingMap()
    collect(ID, CONFIG, map=whole)
    assert load_episodes("ars/hopper/other-v0").spec.fingerprint == load_episodes(ID).spec.fingerprint
    assert rest.calls < whole.calls
    assert [path.name for path in minari_folder.iterdir() if "collecting" in path.name] == []


def test_a_torn_shard_is_done_again(minari_folder: Path) -> None:
    collect(ID, CONFIG)
    other = "ars/hopper/other-v0"
    with pytest.raises(InterruptionError):
        collect(other, CONFIG, map=CountingMap(6))
    shards = sorted(minari_folder.glob(".collecting/*/*.npz"))
    assert len(shards) >= 2
    shards[-1].write_bytes(shards[-1].read_bytes()[:-500])
    collect(other, CONFIG)
    assert load_episodes(other).spec.fingerprint == load_episodes(ID).spec.fingerprint


def test_the_same_settings_reuse_the_data_set_and_others_are_refused(minari_folder: Path) -> None:
    first = collect(ID, CONFIG)
    counting = CountingMap()
    again = collect(ID, CONFIG, map=counting)
    assert (again.reused, first.reused, counting.calls) == (True, False, 0)
    assert dataclasses.replace(again, reused=False, seconds=0) == dataclasses.replace(first, seconds=0)
    changed = dataclasses.replace(CONFIG, seed=6, noise=0.1)
    with pytest.raises(UserError, match=r"noise 0.03, not 0.1; seed 5, not 6.*overwrite"):
        collect(ID, changed, map=counting)
    assert counting.calls == 0
    before = load_episodes(ID).spec.fingerprint
    assert not collect(ID, changed, overwrite=True).reused
    assert load_episodes(ID).spec.fingerprint != before
    assert collect(ID, changed).reused


def test_a_data_set_from_elsewhere_is_not_replaced() -> None:
    space = gym.spaces.Box(-1, 1, (1,))
    rows = [episode([1.0], np.zeros((2, 1)))]
    write_dataset(ID, rows, environment="Hopper-v5", observation_space=space, action_space=space)
    with pytest.raises(UserError, match="exists, made in another way"):
        collect(ID, CONFIG)


def test_a_damaged_data_set_is_named_and_can_be_overwritten(minari_folder: Path) -> None:
    collect(ID, CONFIG)
    (minari_folder / ID / "data" / "metadata.json").write_text('{"total')
    with pytest.raises(UserError, match=r"damaged.*overwrite"):
        collect(ID, CONFIG)
    assert collect(ID, CONFIG, overwrite=True).episodes == len(load_episodes(ID))


@pytest.mark.parametrize(
    ("dataset_id", "environment", "message"),
    [(ID, "Hoper-v5", "Hopper-v5"), (ID, "CartPole-v1", "Discrete"), ("no id", "Hopper-v5", "no id")],
)
def test_what_cannot_be_collected_is_said_before_anything_is_written(
    minari_folder: Path, dataset_id: str, environment: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        collect(dataset_id, dataclasses.replace(CONFIG, environment=environment))
    assert list(minari_folder.iterdir()) == []


def test_one_process_at_a_time(minari_folder: Path) -> None:
    mine = WorkFolder(ID, fingerprint("collect", CONFIG.identity()))
    with mine, pytest.raises(UserError, match="another process"):
        collect(ID, CONFIG)
    assert collect(ID, CONFIG).episodes > 0


def test_nested_observations_keep_their_form(minari_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (minari_folder / "nested_envs.py").write_text(NESTED)
    monkeypatch.chdir(minari_folder)
    report = collect("toy/nested-v0", dataclasses.replace(CONFIG, environment="nested_envs:ToyNested-v0"))
    data = load_episodes("toy/nested-v0")
    assert data.spec.environment["id"] == "nested_envs:ToyNested-v0"
    assert data.spec.observation_keys == ("a", "b/c")
    env = make_environment(data.spec.environment, observation_keys=data.spec.observation_keys)
    assert env.observation_space.shape == (data.spec.observation_dim,)
    np.testing.assert_array_equal(data.observations[:, 1:], np.full((len(data.observations), 2), 4.0))
    assert report.final_policy_return > report.random_return
    assert data.spec.ref_min_score == pytest.approx(report.random_return)
    assert data.spec.ref_max_score == pytest.approx(report.final_policy_return)


NESTED = '''
import gymnasium as gym
import numpy as np

class Nested(gym.Env):
    """Stay at zero: the reward is minus the distance."""
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gym.spaces.Dict({
        "b": gym.spaces.Dict({"c": gym.spaces.Box(-9.0, 9.0, (2, 1))}),
        "a": gym.spaces.Box(-99.0, 99.0, (1,)),
    })

    def observe(self):
        return {"b": {"c": np.full((2, 1), 4.0, np.float32)}, "a": np.array([self.x], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return self.observe(), {}

    def step(self, action):
        self.x += float(action[0])
        return self.observe(), -abs(self.x), False, False, {}

gym.register("ToyNested-v0", entry_point=Nested, max_episode_steps=20)
'''


def test_it_learns_to_balance(minari_folder: Path) -> None:
    config = CollectConfig(
        environment="InvertedPendulum-v5",
        steps=30_000,
        directions=4,
        top_directions=4,
        step_size=0.3,
        noise=0.3,
        max_steps=200,
        final_episodes=5,
        seed=3,
    )
    report = collect("ars/pendulum-v0", config)
    returns = load_episodes("ars/pendulum-v0").returns
    assert report.random_return < 20
    assert report.final_policy_return > 150
    assert returns[: len(returns) // 4].mean() < returns[-(len(returns) // 4) :].mean()
