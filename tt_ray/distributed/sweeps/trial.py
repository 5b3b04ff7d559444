"""One trial of a sweep, in a process of its own: a model for each training seed, and its episodes.

Nothing here knows who started the process; `report` is how a scheduler hears of the trial while it runs, and
may end it there.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.following import replay
from tt_ray.distributed.line import Line
from tt_ray.distributed.scoring import PLANNER, episode_seeds, make_row, run_params, score_planner
from tt_ray.distributed.sweeps.cells import Record, cell_folder, episode_frame, read_record, reuse_text
from tt_ray.distributed.sweeps.progress import TrialProgress
from tt_ray.distributed.sweeps.table import trial_metrics
from tt_ray.distributed.usage import usage_metrics
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.files import whole_file
from tt_ray.model.checkpoint import checkpoint_metrics
from tt_ray.sweep_file import Trial, dump_trial
from tt_ray.tracking import NOTE, Run, open_journal, provenance_tags, read, system_metrics

logger = logging.getLogger(__name__)

Report = Callable[[float, float], None]
"""`report(count, metric)`: at a rung of so many episodes or training steps."""
SPEED = "speed/tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a trial's process is given."""

    trial: Trial
    sweep: str
    """The sweep's name."""
    folder: Path
    """The sweep's folder."""
    data: str
    """Fingerprint of the data set."""
    profile: Mapping[str, int]
    """How much is in the data set."""
    allocation: Allocation
    rungs: tuple[int, ...]
    """Episodes at which the scheduler is asked; the last is all of them."""
    reports_training: bool
    """The scheduler is asked at every validation instead."""
    metric: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds: repetitions of the trial."""
        return self.trial.config.seeds


class Cell:
    """A trial with one training seed: its line of stages, its run in MLflow, and its record."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.folder = cell_folder(task.folder, task.trial, seed)
        config = replace(task.trial.config, seeds=(seed,))
        self.line = Line(config, TrialProgress(task.folder, task.trial, seed))
        self.line.allocation = task.allocation
        self.record = Record.of(task.trial, seed)
        interrupted = read_record(self.folder)
        fits = interrupted is not None and interrupted.data == task.data
        self._before = interrupted if interrupted is not None and fits else Record.of(task.trial, seed)
        self.run: Run
        self._checkpoint: Path | None = None
        self._played: list[EpisodeResult] = []

    def begin(self) -> None:
        """Say that the cell is being computed."""
        before, self.record.data = self._before, self.task.data
        self.record.trained, self.record.seconds = before.trained, dict(before.seconds)
        self.record.save(self.folder)
        self.run = open_journal(
            self.folder, run_params(self.task.trial.config, self.seed), cell_tags(self.task, self.seed)
        )
        dataset = self.line.config.dataset.id
        self.run.log_dataset(dataset, dataset, self.task.data, self.task.profile)

    def train(self, on_validation: Callable[[int, float], None] | None) -> None:
        """The model; `on_validation(step, metric)` is told of every validation, also of an older model's."""
        line, metric, told = self.line, self.task.metric, set[int]()

        def on_point(metrics: Mapping[str, float], step: int) -> None:
            if on_validation is not None and metric in metrics and step not in told:
                told.add(step)
                on_validation(step, metrics[metric])

        def tell(journal: Path) -> None:
            for record, _ in read(journal):
                on_point(record.get("metrics", {}), record.get("step", 0))

        line.locate(self.task.data)
        line.make_tokens()
        journal = line.models[self.seed] / "journal.jsonl"
        replay(journal, self.run)  # as far as an earlier attempt has come: the scheduler decides in order
        tell(journal)
        self._checkpoint = line.train(self.seed, self.run, on_point)
        line.train_critic(self.seed, self.run)
        tell(journal)
        self.record.checkpoint = str(self._checkpoint)
        self.record.trained = self.record.trained or not line.usage.counts["models"]
        if self.record.trained:
            self.run.artifact(self._checkpoint, "checkpoint")
        self.record.metrics |= {
            name: value
            for name, value in checkpoint_metrics(self._checkpoint).items()
            if name.startswith("val/")
        }
        self.record.metrics |= training_speed(journal)
        self._account()
        self.record.save(self.folder)  # now: who resumes this cell finds the model in the store

    def evaluate(self, episodes: int) -> None:
        """The first so many episodes, those before included."""
        assert self._checkpoint is not None
        line, record = self.line, self.record
        seeds = episode_seeds(line, episodes)[len(self._played) :]
        new = score_planner(line, self._checkpoint, line.config.planner, PLANNER, self.seed, seeds)
        self._played += new.results
        row = make_row(line, PLANNER, self.seed, self._played)
        figures = row.summary.metrics() | row.speed()
        record.metrics |= figures
        record.episodes = [result.to_json() for result in row.results]
        self._account()
        self.run.log(figures | usage_metrics(record.seconds, record.saved), episodes)
        record.save(self.folder)

    def report(self, rung: list[float]) -> None:
        """Keep what the scheduler is told, which is all there is to show if it ends the trial here."""
        self.record.reports.append(rung)
        if self.task.reports_training:
            self.record.metrics[self.task.metric] = rung[1]
        self._account()
        self.record.save(self.folder)

    def finish(self) -> None:
        """End the cell well."""
        close_cell(self.run, self.folder, self.task.trial, self.record, "finished")

    def fail(self, error: BaseException) -> None:
        """End the cell with the cause of its failure."""
        logger.error("%s, seed %s", self.task.trial.name, self.seed, exc_info=error)
        self._account()
        self.record.cause = describe(error)
        close_cell(self.run, self.folder, self.task.trial, self.record, "failed")

    def _account(self) -> None:
        """What the cell has cost up to now, earlier attempts included; its own work was not saved."""
        usage, record, before = self.line.usage, self.record, self._before
        record.seconds = dict(Counter(before.seconds) + Counter(usage.so_far()))
        mine = (("models", before.trained), ("evaluations", bool(before.checkpoint)))
        own = {kind for kind, whose in mine if whose}
        record.reused = {kind: count for kind, count in usage.counts.items() if kind not in own}
        record.saved = sum(seconds for kind, seconds in usage.saved_by.items() if kind not in own)


