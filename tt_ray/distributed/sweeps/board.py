"""What is known of a sweep's trials while they run: rows for the tables, and news for MLflow."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import pandas as pd

from tt_ray.distributed.sweeps.cells import Record, cell_folder, cell_name, read_record
from tt_ray.distributed.sweeps.progress import progress_file, read_progress
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import trial_row, trials_frame
from tt_ray.distributed.sweeps.trial import Task, close_cell, place_tags
from tt_ray.sweep_file import Trial
from tt_ray.tracking import Courier, Journal, open_journal

CANCEL = "cancel"
"""Name of the file by which another process asks the sweep to stop."""


class Board:
    """A row for each trial, kept up to date by Tune's events (`tuning.Events`)."""

    def __init__(
        self, study: Study, courier: Courier, parent: str, keep: Callable[[Board], None] | None = None
    ) -> None:
        """`keep` is called whenever something has changed."""
        self.study, self._courier, self._parent, self._keep = study, courier, parent, keep
        self.on_change: Callable[[], None] | None = None  # for whoever shows it
        self.began = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        self.live: dict[str, Trial] = {}
        """Trials that a process works on, by fingerprint."""
        self.cancelling = False
        self.problems: list[str] = []
        for trial in study.trials:
            self.refresh(trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After Ctrl-C and the like nothing works on these trials any more, so none of their runs goes on."""
        interrupted = list(self.live.values())
        self.live.clear()
        for trial in interrupted:
            self._interrupted(trial)
            self.refresh(trial)

    def refresh(self, trial: Trial) -> None:
        """Read what the trial's cells say."""
        row = trial_row(trial, self.study.records(trial), len(trial.config.seeds))
        if row["status"] in ("running", "waiting"):
            row["status"] = "running" if trial.fingerprint in self.live else "waiting"
        self.rows[trial.fingerprint] = row

    def rename_cells(self) -> None:
        """Tell MLflow of ended cells whose trial has another name or number since the file was extended."""
        for trial in self.study.trials:
            for seed in trial.config.seeds:
                folder = cell_folder(self.study.folder, trial, seed)
                record = read_record(folder)
                if record is not None and record.ended and record != record.renamed(trial):
                    journal = Journal(folder)
                    name = cell_name(trial, seed, record.best)
                    journal.write({"tags": {**place_tags(trial), "mlflow.runName": name}})
                    record.renamed(trial).save(folder)
                    self._courier.add(cell_name(trial, seed), folder, self._parent)

    def started(self, task: Task) -> None:
        """See `tuning.Events`."""
        trial = task.trial
        self.live[trial.fingerprint] = trial
        for seed in task.seeds:
            self._courier.add(cell_name(trial, seed), cell_folder(task.folder, trial, seed), self._parent)
        self._changed(trial)

    def ended(self, task: Task, cause: str) -> None:
        """See `tuning.Events`."""
        self.live.pop(task.trial.fingerprint, None)
        if not cause and self.study.sweep.search.scheduler is None:
            cause = f"left no result in {task.folder}; is resources.storage shared by all hosts?"
        if not self.cancelled():
            records = {record.seed: record for record in self.study.records(task.trial)}
            for seed in task.seeds:
                record = records.get(seed) or Record.of(task.trial, seed)
                if not record.ended:
                    self._end_for(task, record, cause)
        else:
            self._interrupted(task.trial)
        progress_file(task.folder, task.trial).unlink(missing_ok=True)
        self._changed(task.trial)

    def refused(self, cause: str) -> None:
        """See `tuning.Events`."""
        if cause not in self.problems:
            self.problems.append(cause)

    def cancelled(self) -> bool:
        """See `tuning.Events`."""
        self.cancelling = self.cancelling or (self.study.folder / CANCEL).exists()
        return self.cancelling

    def counts(self) -> Mapping[str, int]:
        """How many trials there are of each status."""
        return Counter(row["status"] for row in self.rows.values())

    def frame(self) -> pd.DataFrame:
        """The table of trials as it is now."""
        return trials_frame(list(self.rows.values()), self.study.sweep.search)

    def progress(self) -> list[tuple[str, str]]:
        """Name of each running trial, and what it says of itself."""
        return [(trial.name, read_progress(self.study.folder, trial)) for trial in list(self.live.values())]

    def _end_for(self, task: Task, record: Record, cause: str) -> None:
        """End a cell whose process was stopped by the scheduler, or died for `cause`."""
        folder = cell_folder(task.folder, task.trial, record.seed)
        record.cause = cause
        run = open_journal(folder)
        close_cell(run, folder, task.trial, record, "failed" if cause else "stopped")

    def _interrupted(self, trial: Trial) -> None:
        """Say in MLflow that cells which have not ended do not run, until a later command resumes them."""
        ended = {record.seed for record in self.study.records(trial) if record.ended}
        for seed in trial.config.seeds:
            if seed not in ended:
                self._courier.end(cell_folder(self.study.folder, trial, seed), "KILLED")

    def _changed(self, trial: Trial) -> None:
        self.refresh(trial)
        if self._keep is not None:
            self._keep(self)
        if self.on_change is not None:
            self.on_change()
