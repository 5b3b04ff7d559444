"""`tt-ray sweep` killed anywhere, driver, Ray or a trial: --resume runs what is missing and nothing else."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import deadly
import gymnasium as gym
import ledger
import numpy as np
import pandas as pd
import pytest
import sweep_tools as tools
import tiny
from command import run
from processes import descendants, wait_gone
from sweep_tools import GRID, Kept, Outcome, at_step, when_ended, when_played, when_there

from tt_ray.data.minari_writer import write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIAL = "ray::ImplicitFunc.train"
"""What Ray calls a process of a trial."""
OF_RAY = ("sweep: {case}", "one line; equal, with --resume", "undisturbed_grid")
"""The row of a test that ends a part of Ray."""


@pytest.fixture(scope="session")
def undisturbed_grid(data: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with ledger.undisturbed("undisturbed_grid"):
        return tools.run_whole(tmp_path_factory.mktemp("grid"), GRID)


@pytest.fixture(scope="session")
def undisturbed_random(data: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with ledger.undisturbed("undisturbed_random"):
        return tools.run_whole(tmp_path_factory.mktemp("random"), tools.RANDOM, seeds=[0, 1])


@pytest.mark.fault("driver", "sweep: {case}", "equal, with --resume", "undisturbed_grid")
@pytest.mark.parametrize(
    "moment",
    [
        when_there("runs/tokens/*"),
        at_step(1),
        at_step(random.Random(1).randrange(2, tools.STEPS)),
        when_ended(1),
        when_ended(3),
        when_played(random.Random(2).randrange(3, 9)),
        when_there("runs/sweeps/study/results.md"),
        when_there("mlruns/*/*/artifacts/figures/*.png"),
        when_played(3, tools.FRESH),
    ],
    ids=[
        "tokens",
        "first step",
        "random step",
        "a cell has ended",
        "three cells have ended",
        "evaluation",
        "tables",
        "upload",
        "confirmation",
    ],
)
def test_a_killed_grid_ends_as_one_that_was_not(
    undisturbed_grid: Outcome, tmp_path: Path, moment: tools.Moment
) -> None:
    kill_and_resume(tmp_path, GRID, undisturbed_grid, moment)


@pytest.mark.fault("driver", "random search: {case}", "equal, with --resume", "undisturbed_random")
@pytest.mark.parametrize(
    "moment",
    [
        at_step(random.Random(3).randrange(1, tools.STEPS)),
        when_played(random.Random(4).randrange(1, 30)),
        when_ended(random.Random(5).randrange(1, 6)),
    ],
    ids=["random step", "evaluation", "random cell"],
)
def test_a_killed_random_search_ends_as_one_that_was_not(
    undisturbed_random: Outcome, tmp_path: Path, moment: tools.Moment
) -> None:
    kill_and_resume(tmp_path, tools.RANDOM, undisturbed_random, moment, seeds=[0, 1])


@pytest.mark.fault("driver", "sweep: collecting", "equal, with --resume", "undisturbed_grid")
def test_a_sweep_killed_while_it_collects_its_data(
    undisturbed_grid: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    kill_and_resume(tmp_path, GRID, undisturbed_grid, when_there("minari/.collecting/*/*.npz"))
    assert [path.name for path in (tmp_path / "minari").rglob("*.npz")] == []


@pytest.mark.fault("driver", "sweep: three times in a row", "equal, with --resume", "undisturbed_grid")
def test_a_sweep_killed_and_resumed_at_once_again_and_again(
    undisturbed_grid: Outcome, tmp_path: Path
) -> None:
    """The next command starts while processes of the killed one may still be at work."""
    file, more = tools.write_file(tmp_path, GRID), list[str]()
    for moment in (at_step(30), when_played(2), when_ended(3)):
        tools.start_until(tmp_path, moment, file, *more).kill_only()
        more = ["--resume"]
    tools.resume(tmp_path, file)
    tools.assert_same(tmp_path, undisturbed_grid)


def kill_and_resume(
    folder: Path, search: dict, undisturbed: Outcome, moment: tools.Moment, **sections: Any
) -> None:
    """The driver alone gets SIGKILL; what it had started is gone soon after."""
    file = tools.write_file(folder, search, **sections)
    tools.start_until(folder, moment, file).kill()
    kept = Kept(folder)
    tools.resume(folder, file)
    kept.check()
    tools.assert_same(folder, undisturbed)


@pytest.mark.fault("driver", "{case}: two trials have ended", "budget completed, nothing twice")
@pytest.mark.parametrize("search", [tools.ASHA, tools.OPTUNA], ids=["asha", "optuna"])
def test_a_search_that_learns_from_its_trials_completes_its_budget(tmp_path: Path, search: dict) -> None:
    file = tools.write_file(tmp_path, search)
    tools.start_until(tmp_path, when_ended(2), file).kill()
    kept = Kept(tmp_path)
    assert 2 <= kept.finished < search["num_trials"]
    tools.resume(tmp_path, file)
    kept.check()
    found = tools.outcome(tmp_path)
    assert found.table["index"].tolist() == list(range(search["num_trials"]))
    assert set(found.table["status"]) <= {"finished", "stopped"}
    assert np.isfinite(found.table["val/loss"]).all()
    assert len(found.statuses) == 1 + search["num_trials"]
    assert set(found.statuses.values()) == {"FINISHED"}
    models = (tmp_path / "runs" / "models").glob("[!.]*")
    partial = [model.name for model in models if not (model / "stage.json").exists()]  # of stopped trials
    assert len(partial) == (found.table["status"] == "stopped").sum()
    notes = [f"models/.claims/{key}.json" for key in sorted(partial)]  # how long that training took
    assert tiny.leftovers(tmp_path / "runs") == (["models/.claims", *notes] if partial else [])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("raylet", marks=pytest.mark.fault("raylet", *OF_RAY)),
        pytest.param("gcs_server", marks=pytest.mark.fault("control service", *OF_RAY)),
    ],
)
@pytest.mark.parametrize(
    "moment", [at_step(30), when_played(3, tools.FRESH)], ids=["training", "confirmation"]
)
def test_the_death_of_ray_is_one_line_and_resumed(
    undisturbed_grid: Outcome, tmp_path: Path, name: str, moment: tools.Moment
) -> None:
    file = tools.write_file(tmp_path, GRID)
    command = tools.start_until(tmp_path, moment, file)
    victim = tools.ray_process(command, name)
    started = tools.without_agents(command)
    victim.kill()
    text = command.wait(2)
    assert tools.one_line(text).startswith("tt-ray: error: Ray has died: its ")
    assert "[state-dump]" not in text
    wait_gone(started)
    kept = Kept(tmp_path)
    tools.resume(tmp_path, file)
    kept.check()
    tools.assert_same(tmp_path, undisturbed_grid)


@pytest.mark.fault("trial", "{case}", "equal", "undisturbed_grid")
@pytest.mark.parametrize("moment", [at_step(30), when_played(3)], ids=["training", "evaluation"])
def test_a_trial_whose_process_dies_is_done_again(
    undisturbed_grid: Outcome, tmp_path: Path, moment: tools.Moment
) -> None:
    command = tools.start_until(tmp_path, moment, tools.write_file(tmp_path, GRID))
    victims = descendants(command.process.pid, TRIAL)
    assert victims != []
    for victim in victims:
        victim.kill()
    command.wait()
    tools.assert_same(tmp_path, undisturbed_grid)


@pytest.mark.fault("trial", "every time", "fails alone; finished by --retry-failed")
def test_a_trial_that_always_dies_fails_alone_and_is_retried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(deadly.MENDED, str(tmp_path / "mended"))
    monkeypatch.setenv("PYTHONPATH", str(Path(deadly.__file__).parent))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    tiny.write_data()
    write_deadly()
    search = {"parameters": {"dataset.id": {"values": [tiny.DATASET, "faults/deadly-v0"]}}}
    file = tools.write_file(tmp_path, search, collect=None, resources={"max_failures": 1})
    text = run(tmp_path, "sweep", file, expected=1)
    assert "Traceback" not in text
    table = pd.read_parquet(tmp_path / "runs" / "sweeps" / "study" / "trials.parquet")
    assert table["status"].tolist() == ["finished", "failed"]
    cause = table["cause"][1]
    assert "its worker process has died" in cause
    assert cause.count("\n") == 0
    assert cause in " ".join(text.split())
    found = tools.outcome(tmp_path)
    failed = next(run for run, status in found.statuses.items() if status == "FAILED")
    assert found.tags[failed]["error"] == cause
    assert sorted(found.statuses.values()) == ["FAILED", "FINISHED", "FINISHED"]
    kept = Kept(tmp_path)
    (tmp_path / "mended").touch()
    run(tmp_path, "sweep", file, "--retry-failed")
    assert kept.finished == 1
    kept.check()
    found = tools.outcome(tmp_path)
    assert found.table["status"].tolist() == ["finished", "finished"]
    assert set(found.statuses.values()) == {"FINISHED"}
    retried = next(run for run in found.tags if run.removeprefix("★ ") == failed)
    assert "error" not in found.tags[retried]


def write_deadly() -> None:
    """A data set like `tiny`'s, of an environment that kills."""
    numbers = np.random.default_rng(1)
    write_dataset(
        "faults/deadly-v0",
        (tiny.episode(numbers, length=10) for _ in range(20)),
        environment="deadly:Deadly-v0",
        observation_space=gym.spaces.Box(-8, 8, (3,), np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
        ref_min_score=-500.0,
        ref_max_score=0.0,
    )


@pytest.mark.fault("Ctrl-C", "sweep: training, {case}", "one line; equal, with --resume", "undisturbed_grid")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_is_one_line_and_resumed(undisturbed_grid: Outcome, tmp_path: Path, times: int) -> None:
    file = tools.write_file(tmp_path, GRID)
    command = tools.start_until(tmp_path, at_step(30), file)
    started = tools.without_agents(command)
    for _ in range(times):
        os.killpg(command.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        time.sleep(0.3)
    lines = command.wait(130).splitlines()
    assert lines[-1] == "tt-ray: interrupted; the same command with --resume goes on from here"
    assert [line for line in lines if "tt-ray" in line or "Traceback" in line] == lines[-1:]
    wait_gone(started)
    kept = Kept(tmp_path)
    assert "add --resume" in tools.one_line(run(tmp_path, "sweep", file, expected=2))
    tools.resume(tmp_path, file)
    kept.check()
    tools.assert_same(tmp_path, undisturbed_grid)
