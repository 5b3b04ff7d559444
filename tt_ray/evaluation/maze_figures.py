"""Paths over the walls of a maze, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import COLORS, RED, SMALL, open_figure
from tt_ray.evaluation.mazes import Grid, MazeMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAILED = RED
WALL_COLOR = "#4D4D4D"
CELL, SMALLEST, WIDE = 0.55, 3.8, 5.5  # inches: of a cell, the smallest map, one line of legend


def maze_map_of(environment_spec: Mapping[str, Any]) -> list[list[int | str]] | None:
    """The map of a `DataSpec.environment`; None where it is no maze, or does not say."""
    found = (environment_spec.get("kwargs") or {}).get("maze_map")
    return None if found is None else [list(row) for row in found]


def paths_figure(
    maze_map: MazeMap,
    paths: Sequence[NDArray[Any]],
    goals: Sequence[NDArray[Any]],
    reached: Sequence[bool],
    file: Path,
    *,
    cell_size: float = 1.0,
) -> None:
    """Draw E paths from their start (dot) to their goal (star) over the walls; PNG or SVG, by the suffix.

    `paths`: xy positions [T, 2] of each episode in the environment's coordinates; `goals`: E times xy [2];
    `reached`: whether the path came to its goal. Those that did not are dashed, with a cross where they end.
    `cell_size`: side of a cell, 1 in point mazes. Raises `UserError` where the lengths do not fit.
    """
    if not len(paths) == len(goals) == len(reached) > 0:
        lengths = f"{len(paths)} paths, {len(goals)} goals and {len(reached)} outcomes"
        raise UserError(f"figure {file.name}: {lengths} do not fit together: each path needs one of each")
    grid = Grid(maze_map, cell_size)
    cell = max(CELL, SMALLEST / max(grid.columns, grid.rows))
    with open_figure(file, cell * grid.columns, cell * grid.rows + 0.8) as figure:
        axes = figure.add_subplot()
        _draw_walls(axes, grid)
        colors = _colors(len(paths))
        for path, goal, there, color in zip(paths, goals, reached, colors, strict=True):
            _draw_path(axes, np.asarray(path), np.asarray(goal), color if there else FAILED, there)
        axes.set_title(f"{sum(map(bool, reached))} of {len(paths)} at the goal", fontsize=SMALL + 2)
        _legend(figure, failures=not all(reached))


def _draw_walls(axes: Axes, grid: Grid) -> None:
    from matplotlib.patches import Rectangle

    side = grid.cell_size
    for cell in grid.walls:
        corner = grid.center(cell) - side / 2
        axes.add_patch(Rectangle((corner[0], corner[1]), side, side, color=WALL_COLOR, linewidth=0.5))
    half_width, half_height = grid.columns * side / 2, grid.rows * side / 2
    axes.set(xlim=(-half_width, half_width), ylim=(-half_height, half_height), aspect="equal")
    axes.set_xlabel("x", fontsize=SMALL)
    axes.set_ylabel("y", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)


def _draw_path(axes: Axes, path: NDArray[Any], goal: NDArray[Any], color: Any, there: bool) -> None:
    style = "-" if there else (0, (4, 2))
    axes.plot(path[:, 0], path[:, 1], linestyle=style, color=color, linewidth=1.3, alpha=0.85)
    axes.plot(*path[0], "o", color=color, markersize=5, markeredgecolor="black", markeredgewidth=0.5)
    axes.plot(
        *goal,
        "*",
        color=color if there else "white",
        markersize=10,
        markeredgecolor="black" if there else color,
        markeredgewidth=0.5 if there else 1.2,
        zorder=3,
    )
    if not there:
        axes.plot(*path[-1], "X", color=color, markersize=8, markeredgecolor="black", markeredgewidth=0.5)


def _colors(count: int) -> Sequence[Any]:
    """A colour for each path; few are easy to tell apart, many only from their neighbours."""
    usual = [color for color in COLORS if color != FAILED]
    if count <= len(usual):
        return usual[:count]
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.95, count)]


def _legend(figure: Figure, *, failures: bool) -> None:
    from matplotlib.lines import Line2D

    looks = [("start", "o", "black", "grey"), ("goal", "*", "black", "grey")]
    if failures:
        looks += [("end of a failure", "X", FAILED, FAILED), ("its goal", "*", FAILED, "white")]
    keys = [
        Line2D([], [], label=label, marker=marker, color=color, markerfacecolor=face, linestyle="none")
        for label, marker, color, face in looks
    ]
    columns = len(keys) if figure.get_figwidth() >= WIDE else 2
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
