"""What decides while a sweep runs: successive halving and Optuna, also when it goes on where it was."""

import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from ray.tune.schedulers import TrialScheduler
from study_tools import BY_LOSS, HORIZONS, STEPS, cells, launch, make_sweep, played

from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.halving import COUNT, VALUE, Past, scheduler
from tt_ray.distributed.sweeps.proposals import INDEX, decoded, optuna_search
from tt_ray.distributed.sweeps.schedule import rungs_of
from tt_ray.distributed.sweeps.trial import Report, Task
from tt_ray.distributed.train import steps_done
from tt_ray.errors import UserError
from tt_ray.search import MetricConfig, Range, SchedulerConfig, SearchConfig, Values
from tt_ray.sweep_file import Sweep
from tt_ray.training.loop import Trainer

RUNGS = (1, 3, 9)
STOP = TrialScheduler.STOP
Reports = list[tuple[int, float]]


def halving_search(goal: str = "maximize", reduction: int = 3) -> SearchConfig:
    return SearchConfig(
        metric=MetricConfig(name="score/mean", goal=goal),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(type="asha", rung="episodes", grace=1, reduction=reduction),
    )


class Decisions:
    """A scheduler under test: one trial after the other, each until it is stopped."""

    def __init__(self, search: SearchConfig, past: Sequence[Past] = ()) -> None:
        self.halving = scheduler(search, RUNGS[-1], past)

    def run(self, name: str, reports: Reports, case: str | None = None) -> Reports:
        """Those of `reports` that the trial gets to make."""
        trial = SimpleNamespace(trial_id=name, config={"point": {"case": case}})
        self.halving.on_trial_add(None, trial)
        made: Reports = []
        for count, value in reports:
            made.append((count, value))
            if self.halving.on_trial_result(None, trial, {COUNT: count, VALUE: value}) == STOP:
                break
        return made


def by_scheduler(sweep: Sweep, last_rung: int) -> Callable[[Task], Report]:
    """Reports that go to the sweep's own scheduler, which may end the trial."""
    halving = scheduler(sweep.search, last_rung, [])

    def reporting(task: Task) -> Report:
        trial = SimpleNamespace(trial_id=task.trial.name, config={"point": {"case": task.trial.case}})
        halving.on_trial_add(None, trial)

        def report(count: float, value: float) -> None:
            if halving.on_trial_result(None, trial, {COUNT: count, VALUE: value}) == STOP:
                raise SystemExit

        return report

    return reporting


class TestHalving:
    @pytest.mark.parametrize(
        ("grace", "reduction", "episodes", "expected"),
        [
            (1, 3, 9, (1, 3, 9)),
            (1, 3, 10, (1, 3, 9, 10)),
            (2, 2, 7, (2, 4, 7)),
            (5, 3, 5, (5,)),
            (4, 2, 5, (4, 5)),
            (8, 3, 100, (8, 24, 72, 100)),
        ],
    )
    def test_rungs(
        self, tmp_path: Path, grace: int, reduction: int, episodes: int, expected: tuple[int, ...]
    ) -> None:
        asha = {"type": "asha", "rung": "episodes", "grace": grace, "reduction": reduction}
        sweep = make_sweep(tmp_path, {**HORIZONS, "scheduler": asha}, evaluation={"episodes": episodes})
        assert rungs_of(sweep, sweep.trials()[0]) == expected

    def test_all_episodes_at_once_where_no_rung_counts_them(self, tmp_path: Path) -> None:
        steps = {**BY_LOSS, "scheduler": {"type": "asha", "rung": "training_steps", "grace": 20}}
        for search in ({}, steps):
            sweep = make_sweep(tmp_path, {**HORIZONS, **search})
            assert rungs_of(sweep, sweep.trials()[0]) == (4,)

    def test_none_was_asked_for(self) -> None:
        assert scheduler(SearchConfig(), 9, []) is None

    @pytest.mark.parametrize("goal", ["maximize", "minimize"])
    def test_the_worse_of_two_is_stopped_at_the_first_rung(self, goal: str) -> None:
        decisions = Decisions(halving_search(goal))
        good, bad = (9.0, 1.0) if goal == "maximize" else (1.0, 9.0)
        whole = [(count, good) for count in RUNGS]
        assert decisions.run("good", whole) == whole
        assert decisions.run("bad", [(count, bad) for count in RUNGS]) == [(1, bad)]
        assert decisions.run("as good", whole) == whole

    @pytest.mark.filterwarnings("ignore:All-NaN")
    def test_what_is_not_a_number_stops_nobody_else(self) -> None:
        decisions = Decisions(halving_search())
        decisions.run("nan", [(count, math.nan) for count in RUNGS])
        whole = [(count, 1.0) for count in RUNGS]
        assert decisions.run("real", whole) == whole

    def test_cases_are_not_compared(self) -> None:
        decisions = Decisions(halving_search())
        easy, hard = ([(count, value) for count in RUNGS] for value in (90.0, 3.0))
        assert decisions.run("a", easy, "easy") == easy
        assert decisions.run("b", hard, "hard") == hard
        assert decisions.run("c", hard, "easy") == hard[:1]

    @pytest.mark.parametrize("goal", ["maximize", "minimize"])
    def test_going_on_after_an_interruption_decides_as_if_there_had_been_none(self, goal: str) -> None:
        stopped = 0
        for seed in range(30):
            generator = random.Random(seed)
            search = halving_search(goal, reduction=generator.choice([2, 3]))
            trials = [
                (f"t{i}", [(c, generator.random()) for c in RUNGS], generator.choice([None, "x"]))
                for i in range(12)
            ]
            whole = Decisions(search)
            undisturbed = [whole.run(*trial) for trial in trials]
            stopped += sum(len(made) < len(RUNGS) for made in undisturbed)
            split = generator.randrange(1, 12)
            past = [
                Past({}, made, made[-1][1] if len(made) == len(RUNGS) else None, case=case)
                for made, (_, _, case) in zip(undisturbed[:split], trials, strict=False)
            ]
            resumed = Decisions(search, past)
            assert [resumed.run(*trial) for trial in trials[split:]] == undisturbed[split:]
        assert 30 < stopped < 300


