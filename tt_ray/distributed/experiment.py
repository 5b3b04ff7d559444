"""Experiments from end to end: the stages in order, and MLflow's account of them.

An experiment is one parent run with a child for each training seed. A child has the curves, the scores and
the checkpoint of its model; the parent has the baselines, the table and the figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tt_ray.config import ExperimentConfig, to_dict
from tt_ray.distributed.baselines import data_baselines, metric_name, model_baselines, require_policy
from tt_ray.distributed.evaluate import Row
from tt_ray.distributed.line import Line
from tt_ray.distributed.pictures import FIGURES, film, paths_picture, returns_picture, training_picture
from tt_ray.distributed.scoring import PLANNER, checkpoint_identity, run_params, score_planner
from tt_ray.evaluation.scores import aggregate_interval, normalized_score
from tt_ray.experiment_file import dump_yaml
from tt_ray.files import whole_file
from tt_ray.fingerprints import fingerprint, plain_settings
from tt_ray.locks import exclusive
from tt_ray.tracking import Run, Tracker, provenance_tags, system_metrics

RUNNING = "another command is running this experiment"


@dataclass(frozen=True)
class Outcome:
    """What a command has to show at its end."""

    rows: list[Row]
    checkpoints: dict[int, Path]
    folder: Path
    """Where the tables and figures lie."""


def run_experiment(line: Line, tracker: Tracker, resume: bool) -> Outcome:
    """The whole line: data, a model for each seed, its planned episodes, and the baselines beside them."""
    line.prepare_data()
    line.check_resume(resume)
    with start_parent(line, tracker) as parent:
        rows = data_baselines(line)
        for row in rows:
            parent.log(_named(row), 0)
        checkpoints = {}
        for seed in line.config.seeds:
            with start_trial(line, tracker, seed, parent) as trial:
                checkpoints[seed] = _train_seed(line, seed, trial)
                rows += _evaluate_seed(line, checkpoints[seed], seed, trial)
        _draw_episodes(line, checkpoints, rows, run_folder(line), parent)
        folder = _report(line, rows, parent)
    return Outcome(rows, checkpoints, folder)


def train_experiment(line: Line, tracker: Tracker, resume: bool) -> Outcome:
    """Data and a model for each seed, without evaluation."""
    line.prepare_data()
    line.check_resume(resume)
    checkpoints = {}
    with start_parent(line, tracker) as parent:
        for seed in line.config.seeds:
            with start_trial(line, tracker, seed, parent) as trial:
                checkpoints[seed] = _train_seed(line, seed, trial)
        with whole_file(run_folder(line) / "config.yaml") as file:
            file.write_text(dump_yaml(line.config))
        parent.artifact(run_folder(line) / "config.yaml")
    return Outcome([], checkpoints, run_folder(line))


def evaluate_experiment(line: Line, tracker: Tracker, checkpoint: Path, seed: int) -> Outcome:
    """Episodes on one checkpoint, as a run of its own; the line has its spec (`Line.use`)."""
    identity = fingerprint("evaluate", checkpoint_identity(checkpoint), _identity(line.config))
    folder = line.storage / "trials" / identity
    tags = provenance_tags(seed) | {"checkpoint": str(checkpoint)}
    name = f"{line.config.name} seed {seed} evaluate"
    with _started(tracker, name, folder, run_params(line.config, seed), tags) as run:
        require_policy(line, seed)
        planned = _evaluate_seed(line, checkpoint, seed, run)
        rows = [*data_baselines(line), *planned]
        _write_tables(rows, folder)
        returns_picture(line, rows, folder / "returns.png")
        for name in ("results.md", "episodes.parquet", "returns.png"):
            run.artifact(folder / name)
        _draw_episodes(line, {seed: checkpoint}, planned, folder, run)
    return Outcome(rows, {seed: checkpoint}, folder)


def run_folder(line: Line) -> Path:
    """Folder of the experiment's parent run."""
    return line.storage / "experiments" / f"{line.config.name}-{_identity(line.config)}"


@contextmanager
def start_parent(line: Line, tracker: Tracker) -> Iterator[Run]:
    """The experiment's parent run, started or continued, for the duration of a block."""
    tags = {**provenance_tags(), "question": line.config.question}
    with _started(tracker, line.config.name, run_folder(line), to_dict(line.config), tags) as run:
        yield run


@contextmanager
def start_trial(line: Line, tracker: Tracker, seed: int, parent: Run) -> Iterator[Run]:
    """The run of one training seed under `parent`, started or continued, for the duration of a block."""
    config = line.config
    folder = line.storage / "trials" / fingerprint("trial", _identity(config), seed)
    name, params, tags = f"{config.name} seed {seed}", run_params(config, seed), provenance_tags(seed)
    profile = {"episodes": len(line.episodes), "transitions": int(line.episodes.offsets[-1])}
    with _started(tracker, name, folder, params, tags, parent.identity) as run:
        run.log_dataset(line.spec.dataset_id, line.spec.dataset_id, line.spec.fingerprint, profile)
        yield run


