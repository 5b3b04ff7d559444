"""`tt-ray results`: the tables of a sweep, whole at any width, and following one that runs."""

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
from commands import TT_RAY, Outcome, as_refusal, environment, files_below
from mlflow_study import CAUSE, Study, make_study
from rich.console import Console

from tt_ray.cli import follow, trials, view
from tt_ray.cli.follow import followed
from tt_ray.tracking import results_table
from tt_ray.tracking.results import MlflowAwayError

Command = Callable[..., Outcome]
NAME = "a study"


@pytest.fixture
def study(store: str) -> Study:
    return make_study(store, NAME)[0]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Console]:
    """Show everything on a console of that size."""

    def use(width: int, height: int = 50, terminal: bool = False) -> Console:
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal)
        for module in (view, trials, follow):
            monkeypatch.setattr(module, "console", console)
        return console

    return use


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def shown(frame: pd.DataFrame, console: Console) -> str:
    console.print(trials.results_view(frame, NAME))
    text = text_of(console)
    assert max(map(len, text.splitlines())) <= console.width
    assert "…" not in text
    assert "nan" not in text.lower()
    return text


def column(text: str, title: str, after: str = "") -> str:
    """A column of the last sweep's table without blanks, up to the one that comes `after`."""
    lines = text.splitlines()
    (*_, top) = (i for i, line in enumerate(lines) if line.startswith("trial  "))
    start, end = lines[top].index(title), lines[top].index(after) if after else None
    return re.sub(r"\s", "", "".join(line[start:end] for line in lines[top:]))


# --- tables


def test_a_sweep_at_80_and_120_columns(study: Study, store: str, screen: Callable[..., Console]) -> None:
    frame = results_table(NAME, store)
    narrow, wide = shown(frame, screen(80)), shown(frame, screen(120))
    lines = [re.split("  +", line.strip()) for line in wide.splitlines()]
    assert ["trial", "seed", "status", "score [interval]", "return", "val loss", "time", "reused"] in lines
    first, width = "horizon=5, beam_width=128", "beam_width=128"
    assert [first, "0", "finished", "70.0 [68.0, 73.0]", "7000", "4.50", "21 min"] in lines
    assert [first, "1", "failed", "tokens"] in lines
    assert ["horizon=10, " + width, "0", "running", "4.75"] in lines
    stopped = next(line for line in lines if line[0].startswith("horizon=50"))
    assert stopped[2:6] == ["stopped", "60.0 [58.0, 63.0]", "6000", "4.50"]
    for text in (narrow, wide):
        flat = " ".join(text.split())
        assert "bins (running)" in text
        assert "3 trials in 4 runs: 1 finished, 1 stopped, 1 failed, 1 running" in text
        assert (
            "43 min of computing; 4 stages reused (tokens 2, model 1, episodes 1), which saved 20 min" in flat
        )
        assert re.search(r"score/mean +70\.0 \[68\.0, 73\.0\] +66\.0 \[64\.0, 69\.0\]", text)
        assert re.search(r"val/loss +4\.50\s*\n", text)
        assert f"failed: horizon=5, beam_width=128 seed 1: {' '.join(CAUSE.split())}" in flat
    reused = "tokens,model0,20episodes(planner,seed0)"
    assert f"reused:{reused}" in column(narrow, "trial", "status")
    assert reused in column(wide, "reused")
    assert text_row(narrow, "plain") == ["50.0", "5000", "4.50"]


def text_row(text: str, name: str) -> list[str]:
    """The numbers in the line of a run that is no sweep's, without interval."""
    line = next(line for line in text.splitlines() if f"  {name} " in line)
    return re.sub(r"\[.*?(\]|  )", " ", line).split()[2:]