class TestHalvingOfTrials:
    def test_a_hopeless_learning_rate_is_stopped_and_can_be_taken_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        often = {"validate_every": 10}
        search = {
            "parameters": {"training.learning_rate": {"values": [1e-3, 1.0]}},
            **BY_LOSS,
            "scheduler": {"type": "asha", "rung": "training_steps", "grace": 20, "reduction": 2},
        }
        sweep = make_sweep(tmp_path, search, training=often)
        board = launch(sweep, reporting=by_scheduler(sweep, STEPS))
        study, frame = board.study, board.frame()
        assert frame["status"][1] == "stopped"
        assert frame["status"][0] == "finished"
        assert frame["val/loss"][1] > frame["val/loss"][0] + 0.1
        record = study.records(study.trials[1])[0]
        assert [count for count, _ in record.reports] == [10, 20]
        assert record.metrics["val/loss"] == record.reports[-1][1]
        assert (frame["episodes"][1], record.checkpoint) == (0, "")
        key = str(study.model_key(study.trials[1].config, 0))
        assert study.store.find("models", key) is None
        assert steps_done(study.store.path("models", key)) == 10
        assert study.store.find("models", str(study.model_key(study.trials[0].config, 0))) is not None
        assert study.store.holder("models", key) is None

        updates, update = list[int](), Trainer.update
        monkeypatch.setattr(
            Trainer, "update", lambda self, step: (updates.append(step), update(self, step))[1]
        )
        alone = {"parameters": {"training.learning_rate": {"values": [1.0]}}}
        again = launch(make_sweep(tmp_path, alone, name="again", training=often))
        assert updates == list(range(10, STEPS))
        assert list(again.frame()["status"]) == ["finished"]
        fresh = launch(make_sweep(tmp_path / "fresh", alone, name="again", training=often)).study
        tiny.assert_same(study.store.path("models", key), fresh.store.path("models", key), STEPS)

    def test_a_stopped_trial_plays_no_more_than_its_rung(self, tmp_path: Path) -> None:
        search = {
            "parameters": {
                "planner.horizon": {"values": [1, 2, 3]},
                "planner.beam_width": {"values": [1, 2, 4]},
            },
            "scheduler": {"type": "asha", "rung": "episodes", "grace": 1, "reduction": 2},
        }
        sweep = make_sweep(tmp_path, search, evaluation={"episodes": 8})
        board = launch(sweep, reporting=by_scheduler(sweep, 8))
        frame = board.frame()
        last = [int(board.study.records(trial)[0].reports[-1][0]) for trial in board.study.trials]
        assert list(frame["episodes"]) == last
        stopped = frame["status"] == "stopped"
        assert stopped.any()
        assert set(frame["episodes"][stopped]) <= {1, 2, 4}
        assert set(frame["episodes"][~stopped]) == {8}
        assert played(tmp_path / "runs").total() == sum(last)
        assert np.isfinite(frame["score/mean"]).all()
        before = cells(board.study)
        assert cells(launch(sweep).study) == before


