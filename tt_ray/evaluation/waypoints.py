"""Walks through point mazes: a controller that follows the cells of a shortest way.

It sees what the observation gives (position, velocity, goal) and the map, and remembers nothing. Every
episode is a function of the settings and its number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import CollectConfig
from tt_ray.data.minari_writer import RecordedEpisode
from tt_ray.data.observations import observation_keys
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import FlatEnvironment
from tt_ray.evaluation.mazes import Cell, Grid
from tt_ray.evaluation.recording import WALK, action_noise, environment, episode_seed, record

GAIN, DAMPING = 10.0, 1.0  # full force beyond a tenth of a cell; 4 to 5 cells a second
ARRIVED = 0.2  # cells between a segment's end and the middle of its last cell
GOAL_RADIUS = 0.45  # the environment's own, in its units
FIRST_ROUND, ROUND = 8, 64  # episodes: enough to keep many actors busy for some seconds

# Where a point maze's flat observation has its parts, sorted by name.
KEYS = ("achieved_goal", "desired_goal", "observation")
POSITION, TARGET, VELOCITY, SIZE = slice(0, 2), slice(2, 4), slice(6, 8), 8


@dataclass(frozen=True)
class Walks:
    """What was walked so far."""

    steps: int = 0
    episodes: int = 0


class Waypoints:
    """A `Method`: directed walks to the environment's goal, or undirected ones between random cells.

    Raises `UserError` unless the environment is a point maze whose free cells are all connected.
    """

    algorithm = "Shortest way through the cells of the maze, PD control, normal noise"

    def __init__(self, config: CollectConfig) -> None:
        self._config = config
        self._env = environment(config)
        _check(self._env, config.environment)

    @property
    def description(self) -> str:
        """One line for the data set."""
        cells = self._config.segment_cells
        if cells is None:
            return "Walks from the environment's start to its goal."
        return f"Walks between random cells, at most {cells} cells apart, whatever the goal is."

    def start(self) -> Walks:
        """Nothing walked."""
        return Walks()

    def restore(self, saved: Mapping[str, Any]) -> Walks:
        """As it was saved."""
        return Walks(int(saved["steps"]), int(saved["episodes"]))

    def round(self, walks: Walks) -> tuple[Callable[[Any], RecordedEpisode], Sequence[int]]:
        """The next episodes' numbers: as many as are likely to be needed, up to a limit."""
        size = FIRST_ROUND
        if walks.episodes:
            missing = self._config.steps - walks.steps
            size = min(ROUND, math.ceil(missing * walks.episodes / walks.steps))
        return functools.partial(walk, self._config), range(walks.episodes, walks.episodes + size)

    def advance(self, walks: Walks, episodes: Sequence[RecordedEpisode]) -> Walks:
        """One round more."""
        steps = sum(len(episode.rewards) for episode in episodes)
        return Walks(walks.steps + steps, walks.episodes + len(episodes))

    def message(self, walks: Walks, episodes: Sequence[RecordedEpisode]) -> str:
        """Episodes so far, and how many of the latest came to the goal."""
        there = sum(map(reached, episodes))
        return f"{walks.episodes} episodes, {there} of the last {len(episodes)} at the goal"

    def findings(self, walks: Walks, episodes: Iterable[RecordedEpisode], map: Any) -> dict[str, Any]:
        """The share of episodes that came to the goal."""
        return {"success_share": float(np.mean([reached(episode) for episode in episodes]))}

    def references(self, metadata: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
        """Random actions and the directed controller; undirected, 0 and 1 where that is what can be had."""
        if self._config.segment_cells is None:
            return float(np.mean(metadata["random_returns"])), float(metadata["history"]["mean_return"])
        task = self._env.unwrapped
        one_at_most = task.reward_type == "sparse" and not task.continuing_task
        return (0.0, 1.0) if one_at_most else (None, None)


def walk(config: CollectConfig, episode: int) -> RecordedEpisode:
    """Episode number `episode`, directed or undirected as `config` says."""
    env = environment(config)
    grid, seed = _grid(env), episode_seed(config, WALK, episode)
    noise = action_noise(env, seed, config.waypoint_noise)
    if config.segment_cells is None:

        def to_goal(observation: NDArray[np.float32]) -> NDArray[np.float64]:
            goal = observation[TARGET]
            return steer(grid, observation, grid.cell_at(goal), goal) + noise()

        return record(env, to_goal, seed, "waypoints to the goal")
    start, end = _segment(grid, seed, config.segment_cells)
    target = grid.center(end)

    def to_end(observation: NDArray[np.float32]) -> NDArray[np.float64]:
        return steer(grid, observation, end, target) + noise()

    def arrived(observation: NDArray[np.float32]) -> bool:
        return float(np.linalg.norm(observation[POSITION] - target)) <= ARRIVED * grid.cell_size

    name = f"waypoints from cell {start} to {end}"
    return record(env, to_end, seed, name, options={"reset_cell": np.array(start)}, arrived=arrived)


def steer(
    grid: Grid, observation: NDArray[np.float32], end: Cell, target: NDArray[Any]
) -> NDArray[np.float64]:
    """Force [2], not yet clipped, towards the next cell of the way to `end`; there, towards `target` [2]."""
    position = observation[POSITION]
    here = grid.cell_at(position)
    waypoint = target if here == end else grid.center(grid.next_cell(here, end))
    return GAIN * (waypoint - position).astype(np.float64) - DAMPING * observation[VELOCITY]


def reached(episode: RecordedEpisode) -> bool:
    """Whether the goal was reached in an episode of flat observations."""
    after = episode.observations[1:]
    distances = np.linalg.norm(after[:, POSITION] - after[:, TARGET], axis=1)
    return bool((distances <= GOAL_RADIUS).any() or episode.terminations.any())


def _segment(grid: Grid, seed: int, cells: int) -> tuple[Cell, Cell]:
    """A random start, no goal cell unless all are, and a random other cell at most `cells` away."""
    stream = np.random.default_rng([seed, 3])
    starts = [cell for cell in grid.free if cell not in grid.goals] or grid.free
    start = starts[stream.integers(len(starts))]
    near = [cell for cell, distance in grid.distances(start).items() if 0 < distance <= cells]
    return start, near[stream.integers(len(near))]


@functools.lru_cache(maxsize=1)
def _grid(env: FlatEnvironment) -> Grid:
    maze = env.unwrapped.maze
    return Grid(maze.maze_map, maze.maze_size_scaling)


def _check(env: FlatEnvironment, name: str) -> None:
    kind = (observation_keys(env.env.observation_space), env.observation_space.shape, env.action_space.shape)
    if not hasattr(env.unwrapped, "maze") or kind != (KEYS, (SIZE,), (2,)):
        raise UserError(
            f"collect.method: waypoints are for point mazes, such as tt_ray.evaluation.mazes:FourRooms-v0, "
            f"and {name} is none"
        )
    grid = _grid(env)
    if not 1 < len(grid.distances(grid.free[0])) == len(grid.free):
        raise UserError(f"environment {name}: its maze has free cells that cannot be reached from others")