def run_trial(task: Task, report: Report) -> None:
    """All cells of a trial that have not ended, rung by rung; a cell that fails leaves the others alone."""
    records = {seed: read_record(cell_folder(task.folder, task.trial, seed)) for seed in task.seeds}
    ended = [record for record in records.values() if record is not None and record.ended]
    done = [record for record in ended if record.status == "finished"]
    cells = [Cell(task, seed) for seed in task.seeds if seed not in {record.seed for record in ended}]
    for cell in cells:
        cell.begin()
    told: list[list[float]] = []

    def tell(count: float, value: float) -> None:
        told.append([count, value])
        for cell in cells:
            cell.report([count, value])
        report(count, value)

    live = list(cells)
    for rung in task.rungs:
        for cell in list(live):
            try:
                with system_metrics(cell.run):
                    if rung == task.rungs[0]:
                        first = task.reports_training and cell is cells[0]
                        cell.train(tell if first else None)
                    cell.evaluate(rung)
                if rung == task.rungs[-1]:
                    cell.finish()
            except Exception as error:
                cell.fail(error)
                live.remove(cell)
        if live and not task.reports_training:
            tell(rung, rung_value(task, [*done, *(cell.record for cell in live)], rung))


def rung_value(task: Task, records: Sequence[Record], episodes: int) -> float:
    """The sweep's metric over the first so many episodes of each seed; NaN where it has none."""
    first = [replace(record, episodes=record.episodes[:episodes]) for record in records]
    return trial_metrics(first, task.trial.config).get(task.metric, math.nan)


def training_speed(journal: Path) -> dict[str, float]:
    """Mean training speed in a model's journal, under its MLflow name; empty where none was measured."""
    points = [record["metrics"].get(SPEED) for record, _ in read(journal) if "metrics" in record]
    measured = [point for point in points if point is not None]
    return {SPEED: sum(measured) / len(measured)} if measured else {}


def close_cell(run: Run, folder: Path, trial: Trial, record: Record, status: Any) -> None:
    """Write down how a cell has ended: its record last, since that is what makes it over."""
    record.status = status
    alone = replace(trial, config=replace(trial.config, seeds=(record.seed,)))
    with whole_file(folder / "config.yaml") as path:
        path.write_text(dump_trial(alone))
    run.artifact(folder / "config.yaml")
    if record.episodes:
        with whole_file(folder / "episodes.parquet") as path:
            episode_frame([record]).to_parquet(path)
        run.artifact(folder / "episodes.parquet")
    tags = {"trial.status": status, "reused": reuse_text(record.reused), "error": record.cause}
    run.set_tags({**tags, NOTE: describe_cell(record, trial)})
    run.finish("FAILED" if status == "failed" else "FINISHED")
    record.save(folder)


def describe_cell(record: Record, trial: Trial) -> str:
    """What came of a cell, in a line: its description in MLflow."""
    figures, episodes = trial_metrics([record], trial.config), len(record.episodes)
    parts = [f"failed: {record.cause}"] if record.cause else []
    parts += ["stopped early by the scheduler"] if record.status == "stopped" else []
    for name in ("score", "return"):
        if f"{name}/mean" in figures:
            low, high = (f"{figures[f'{name}/{end}']:.4g}" for end in ("ci_low", "ci_high"))
            parts.append(f"{name} {figures[f'{name}/mean']:.4g} [{low}, {high}]")
    parts += [f"{episodes} episodes"] if episodes else []
    parts += [f"reused {reuse_text(record.reused)}"] if record.reused else []
    return ", ".join(parts)


def cell_tags(task: Task, seed: int) -> dict[str, str]:
    """Where a cell belongs."""
    trial = task.trial
    return _origin() | {
        "seed": str(seed),
        "kind": "trial",
        "sweep": task.sweep,
        "trial": trial.fingerprint,
        **place_tags(trial),
        "trial.status": "running",
    }


def place_tags(trial: Trial) -> dict[str, str]:
    """Where a trial stands in its sweep, which changes as the file is extended."""
    return {"trial.name": trial.name, "trial.index": str(trial.index), "trial.case": trial.case or ""}


@functools.cache
def _origin() -> dict[str, str]:
    """What this process runs; asked once, since that takes as long as a small trial."""
    return provenance_tags()


def describe(error: BaseException) -> str:
    """An error in one line: the project's own as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")
