"""Ray Tune over trials: which one runs when and where, who is stopped early, what is tried next.

Tune's own files are of no use afterwards and are removed; what has been done is in the cells' records.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune

from tt_ray.distributed.sweeps.capacity import Capacity
from tt_ray.distributed.sweeps.trial import Task, run_trial
from tt_ray.errors import UserError
from tt_ray.search import Range, SearchConfig, Space

TaskOf = Callable[[Mapping[str, Any]], Task]
"""The task of a trial's configuration, as Tune has it."""
_COUNT, _VALUE = "count", "value"  # what a trial reports
_INDEX = "index"  # a trial's number, beside the parameters that Optuna chooses
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command's
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "100000",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Events(Protocol):
    """Who is told what happens to the trials, in the process that runs them."""

    def started(self, task: Task) -> None:
        """A process has begun with the trial."""
        ...

    def ended(self, task: Task, cause: str) -> None:
        """The trial is over: by itself, by the scheduler, or for `cause` where its process died."""
        ...

    def refused(self, cause: str) -> None:
        """The search has proposed settings that do not go together."""
        ...

    def cancelled(self) -> bool:
        """Whether all trials are to stop."""
        ...


@dataclass(frozen=True)
class Past:
    """A trial of an earlier command: what the scheduler and the search have learnt from it."""

    settings: Mapping[str, Any]
    reports: Sequence[Sequence[float]]
    value: float | None
    """The metric in the end; None if it was stopped or has failed."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the trials of a sweep are run."""

    search: SearchConfig
    capacity: Capacity
    make_task: Callable[[Mapping[str, Any], str | None, int], Task]
    """Of settings, case and number; goes to the trials' processes."""
    last_rung: int
    max_failures: int
    folder: Path
    """For Tune's files, shared by all hosts."""

    def run(self, points: Sequence[Mapping[str, Any]], past: Sequence[Past], events: Events) -> None:
        """Run these points (settings, case, index) in their order."""
        space = {"point": tune.grid_search([dict(point) for point in points])}
        self._fit(space, None, 1, past, events, lambda config: config["point"])

    def run_optuna(
        self, case: str | None, budget: int, first: int, past: Sequence[Past], events: Events
    ) -> None:
        """Run `budget` more points of Optuna's choice in a case; their numbers begin at `first`."""
        searcher = optuna_search(self.search, past, first)

        def point(config: Mapping[str, Any]) -> dict[str, Any]:
            return {"settings": _decoded(self.search, config), "case": case, "index": config[_INDEX]}

        self._fit({}, searcher, budget, past, events, point)

    def _fit(
        self,
        space: dict[str, Any],
        searcher: Any,
        samples: int,
        past: Sequence[Past],
        events: Events,
        point: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        _prepare()
        make_task = self.make_task

        def task_of(config: Mapping[str, Any]) -> Task:
            where = point(config)
            return make_task(where["settings"], where["case"], where["index"])

        def trainable(config: dict[str, Any]) -> None:
            try:
                task = task_of(config)
            except UserError:
                return  # the driver sees it too, and says so
            run_trial(task, lambda count, value: tune.report({_COUNT: count, _VALUE: value}))

        shutil.rmtree(self.folder, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(trainable, self.capacity.bundle),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                search_alg=searcher,
                scheduler=scheduler(self.search, self.last_rung, past),
                max_concurrent_trials=self.capacity.concurrent,
                reuse_actors=True,  # a process starts in seconds, and most trials take little more
            ),
            run_config=tune.RunConfig(
                name=self.folder.name,
                storage_path=str(self.folder.parent),
                callbacks=[_Told(events, task_of)],
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                stop=_Cancel(events, task_of),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def scheduler(search: SearchConfig, last_rung: int, past: Sequence[Past]) -> Any:
    """Successive halving where the search asks for it, which has seen what earlier trials reported."""
    if search.scheduler is None:
        return None
    from ray.tune.schedulers import ASHAScheduler

    halving = ASHAScheduler(
        time_attr=_COUNT,
        metric=_VALUE,
        mode=_mode(search),
        max_t=last_rung,
        grace_period=search.scheduler.grace,
        reduction_factor=search.scheduler.reduction,
        stop_last_trials=False,  # at the last rung there is nothing left to save
    )
    for number, trial in enumerate(past):
        stand_in = SimpleNamespace(trial_id=f"past-{number}")
        halving.on_trial_add(None, stand_in)
        for count, value in trial.reports:
            halving.on_trial_result(None, stand_in, {_COUNT: count, _VALUE: value})
    return halving


def optuna_search(search: SearchConfig, past: Sequence[Past], first: int = 0) -> Any:
    """Optuna's sampler over the search's parameters, which knows how earlier trials ended.

    What it suggests is numbered from `first` on.
    """
    optuna = import_optuna()
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {key: _distribution(optuna, space) for key, space in search.parameters.items()}
    known = [trial for trial in past if trial.value is not None]
    options: dict[str, Any] = {}
    if known:
        options["points_to_evaluate"] = [_encoded(search, trial.settings) for trial in known]
        options["evaluated_rewards"] = [trial.value for trial in known]
    seed = search.seed + len(past)  # going on with the same seed would propose what it began with again

    class Numbered(OptunaSearch):
        def suggest(self, trial_id: str) -> Any:
            suggested = super().suggest(trial_id)
            if isinstance(suggested, dict):
                suggested = {**suggested, _INDEX: first + len(self._ot_trials) - 1}
            return suggested

    return Numbered(space=space, metric=_VALUE, mode=_mode(search), seed=seed, **options)


def import_optuna() -> Any:
    """The optional package; `UserError` where it is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "search.method: optuna is not installed; `pip install 'tt-ray[optuna]'`, or use method: random"
        ) from None
    return optuna


def _distribution(optuna: Any, space: Space) -> Any:
    distributions = optuna.distributions
    if not isinstance(space, Range):
        return distributions.CategoricalDistribution([_choice(value) for value in space.values])
    if space.whole:
        return distributions.IntDistribution(int(space.min), int(space.max), log=space.log)
    return distributions.FloatDistribution(space.min, space.max, log=space.log)


def _choice(value: Any) -> Any:
    """A choice as Optuna can hold it: lists and the like are none."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _encoded(search: SearchConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    spaces = search.parameters
    return {k: v if isinstance(spaces[k], Range) else _choice(v) for k, v in settings.items()}


def _decoded(search: SearchConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's choices as the values that the search names."""
    settings = {}
    for key, space in search.parameters.items():
        value = config[key]
        if not isinstance(space, Range):
            value = next(choice for choice in space.values if _choice(choice) == value)
        settings[key] = value
    return settings


def _mode(search: SearchConfig) -> str:
    return "max" if search.metric.goal == "maximize" else "min"


def _prepare() -> None:
    """Tune's own lines would bury the live table."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Here:
    """Tune writes down what it is given in case it is restored, which it never is: so nothing of this."""

    def __init__(self, events: Events, task_of: TaskOf) -> None:
        self._events, self._task_of = events, task_of
        self._looked = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Told(_Here, tune.Callback):
    """Passes Tune's news on."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, self._events.started)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, lambda task: self._events.ended(task, ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, lambda task: self._events.ended(task, _cause(trial)))

    def _tell(self, trial: Any, how: Callable[[Task], None]) -> None:
        try:
            how(self._task_of(trial.config))
        except UserError as error:
            self._events.refused(str(error))


class _Cancel(_Here, tune.Stopper):
    """Ends everything when it is to be cancelled."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if time.monotonic() - self._looked < 0.5:
            return False
        self._looked = time.monotonic()
        return self._events.cancelled()


def _cause(trial: Any) -> str:
    """Why a trial's process died, in one line."""
    error = trial.get_error()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] if error is not None else []
    return lines[-1] if lines else "its process died"
