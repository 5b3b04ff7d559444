"""`tt-ray predict`: how far ahead the models can predict, compared with what really followed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import typer
from rich.table import Table

from tt_ray.cli.arguments import Resume, settings
from tt_ray.cli.figures import Figures, copy_figures, figures_folder
from tt_ray.cli.session import find_checkpoint, session, show_places
from tt_ray.cli.view import Bars, console, empty_table, times_table
from tt_ray.experiment_file import apply_overrides, load_experiment
from tt_ray.texts import interval_text

if TYPE_CHECKING:
    from tt_ray.config import ExperimentConfig
    from tt_ray.distributed.line import Line
    from tt_ray.distributed.prediction_report import PredictionOutcome

SECTIONS = ("prediction", "ensemble", "evaluation", "resources", "tracking")
"""What can be changed for a checkpoint: its model and data are as they were trained."""


def predict(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_MODEL",
            help="Experiment file (YAML), or the model folder, checkpoint or MLflow run of the full model.",
        ),
    ],
    overrides: Annotated[list[str] | None, settings("prediction.horizon=50")] = None,
    resume: Resume = False,
    figures: Figures = None,
) -> None:
    """Long-horizon prediction without an environment: train what is missing, roll it out, compare."""
    from tt_ray.distributed.line import Line
    from tt_ray.distributed.prediction import check_prediction, predict, require_same_data

    started = time.perf_counter()
    config, checkpoint = _config(target, overrides or [])
    line = Line(config, Bars())
    line.plays = False
    line.check(resume or checkpoint is not None)
    if checkpoint is not None:
        require_same_data(line, checkpoint)
    check_prediction(line, resume)
    figures_folder(figures)
    with session(config, line.storage if resume else None) as (tracker, line.allocation):
        outcome = predict(line, tracker, resume, checkpoint)
    _show(outcome, line, time.perf_counter() - started)
    copy_figures(outcome.folder, figures)


def _config(target: str, overrides: list[str]) -> tuple[ExperimentConfig, Path | None]:
    """The experiment of a file; or of a checkpoint, and that."""
    from dataclasses import replace

    from tt_ray.distributed.checkpoints import load_for_evaluation
    from tt_ray.distributed.scoring import checkpoint_identity

    if target.endswith((".yaml", ".yml")):
        return load_experiment(target, overrides), None
    path = find_checkpoint(target, overrides)
    stored = load_for_evaluation(path, [])[0]
    config = apply_overrides(stored, overrides, SECTIONS)
    # A run of its own, in the experiment of the checkpoint's.
    tracking = replace(config.tracking, experiment=config.tracking.experiment or config.name)
    name = f"{config.name} checkpoint {checkpoint_identity(path)[:8]}"
    return replace(config, name=name, tracking=tracking), path


def _show(outcome: PredictionOutcome, line: Line, seconds: float) -> None:
    """Both tables, the times, and where to look next."""
    confidence = line.config.evaluation.confidence
    console.print(_table(outcome.likelihood, "Log-likelihood of what followed", confidence))
    console.print(_table(outcome.ahead, "How far the Transformer is ahead (paired by start)", confidence))
    elsewhere = seconds - sum(line.usage.seconds.values())
    console.print(times_table({**line.usage.seconds, "start-up and figures": elsewhere}))
    console.print()
    places = [("reused", ", ".join(line.usage.reused))] if line.usage.reused else []
    places += [(model, str(path)) for model, path in outcome.checkpoints.items()]
    show_places([*places, ("tables and figures", str(outcome.folder))], line.config)


def _table(frame: pd.DataFrame, title: str, confidence: float) -> Table:
    """A line for each model, a column for each step shown."""
    from tt_ray.distributed.prediction_report import shown
    from tt_ray.evaluation.prediction_figures import LABELS

    rows = shown(frame)
    table = empty_table(f"{title}, mean over starts [{100 * confidence:.0f} %]")
    table.add_column("model", overflow="fold")
    for step in sorted(rows["step"].unique()):
        table.add_column(f"step {step}", justify="right", overflow="fold")
    for model, mine in rows.groupby("model", sort=False):
        cells = mine.sort_values("step")
        numbers = zip(cells["log_likelihood"], cells["ci_low"], cells["ci_high"], strict=True)
        table.add_row(LABELS[str(model)], *(interval_text(*number) for number in numbers))
    return table
