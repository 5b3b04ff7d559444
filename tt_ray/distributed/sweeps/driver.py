"""A sweep from end to end: its data, its trials by Ray Tune, the winner once more on fresh seeds, the report.

What is done is known from the cells' records and the stage store alone, so that a driver killed anywhere
loses nothing: the next one runs what is missing.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tt_ray.distributed import cluster
from tt_ray.distributed.line import Line, Progress, check_data, collect_data
from tt_ray.distributed.sweeps.board import CANCEL, Board
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.distributed.sweeps.cells import Record
from tt_ray.distributed.sweeps.confirm import confirm_winners
from tt_ray.distributed.sweeps.report import report, write_tables
from tt_ray.distributed.sweeps.study import Study, by_data, data_key
from tt_ray.distributed.sweeps.table import CONFIRMED, trial_metrics
from tt_ray.distributed.sweeps.trial import Task
from tt_ray.distributed.sweeps.tuning import Past, Tuning, import_optuna
from tt_ray.errors import UserError
from tt_ray.locks import exclusive
from tt_ray.sweep_file import Sweep, Trial
from tt_ray.tracking import Courier, MlflowTracker, Run, provenance_tags, read

RUNNING = (
    "this sweep is running already; `tt-ray results NAME --follow` shows it, `tt-ray cancel NAME` ends it"
)
TABLES_EVERY = 20.0  # seconds between two partial tables in MLflow


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How a sweep is taken up."""

    resume: bool = False
    """Go on with one that was interrupted."""
    only_failed: bool = False
    """Run the cells that have failed once more, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep has to show at its end."""

    frame: pd.DataFrame
    folder: Path
    cancelled: bool
    problems: Sequence[str]
    """Settings that Optuna has proposed and that do not go together."""
    data: Sequence[str]
    """A line on each data set, to compare the planners with."""


@dataclass
class Making:
    """Makes tasks of settings, in the driver and in the trials' processes."""

    sweep: Sweep
    folder: Path
    data: Mapping[Any, str]
    capacity: Capacity

    def __call__(self, settings: Mapping[str, Any], case: str | None, index: int) -> Task:
        """The task of a trial; `UserError` where the settings do not go together."""
        trial, search = self.sweep.trial(settings, case, index), self.sweep.search
        by_steps = search.scheduler is not None and search.scheduler.rung == "training_steps"
        return Task(
            trial=trial,
            sweep=self.sweep.base.name,
            folder=self.folder,
            data=self.data[data_key(trial.config)],
            allocation=self.capacity.allocation,
            rungs=rungs_of(self.sweep, trial),
            reports_training=by_steps,
            metric=search.metric.name,
        )


def check_sweep(sweep: Sweep, flags: Flags) -> Study:
    """The study, with all refused that can be known before anything is started or written."""
    study = Study(with_absolute_storage(sweep))
    if study.by_optuna:
        import_optuna()
    _check_scheduler(sweep)
    begun = study.interrupted()
    if begun and not (flags.resume or flags.only_failed):
        raise UserError(
            f"sweep {sweep.base.name!r} was interrupted with {begun} cells unfinished; add --resume to go on "
            f"from there, or remove {study.folder} to begin again"
        )
    for key, trials in by_data(study.samples()).items():
        config = trials[0].config
        if check_data(config):
            line = Line(config, _Silent())
            line.use(line.episodes.spec)
            study.has_read(key, line.episodes)
    return study


def with_absolute_storage(sweep: Sweep) -> Sweep:
    """The same sweep for processes in other working folders."""
    resources = sweep.base.resources
    absolute = replace(resources, storage=str(Path(resources.storage).resolve()))
    return replace(sweep, base=replace(sweep.base, resources=absolute))


def run_sweep(
    study: Study,
    tracker: MlflowTracker,
    flags: Flags,
    progress: Progress,
    watch: Callable[[Board], AbstractContextManager[Any]] | None = None,
) -> SweepOutcome:
    """All that is still to do of a sweep, with Ray up; `watch(board)` is a context manager that shows it."""
    folder = study.folder
    with exclusive(folder, RUNNING), _parent(study, tracker) as parent:
        _tidy(folder)
        (folder / "sweep.yaml").write_text(study.sweep.source)
        parent.artifact(folder / "sweep.yaml")
        _prepare_data(study, progress)
        courier = Courier(tracker.uri, tracker.experiment)
        try:
            board = Board(study, courier, parent.identity, _TableKeeper(study, parent))
            with watch(board) if watch is not None else nullcontext():
                _run_trials(study, flags, board)
            confirmed = [] if board.cancelled() else confirm_winners(study, board, progress)
            frame = with_confirmed(board.frame(), confirmed)
            report(study, frame, confirmed, parent, _launches(folder))
        finally:
            courier.close(tracker.finish_wait)
            shutil.rmtree(folder / "progress", ignore_errors=True)
        if board.cancelling:
            (folder / CANCEL).unlink(missing_ok=True)
            parent.set_tags({"status": "cancelled"})
            parent.finish("KILLED")
    return SweepOutcome(
        frame=frame,
        folder=folder,
        cancelled=board.cancelling,
        problems=board.problems,
        data=[str(facts) for facts in study.facts.values()],
    )