class TestOptuna:
    LISTS = SearchConfig(
        method="optuna",
        num_trials=8,
        parameters={
            "a.list": Values(values=([1, 2], [3], None)),
            "a.flag": Values(values=(True, False)),
            "a.mixed": Values(values=("auto", 2, 0.5, None)),
            "a.whole": Range(min=1, max=64, distribution="log_int"),
            "a.rate": Range(min=1e-5, max=1e-1, distribution="log_uniform"),
        },
    )

    def suggestions(self, search: SearchConfig, count: int, past: Sequence[Past] = (), first: int = 0) -> Any:
        searcher = optuna_search(search, past, first)
        return [searcher.suggest(f"t{i}") for i in range(count)]

    def test_any_value_survives(self) -> None:
        found = [decoded(self.LISTS, point) for point in self.suggestions(self.LISTS, 60)]
        for key in ("a.list", "a.flag", "a.mixed"):
            values = self.LISTS.parameters[key].values  # type: ignore[union-attr]
            seen = [point[key] for point in found]
            assert {repr(value) for value in seen} == {repr(value) for value in values}
        assert {type(point["a.whole"]) for point in found} == {int}
        assert all(1 <= point["a.whole"] <= 64 and 1e-5 <= point["a.rate"] <= 1e-1 for point in found)

    def test_what_is_known_goes_back_in_as_it_came_out(self) -> None:
        found = [decoded(self.LISTS, point) for point in self.suggestions(self.LISTS, 12)]
        past = [Past(settings, [[1, 0.5]], float(i)) for i, settings in enumerate(found)]
        searcher = optuna_search(self.LISTS, past)
        trials = searcher._ot_study.get_trials()
        assert [trial.value for trial in trials] == [float(i) for i in range(12)]
        assert [decoded(self.LISTS, trial.params) for trial in trials] == found

    def test_numbers_go_on_and_nothing_is_proposed_twice(self) -> None:
        small = SearchConfig(
            method="optuna", num_trials=6, parameters={"a.b": Values(values=tuple(range(6)))}
        )
        first = self.suggestions(small, 3)
        assert [point[INDEX] for point in first] == [0, 1, 2]
        past = [Past({"a.b": point["a.b"]}, [[1, 0.5]], 1.0) for point in first]
        second = self.suggestions(small, 3, past, first=3)
        assert [point[INDEX] for point in second] == [3, 4, 5]
        assert {point["a.b"] for point in first + second} == set(range(6))

    def test_it_learns_from_the_past(self) -> None:
        search = SearchConfig(method="optuna", num_trials=1, parameters={"a.b": Range(min=0, max=1)})
        for best in (0.1, 0.9):
            values = np.linspace(0, 1, 60)
            past = [Past({"a.b": float(v)}, [[1, 0.0]], -abs(float(v) - best)) for v in values]
            proposed = [point["a.b"] for point in self.suggestions(search, 8, past)]
            assert abs(np.median(proposed) - best) < 0.2

    @pytest.mark.parametrize("value", [None, math.nan, math.inf])
    def test_a_trial_without_a_figure_teaches_nothing(self, value: float | None) -> None:
        past = [
            Past(decoded(self.LISTS, point), [[1, 0.5]], value) for point in self.suggestions(self.LISTS, 3)
        ]
        assert len(optuna_search(self.LISTS, past)._ot_study.get_trials()) == 0

    def test_the_past_may_lie_outside_of_the_present_space(self) -> None:
        wide = SearchConfig(
            method="optuna",
            num_trials=4,
            parameters={"a.b": Values(values=(1, 2, 3)), "a.c": Range(min=0, max=1)},
        )
        narrow = SearchConfig(
            method="optuna",
            num_trials=4,
            parameters={"a.b": Values(values=(1, 2)), "a.c": Range(min=0, max=0.5)},
        )
        settings = [{"a.b": 3, "a.c": 0.2}, {"a.b": 1, "a.c": 0.9}, {"a.b": 2, "a.c": 0.3}]
        past = [Past(setting, [[1, 0.5]], 1.0) for setting in settings]
        assert len(optuna_search(wide, past)._ot_study.get_trials()) == 3
        known = optuna_search(narrow, past)._ot_study.get_trials()
        assert [trial.params for trial in known] == [settings[2]]

    def test_a_missing_package_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        search = {
            "method": "optuna",
            "num_trials": 2,
            "parameters": {"training.learning_rate": {"min": 1e-4, "max": 1e-2}},
        }
        sweep = make_sweep(tmp_path, search)
        check_sweep(sweep, Flags())
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(
            UserError, match=r"optuna is not installed; `pip install 'tt-ray\[optuna\]'`"
        ) as e:
            check_sweep(sweep, Flags())
        assert "\n" not in str(e.value)

    def test_it_cannot_choose_the_data(self, tmp_path: Path) -> None:
        search = {
            "method": "optuna",
            "num_trials": 2,
            "parameters": {"dataset.observation_dims": {"values": [2, 3]}},
        }
        with pytest.raises(
            UserError, match=r"sweep\.yaml:\d+: search\.parameters\.dataset\.observation_dims"
        ):
            check_sweep(make_sweep(tmp_path, search), Flags())
