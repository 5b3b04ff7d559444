"""What a study of long-horizon prediction leaves: tables, figures, a film, and MLflow's curves by horizon."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tt_ray.config import to_dict
from tt_ray.distributed.experiment import run_folder
from tt_ray.distributed.line import Line
from tt_ray.evaluation import filmstrip
from tt_ray.evaluation.prediction import (
    HeldOut,
    Prediction,
    difference_table,
    error_table,
    likelihood_table,
)
from tt_ray.evaluation.prediction_figures import (
    ENSEMBLE,
    FULL,
    LABELS,
    MARKOVIAN,
    error_figure,
    likelihood_figure,
)
from tt_ray.experiment_file import dump_yaml
from tt_ray.files import whole_file
from tt_ray.model.checkpoint import checkpoint_metrics
from tt_ray.tracking import Run

SHOWN = (1, 10, 20, 50)
"""Steps of the tables."""


@dataclass(frozen=True)
class PredictionOutcome:
    """What the command has to show at its end."""

    likelihood: pd.DataFrame
    ahead: pd.DataFrame
    """How far the Transformer is ahead of the others."""
    checkpoints: dict[str, Path]
    folder: Path


def report(
    line: Line,
    held_out: HeldOut,
    predictions: Mapping[str, Prediction],
    checkpoints: dict[str, Path],
    parent: Run,
) -> PredictionOutcome:
    """Tables and figures, as files and as artifacts of `parent`, and its curves by horizon."""
    evaluation, folder = line.config.evaluation, run_folder(line)
    sampling = (evaluation.confidence, evaluation.bootstrap_samples)
    likelihood = likelihood_table(predictions, *sampling)
    ahead = difference_table(predictions, FULL, *sampling)
    errors = error_table(predictions)
    for step, rows in likelihood.groupby("step"):
        values = zip(rows["model"], rows["log_likelihood"], strict=True)
        parent.log({f"log-likelihood/{model}": value for model, value in values}, int(str(step)))
    parent.log(line.usage.metrics(), 0)
    frames = {"prediction": likelihood, "prediction_ahead": ahead, "prediction_errors": errors}
    written = [_write(folder / f"{name}.parquet", frame) for name, frame in frames.items()]
    with whole_file(folder / "prediction.json") as file:
        file.write_text(json.dumps(_summary(line, held_out, likelihood, ahead, checkpoints), indent=1))
    with whole_file(folder / "config.yaml") as file:
        file.write_text(dump_yaml(line.config))
    for path in [*written, folder / "prediction.json", folder / "config.yaml"]:
        parent.artifact(path)  # before anything is drawn: a library that fails there takes no table along
    for path in _pictures(line, held_out, predictions, likelihood, errors, folder):
        parent.artifact(path)
    return PredictionOutcome(likelihood, ahead, checkpoints, folder)


def _write(path: Path, frame: pd.DataFrame) -> Path:
    with whole_file(path) as file:
        frame.to_parquet(file)
    return path


def _summary(
    line: Line,
    held_out: HeldOut,
    likelihood: pd.DataFrame,
    ahead: pd.DataFrame,
    checkpoints: Mapping[str, Path],
) -> dict[str, Any]:
    episodes = np.searchsorted(held_out.episodes.offsets, held_out.rows, side="right") - 1
    return {
        "experiment": line.config.name,
        "dataset": line.spec.dataset_id,
        "settings": to_dict(line.config.prediction),
        "hidden_fraction": line.config.dataset.hidden_fraction,
        "starts": [
            {"episode": int(e), "step": int(row - held_out.episodes.offsets[e])}
            for e, row in zip(episodes, held_out.rows, strict=True)
        ],
        "models": {
            model: {"checkpoint": str(path), "metrics": checkpoint_metrics(path)}
            for model, path in checkpoints.items()
        },
        "log_likelihood": shown(likelihood).to_dict("records"),
        "transformer_ahead_of": shown(ahead).to_dict("records"),
    }


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the steps that tables show: `SHOWN`, as far as they go, and the last."""
    last = int(table["step"].max())
    return table[table["step"].isin({*(step for step in SHOWN if step < last), last})]


def _pictures(
    line: Line,
    held_out: HeldOut,
    predictions: Mapping[str, Prediction],
    likelihood: pd.DataFrame,
    errors: pd.DataFrame,
    folder: Path,
) -> list[Path]:
    """Every figure; those of single trajectories are from the first start."""
    names = [f"dimension {n}" for n in range(held_out.layout.observation_dim)]
    seen = {
        model: predictions[model].example for model in (FULL, MARKOVIAN, ENSEMBLE) if model in predictions
    }
    title = f"{line.spec.dataset_id}, {len(held_out.rows)} starts, {line.config.prediction.rollouts} rollouts"
    if held_out.layout.partial:
        title += f", {line.config.dataset.hidden_fraction:.0%} of the observations hidden"
    paths = [folder / f"{name}.png" for name in ("log_likelihood", "errors", "states")]
    likelihood_figure(likelihood, paths[0], title)
    error_figure(errors, paths[1], names)
    bands = {LABELS[model]: rollouts for model, rollouts in seen.items()}
    filmstrip.state_strip(held_out.reference(0), bands, paths[2], names)
    renderer = filmstrip.StateRenderer.of(line.spec)
    if renderer is None:
        return paths
    futures = {"what followed": held_out.reference(0)} | {LABELS[m]: drawn[0] for m, drawn in seen.items()}
    start = held_out.present(0)[None]
    try:
        rows = {name: renderer.frames(np.concatenate([start, future])) for name, future in futures.items()}
    finally:
        renderer.close()
    steps = np.unique(np.linspace(0, line.config.prediction.horizon, 9).round().astype(int)).tolist()
    filmstrip.film_strip(rows, steps, folder / "film.png")
    filmstrip.film(rows, folder / "film.mp4")
    return [*paths, folder / "film.png", folder / "film.mp4"]
