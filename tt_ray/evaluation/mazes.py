"""Point mazes as Gymnasium environments: importing this module registers them.

They are gymnasium-robotics' PointMaze with maps of our own and a sparse reward, 1 at the goal, which ends the
episode. An experiment names one by its import path, such as `tt_ray.evaluation.mazes:FourRooms-v0`.

A map is a list of rows; 1 is a wall, anything else a free cell: r where episodes start, g where their goal
lies, 0 neither. Without r (or g) starts (or goals) are drawn from all free cells.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
from collections import deque
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError

Cell = tuple[int, int]
"""Row and column of a map."""
MazeMap = Sequence[Sequence[int | str]]

WALL = 1
GOAL = "g"

FOUR_ROOMS: MazeMap = [
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
]
U_MAZE_FAR: MazeMap = [
    [1, 1, 1, 1, 1],
    [1, "r", 0, 0, 1],
    [1, 1, 1, 0, 1],
    [1, "g", 0, 0, 1],
    [1, 1, 1, 1, 1],
]
MEDIUM_MAZE_FAR: MazeMap = [
    [1, 1, 1, 1, 1, 1, 1, 1],
    [1, "r", 0, 1, 1, 0, 0, 1],
    [1, 0, 0, 1, 0, 0, 0, 1],
    [1, 1, 0, 0, 0, 1, 1, 1],
    [1, 0, 0, 1, 0, 0, 0, 1],
    [1, 0, 1, 0, 0, 1, 0, 1],
    [1, 0, 0, 0, 1, 0, "g", 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
]

MEDIUM_MAZE: MazeMap = [[0 if cell == "r" else cell for cell in row] for row in MEDIUM_MAZE_FAR]


class Grid:
    """A map's cells in the environment's coordinates: x to the right, y up, the middle at the origin."""

    def __init__(self, maze_map: MazeMap, cell_size: float = 1.0) -> None:
        """`cell_size`: side of a cell in the environment's units, 1 in point mazes."""
        self.rows, self.columns = len(maze_map), len(maze_map[0])
        self.cell_size = cell_size
        cells = [(row, column) for row in range(self.rows) for column in range(self.columns)]
        self.walls: list[Cell] = [cell for cell in cells if maze_map[cell[0]][cell[1]] == WALL]
        self.free: list[Cell] = [cell for cell in cells if maze_map[cell[0]][cell[1]] != WALL]
        self._free = frozenset(self.free)
        self.goals: list[Cell] = [cell for cell in cells if maze_map[cell[0]][cell[1]] == GOAL]
        self.distances = cache(self._distances)

    def center(self, cell: Cell) -> NDArray[np.float64]:
        """Middle [2] of a cell."""
        row, column = cell
        x, y = column + 0.5 - self.columns / 2, self.rows / 2 - (row + 0.5)
        return np.array([x, y]) * self.cell_size

    def cell_at(self, position: NDArray[Any]) -> Cell:
        """The free cell that holds `position` [2], or else the one nearest to it."""
        x, y = position / self.cell_size
        cell = (math.floor(self.rows / 2 - y), math.floor(x + self.columns / 2))
        if cell in self._free:
            return cell
        return min(self.free, key=lambda free: float(np.linalg.norm(self.center(free) - position)))

    def _distances(self, target: Cell) -> dict[Cell, int]:
        """Steps from cell to neighbouring cell on the shortest way to `target`, nearest cells first."""
        found = {target: 0}
        queue = deque([target])
        while queue:
            cell = queue.popleft()
            for near in _neighbours(cell):
                if near in self._free and near not in found:
                    found[near] = found[cell] + 1
                    queue.append(near)
        return found

    def next_cell(self, cell: Cell, target: Cell) -> Cell:
        """The neighbour of `cell` on a shortest way to `target`; the target itself when there."""
        distances = self.distances(target)
        return min((*_neighbours(cell), cell), key=lambda other: distances.get(other, math.inf))


def _neighbours(cell: Cell) -> tuple[Cell, ...]:
    row, column = cell
    return (row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)


def point_maze(**kwargs: Any) -> gym.Env:
    """gymnasium-robotics' PointMaze (its keyword arguments), without the file that it leaves behind.

    Raises `UserError` where gymnasium-robotics is not installed.
    """
    env = import_robotics("gymnasium_robotics.envs.maze.point_maze").PointMazeEnv(**kwargs)
    remove_leftover(env)
    return env


def remove_leftover(env: gym.Env) -> None:
    """Delete the file in the temporary folder that making a maze of gymnasium-robotics leaves behind."""
    path = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)  # MuJoCo has read it


def import_robotics(module: str = "gymnasium_robotics") -> ModuleType:
    """Import (a module of) gymnasium-robotics without the notice that it prints; `UserError` if not here."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError("the mazes need a further package: pip install 'tt-ray[mazes]'") from error


def _register(name: str, maze_map: MazeMap, steps: int) -> None:
    gym.register(
        id=name,
        entry_point=f"{__name__}:point_maze",
        kwargs={"maze_map": maze_map, "reward_type": "sparse", "continuing_task": False},
        max_episode_steps=steps,
    )


_register("FourRooms-v0", FOUR_ROOMS, 600)
_register("UMazeFar-v0", U_MAZE_FAR, 300)
_register("MediumMazeFar-v0", MEDIUM_MAZE_FAR, 600)
_register("MediumMaze-v0", MEDIUM_MAZE, 600)