def _run_trials(study: Study, flags: Flags, board: Board) -> None:
    search, resources = study.sweep.search, study.sweep.base.resources
    to_do = [(trial, study.to_do(trial, only_failed=flags.only_failed)) for trial in study.trials]
    pending = [trial for trial, seeds in to_do if seeds]
    budget = _budget(study) if study.by_optuna and not flags.only_failed else {}
    if not pending and not any(budget.values()):
        return
    for trial, seeds in to_do:
        study.reopen(trial, seeds)
    at_once = min(search.max_concurrent_trials, len(pending) + sum(budget.values()))
    capacity = share_out(resources, cluster.offer(), at_once)
    tuning = Tuning(
        search=search,
        capacity=capacity,
        make_task=Making(study.sweep, study.folder, study.data, capacity),
        last_rung=_last_rung(study),
        max_failures=resources.max_failures,
        folder=study.folder / "tune",
    )
    if pending:
        points = [
            {"settings": dict(trial.settings), "case": trial.case, "index": trial.index}
            for trial in study.in_order(pending)
        ]
        tuning.run(points, _past(study), board)
    for case, count in budget.items():
        if count and not board.cancelled():
            first = 1 + max((trial.index for trial in study.trials), default=-1)
            tuning.run_optuna(case, count, first, _past(study, case), board)
            study.refresh()


def _budget(study: Study) -> dict[str | None, int]:
    """How many trials Optuna has left in each case."""
    wanted = study.sweep.search.num_trials or 0
    begun = Counter(trial.case for trial in study.trials)
    return {case: max(0, wanted - begun[case]) for case in study.sweep.case_names}


def _past(study: Study, case: str | None = None) -> list[Past]:
    """What the trials that are over have reported, in one case or in all."""
    past, metric = list[Past](), study.sweep.search.metric.name
    for trial in study.trials:
        records = study.records(trial)
        reports = max((record.reports for record in records), key=len, default=[])
        if reports and all(record.ended for record in records) and case in (None, trial.case):
            finished = all(record.status == "finished" for record in records)
            value = trial_metrics(records, trial.config).get(metric) if finished else None
            past.append(Past(trial.settings, reports, value))
    return past


def _last_rung(study: Study) -> int:
    """The furthest that any trial can get, in what a rung counts."""
    how = study.sweep.search.scheduler
    configs = [trial.config for trial in study.samples()]
    if how is not None and how.rung == "training_steps":
        return max(config.training.steps for config in configs)
    return max(config.evaluation.episodes for config in configs)


def rungs_of(sweep: Sweep, trial: Trial) -> tuple[int, ...]:
    """Episodes after which the scheduler is asked about a trial; the last is all of them."""
    how, every = sweep.search.scheduler, trial.config.evaluation.episodes
    if how is None or how.rung != "episodes":
        return (every,)
    rungs, rung = list[int](), how.grace
    while rung < every:
        rungs.append(rung)
        rung *= how.reduction
    return (*rungs, every)


def _prepare_data(study: Study, progress: Progress) -> None:
    """Every data set, collected where that is to do, and the tokens that the known trials need."""
    for key, trials in by_data(study.samples()).items():
        config = trials[0].config
        if key not in study.data:
            collect_data(config, progress, cluster.resolve(config.resources, cluster.offer()))
        lines = {tuple(sorted(vars(trial.config.discretizer).items())): trial.config for trial in trials}
        episodes = None
        for one in lines.values() if not study.by_optuna else [config]:
            line = Line(one, progress)
            if episodes is None and key not in study.data:
                episodes = line.episodes
                line.use(episodes.spec)
                study.has_read(key, episodes)
            if episodes is not None:
                line.episodes = episodes
            line.locate(study.data[key])
            line.make_tokens()


def with_confirmed(frame: pd.DataFrame, confirmed: Sequence[tuple[Trial, list[Record]]]) -> pd.DataFrame:
    """The table with the winners' scores on fresh seeds: normalised, or returns where there are none."""
    frame = frame.copy()
    for trial, records in confirmed:
        figures = trial_metrics(records, trial.config)
        stem = "score" if "score/mean" in figures else "return"
        row = frame.index[frame["fingerprint"] == trial.fingerprint]
        for name in CONFIRMED:
            frame.loc[row, name] = figures[name.replace("confirmed", stem)]
    return frame


class _TableKeeper:
    """Writes the partial tables as trials end, and sends them to MLflow now and then."""

    def __init__(self, study: Study, parent: Run) -> None:
        self._study, self._parent, self._sent = study, parent, time.monotonic()

    def __call__(self, board: Board) -> None:
        if time.monotonic() - self._sent > TABLES_EVERY:
            self._sent = time.monotonic()
            for path in write_tables(self._study, board.frame()):
                self._parent.artifact(path)


class _Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        yield lambda done, message: None

    def note(self, message: str) -> None:
        """Nothing."""


def _parent(study: Study, tracker: MlflowTracker) -> Run:
    base, search = study.sweep.base, study.sweep.search
    tags = {
        **provenance_tags(),
        "kind": "sweep",
        "sweep": base.name,
        "question": base.question,
        "search.method": search.method,
        "search.metric": search.metric.name,
        "search.goal": search.metric.goal,
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
    for file in (
        folder / CANCEL,
        *folder.glob(".*.md"),
        *folder.glob(".*.parquet"),
        *folder.glob("cells/*/.*"),
    ):
        file.unlink(missing_ok=True)


def _check_scheduler(sweep: Sweep) -> None:
    """`UserError` where the scheduler cannot see into the training."""
    how, workers = sweep.search.scheduler, sweep.base.resources.workers
    if how is not None and how.rung == "training_steps" and workers not in ("auto", 1):
        key = "search.scheduler.rung"
        raise UserError(
            f"{sweep.places.of(key)}: {key}: training_steps needs the trial to train in its own process; "
            f"resources.workers must be 1 or auto, not {workers}"
        )
