"""Walks through mazes: directed ones reach the goal, undirected ones are everywhere and short."""

import ast
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from minari.dataset.minari_storage import MinariStorage

from tt_ray.config import CollectConfig, to_dict
from tt_ray.data.minari_sets import load_episodes
from tt_ray.errors import UserError
from tt_ray.evaluation import collect as module
from tt_ray.evaluation import waypoints
from tt_ray.evaluation.collect import collect, method_of
from tt_ray.evaluation.environments import make_environment
from tt_ray.evaluation.maze_figures import maze_map_of
from tt_ray.evaluation.mazes import FOUR_ROOMS, MEDIUM_MAZE_FAR, U_MAZE_FAR, Grid
from tt_ray.evaluation.waypoints import Walks, Waypoints, reached, steer, walk

MAZES = "tt_ray.evaluation.mazes"
DIRECTED = CollectConfig(environment=f"{MAZES}:FourRooms-v0", method="waypoints", steps=3000, seed=3)
UNDIRECTED = CollectConfig(
    environment=f"{MAZES}:UMazeFar-v0", method="waypoints", steps=3000, segment_cells=3, max_steps=60
)
ID = "tt/maze-v0"


@pytest.fixture(autouse=True)
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private Minari folder, and shards and rounds small enough that a short collection has several."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(module, "STEPS_PER_SHARD", 150)
    monkeypatch.setattr(module, "RANDOM_EPISODES", 3)
    monkeypatch.setattr(waypoints, "FIRST_ROUND", 2)
    monkeypatch.setattr(waypoints, "ROUND", 4)
    return tmp_path


def metadata_of(dataset_id: str, folder: Path) -> dict[str, Any]:
    return MinariStorage.read_raw_metadata(folder / dataset_id / "data")["tt_ray"]["metadata"]


class InterruptionError(Exception):
    """Stands for a crash."""