@contextmanager
def _started(
    tracker: Tracker,
    name: str,
    folder: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    parent: str | None = None,
) -> Iterator[Run]:
    """The run that lives in `folder`, started or continued; `UserError` where another command has it."""
    with exclusive(folder, RUNNING):
        for leftover in folder.glob(".run.json.*"):  # of a command that was killed while it wrote
            leftover.unlink()
        with tracker.start(name, folder, params=params, tags=tags, parent=parent) as run, system_metrics(run):
            yield run


def _identity(config: ExperimentConfig) -> str:
    """What makes two commands the same experiment; where it runs and where it is logged does not."""
    return fingerprint("experiment", plain_settings(config, "resources", "tracking"))


def _train_seed(line: Line, seed: int, trial: Run) -> Path:
    """The model of one training seed, its critic where it has one, and its curves as a picture."""
    checkpoint = line.train(seed, trial)
    trial.artifact(checkpoint, "checkpoint")
    line.train_critic(seed, trial)
    picture = run_folder(line) / FIGURES / f"training-seed-{seed}.png"
    for path in training_picture(checkpoint.parent.parent, picture, f"{line.config.name}, seed {seed}"):
        trial.artifact(path, FIGURES)
    return checkpoint


def _draw_episodes(
    line: Line, checkpoints: Mapping[int, Path], rows: list[Row], folder: Path, run: Run
) -> None:
    """Films of the first training seed's planner, and paths in a maze, as artifacts of `run`."""
    planned = [row for row in rows if row.policy == PLANNER]
    results, seed = planned[0].results, planned[0].seed
    assert seed is not None
    pictures = folder / FIGURES
    files = film(line, checkpoints[seed], seed, results, pictures, "episode")
    everything = [result for row in planned for result in row.results]
    for path in [*files, *paths_picture(line, everything, pictures / "paths.png")]:
        run.artifact(path, FIGURES)


def _evaluate_seed(line: Line, checkpoint: Path, seed: int, trial: Run) -> list[Row]:
    """The rows of a model: its baselines, and last the planner."""
    step, rows = line.config.training.steps, model_baselines(line, checkpoint, seed)
    for row in rows:
        trial.log(_named(row), step)
    planner = score_planner(line, checkpoint, line.config.planner, PLANNER, seed)
    trial.log(planner.summary.metrics() | planner.speed(), step)
    return [*rows, planner]


def _named(row: Row) -> dict[str, float]:
    return {f"{metric_name(row.policy)}/{name}": value for name, value in row.summary.metrics().items()}


def _report(line: Line, rows: list[Row], parent: Run) -> Path:
    """Tables and figure of the whole experiment, as files and as the parent's artifacts."""
    folder = run_folder(line)
    planned = [np.array(row.returns) for row in rows if row.policy == PLANNER]
    evaluation, spec = line.config.evaluation, line.spec
    total = aggregate_interval(
        planned, confidence=evaluation.confidence, samples=evaluation.bootstrap_samples
    )
    figures = {"return/mean": total.interval.value}
    figures |= {"return/ci_low": total.interval.low, "return/ci_high": total.interval.high}
    scores = normalized_score(list(figures.values()), spec.ref_min_score, spec.ref_max_score)
    if scores is not None:
        names = [name.replace("return", "score") for name in figures]
        figures |= dict(zip(names, scores.tolist(), strict=True))
    if total.seed_std is not None:
        figures["return/seed_std"] = total.seed_std
    parent.log(figures, line.config.training.steps)
    parent.log(line.usage.metrics(), 0)
    _write_tables(rows, folder)
    with whole_file(folder / "config.yaml") as file:
        file.write_text(dump_yaml(line.config))
    returns_picture(line, rows, folder / "returns.png")
    for name in ("results.md", "episodes.parquet", "config.yaml", "returns.png"):
        parent.artifact(folder / name)
    return folder


def _write_tables(rows: list[Row], folder: Path) -> None:
    """`results.md`, a line for each policy, and `episodes.parquet`, one for each episode."""
    columns = [
        "policy",
        "seed",
        "episodes",
        "return",
        "interval",
        "score",
        "interval",
        "length",
        "decisions/s",
    ]
    lines = [columns, ["---"] * len(columns), *(row.cells() for row in rows)]
    with whole_file(folder / "results.md") as file:
        file.write_text("\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n")
    episodes = [
        {"policy": row.policy, "training_seed": row.seed, **result.to_json()}
        for row in rows
        for result in row.results
    ]
    with whole_file(folder / "episodes.parquet") as file:
        pd.DataFrame(episodes).to_parquet(file)
