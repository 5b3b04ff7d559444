"""Successive halving: at each rung only the best trials of a case go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from tt_ray.search import SearchConfig

COUNT, VALUE = "count", "value"
"""What a trial reports."""


@dataclass(frozen=True)
class Past:
    """A trial of an earlier command: what the scheduler and the search have learnt from it."""

    settings: Mapping[str, Any]
    reports: Sequence[Sequence[float]]
    value: float | None
    """The metric in the end; None if it was stopped or has failed."""
    case: str | None = None


def mode(search: SearchConfig) -> str:
    """The search's goal in Tune's words."""
    return "max" if search.metric.goal == "maximize" else "min"


def scheduler(search: SearchConfig, last_rung: int, past: Sequence[Past]) -> Any:
    """Successive halving where the search asks for it, which has seen what earlier trials reported."""
    if search.scheduler is None:
        return None
    how, goal = search.scheduler, mode(search)

    def one() -> ASHAScheduler:
        return ASHAScheduler(
            time_attr=COUNT,
            metric=VALUE,
            mode=goal,
            max_t=last_rung,
            grace_period=how.grace,
            reduction_factor=how.reduction,
            stop_last_trials=False,  # at the last rung there is nothing left to save
        )

    halving = CaseByCase(one)
    for number, trial in enumerate(past):
        config = {"point": {"case": trial.case}}
        stand_in = SimpleNamespace(trial_id=f"past-{number}", config=config)
        halving.on_trial_add(None, stand_in)
        for count, value in trial.reports:
            halving.on_trial_result(None, stand_in, {COUNT: count, VALUE: value})
    return halving


class CaseByCase(FIFOScheduler):
    """A scheduler for each case: the trials of a hard task are not compared with those of an easy one."""

    def __init__(self, make: Callable[[], ASHAScheduler]) -> None:
        super().__init__()
        self._make = make
        self._cases: dict[str | None, ASHAScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """As `TrialScheduler.on_trial_add`, and so on below."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        return str(self._of(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial is over."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial is no more."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def _of(self, trial: Any) -> ASHAScheduler:
        case = trial.config.get("point", {}).get("case")
        if case not in self._cases:
            self._cases[case] = self._make()
        return self._cases[case]
