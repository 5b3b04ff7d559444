"""A study on disk: what is done is not done again, whatever is added, fails or is interrupted."""

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from study_tools import (
    HORIZONS,
    LOG,
    RATES,
    board_of,
    cells,
    comparable,
    launch,
    make_sweep,
    nothing,
    played,
    tags,
    tasks,
    trainings,
)

from tt_ray.cli.sweep_view import forecast_table
from tt_ray.distributed.sweeps.board import CANCEL
from tt_ray.distributed.sweeps.cells import Record, cell_folder
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.study import Forecast, Study, sweep_folder
from tt_ray.distributed.sweeps.trial import run_trial
from tt_ray.errors import UserError
from tt_ray.sweep_file import Trial

RETRY = Flags(only_failed=True)
TWO = {"parameters": {"planner.horizon": {"values": [1, 2]}}}


def block_a_model(study: Study, learning_rate: float) -> Path:
    """Let the training of one setting fail: a file is where the model's folder would be."""
    (trial,) = (t for t in study.trials if t.settings["training.learning_rate"] == learning_rate)
    path = study.store.path("models", str(study.model_key(trial.config, 0)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    return path


def under_way(study: Study, trial: Trial) -> None:
    """As if a process worked on the trial's first seed, or had been killed while it did."""
    Record.of(trial, 0).save(cell_folder(study.folder, trial, 0))


def forecasts(study: Study) -> list[Forecast]:
    return [study.forecast(trial) for trial in study.trials]


def printed(study: Study) -> str:
    screen = io.StringIO()
    Console(width=120, file=screen).print(forecast_table(study))
    return screen.getvalue()


@pytest.mark.usefixtures("counted")
def test_the_same_file_again_runs_nothing(tmp_path: Path) -> None:
    first = launch(make_sweep(tmp_path))
    before, done = cells(first.study), (played(tmp_path / "runs"), trainings(tmp_path / "runs"))
    again = launch(make_sweep(tmp_path))
    assert cells(again.study) == before
    assert (played(tmp_path / "runs"), trainings(tmp_path / "runs")) == done
    assert again.frame().equals(first.frame())
    assert [len(d) for d in done] == [3 * 4, 1]


@pytest.mark.usefixtures("counted")
def test_only_what_was_added_is_run(tmp_path: Path) -> None:
    before = cells(launch(make_sweep(tmp_path, TWO)).study)
    more = {"parameters": {"planner.horizon": {"values": [3, 1, 2]}}}
    board = launch(make_sweep(tmp_path, more, seeds=[0, 7]))
    after, frame = cells(board.study), board.frame()
    assert {name: after[name] for name in before} == before
    assert len(before) == 2 * 2  # records and journals
    assert len(after) == 2 * 6
    assert len(trainings(tmp_path / "runs")) == 2
    assert played(tmp_path / "runs").total() == 6 * 4
    assert list(frame["planner.horizon"]) == [3, 1, 2]
    assert list(frame["seeds"]) == [2, 2, 2]
    assert list(frame["status"]) == 3 * ["finished"]


def test_what_was_added_is_as_if_it_had_always_been_there(tmp_path: Path) -> None:
    launch(make_sweep(tmp_path / "a", TWO))
    extended = launch(make_sweep(tmp_path / "a", HORIZONS, seeds=[0, 1])).frame()
    at_once = launch(make_sweep(tmp_path / "b", HORIZONS, seeds=[0, 1])).frame()
    assert comparable(extended).equals(comparable(at_once))


@pytest.mark.usefixtures("counted")
def test_more_episodes_play_only_the_new_ones(tmp_path: Path) -> None:
    launch(make_sweep(tmp_path))
    old = played(tmp_path / "runs")
    board = launch(make_sweep(tmp_path, evaluation={"episodes": 6}))
    assert len(trainings(tmp_path / "runs")) == 1
    now = played(tmp_path / "runs")
    assert {seed for _, seed in now - old} == {10_004, 10_005}
    assert set(now.values()) == {1}
    assert now.total() == 3 * 6
    assert list(board.frame()["episodes"]) == [6, 6, 6]
    assert list(board.frame()["reused"]) == 3 * ["tokens, model, 4 episodes"]
    fewer = launch(make_sweep(tmp_path, evaluation={"episodes": 2}))
    assert played(tmp_path / "runs") == now
    assert list(fewer.frame()["reused"]) == 3 * ["tokens, model, 2 episodes"]


@pytest.mark.usefixtures("counted")
def test_what_failed_is_run_again_only_on_request_and_alone(tmp_path: Path) -> None:
    study = check_sweep(make_sweep(tmp_path, RATES), Flags())
    blocked = block_a_model(study, 1e-2)
    frame = launch(study.sweep).frame()
    assert list(frame["status"]) == ["failed", "finished"]
    assert frame["cause"][0] == f"{blocked}: cannot make this folder: File exists"

    before = cells(study)
    blocked.unlink()
    assert cells(launch(study.sweep).study) == before  # a failed one is over
    more = {"parameters": {"training.learning_rate": {"values": [1e-2, 1e-3, 1e-4]}}}
    (tmp_path / LOG).unlink()
    board = launch(make_sweep(tmp_path, more), RETRY)
    assert list(board.frame()["status"]) == ["finished", "finished", "waiting"]
    assert list(board.frame()["cause"]) == ["", "", ""]
    assert trainings(tmp_path / "runs") == [blocked.name]
    finished = cell_folder(study.folder, study.trials[1], 0).name
    assert [name for name, state in cells(study).items() if before[name] == state] == [
        f"{finished}/journal.jsonl",
        f"{finished}/result.json",
    ]


def test_an_interrupted_sweep_is_resumed_only_on_request(tmp_path: Path) -> None:
    study = check_sweep(make_sweep(tmp_path), Flags())
    under_way(study, study.trials[1])
    with pytest.raises(UserError, match="'tiny' was interrupted with 1 cells unfinished; add --resume"):
        check_sweep(study.sweep, Flags())
    assert list(board_of(study).frame()["status"]) == 3 * ["waiting"]
    board = launch(study.sweep, Flags(resume=True))
    assert list(board.frame()["status"]) == 3 * ["finished"]
    check_sweep(study.sweep, Flags())


def test_stopped_trials_go_on_without_the_scheduler(tmp_path: Path) -> None:
    scheduler = {"scheduler": {"type": "asha", "rung": "episodes", "grace": 1, "reduction": 2}}

    def stop(count: float, value: float) -> None:
        raise SystemExit

    stopped = launch(make_sweep(tmp_path, {**TWO, **scheduler}), reporting=lambda task: stop)
    assert list(stopped.frame()["status"]) == ["stopped", "stopped"]
    assert list(stopped.frame()["episodes"]) == [1, 1]
    before = cells(stopped.study)
    again = launch(make_sweep(tmp_path, {**TWO, **scheduler}))
    assert cells(again.study) == before
    whole = launch(make_sweep(tmp_path, TWO))
    assert list(whole.frame()["status"]) == ["finished", "finished"]
    assert set(played(tmp_path / "runs").values()) == {1}
    undisturbed = launch(make_sweep(tmp_path / "other", TWO)).frame()
    assert comparable(whole.frame()).equals(comparable(undisturbed))


def test_a_forecast_before_between_and_after(tmp_path: Path) -> None:
    study = check_sweep(make_sweep(tmp_path, seeds=[0, 1]), Flags())
    assert forecasts(study) == 3 * [Forecast(tokens=False, models=0, episodes=0)]
    assert "2 models for 3 trials, 2 of them to be trained" in printed(study)

    calls = []

    def at_the_second_seed(count: float, value: float) -> None:
        calls.append(count)
        if len(calls) == 2:
            raise SystemExit

    by_loss = {**HORIZONS, "metric": "val/loss", "max_concurrent_trials": 1}
    steps = {"scheduler": {"type": "asha", "rung": "training_steps", "grace": 20}}
    (task, *_) = tasks(check_sweep(make_sweep(tmp_path, {**by_loss, **steps}, seeds=[0, 1]), Flags()))
    with pytest.raises(SystemExit):
        run_trial(task, at_the_second_seed)
    (tokens,) = study.store.stages()
    between = Forecast(tokens=True, models=0, steps=20, episodes=0, seconds={tokens.key: tokens.seconds})
    assert forecasts(study) == 3 * [between]

    resumed = check_sweep(study.sweep, Flags(resume=True))
    run_trial(tasks(resumed)[0], nothing)
    after = forecasts(resumed)
    assert [(f.tokens, f.models, f.steps, f.episodes) for f in after] == [
        (True, 2, 0, 8),
        (True, 2, 0, 0),
        (True, 2, 0, 0),
    ]
    stages = {stage.key: stage for stage in study.store.stages()}
    kinds = [Counter(stages[key].kind for key in forecast.seconds) for forecast in after]
    assert kinds[0] == {"tokens": 1, "models": 2, "evaluations": 2}
    assert kinds[1] == kinds[2] == {"tokens": 1, "models": 2}
    assert all(stages[key].seconds == seconds for key, seconds in after[0].seconds.items())
    text = printed(resumed)
    assert "2 models for 3 trials, 0 of them to be trained" in text
    first = next(row for row in text.splitlines() if "horizon=1" in row)
    assert [part.strip() for part in first.split("horizon=1")[1].split("  ") if part.strip()] == [
        *("2/2", "yes", "2/2", "8/8")
    ]


def test_a_forecast_is_unknown_before_the_data_is_here(tmp_path: Path) -> None:
    collect = {"environment": "Pendulum-v1", "steps": 400}
    sweep = make_sweep(tmp_path, dataset={"id": "away/pendulum-v0"}, collect=collect)
    study = check_sweep(sweep, Flags())
    assert forecasts(study) == 3 * [Forecast()]
    text = printed(study)
    assert text.count("unknown") == 3 * 3 + 1
    assert "their data is not here yet" in text
    assert not (tmp_path / "runs").exists()


def test_trials_that_train_different_models_begin_first(tmp_path: Path) -> None:
    search = {"parameters": {**RATES["parameters"], **HORIZONS["parameters"]}}
    study = check_sweep(make_sweep(tmp_path, search), Flags())
    order = [tuple(trial.settings.values()) for trial in study.in_order(study.trials)]
    assert order == [(1e-2, 1), (1e-3, 1), (1e-2, 2), (1e-3, 2), (1e-2, 3), (1e-3, 3)]


@pytest.mark.parametrize(
    "name", ["beam widths, and more", "a/b/../c", "Größe 東京 ½", "x" * 200, "..", "CON"]
)
def test_any_name_that_can_be_shown_works(tmp_path: Path, name: str) -> None:
    cases = {"cases": [{"name": name, "planner.beam_width": 3}, {"name": f"{name} "}]}
    board = launch(make_sweep(tmp_path, {**TWO, **cases}, name=name, training={"steps": 20}))
    frame = board.frame()
    assert list(frame["status"]) == 4 * ["finished"]
    assert list(frame["case"]) == [name, name, f"{name} ", f"{name} "]
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert folder == board.study.folder == sweep_folder(tmp_path / "runs", name)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        *("evaluations", "models", "sweeps", "tokens")
    ]
    (trial, *_) = board.study.trials
    assert tags(cell_folder(folder, trial, 0))["trial.name"] == f"{name}, horizon=1"


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "bell\x07", "nul\x00"])
def test_a_name_that_cannot_be_shown_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"sweep\.yaml:\d+: name: ") as caught:
        make_sweep(tmp_path, name=name)
    assert str(caught.value).isprintable()


