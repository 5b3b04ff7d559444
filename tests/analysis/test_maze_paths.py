from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import maze_paths
import pandas as pd
import pytest
from written_studies import StudyWriter

from tt_ray.distributed.sweeps.cells import Record, episode_frame
from tt_ray.evaluation.mazes import FOUR_ROOMS, U_MAZE_FAR, Grid, MazeMap
from tt_ray.evaluation.rollout import EpisodeResult

WAY = tuple((x, 1.0) for x in (-1.0, 0.0, 1.0))
SEEDS = (0, 1)


def result(seed: int, reached: bool, path: tuple[Any, ...], goal: tuple[float, ...]) -> EpisodeResult:
    numbers = {"length": 2, "decisions": 2, "environment_seconds": 0.0, "planning_seconds": 0.0}
    return EpisodeResult(
        seed=seed,
        episode_return=float(reached),
        terminated=reached,
        path=path,
        goal=goal,
        **numbers,  # type: ignore[arg-type]
    )


@pytest.fixture
def write(analysis_store: str, tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep of two trials, the second the better one, whose model the first has trained.

    Gives the folder of the model's checkpoint, which MLflow has, too, if `kept`.
    """

    def write_sweep(
        name: str,
        maze_map: MazeMap | None = U_MAZE_FAR,
        path: tuple[Any, ...] = WAY,
        goal: tuple[float, ...] = (1.0, 1.0),
        *,
        here: bool = True,
        kept: bool = True,
    ) -> Path:
        writer = StudyWriter(analysis_store, name, tmp_path / "written")
        trials = pd.DataFrame({"index": [0, 1], "trial": ["narrow", "wide"], "status": "finished"})
        trials = trials.assign(fingerprint=["f0", "f1"], case="", **{"return/mean": [0.25, 0.75]})
        records = [
            Record(
                trial=f"f{i}",
                name=trial,
                index=i,
                case="",
                seed=model,
                settings={},
                episodes=[result(s, s >= least, path, goal).to_json() for s in range(4)],
            )
            for i, (trial, least) in enumerate((("narrow", 3), ("wide", 1)))
            for model in SEEDS
        ]
        tags = {"search.metric": "return/mean", "question": "Who gets there?"}
        parent = writer.parent(trials, episode_frame(records), **tags)
        runs = [
            writer.cell(parent, trial, model, {"dataset.id": "mine/maze-v0"}, None)
            for _, trial in trials.iterrows()
            for model in SEEDS
        ]
        environment = {"id": "x", "kwargs": {} if maze_map is None else {"maze_map": maze_map}}
        checkpoint = tmp_path / "model"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps({"data": {"environment": environment}}))
        if kept:
            writer.client.log_artifacts(runs[0], str(checkpoint), "checkpoint")
        if here:
            writer.client.set_tag(runs[3], "checkpoint", str(checkpoint))
        return checkpoint

    return write_sweep


@pytest.fixture
def draw(
    run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The script on a sweep: its exit code, and what it says."""

    def run(name: str, *arguments: object) -> tuple[int, str]:
        code = run_main(maze_paths.main, name, "--out", tmp_path / "out", *arguments)
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out

    return run


def test_the_best_trials_paths_are_drawn_to_the_goals_that_they_were_given(
    write: Callable[..., Path], draw: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    write("paths with goals")
    code, text = draw("paths with goals")
    assert code == 0, text
    assert "Who gets there?" in text
    cells = next(line for line in text.splitlines() if "wide" in line).split("|")
    assert [cell.strip() for cell in cells[1:-1]] == ["1", "wide", "8", "6", "75.0", "2"]
    names = {"paths-1.png", "paths-1.svg", "paths.md", "paths.parquet"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert "6 of 8 at the goal" in (tmp_path / "out" / "paths-1.svg").read_text()
    table = pd.read_parquet(tmp_path / "out" / "paths.parquet")
    assert table["reached"].tolist() == [False, True, True, True] * 2
    assert table["training_seed"].tolist() == [0] * 4 + [1] * 4


def test_trials_by_number_few_episodes_and_a_maze_that_only_mlflow_has(
    write: Callable[..., Path], draw: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (write("paths by number", here=False) / "config.json").unlink()
    code, text = draw("paths by number", "--trial", 1, "--trial", 0, "--episodes", 2)
    assert code == 0, text
    assert "The pictures show the first 2 episodes." in text
    assert "0 of 2 at the goal" in (tmp_path / "out" / "paths-0.svg").read_text()
    assert "1 of 2 at the goal" in (tmp_path / "out" / "paths-1.svg").read_text()


def test_without_given_goals_the_only_goal_cell_is_the_goal(
    write: Callable[..., Path],
    draw: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        maze_paths, "paths_figure", lambda *arguments, **sizes: drawn.append((arguments, sizes))
    )
    monkeypatch.setattr(
        maze_paths, "write_figure", lambda figure, folder, name: figure(folder / name) or name
    )
    write("paths to a cell", path=((4.0, -4.0, 9.0), (0.0, 1.0, 9.0)), goal=())
    code, text = draw("paths to a cell", "--cell-size", 4)
    assert code == 0, text
    (((maze_map, positions, goals, _, _), sizes),) = drawn
    assert maze_map == U_MAZE_FAR
    assert positions[0].tolist() == [[4.0, -4.0], [0.0, 1.0]]  # the position alone of what was recorded
    assert goals[0].tolist() == Grid(U_MAZE_FAR, 4.0).center((3, 1)).tolist()
    assert sizes == {"cell_size": 4.0}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"path": ()}, [], "trial 'wide' has no paths: give evaluation.record the dimensions of the"),
        (
            {"path": ((1.0,),)},
            [],
            "trial 'wide': evaluation.record has one dimension, and a position has two",
        ),
        ({"maze_map": None}, [], "trial 'wide': x has no map of a maze"),
        (
            {"here": False, "kept": False},
            [],
            "trial 'wide': its maze is not known, since none of its models'",
        ),
        (
            {"maze_map": FOUR_ROOMS, "goal": ()},
            [],
            "trial 'wide': its model was given no goals, and its maze",
        ),
        ({}, ["--trial", 7], "--trial 7: sweep '{name}' has no trial of that number"),
        ({}, ["--episodes", 0], "--episodes and --cell-size must be above 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    settings: dict[str, Any],
    arguments: list[Any],
    message: str,
    write: Callable[..., Path],
    draw: Callable[..., tuple[int, str]],
    tmp_path: Path,
) -> None:
    name = "-".join(["mistake", *re.findall("[a-z]+", message)])
    write(name, **settings)
    code, error = draw(name, *arguments)
    assert code == 2
    assert error.startswith(f"maze_paths.py: error: {message.format(name=name)}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
