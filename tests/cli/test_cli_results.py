"""`tt-ray results`: the tables of a sweep, whole at any width."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import Command, as_refusal, files_below, text_of
from mlflow_study import CAUSE, Study, make_study
from rich.console import Console

from tt_ray.cli import trials
from tt_ray.tracking import results_table

NAME = "a study"


@pytest.fixture
def study(store: str) -> Study:
    return make_study(store, NAME)[0]


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
        winner = [line.split()[0] for line in text.partition("\nWinner")[2].splitlines()[3:] if line.strip()]
        assert winner[:4] == ["score/mean", "return/mean", "val/loss", "run"]  # the last one is the advice
        assert re.search(r"return/mean +7000\s*\n", text)
        assert re.search(r"val/loss +4\.50\s*\n", text)
        assert "\ndata set: mean return 3120 (score 44.5)\n" in re.sub(" +\n", "\n", text)
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


def test_the_winner_by_what_it_was_chosen(store: str, screen: Callable[..., Console]) -> None:
    study = Study(store, NAME)
    sweep = study.start("returns", tags={"kind": "sweep", "search.metric": "return/iqm"})
    ends = {"return/iqm": 50.0, "return/iqm_ci_low": 40.0, "return/iqm_ci_high": 60.0, "return/mean": 55.0}
    study.log(sweep, {f"best/{name}": value for name, value in ends.items()})
    study.log(sweep, {"confirmed/return/mean": 51.0, "data/return/mean": 12.25})
    text = shown(results_table(NAME, store), screen(80))
    rows = [re.split("  +", line.strip()) for line in text.partition("\nWinner")[2].splitlines()]
    assert rows[3:5] == [["return/iqm", "50.0 [40.0, 60.0]"], ["return/mean", "55.0", "51.0"]]
    assert rows[5] == [""]
    assert "data set: mean return 12.2\n" in re.sub(" +\n", "\n", text)


def test_trials_of_one_name_are_counted_apart(store: str, screen: Callable[..., Console]) -> None:
    """As the experiment below the search changes, so do all trials, under their old names."""
    study = Study(store, NAME)
    sweep = study.sweep()
    for fingerprint in ("before", "after"):
        for seed in (0, 1):
            study.end(study.trial(sweep, 0, seed, fingerprint, horizon=1))
    assert "2 trials in 4 runs: 4 finished" in shown(results_table(NAME, store), screen(80))


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
