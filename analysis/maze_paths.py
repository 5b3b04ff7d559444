"""Where episodes went, over the walls of their maze: python analysis/maze_paths.py SWEEP [--trial N]

For sweeps with evaluation.record, whose first two dimensions are a position. A picture for each trial that is
named, or else for the best one of each case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from study import Study, load_study, markdown_table, run_script, write_figure, write_report, write_table

from tt_ray.errors import UserError
from tt_ray.evaluation.maze_figures import maze_map_of, paths_figure
from tt_ray.evaluation.mazes import Grid, MazeMap

Positions = NDArray[np.float64]

CONFIG = "config.json"
"""Of a checkpoint: what it says of its data."""


@dataclass(frozen=True)
class Paths:
    """Episodes of one trial."""

    trial: str
    index: int
    episodes: pd.DataFrame
    """training_seed, seed, episode_return, length of each."""
    positions: list[Positions]
    """xy [T, 2] of each."""
    goals: list[Positions]
    """xy [2] of each."""
    maze_map: MazeMap

    @property
    def reached(self) -> NDArray[np.bool_]:
        """Whether each episode was rewarded."""
        return self.episodes["episode_return"].to_numpy(dtype=float) > 0


def paths_of(study: Study, trial: pd.Series, cell_size: float) -> Paths:
    """A trial's recorded episodes, those that chose it (the winner's fresh ones are left out).

    Raises:
        UserError: nothing was recorded, its maze is not known, or no goal is.
    """
    name, episodes = str(trial["trial"]), study.episodes
    mine = episodes[(episodes["fingerprint"] == trial["fingerprint"]) & ~episodes["fresh"]]
    recorded = mine["path"].map(len).to_numpy() > 0 if "path" in mine else np.zeros(len(mine), dtype=bool)
    if not recorded.any():
        raise UserError(
            f"trial {name!r} has no paths: give evaluation.record the dimensions of the position, and run "
            "the sweep again"
        )
    mine = mine[recorded].sort_values(["training_seed", "seed"], ignore_index=True)
    positions = [np.stack([np.asarray(point) for point in path]) for path in mine["path"]]
    if positions[0].shape[1] < 2:
        raise UserError(f"trial {name!r}: evaluation.record has one dimension, and a position has two")
    maze_map = maze_of(study, trial)
    goals = _goals(mine, maze_map, cell_size, name)
    xy = [path[:, :2].astype(float) for path in positions]
    kept = mine[["training_seed", "seed", "episode_return", "length"]]
    return Paths(name, int(trial["index"]), kept, xy, goals, maze_map)


def _goals(episodes: pd.DataFrame, maze_map: MazeMap, cell_size: float, trial: str) -> list[Positions]:
    """Each episode's goal, where its model was given one; or else the only cell that the map marks as it."""
    given = [np.asarray(goal, dtype=float) for goal in episodes["goal"]]
    if all(len(goal) >= 2 for goal in given):
        return [goal[:2] for goal in given]
    grid = Grid(maze_map, cell_size)
    if len(grid.goals) != 1:
        raise UserError(
            f"trial {trial!r}: its model was given no goals, and its maze has {len(grid.goals)} goal cells "
            "where one would do: nothing says where the episodes were to go"
        )
    return [grid.center(grid.goals[0])] * len(given)


def maze_of(study: Study, trial: pd.Series) -> MazeMap:
    """The map of the trial's environment, which the checkpoints of its models describe.

    Raises:
        UserError: it is no maze, or no checkpoint is where it was written or in MLflow.
    """
    cells = study.cells
    same = cells["tags.trial"] == trial["fingerprint"]
    column = cells.get("params.dataset.id", pd.Series("", cells.index))
    of_data = column.isin(column[same])  # a model that another trial has trained
    for _, cell in pd.concat([cells[same], cells[of_data & ~same]]).iterrows():
        config = _checkpoint_config(cell)
        if config is not None:
            environment = config["data"]["environment"]
            found = maze_map_of(environment)
            if found is None:
                raise UserError(f"trial {trial['trial']!r}: {environment.get('id')} has no map of a maze")
            return found
    raise UserError(
        f"trial {trial['trial']!r}: its maze is not known, since none of its models' checkpoints is where it "
        "was written, nor in MLflow"
    )


