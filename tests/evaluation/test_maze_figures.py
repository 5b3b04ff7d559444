"""Paths over walls: the map from a data set's environment, walls and marks where they belong."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import COLORS
from tt_ray.evaluation.maze_figures import FAILED, WALL_COLOR, maze_map_of, paths_figure
from tt_ray.evaluation.mazes import FOUR_ROOMS, U_MAZE_FAR, Grid

GRID = Grid(U_MAZE_FAR)
WAY = np.linspace(GRID.center((1, 1)), GRID.center((1, 3)), 20)
GOAL = GRID.center((3, 1))


def share(file: Path, color: str) -> float:
    """Share of the pixels that have `color`, or are a little lighter."""
    pixels = imread(file)[..., :3]
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(pixels - wanted).max(axis=-1) < 0.02).mean())


def test_the_map_of_an_environment() -> None:
    assert maze_map_of({"id": "x", "kwargs": {"maze_map": U_MAZE_FAR}}) == U_MAZE_FAR
    assert maze_map_of({"id": "Hopper-v5", "kwargs": {}}) is None
    assert maze_map_of({"id": "Hopper-v5"}) is None


def test_walls_paths_and_failures_are_drawn(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    paths_figure(U_MAZE_FAR, [WAY], [GRID.center((1, 3))], [True], good)
    paths_figure(U_MAZE_FAR, [WAY], [GOAL], [False], bad)
    for file in (good, bad):
        assert 0.3 < share(file, WALL_COLOR) < 0.7  # 18 of 25 cells, and a margin
    assert share(good, COLORS[0]) > 0
    assert share(good, FAILED) == 0
    assert share(bad, FAILED) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "good.png"]


def test_things_are_where_the_environment_has_them(tmp_path: Path) -> None:
    file = tmp_path / "paths.svg"
    paths_figure(U_MAZE_FAR, [WAY, WAY + 0.1], [GRID.center((1, 3))] * 2, [True, True], file)
    text = file.read_text()
    assert "2 of 2 at the goal" in text
    assert text.count(f"fill: {WALL_COLOR.lower()}") == len(GRID.walls)
    assert "failure" not in text


def test_many_paths_have_colours_of_their_own(tmp_path: Path) -> None:
    grid = Grid(FOUR_ROOMS)
    paths = [np.stack([grid.center(cell), grid.center(cell) + 0.3]) for cell in grid.free[:20]]
    file = tmp_path / "many.svg"
    paths_figure(FOUR_ROOMS, paths, [path[-1] for path in paths], [True] * 19 + [False], file)
    lines = {part[:7] for part in file.read_text().split("stroke: ")[1:]}
    assert len(lines) >= 20
    assert FAILED.lower() in lines
    assert "19 of 20 at the goal" in file.read_text()


@pytest.mark.parametrize(("paths", "goals", "reached"), [([], [], []), ([WAY], [GOAL], [True, False])])
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, paths: list[np.ndarray], goals: list[np.ndarray], reached: list[bool]
) -> None:
    with pytest.raises(UserError, match=r"paths.png: .* do not fit together"):
        paths_figure(U_MAZE_FAR, paths, goals, reached, tmp_path / "paths.png")
    assert list(tmp_path.iterdir()) == []
