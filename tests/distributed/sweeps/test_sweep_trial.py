"""One trial in its process: what it computes once, and that an interruption leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from study_tools import (
    BY_LOSS,
    EVERY,
    RATES,
    STEPS,
    board_of,
    cells,
    essence,
    launch,
    make_sweep,
    nothing,
    played,
    points,
    tags,
    tasks,
    trainings,
)

from tt_ray.distributed.evaluate import EpisodeFile
from tt_ray.distributed.sweeps.cells import cell_folder, episode_frame, read_record
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.trial import Task, run_trial
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.experiment_file import load_experiment

BY_EPISODES = {
    "parameters": {"planner.horizon": {"values": [2]}},
    "scheduler": {"type": "asha", "rung": "episodes", "grace": 1, "reduction": 2},
}
BY_STEPS = {
    "parameters": {"planner.horizon": {"values": [2]}},
    **BY_LOSS,
    "scheduler": {"type": "asha", "rung": "training_steps", "grace": EVERY, "reduction": 2},
}
TIMES = [name for name in EpisodeResult.__dataclass_fields__ if "seconds" in name or "latency" in name]


class BurningError(Exception):
    """Something went wrong."""


def one_task(folder: Path, search: dict[str, Any]) -> Task:
    """The task of a study's one trial, with two training seeds."""
    (task,) = tasks(check_sweep(make_sweep(folder, search, seeds=[0, 1]), Flags(resume=True)))
    return task


def ending_at(number: int) -> Callable[[float, float], None]:
    """A report that ends the process the so-manyeth time."""
    calls = []

    def report(count: float, value: float) -> None:
        calls.append(count)
        if len(calls) == number:
            raise SystemExit

    return report


def folders(task: Task) -> list[Path]:
    return [cell_folder(task.folder, task.trial, seed) for seed in task.seeds]


def assert_like(task: Task, undisturbed: Task) -> None:
    """Two trials have left the same, each point of it once."""
    for folder, other in zip(folders(task), folders(undisturbed), strict=True):
        record, expected = read_record(folder), read_record(other)
        assert record is not None
        assert expected is not None
        assert essence(record) == essence(expected)
        assert record.status == "finished"
        assert points(folder) == points(other)
        episodes, others = (pd.read_parquet(f / "episodes.parquet") for f in (folder, other))
        pd.testing.assert_frame_equal(episodes.drop(columns=TIMES), others.drop(columns=TIMES))
    once = played(Path(task.trial.config.resources.storage))
    assert sorted(seed for _, seed in once) == sorted(2 * [10_000, 10_001, 10_002, 10_003])
    assert set(once.values()) == {1}


@pytest.fixture(scope="module")
def by_episodes(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = one_task(tmp_path_factory.mktemp("episodes"), BY_EPISODES)
    run_trial(task, nothing)
    return task


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = one_task(tmp_path_factory.mktemp("steps"), BY_STEPS)
    run_trial(task, nothing)
    return task


@pytest.mark.usefixtures("counted")
def test_twelve_beam_settings_train_one_model(tmp_path: Path) -> None:
    search = {
        "parameters": {
            "planner.horizon": {"values": [1, 2, 3]},
            "planner.beam_width": {"values": [2, 4]},
            "planner.n_expand": {"values": [1, 2]},
        }
    }
    board = launch(make_sweep(tmp_path, search))
    frame, study = board.frame(), board.study
    assert len(trainings(study.storage)) == 1
    assert list(frame["status"]) == 12 * ["finished"]
    assert np.isfinite(frame[["score/mean", "return/mean", "val/loss", "speed/tokens_per_second"]]).all(None)
    assert list(frame["reused"]) == ["", *(11 * ["tokens, model"])]
    (model,) = study.store.root.glob("models/*")
    stage, tokens = study.store.find("models", model.name), next(study.store.stages())
    assert stage is not None
    assert stage.seconds > 0
    saved = [0.0, *(11 * [stage.seconds + tokens.seconds])]
    np.testing.assert_allclose(frame["saved"], saved, rtol=1e-9)
    assert played(study.storage).total() == 12 * 4


def test_rungs_are_reported_in_order(by_episodes: Task, by_steps: Task) -> None:
    for task, counts in ((by_episodes, [1, 2, 4]), (by_steps, [20, 40, 60])):
        first, second = (read_record(folder) for folder in folders(task))
        assert first is not None
        assert second is not None
        assert [count for count, _ in first.reports] == counts
        assert first.reports == second.reports
        assert np.isfinite(first.reports).all()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.usefixtures("counted")
def test_ended_at_any_rung_of_episodes_and_run_again(tmp_path: Path, by_episodes: Task, number: int) -> None:
    task = one_task(tmp_path, BY_EPISODES)
    with pytest.raises(SystemExit):
        run_trial(task, ending_at(number))
    run_trial(one_task(tmp_path, BY_EPISODES), nothing)
    assert len(trainings(tmp_path / "runs")) == 2
    assert_like(task, by_episodes)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ended_at_any_validation_and_run_again(tmp_path: Path, by_steps: Task, number: int) -> None:
    task = one_task(tmp_path, BY_STEPS)
    with pytest.raises(SystemExit):
        run_trial(task, ending_at(number))
    for _ in range(2):  # the second time there is nothing to do
        run_trial(one_task(tmp_path, BY_STEPS), nothing)
    assert_like(task, by_steps)
    models = [sorted(Path(one.trial.config.resources.storage).glob("models/*")) for one in (task, by_steps)]
    for model, other in zip(*models, strict=True):
        tiny.assert_same(model, other, STEPS)


@pytest.mark.parametrize("error", [SystemExit, BurningError])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_broken_off_in_the_middle_of_an_evaluation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_episodes: Task,
    error: type[BaseException],
    after: int,
) -> None:
    task, append, kept = one_task(tmp_path, BY_EPISODES), EpisodeFile.append, []

    def breaking(file: EpisodeFile, result: EpisodeResult) -> None:
        if len(kept) == after:
            raise error("the disk is on fire")
        kept.append(result)
        append(file, result)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeFile, "append", breaking)
        if error is SystemExit:
            with pytest.raises(SystemExit):
                run_trial(task, nothing)
        else:
            run_trial(task, nothing)
    study = check_sweep(make_sweep(tmp_path, BY_EPISODES, seeds=[0, 1]), Flags(resume=True))
    causes = {record.status: record.cause for record in study.records(study.trials[0])}
    expected = {"running": ""} if error is SystemExit else {"failed": "BurningError: the disk is on fire"}
    assert causes == expected
    study.reopen(study.trials[0], [0, 1])
    run_trial(task, nothing)
    assert_like(task, by_episodes)