def _checkpoint_config(cell: pd.Series) -> Mapping[str, Any] | None:
    """What the checkpoint of a run says of itself: where it was written if that is here, or its artifact."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    written = cell.get("tags.checkpoint")
    file = Path(written if isinstance(written, str) else "") / CONFIG
    with tempfile.TemporaryDirectory() as folder:
        try:
            if not file.is_file():
                artifact = f"checkpoint/{CONFIG}"
                file = Path(MlflowClient().download_artifacts(cell["run_id"], artifact, folder))
            return json.loads(file.read_text(encoding="utf-8"))
        except (MlflowException, OSError, ValueError):
            return None


def chosen_trials(study: Study, numbers: Sequence[int]) -> pd.DataFrame:
    """The trials of these numbers, or else the best one of each case; `UserError` where there are none."""
    trials = study.trials[study.trials["index"].isin(numbers)] if numbers else study.winners()
    missing = sorted(set(numbers) - set(trials["index"]))
    if missing:
        raise UserError(f"--trial {missing[0]}: sweep {study.name!r} has no trial of that number")
    if trials.empty:
        raise UserError(f"sweep {study.name!r} has no finished trials")
    return trials


def report(study: Study, found: Sequence[Paths], figures: Sequence[str], shown: int | None) -> str:
    """The page: how many reached their goal, and the pictures."""
    rows = [
        [
            str(paths.index),
            paths.trial,
            str(len(paths.reached)),
            str(int(paths.reached.sum())),
            f"{100 * float(paths.reached.mean()):.1f}",
            f"{float(np.mean(paths.episodes['length'])):.0f}",
        ]
        for paths in found
    ]
    table = markdown_table(["number", "trial", "episodes", "at the goal", "%", "mean length"], rows)
    several = "" if shown is None else f"The pictures show the first {shown} episodes."
    pictures = [f"{paths.trial}:\n\n{figure}" for paths, figure in zip(found, figures, strict=True)]
    question = study.tags.get("question", "")
    sections = [f"# {study.name}: paths", question, table, several, *pictures, study.gone_text]
    return "\n\n".join(filter(None, sections)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="maze_paths.py", description=about, epilog=more)
    parser.add_argument("name", metavar="SWEEP", help="name of a sweep in MLflow, or its run id")
    parser.add_argument(
        "--trial",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="number of a trial; may be repeated",
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="draw only the first N (default: all)")
    parser.add_argument(
        "--cell-size",
        type=float,
        default=1.0,
        metavar="SIDE",
        help="of a cell: 1 in point mazes, 4 in AntMaze",
    )
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    if (options.episodes is not None and options.episodes < 1) or not options.cell_size > 0:
        raise UserError("--episodes and --cell-size must be above 0")
    study = load_study(options.name, uri)
    found = [
        paths_of(study, trial, options.cell_size)
        for _, trial in chosen_trials(study, options.trial).iterrows()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for paths in found:
        few = slice(options.episodes)
        drawn = (paths.maze_map, paths.positions[few], paths.goals[few], list(paths.reached[few]))
        draw = partial(paths_figure, *drawn, cell_size=options.cell_size)
        figures.append(write_figure(draw, folder, f"paths-{paths.index}"))
    tables = [paths.episodes.assign(trial=paths.trial, reached=paths.reached) for paths in found]
    write_table(pd.concat(tables, ignore_index=True), folder / "paths.parquet")
    write_report(report(study, found, figures, options.episodes), folder / "paths.md")


if __name__ == "__main__":
    sys.exit(main())
