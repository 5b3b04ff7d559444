"""Ray Tune over trials: which one runs when and where, who is stopped early, what is tried next.

Tune's own files are of no use afterwards and are removed; what has been done is in the cells' records.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback

from tt_ray.distributed.sweeps.capacity import Capacity
from tt_ray.distributed.sweeps.halving import COUNT, VALUE, Past, scheduler
from tt_ray.distributed.sweeps.ownership import require_own
from tt_ray.distributed.sweeps.proposals import INDEX, decoded, optuna_search
from tt_ray.distributed.sweeps.trial import Task, run_trial
from tt_ray.distributed.vigil import NOTICED
from tt_ray.errors import UserError
from tt_ray.search import SearchConfig

TaskOf = Callable[[Mapping[str, Any]], Task]
"""The task of a trial's configuration, as Tune has it."""

_GUESSES = "Some common causes include"  # what Ray goes on with, after what it knows
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

        def usable(settings: Mapping[str, Any]) -> bool:
            try:
                self.make_task(settings, case, first)
            except UserError as error:
                events.refused(str(error))
                return False
            return True

        def point(config: Mapping[str, Any]) -> dict[str, Any]:
            return {"settings": decoded(self.search, config), "case": case, "index": config[INDEX]}

        alone = [replace(trial, case=None) for trial in past]
        searcher = optuna_search(self.search, alone, first, usable)
        self._fit({}, searcher, budget, alone, events, point)

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
            # A trial that is stopped has to give back what it holds before its process takes the next one.
            os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
            run_trial(task_of(config), lambda count, value: tune.report({COUNT: count, VALUE: value}))

        bundles = [self.capacity.bundle, *self.capacity.actor_bundles]
        self._prepare_folder()
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory(bundles)),
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
                callbacks=[_Told(events, task_of), _Mute()],
                failure_config=tune.FailureConfig(max_failures=self.max_failures),
                stop=_Cancel(events, task_of),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare_folder(self) -> None:
        """An empty folder that this user alone can read and write: Tune reads its pickled errors back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        require_own(self.folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made anew: {error.strerror}") from error


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
        time.sleep(NOTICED)  # where Ray itself has died, all ends here, and no trial has failed
        self._tell(trial, lambda task: self._events.ended(task, _cause(trial)))

    def _tell(self, trial: Any, how: Callable[[Task], None]) -> None:
        how(self._task_of(trial.config))


class _Mute(TrialProgressCallback):
    """In place of Tune's own, which prints a line for each trial that has reported nothing."""

    def _print(self, msg: str) -> None:
        pass


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
    try:
        text = Path(trial.error_file).read_text(errors="replace")  # the storage has it only later
    except (OSError, TypeError):
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].partition(_GUESSES)[0].strip() if lines else "its process died"