class CountingMap:
    """The builtin map that notes its items and is interrupted in the call numbered `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.items: list[list[Any]] = []
        self.stop = stop

    def __call__(self, function: Any, items: Iterable[Any]) -> list[Any]:
        self.items.append(list(items))
        results = list(map(function, self.items[-1]))
        if len(self.items) == self.stop:
            raise InterruptionError
        return results


@pytest.mark.parametrize("name", ["FourRooms-v0", "UMazeFar-v0", "MediumMazeFar-v0"])
def test_directed_walks_reach_the_goal_which_ends_them(name: str) -> None:
    config = dataclasses.replace(DIRECTED, environment=f"{MAZES}:{name}")
    episodes = [walk(config, number) for number in range(30)]
    assert sum(map(reached, episodes)) >= 29
    assert sum(episode.terminations[-1] for episode in episodes) >= 29
    assert {float(episode.rewards.sum()) for episode in episodes if reached(episode)} == {1.0}


def test_undirected_walks_start_all_over_the_maze_and_stay_short() -> None:
    grid = Grid(U_MAZE_FAR)
    episodes = [walk(UNDIRECTED, number) for number in range(150)]
    starts = {grid.cell_at(episode.observations[0, :2]) for episode in episodes}
    assert starts == set(grid.free) - {(3, 1)}
    assert max(len(episode.rewards) for episode in episodes) == 60
    far = grid.distances((3, 1))
    for episode in episodes:
        cells = [grid.cell_at(observation[:2]) for observation in episode.observations]
        way = {grid.distances(cells[0])[cell] for cell in cells}
        assert max(way) <= 3
        assert episode.terminations[-1] == reached(episode) == (episode.rewards.sum() == 1)
        assert episode.truncations[-1] != episode.terminations[-1]
        assert not episode.rewards[:-1].any()
        if far[cells[0]] > 4:  # no segment reaches from here
            assert not reached(episode)
    assert 5 <= sum(map(reached, episodes)) <= 40


def test_an_undirected_walk_goes_where_it_says_and_leaves_the_goal_alone() -> None:
    grid = Grid(FOUR_ROOMS)
    config = dataclasses.replace(DIRECTED, segment_cells=2)
    goals = set()
    for number in range(40):
        episode = walk(config, number)
        start, end = map(ast.literal_eval, episode.behavior_policy.split("cell ")[1].split(" to "))
        assert grid.cell_at(episode.observations[0, :2]) == start
        assert 1 <= grid.distances(start)[end] <= 2
        if episode.truncations[-1]:
            assert np.linalg.norm(episode.observations[-1, :2] - grid.center(end)) <= waypoints.ARRIVED
        goals.add(grid.cell_at(episode.observations[0, 2:4]))
    assert len(goals) > 20


def test_the_controller_sees_the_observation_and_the_map_alone() -> None:
    grid = Grid(MEDIUM_MAZE_FAR)
    observation = np.array([*grid.center((1, 1)), *grid.center((6, 6)), 0, 0, 0.5, 0.0], np.float32)
    force = steer(grid, observation, (6, 6), grid.center((6, 6)))
    np.testing.assert_allclose(
        force,
        10 * (grid.center(grid.next_cell((1, 1), (6, 6))) - observation[:2]) - np.array([0.5, 0.0]),
        rtol=1e-6,
    )
    near = np.array([*grid.center((6, 6)) + 0.2, *grid.center((6, 6)), 0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(steer(grid, near, (6, 6), near[2:4]), [-2.0, -2.0], rtol=1e-5)


def test_actions_are_those_taken_and_an_episode_can_be_lived_again() -> None:
    for config in (DIRECTED, UNDIRECTED):
        episode = walk(config, 4)
        assert np.abs(episode.actions).max() == 1.0
        assert episode.actions.dtype == np.float32
        env = make_environment({"id": config.environment})
        options = None
        if config.segment_cells is not None:
            options = {"reset_cell": np.array(Grid(U_MAZE_FAR).cell_at(episode.observations[0, :2]))}
        lived = [env.reset(seed=episode.seed, options=options)[0]]
        lived += [env.step(action)[0] for action in episode.actions]
        np.testing.assert_array_equal(np.stack(lived), episode.observations)


def test_noise_is_as_wide_as_it_is_set() -> None:
    quiet, usual, loud = (
        walk(dataclasses.replace(DIRECTED, waypoint_noise=noise), 0) for noise in (0.0, 0.5, 2.0)
    )

    def rough(episode: Any) -> float:
        return float(np.diff(episode.actions, axis=0).std())

    assert rough(quiet) < rough(usual) < rough(loud)
    np.testing.assert_array_equal(quiet.observations[0], loud.observations[0])


@pytest.mark.parametrize("config", [DIRECTED, UNDIRECTED], ids=["directed", "undirected"])
def test_the_data_set_says_how_it_was_made(minari_folder: Path, config: CollectConfig) -> None:
    messages: list[tuple[int, int, str]] = []
    report = collect(ID, config, progress=lambda *message: messages.append(message))
    data, about = load_episodes(ID), metadata_of(ID, minari_folder)
    assert report.episodes == len(data)
    assert report.steps == len(data.rewards) == messages[-1][0] >= config.steps > messages[-2][0]
    assert report.steps < config.steps + 1300
    assert report.mean_return == pytest.approx(data.returns.mean())
    assert report.success_share == pytest.approx(data.terminated.sum() / len(data))
    assert (report.final_policy_returns, report.final_policy_return) == ((), None)
    assert about["collect"] == to_dict(config)
    assert "of the last" in messages[0][2]
    assert data.spec.environment["id"] == config.environment
    maze_map = FOUR_ROOMS if config is DIRECTED else U_MAZE_FAR
    assert maze_map_of(data.spec.environment) == maze_map
    env = make_environment(data.spec.environment, observation_keys=data.spec.observation_keys)
    assert env.unwrapped.maze.maze_map == maze_map
    assert env.spec is not None
    assert env.spec.max_episode_steps == (600 if config is DIRECTED else 300)
    high = report.mean_return if config is DIRECTED else 1.0
    low = report.random_return if config is DIRECTED else 0.0
    assert (data.spec.ref_min_score, data.spec.ref_max_score) == (pytest.approx(low), pytest.approx(high))
    assert high > low


@pytest.mark.parametrize("stop", [1, 4, -1])
@pytest.mark.parametrize("config", [DIRECTED, UNDIRECTED], ids=["directed", "undirected"])
def test_interrupted_and_continued_is_the_same_data_set(
    minari_folder: Path, config: CollectConfig, stop: int
) -> None:
    config = dataclasses.replace(config, steps=1500)
    whole = CountingMap()
    collect(ID, config, map=whole)
    assert [item for items in whole.items[:-1] for item in items] == list(range(len(load_episodes(ID))))
    with pytest.raises(InterruptionError):
        collect("tt/other-v0", config, map=CountingMap(stop if stop > 0 else len(whole.items)))
    rest = CountingMap()
    collect("tt/other-v0", config, map=rest)
    assert load_episodes("tt/other-v0").spec.fingerprint == load_episodes(ID).spec.fingerprint
    assert metadata_of("tt/other-v0", minari_folder) == metadata_of(ID, minari_folder)
    assert len(rest.items) < len(whole.items) or stop == 1
    again = CountingMap()
    assert collect(ID, config, map=again).reused
    assert again.items == []


def test_a_shard_with_a_wrong_byte_is_done_again(minari_folder: Path) -> None:
    config = dataclasses.replace(UNDIRECTED, steps=1000)
    collect(ID, config)
    with pytest.raises(InterruptionError):
        collect("tt/other-v0", config, map=CountingMap(5))
    shards = sorted(minari_folder.glob(".collecting/*/*.npz"))
    assert len(shards) >= 2
    content = bytearray(shards[-1].read_bytes())
    content[len(content) // 2] ^= 255  # in the observations, behind what the shard says of the work
    shards[-1].write_bytes(content)
    collect("tt/other-v0", config)
    assert load_episodes("tt/other-v0").spec.fingerprint == load_episodes(ID).spec.fingerprint


def test_the_number_of_episodes_in_a_round_follows_what_is_missing() -> None:
    method = Waypoints(DIRECTED)
    assert list(method.round(Walks())[1]) == [0, 1]
    assert list(method.round(Walks(steps=200, episodes=2))[1]) == [2, 3, 4, 5]
    assert list(method.round(Walks(steps=2850, episodes=20))[1]) == [20, 21]


def test_older_data_sets_keep_their_identity() -> None:
    older = CollectConfig(environment="Hopper-v5")
    assert older.identity() == {
        "environment": "Hopper-v5",
        "steps": 200_000,
        "directions": 8,
        "top_directions": 4,
        "step_size": 0.02,
        "noise": 0.03,
        "action_noise": 0.0,
        "alive_bonus": 0.0,
        "max_steps": None,
        "final_episodes": 20,
        "seed": 0,
    }
    assert UNDIRECTED.identity().items() >= {"method": "waypoints", "segment_cells": 3}.items()
    assert "waypoint_noise" not in UNDIRECTED.identity()


def test_other_settings_are_told_apart(minari_folder: Path) -> None:
    config = dataclasses.replace(UNDIRECTED, steps=100)
    collect(ID, config)
    with pytest.raises(UserError, match=r"segment_cells 3, not 2; waypoint_noise 0.5, not 0.1"):
        collect(ID, dataclasses.replace(config, segment_cells=2, waypoint_noise=0.1))
    with pytest.raises(UserError, match=r"method waypoints, not random_search"):
        collect(ID, CollectConfig(environment=config.environment, steps=100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_cells": 0}, "collect.segment_cells: must be at least 1, not 0"),
        ({"waypoint_noise": -1.0}, "collect.waypoint_noise: must be at least 0, not -1.0"),
        ({"method": "random_search"}, "collect.segment_cells: is a setting of collect.method = waypoints"),
        ({"environment": "Pendulum-v1"}, "waypoints are for point mazes, .*and Pendulum-v1 is none"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        method_of(dataclasses.replace(UNDIRECTED, **settings))
    assert "\n" not in str(error.value)


def test_a_maze_in_parts_is_refused(minari_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (minari_folder / "parts_maze.py").write_text(PARTS)
    monkeypatch.chdir(minari_folder)
    with pytest.raises(UserError, match="Parts-v0: its maze has free cells that cannot be reached"):
        method_of(dataclasses.replace(DIRECTED, environment="parts_maze:Parts-v0"))


PARTS = """
import gymnasium as gym
gym.register(
    "Parts-v0",
    entry_point="tt_ray.evaluation.mazes:point_maze",
    kwargs={"maze_map": [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]},
)
"""
