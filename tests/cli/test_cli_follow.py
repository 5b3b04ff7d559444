"""`tt-ray results --follow`: a sweep while it runs, on a terminal and in a log."""

import io
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import TT_RAY, environment, text_of
from mlflow_study import Study
from rich.console import Console

from tt_ray.cli import follow
from tt_ray.cli.follow import followed
from tt_ray.tracking import results_table
from tt_ray.tracking.results import MlflowAwayError

NAME = "a study"


class Steps:
    """A read of MLflow before each of which something happens there; a sleep that takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, study: Study, *happenings: Callable[[], Any]) -> None:
        self.study, self.happenings = study, iter(happenings)
        self.slept: list[float] = []
        monkeypatch.setattr(follow.time, "sleep", self.slept.append)

    def read(self) -> pd.DataFrame:
        next(self.happenings)()
        return results_table(self.study.name, self.study.uri)

    def follow(self, every: float = 2.0) -> pd.DataFrame:
        return followed(results_table(self.study.name, self.study.uri), self.read, every)


def away() -> None:
    raise MlflowAwayError("MLflow at http://x does not answer (Connection refused)")


@pytest.fixture
def running(store: str) -> tuple[Study, str, str]:
    """A study with an older sweep that has ended and one that runs; the latter's id and its trial's."""
    study = Study(store, NAME)
    sweep = study.sweep("running sweep")
    study.end(study.sweep("a later one"))
    return study, sweep, study.trial(sweep, 0, horizon=1)


def test_following_in_a_log(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    study, sweep, trial = running
    console = screen(80)
    steps = Steps(
        monkeypatch,
        study,
        lambda: study.log(trial, {"val/loss": 4.0}),  # no news
        away,
        away,
        lambda: study.trial(sweep, 1, horizon=2),
        lambda: study.score(trial, 70.0),
        lambda: study.end(trial, trial_status="finished"),
        lambda: [study.end(run_id, "KILLED") for run_id in study_runs(study)],
    )
    frame = steps.follow()
    assert (frame["status"] == "RUNNING").sum() == 0
    said = [line[9:] for line in text_of(console).splitlines()]
    assert said == [
        "running sweep: 1 running",
        "MLflow at http://x does not answer (Connection refused); waiting for it",
        "MLflow is back",
        "horizon=2 seed 0: running",
        "horizon=1 seed 0: running, score 70.0 [68.0, 73.0]",
        "horizon=1 seed 0: finished, score 70.0 [68.0, 73.0]",
        "running sweep: interrupted",
        "horizon=2 seed 0: interrupted",
    ]
    assert min(steps.slept) >= 2.0


def still_for_a_while(running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks every 25 s, of which some find nothing new."""
    study, _, trial = running
    later = study.client.get_run(trial).info.start_time + 1000
    monkeypatch.setattr(follow.time, "perf_counter", lambda: 0.0)  # reading takes no time
    Steps(
        monkeypatch,
        study,
        *[lambda: None] * 2,
        lambda: study.client.log_metric(trial, "train/loss", 1.0, later),  # no table shows it, but it is news
        *[lambda: None] * 4,
        lambda: study.score(trial, 70.0),
        *[lambda: None] * 3,
        lambda: [study.end(run_id) for run_id in study_runs(study)],
    ).follow(25.0)


STILL = "nothing new for {}; is its driver gone? `tt-ray sweep FILE --resume` goes on"


