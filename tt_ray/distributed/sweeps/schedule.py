"""Which trials are still to run, and how: tasks for Ray Tune, rungs, and what is known of earlier trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ray.distributed import cluster
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.distributed.sweeps.halving import Past
from tt_ray.distributed.sweeps.study import DataFacts, Study, data_key
from tt_ray.distributed.sweeps.table import trial_metrics
from tt_ray.distributed.sweeps.trial import Task
from tt_ray.distributed.sweeps.tuning import Tuning
from tt_ray.search import Values
from tt_ray.sweep_file import Sweep, Trial


@dataclass
class Making:
    """Makes tasks of settings, in the driver and in the trials' processes."""

    sweep: Sweep
    folder: Path
    data: Mapping[Any, str]
    capacity: Capacity
    facts: Mapping[Any, DataFacts]

    def __call__(self, settings: Mapping[str, Any], case: str | None, index: int) -> Task:
        """The task of a trial; `UserError` where the settings do not go together."""
        trial, search = self.sweep.trial(settings, case, index), self.sweep.search
        key = data_key(trial.config)
        by_steps = search.scheduler is not None and search.scheduler.rung == "training_steps"
        return Task(
            trial=trial,
            sweep=self.sweep.base.name,
            folder=self.folder,
            data=self.data[key],
            profile=self.facts[key].profile,
            allocation=self.capacity.allocation,
            rungs=rungs_of(self.sweep, trial),
            reports_training=by_steps,
            metric=search.metric.name,
        )


def run_trials(study: Study, board: Board, *, only_failed: bool) -> None:
    """Run what is not finished, or only what has failed; `board` is told what happens."""
    resources = study.sweep.base.resources
    to_do = [(trial, study.to_do(trial, only_failed=only_failed)) for trial in study.trials]
    pending = [trial for trial, seeds in to_do if seeds]
    budget = _budget(study) if study.by_optuna and not only_failed else {}
    if not pending and not any(budget.values()):
        return
    for trial, seeds in to_do:
        study.reopen(trial, seeds)
    for _ in range(1 + resources.max_failures):  # again, should Tune have dropped any on the way
        for some in _phases(study, pending):
            if not board.cancelled():
                points = [
                    {"settings": dict(trial.settings), "case": trial.case, "index": trial.index}
                    for trial in some
                ]
                _tuning(study, len(points)).run(points, _past(study), board)
        pending = [trial for trial in pending if any(not r.ended for r in study.records(trial, begun=False))]
    for case, count in budget.items():
        if count and not board.cancelled():
            first = 1 + max((trial.index for trial in study.trials), default=-1)
            _tuning(study, count).run_optuna(case, count, first, _past(study, case), board)
            study.refresh()


def _phases(study: Study, trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials in their order, by turns: where few models are missing, those that train them go alone.

    So they have all CPUs, which would otherwise be held by trials that wait for these models.
    """
    ordered, offered = study.in_order(trials), cluster.offer()
    leaders = study.leaders(ordered)
    places = min(study.sweep.search.max_concurrent_trials, offered.cpus, len(ordered))
    if study.sweep.search.scheduler is not None or offered.gpus or len(leaders) >= places:
        return [ordered] if ordered else []
    rest = [trial for trial in ordered if trial not in leaders]
    return [phase for phase in (leaders, rest) if phase]


def _tuning(study: Study, trials: int) -> Tuning:
    """How so many trials are run."""
    search, resources = study.sweep.search, study.sweep.base.resources
    capacity = share_out(resources, cluster.offer(), min(search.max_concurrent_trials, trials))
    return Tuning(
        search=search,
        capacity=capacity,
        make_task=Making(study.sweep, study.folder, study.data, capacity, study.facts),
        last_rung=_last_rung(study),
        max_failures=resources.max_failures,
        folder=study.folder / "tune",
    )


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
        whole = len(records) == len(trial.config.seeds) and all(record.ended for record in records)
        if whole and case in (None, trial.case):
            finished = all(record.status == "finished" for record in records)
            value = trial_metrics(records, trial.config).get(metric) if finished else None
            past.append(Past(trial.settings, reports, value, trial.case))
    return past


def _last_rung(study: Study) -> int:
    """The furthest that any trial can get, in what a rung counts."""
    how, search, base = study.sweep.search.scheduler, study.sweep.search, study.sweep.base
    by_steps = how is not None and how.rung == "training_steps"
    key = "training.steps" if by_steps else "evaluation.episodes"
    counts = [base.training.steps if by_steps else base.evaluation.episodes]
    counts += [case.settings[key] for case in search.cases if key in case.settings]
    space = search.parameters.get(key)
    if space is not None:
        counts = [*space.values] if isinstance(space, Values) else [int(space.max)]
    return max(counts)


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