def test_long_names_and_numbers_are_whole(store: str, screen: Callable[..., Console]) -> None:
    study = Study(store, NAME)
    trial = study.trial(study.sweep("[red]" + "x" * 90), 0, horizon="[bold]" + "y" * 70)
    study.score(trial, -123456.0)
    study.end(trial, "KILLED", reused="an unusual stage")
    frame = results_table(NAME, store)
    narrow, wide = shown(frame, screen(80)), shown(frame, screen(200))
    for text in (narrow, wide):
        assert "x" * 70 in re.sub(r"\s", "", text)
        assert "horizon=[bold]" + "y" * 70 in column(text, "trial", " status")
        assert {"[red]", "[bold]"} <= set(re.findall(r"\[[a-z]+\]", text))
        assert "interrupted" in text
        assert {"-123456", "[-123458,", "-123453]", "-12345600"} <= set(text.split())


def test_a_sweep_without_trials_and_an_experiment_without_runs(
    store: str, screen: Callable[..., Console]
) -> None:
    study = Study(store, NAME)
    assert "run id" in shown(results_table(NAME, store), screen(80))
    study.sweep()
    text = shown(results_table(NAME, store), screen(80))
    assert "bins (running)" in text
    assert "no trial has begun yet" in text


def test_two_sweeps_have_a_table_each(study: Study, store: str, screen: Callable[..., Console]) -> None:
    sweep = study.sweep("again")
    study.end(study.trial(sweep, 0, horizon=3), trial_status="finished")
    study.end(sweep)
    text = shown(results_table(NAME, store), screen(120))
    assert text.index("bins (running)") < text.index("again (finished)")
    assert "\n1 trial: 1 finished\n" in text


def test_failures_of_one_cause_are_one_line(study: Study, store: str, screen: Callable[..., Console]) -> None:
    sweep = study.sweep("broken")
    for index in range(3):
        study.end(study.trial(sweep, index, horizon=index), "FAILED", error="no memory")
    text = shown(results_table(NAME, store), screen(120))
    assert "failed: horizon=0 seed 0, horizon=1 seed 0, horizon=2 seed 0: no memory" in text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["", ""], {}),
        (["tokens", "tokens, model 0"], {"tokens": 2, "model": 1}),
        (["20 episodes (planner, seed 0), 4 episodes (greedy, seed 0)"], {"episodes": 2}),
    ],
)
def test_reused_stages_are_counted(texts: list[str], expected: dict[str, int]) -> None:
    assert trials.reused_stages(texts) == expected


# --- the command


def test_the_command_and_its_file(study: Study, here: Path, command: Command) -> None:
    outcome = command("results", NAME, "--csv", "table.csv")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"tt-ray results '{NAME}' --csv FILE" in outcome.out
    frame = pd.read_csv(here / "table.csv", index_col="run_id")
    assert {"trial", "case", "reused", "saved", "cause", "planner.horizon"} <= set(frame.columns)
    assert frame["seconds"].sum() == 3 * 1280.0
    assert frame.loc[frame["status"] == "FAILED", "cause"].tolist() == [CAUSE]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--interval", "0"), ("--interval 0: expected seconds",)),
        (("--interval", "nan", "--follow"), ("--interval nan: expected seconds",)),
        (("--interval", "1e9", "--follow"), ("--interval 1e+09",)),
        (("--csv", "missing/table.csv"), ("--csv missing/table.csv: cannot be written: No such file",)),
        (("--csv", "folder", "--follow"), ("--csv folder: cannot be written: Is a directory",)),
    ],
)
def test_mistakes_are_refused_in_one_line(
    study: Study, here: Path, command: Command, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    (here / "folder").mkdir()
    before = files_below(here)
    as_refusal(command("results", NAME, *arguments), *parts)
    assert files_below(here) == before


# --- following


class Steps:
    """A read of MLflow before each of which something happens there; a sleep that takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, study: Study, *happenings: Callable[[], Any]) -> None:
        self.study, self.happenings = study, iter(happenings)
        self.slept: list[float] = []
        monkeypatch.setattr(follow.time, "sleep", self.slept.append)

    def read(self) -> pd.DataFrame:
        next(self.happenings)()
        return results_table(self.study.name, self.study.uri)

    def follow(self) -> pd.DataFrame:
        return followed(results_table(self.study.name, self.study.uri), self.read, 2.0)


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
        plain = Console(file=io.StringIO(), width=100)
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