def test_names_that_look_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a b", "a-b", "a/b", "A-b", "a b ", "ä-b", "a-b-0123456789ab"]
    assert len({sweep_folder(tmp_path, name) for name in names}) == len(names)
    assert {sweep_folder(tmp_path, name).parent for name in names} == {tmp_path / "sweeps"}


def test_scores_need_references(tmp_path: Path, minari_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "minari"
    shutil.copytree(minari_folder, copy)
    (metadata,) = copy.rglob("metadata.json")
    text = metadata.read_text()
    assert '"ref_min_score"' in text
    metadata.write_text(text.replace('"ref_min_score"', '"nothing"').replace('"ref_max_score"', '"none"'))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(copy))
    with pytest.raises(UserError, match=r"sweep\.yaml.*: search.metric.name: score/mean is not reported"):
        check_sweep(make_sweep(tmp_path), Flags())
    by_return = launch(make_sweep(tmp_path, {**TWO, "metric": "return/mean"})).frame()
    assert np.isfinite(by_return["return/mean"]).all()
    assert "score/mean" not in by_return
    assert list(launch(make_sweep(tmp_path, None)).frame()["status"]) == ["finished"]


class TestBoard:
    def test_a_trial_is_announced_to_the_courier_with_its_parent(self, study: Study) -> None:
        board, (task, *_) = board_of(study), tasks(study)
        board.started(task)
        folder = cell_folder(study.folder, task.trial, 0)
        courier: Any = board._courier
        assert courier.added == [("horizon=1 seed 0", folder, "parent")]
        assert dict(board.counts()) == {"running": 1, "waiting": 2}
        run_trial(task, nothing)
        board.ended(task, "")
        assert dict(board.counts()) == {"finished": 1, "waiting": 2}

    def test_a_process_that_died_is_a_failure_with_its_cause(self, tmp_path: Path) -> None:
        asha = {"scheduler": {"type": "asha", "rung": "episodes", "grace": 1}}
        study = check_sweep(make_sweep(tmp_path, {**HORIZONS, **asha}), Flags())
        board, (task, other, _) = board_of(study), tasks(study)
        for one, cause in ((task, "its process died"), (other, "")):
            board.started(one)
            under_way(study, one.trial)
            board.ended(one, cause)
            found = tags(cell_folder(study.folder, one.trial, 0))
            assert (found["trial.status"], found["error"]) == ("failed" if cause else "stopped", cause)
        assert list(board.frame()["status"]) == ["failed", "stopped", "waiting"]
        assert list(board.frame()["cause"]) == ["its process died", "", ""]
        assert [study.to_do(t.trial, only_failed=True) for t in (task, other)] == [[0], []]

    def test_nobody_stops_a_trial_without_a_scheduler(self, study: Study) -> None:
        board, (task, *_) = board_of(study), tasks(study)
        board.started(task)
        under_way(study, task.trial)
        board.ended(task, "")
        cause = board.frame()["cause"][0]
        assert cause == f"left no result in {study.folder}; is resources.storage shared by all hosts?"
        assert list(board.frame()["status"]) == ["failed", "waiting", "waiting"]

    def test_a_cancelled_trial_is_left_to_be_resumed(self, study: Study) -> None:
        board, (task, *_) = board_of(study), tasks(study)
        board.started(task)
        under_way(study, task.trial)
        assert not board.cancelled()
        (study.folder / CANCEL).touch()
        assert board.cancelled()
        board.ended(task, "")
        assert list(board.frame()["status"]) == 3 * ["waiting"]
        assert study.interrupted() == 1
        courier: Any = board._courier
        assert courier.killed == [(cell_folder(study.folder, task.trial, 0), "KILLED")]

    def test_a_problem_is_told_once(self, study: Study) -> None:
        board = board_of(study)
        for problem in ("one", "two", "one"):
            board.refused(problem)
        assert board.problems == ["one", "two"]
