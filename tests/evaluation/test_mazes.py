"""Point mazes: maps and coordinates as gymnasium-robotics has them, starts, goals, rewards, no litter."""

import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tt_ray.errors import UserError
from tt_ray.evaluation import mazes
from tt_ray.evaluation.environments import FlatEnvironment, make_environment
from tt_ray.evaluation.mazes import FOUR_ROOMS, MEDIUM_MAZE_FAR, U_MAZE_FAR, Grid

NAMES = {"FourRooms-v0": (FOUR_ROOMS, 600), "UMazeFar-v0": (U_MAZE_FAR, 300)} | {
    "MediumMazeFar-v0": (MEDIUM_MAZE_FAR, 600)
}
POSITION, GOAL = slice(0, 2), slice(2, 4)


def maze(name: str) -> FlatEnvironment:
    return make_environment({"id": f"tt_ray.evaluation.mazes:{name}"})


@pytest.mark.parametrize("name", NAMES)
def test_a_maze_is_registered_with_its_map_and_limit(name: str) -> None:
    env = maze(name)
    maze_map, steps = NAMES[name]
    assert env.unwrapped.maze.maze_map == maze_map
    assert env.spec is not None
    assert env.spec.max_episode_steps == steps
    assert not env.unwrapped.continuing_task
    assert env.observation_space.shape == (8,)


@pytest.mark.parametrize("name", NAMES)
def test_cells_lie_where_gymnasium_robotics_puts_them(name: str) -> None:
    reference, grid = maze(name).unwrapped.maze, Grid(NAMES[name][0])
    for cell in grid.free + grid.walls:
        np.testing.assert_array_equal(grid.center(cell), reference.cell_rowcol_to_xy(np.array(cell)))
    for cell in grid.free:
        inside = grid.center(cell) + (0.3, -0.4)
        assert grid.cell_at(inside) == cell == tuple(reference.cell_xy_to_rowcol(inside))


def test_a_place_in_a_wall_belongs_to_the_nearest_free_cell() -> None:
    grid = Grid(U_MAZE_FAR, cell_size=4.0)
    assert grid.cell_at(np.array([-4.0, 1.0])) == (1, 1)
    assert grid.cell_at(np.array([-40.0, -4.0])) == (3, 1)
    np.testing.assert_array_equal(grid.center((1, 3)), [4.0, 4.0])


def test_shortest_ways() -> None:
    grid = Grid(U_MAZE_FAR)
    assert list(grid.distances((3, 1)).items())[::3] == [((3, 1), 0), ((2, 3), 3), ((1, 1), 6)]
    way = [(1, 1)]
    while way[-1] != (3, 1):
        way.append(grid.next_cell(way[-1], (3, 1)))
    assert way == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert grid.next_cell((3, 1), (3, 1)) == (3, 1)


@pytest.mark.parametrize(("name", "start", "goal"), [("UMazeFar-v0", (1, 1), (3, 1))])
def test_a_far_task_is_always_the_same(name: str, start: tuple[int, int], goal: tuple[int, int]) -> None:
    env, grid = maze(name), Grid(NAMES[name][0])
    seen = [env.reset(seed=seed)[0] for seed in range(20)]
    assert {grid.cell_at(first[POSITION]) for first in seen} == {start}
    assert {grid.cell_at(first[GOAL]) for first in seen} == {goal}
    assert len({tuple(first) for first in seen}) == 20


def test_four_rooms_starts_and_ends_anywhere() -> None:
    env, grid = maze("FourRooms-v0"), Grid(FOUR_ROOMS)
    seen = [env.reset(seed=seed)[0] for seed in range(120)]
    for part in (POSITION, GOAL):
        assert len({grid.cell_at(first[part]) for first in seen}) > len(grid.free) / 2


def test_the_goal_pays_one_and_ends_the_episode() -> None:
    env = maze("UMazeFar-v0")
    env.reset(seed=0, options={"reset_cell": np.array([3, 2])})
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, _ = env.step([-1.0, 0.0])
        rewards.append(reward)
        assert not truncated
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_the_time_limit_truncates() -> None:
    env = maze("UMazeFar-v0")
    env.reset(seed=0)
    ends = [env.step([0.0, 0.0])[1:4] for _ in range(300)]
    assert set(ends[:-1]) == {(0.0, False, False)}
    assert ends[-1] == (0.0, False, True)


def test_nothing_is_printed_and_nothing_left_behind(tmp_path: Path) -> None:
    script = "from tt_ray.evaluation.environments import make_environment as make\n" + "".join(
        f"make({{'id': 'tt_ray.evaluation.mazes:{name}'}}).reset(seed=0)\n" for name in NAMES
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        capture_output=True,
        text=True,
        env={"TMPDIR": str(tmp_path), "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_without_gymnasium_robotics_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gymnasium_robotics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(UserError, match=r"^the mazes need .*: pip install 'tt-ray\[mazes\]'$"):
        maze("FourRooms-v0")


def test_it_is_the_environment_that_gymnasium_robotics_has() -> None:
    robotics = mazes.import_robotics()
    gym.register_envs(robotics)
    before = set(Path(tempfile.gettempdir()).glob("ant_maze*"))
    theirs = gym.make("PointMaze_UMaze-v3", maze_map=U_MAZE_FAR, continuing_task=False)
    try:
        ours = gym.make("UMazeFar-v0")
        for env in (ours, theirs):
            env.reset(seed=7)
        for action in np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32):
            mine, reference = ours.step(action), theirs.step(action)
            np.testing.assert_array_equal(mine[0]["observation"], reference[0]["observation"])
            assert mine[1:4] == reference[1:4]
    finally:
        theirs.close()
        for left in set(Path(tempfile.gettempdir()).glob("ant_maze*")) - before:
            left.unlink()