def test_a_seed_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_episodes: Task
) -> None:
    study = check_sweep(make_sweep(tmp_path, BY_EPISODES, seeds=[0, 1]), Flags())
    (task,) = tasks(study)
    model = study.store.path("models", str(study.model_key(task.trial.config, 0)))
    model.parent.mkdir(parents=True)
    model.write_text("in the way of the model's folder")
    run_trial(task, nothing)
    failed, finished = study.records(task.trial)
    assert (failed.status, finished.status) == ("failed", "finished")
    assert failed.cause == f"{model}: cannot make this folder: File exists"
    assert tags(folders(task)[0])["error"] == failed.cause
    row = board_of(study).rows[task.trial.fingerprint]
    assert (row["status"], row["seeds"], row["episodes"], row["cause"]) == ("failed", 1, 4, failed.cause)

    before = cells(study)
    model.unlink()
    board = launch(study.sweep, Flags(only_failed=True))
    assert list(board.frame()["status"]) == ["finished"]
    other = folders(task)[1].name
    assert {k: v for k, v in cells(study).items() if k.startswith(other)} == {
        k: v for k, v in before.items() if k.startswith(other)
    }
    for folder, undisturbed in zip(folders(task), folders(by_episodes), strict=True):
        assert points(folder) == points(undisturbed)
    assert tags(folders(task)[0])["error"] == ""


def test_a_reused_model_shows_its_curves(tmp_path: Path) -> None:
    board = launch(make_sweep(tmp_path))
    curves = []
    for folder in sorted((board.study.folder / "cells").iterdir()):
        found = points(folder)
        curves.append({k: v for k, v in found.items() if k[0].startswith(("train/", "val/"))})
        assert {step for name, step in found if name == "val/loss"} == {20, 40, 60}
        assert {step for name, step in found if name == "train/loss"} == {10, 20, 30, 40, 50, 60}
    assert curves[0] == curves[1] == curves[2]


def test_curves_end_where_the_training_does(tmp_path: Path) -> None:
    long = {"episodes": 30, "max_steps": 2}
    study = launch(make_sweep(tmp_path, training={"steps": 20}, evaluation=long)).study
    for folder in (study.folder / "cells").iterdir():
        found = points(folder)
        assert {step for name, step in found if name.startswith("val/")} == {20}
        assert {step for name, step in found if name.startswith(("score/", "return/"))} == {30}


def test_a_cell_can_be_run_by_itself(tmp_path: Path) -> None:
    study = launch(make_sweep(tmp_path, seeds=[0, 1])).study
    for trial in study.trials:
        for seed in (0, 1):
            config = load_experiment(cell_folder(study.folder, trial, seed) / "config.yaml")
            assert config == replace(trial.config, seeds=(seed,))


def test_the_table_of_episodes(by_episodes: Task) -> None:
    records = [record for folder in folders(by_episodes) if (record := read_record(folder)) is not None]
    frame = episode_frame(records)
    assert list(frame["training_seed"]) == 4 * [0] + 4 * [1]
    assert list(frame["seed"]) == 2 * [10_000, 10_001, 10_002, 10_003]
    scores = (frame["episode_return"] + 500) / 5  # the data set's references are -500 and 0
    np.testing.assert_allclose(frame["score"], scores)
    assert not frame["fresh"].any()


def test_a_damaged_record_is_named(study: Study) -> None:
    folder = cell_folder(study.folder, study.trials[0], 0)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"trial": ')
    with pytest.raises(UserError, match=rf"{folder}/result.json: damaged .*; remove it") as caught:
        check_sweep(study.sweep, Flags())
    assert "\n" not in str(caught.value)


def test_every_metric_that_can_be_searched_for_is_reported(by_steps: Task, tmp_path: Path) -> None:
    from tt_ray.search import METRICS

    study = check_sweep(make_sweep(tmp_path, RATES), Flags())
    row = launch(study.sweep).frame().iloc[0]
    assert [name for name in METRICS if not np.isfinite(row.get(name, np.nan))] == []
    assert list(RATES["parameters"]) == ["training.learning_rate"]
