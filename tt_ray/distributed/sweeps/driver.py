"""A sweep from end to end: data, trials by Ray Tune, winners on fresh seeds, baselines, the report.

What is done is known from the cells' records and the stage store alone, so that a driver killed anywhere
loses nothing: the next one runs what is missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tt_ray.distributed.line import Progress
from tt_ray.distributed.pictures import FIGURES
from tt_ray.distributed.sweeps.baselines import baseline_frame, play_missing
from tt_ray.distributed.sweeps.board import CANCEL, Board
from tt_ray.distributed.sweeps.checks import Flags, prepare_data, running
from tt_ray.distributed.sweeps.confirm import confirm_winners
from tt_ray.distributed.sweeps.notes import mark_best, present, sweep_note
from tt_ray.distributed.sweeps.pictures import winner_pictures
from tt_ray.distributed.sweeps.report import report, write_tables
from tt_ray.distributed.sweeps.schedule import run_trials
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import with_confirmed
from tt_ray.files import whole_file
from tt_ray.locks import exclusive
from tt_ray.tracking import (
    NOTE,
    Courier,
    MlflowRun,
    MlflowStore,
    MlflowTracker,
    Run,
    provenance_tags,
    read,
    system_metrics,
)

TABLES_EVERY = 20.0  # seconds between two partial tables in MLflow


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep has to show at its end."""

    frame: pd.DataFrame
    baselines: pd.DataFrame
    """Rows to compare the planners with."""
    folder: Path
    cancelled: bool
    problems: Sequence[str]
    """Settings that Optuna has proposed and that do not go together."""
    data: Sequence[str]
    """A line on each data set."""


def run_sweep(
    study: Study,
    tracker: MlflowTracker,
    flags: Flags,
    progress: Progress,
    watch: Callable[[Board], AbstractContextManager[Any]] | None = None,
) -> SweepOutcome:
    """All that is still to do of a sweep, with Ray up; `watch(board)` is a context manager that shows it."""
    folder = study.folder
    with exclusive(folder, running(study)), _parent(study, tracker) as parent:
        with whole_file(folder / "sweep.yaml") as path:
            path.write_text(study.sweep.source)
        parent.artifact(folder / "sweep.yaml")
        prepare_data(study, progress)
        for key, facts in study.facts.items():
            parent.log_dataset(facts.name, facts.name, study.data[key], facts.profile)
        courier = Courier(tracker.uri, tracker.experiment)
        try:
            board = Board(study, courier, parent.identity, _TableKeeper(study, parent))
            board.rename_cells()
            with board, system_metrics(parent), watch(board) if watch is not None else nullcontext():
                run_trials(study, board, only_failed=flags.only_failed)
            confirmed = [] if board.cancelled() else confirm_winners(study, board, progress)
            if not board.cancelled():
                play_missing(study, board, progress)
            frame = with_confirmed(board.frame(), confirmed)
            figures = report(study, frame, confirmed, parent, _launches(folder))
            for path in [] if board.cancelled() else winner_pictures(study, frame, confirmed, progress):
                parent.artifact(path, FIGURES)
            parent.set_tags({NOTE: sweep_note(study, frame, figures, parent.run_id)})
            mark_best(study, frame, courier, parent.identity)
        finally:
            courier.close(tracker.finish_wait)
            shutil.rmtree(folder / "progress", ignore_errors=True)
        present(study, frame, MlflowStore(tracker.uri, tracker.experiment))
        if board.cancelling:
            (folder / CANCEL).unlink(missing_ok=True)
            parent.set_tags({"status": "cancelled"})
            parent.finish("KILLED")
    return SweepOutcome(
        frame=frame,
        baselines=baseline_frame(study, frame),
        folder=folder,
        cancelled=board.cancelling,
        problems=board.problems,
        data=[str(facts) for facts in study.facts.values()],
    )


class _TableKeeper:
    """Writes the partial tables as trials end, and sends them to MLflow now and then."""

    def __init__(self, study: Study, parent: Run) -> None:
        self._study, self._parent, self._sent = study, parent, time.monotonic()

    def __call__(self, board: Board) -> None:
        if time.monotonic() - self._sent > TABLES_EVERY:
            self._sent = time.monotonic()
            for path in write_tables(self._study, board.frame()):
                self._parent.artifact(path)


def _parent(study: Study, tracker: MlflowTracker) -> MlflowRun:
    """The sweep's own run, in a folder that is tidied first: its thread writes there from then on."""
    _tidy(study.folder)
    base, search = study.sweep.base, study.sweep.search
    tags = {
        **provenance_tags(),
        "kind": "sweep",
        "sweep": base.name,
        "question": base.question,
        "search.method": search.method,
        "search.metric": search.metric.name,
        "search.goal": search.metric.goal,
        "overrides": " ".join(study.sweep.overrides),
        "status": "",
    }
    return tracker.start(base.name, study.folder, tags=tags)


def _launches(folder: Path) -> int:
    """How often the sweep has been launched: the step of its figures, which each launch may change."""
    return sum(record.get("status") == "RUNNING" for record, _ in read(folder / "journal.jsonl"))


def _tidy(folder: Path) -> None:
    """Remove what a driver that was killed has left."""
    for leftover in (folder / "tune", folder / "progress"):
        shutil.rmtree(leftover, ignore_errors=True)
    hidden = (file for pattern in (".*", "figures/.*", "cells/*/.*") for file in folder.glob(pattern))
    for file in (folder / CANCEL, *(file for file in hidden if file.is_file())):
        file.unlink(missing_ok=True)