def test_a_driver_that_may_be_gone_in_a_log(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    console = screen(80)
    still_for_a_while(running, monkeypatch)
    assert [line[9:] for line in text_of(console).splitlines()] == [
        "running sweep: 1 running",
        STILL.format("1.2 min"),
        "horizon=1 seed 0: running, score 70.0 [68.0, 73.0]",
        STILL.format("1.2 min"),
        "running sweep: finished",
        "horizon=1 seed 0: finished, score 70.0 [68.0, 73.0]",
    ]


def test_a_driver_that_may_be_gone_on_a_terminal(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    screen(100, terminal=True)
    remarks: list[str] = []
    monkeypatch.setattr(follow.Screen, "_draw", lambda self, remark: remarks.append(remark[11:]))
    still_for_a_while(running, monkeypatch)
    still = {place: remark for place, remark in enumerate(remarks) if "Ctrl-C" not in remark}
    times = {6: "1.2 min", 7: "1.7 min", 11: "1.2 min"}
    assert still == {place: f": {STILL.format(time)}" for place, time in times.items()}
    assert len(remarks) == 13


def study_runs(study: Study) -> Iterator[str]:
    """Ids of the runs under way."""
    runs = study.client.search_runs([study.experiment])
    yield from (run.info.run_id for run in runs if run.info.status == "RUNNING")


def test_following_on_a_terminal(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    study, sweep, trial = running
    for index in range(2, 30):
        study.end(study.trial(sweep, index, horizon=index), "FAILED", error=f"cause {index}")
    console = screen(100, height=20, terminal=True)
    frames: list[str] = []
    draw = follow.Screen._draw

    def drawn(self: follow.Screen, remark: str) -> None:
        plain = Console(file=io.StringIO(), width=100, markup=False)
        plain.print(self._shown)
        frames.append(text_of(plain) + remark)
        draw(self, remark)

    monkeypatch.setattr(follow.Screen, "_draw", drawn)
    Steps(
        monkeypatch,
        study,
        lambda: study.score(trial, 70.0),
        away,
        lambda: [study.end(run_id) for run_id in study_runs(study)],
    ).follow()
    assert len(frames) == 4
    assert all(len(frame.splitlines()) <= 20 for frame in frames)
    for frame in frames[:3]:
        assert re.search(r"horizon=1 +0 +running", frame)
        assert re.search(r"and 2\d more", frame)
        assert "29 trials: 28 failed, 1 running" in frame
        assert "cause 29" in frame
        assert "cause 2\n" not in frame
    assert "70.0" not in frames[0]
    assert "70.0" in frames[1]
    assert "Connection refused); waiting for it" in frames[2]
    assert "29 trials: 1 finished, 28 failed" in frames[3]
    assert "\x1b[2K" in text_of(console)  # redrawn in place


def test_nothing_that_runs_is_followed_to_its_end_at_once(
    store: str, monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    console = screen(80)
    study = Study(store, NAME)
    assert len(Steps(monkeypatch, study).follow()) == 0
    study.end(study.sweep())
    assert len(Steps(monkeypatch, study).follow()) == 1
    assert [line[9:] for line in text_of(console).splitlines()] == ["bins: no trials"]


def test_a_sweep_that_is_deleted_while_it_is_followed(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    study, sweep, trial = running
    screen(80)
    frame = Steps(
        monkeypatch, study, lambda: [study.client.delete_run(one) for one in (sweep, trial)]
    ).follow()
    assert list(frame["run"]) == ["a later one"]


def test_reading_slowly_takes_a_fifth_of_the_time(
    running: tuple[Study, str, str], monkeypatch: pytest.MonkeyPatch, screen: Callable[..., Console]
) -> None:
    study, _, _ = running
    screen(80)
    clock = iter(range(0, 1000, 30))  # each read takes half a minute
    monkeypatch.setattr(follow.time, "perf_counter", lambda: next(clock))
    steps = Steps(monkeypatch, study, lambda: None, lambda: [study.end(one) for one in study_runs(study)])
    steps.follow()
    assert steps.slept == [2.0, 150.0]


def test_ctrl_c_leaves_what_runs_alone(running: tuple[Study, str, str], here: Path) -> None:
    study, _, trial = running
    process = subprocess.Popen(
        [TT_RAY, "results", NAME, "--follow", "--interval", "0.2", "--csv", "table.csv"],
        env=environment(MLFLOW_TRACKING_URI=study.uri),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()[9:] == "running sweep: 1 running\n"
    study.score(trial, 70.0)
    assert process.stdout.readline()[9:] == "horizon=1 seed 0: running, score 70.0 [68.0, 73.0]\n"
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == f"tt-ray: what runs goes on; `tt-ray results '{NAME}' --follow` shows it again\n"
    assert study.client.get_run(trial).info.status == "RUNNING"
    assert (here / "table.csv").exists()
