from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_table
import numpy as np
import pandas as pd
import pytest
from published import read_published, task_name
from scipy.stats import trim_mean
from study import Study, load_study

SCRIPT = Path(benchmark_table.__file__)


def cells_of(report: str, title: str, row: str) -> dict[str, str]:
    """A row of the table below the heading `title`, by column."""
    lines = report.partition(f"## {title}\n")[2].partition("## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    found = [cells for cells in rows if cells[0] == row]
    assert len(found) == 1, f"{row} in {title}"
    return dict(zip(rows[0], found[0], strict=True))


@pytest.fixture(scope="module")
def made(bins: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script's files, made as a user makes them."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(SCRIPT), bins.name, "--uri", bins.uri, "--out", "made"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith((folder / "made" / "benchmark.md").read_text())
    return folder / "made"


def test_every_file_is_there(made: Path) -> None:
    names = ("benchmark.md", "benchmark.parquet", "benchmark-locomotion.png", "benchmark-locomotion.svg")
    assert sorted(path.name for path in made.iterdir()) == sorted(names)


def test_published_and_own_numbers_stand_side_by_side(made: Path, bins: Any) -> None:
    cells = cells_of((made / "benchmark.md").read_text(), "Locomotion", "Hopper medium")
    assert cells["BC"] == "63.9"
    assert cells["TT uniform"] == "67.4 ± 2.9"
    played = bins.episodes[(bins.episodes["trial_index"] == 0)]
    means = [played[played["training_seed"] == seed]["score"].mean() for seed in (0, 1, 2)]
    error = np.std(means, ddof=1) / np.sqrt(3)
    assert cells["ours, strategy=uniform"] == f"{np.mean(means):.1f} ± {error:.1f}"


def test_the_table_of_numbers_agrees_with_a_computation_by_hand(made: Path, bins: Any) -> None:
    table = pd.read_parquet(made / "benchmark.parquet")
    ours = table[~table["published"]].set_index(["task", "setting"])
    assert len(ours) == 3
    for index, task, setting, seeds in (
        (0, "Hopper medium", "strategy=uniform", [0, 1, 2]),
        (1, "Hopper medium", "strategy=quantile", [0, 1]),  # the third one has not been computed
        (3, "HalfCheetah medium-expert", "strategy=quantile", [0, 1, 2]),
    ):
        row = ours.loc[task, setting]
        played = bins.episodes[(bins.episodes["trial_index"] == index) & ~bins.episodes["fresh"]]
        by_seed = [played[played["training_seed"] == seed].sort_values("seed")["score"] for seed in seeds]
        first = np.concatenate([scores[:3] for scores in by_seed])
        means = [scores.mean() for scores in by_seed]
        assert (row["seeds"], row["episodes"], row["paper_runs"]) == (
            len(seeds),
            4 * len(seeds),
            3 * len(seeds),
        )
        assert row["mean"] == pytest.approx(np.mean(means))
        assert row["error"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(seeds)))
        assert row["iqm"] == pytest.approx(trim_mean(np.concatenate(by_seed), 0.25))
        assert row["iqm_low"] < row["iqm"] < row["iqm_high"]
        assert row["paper_mean"] == pytest.approx(first.mean())
        assert row["paper_error"] == pytest.approx(np.sqrt(np.mean((first - first.mean()) ** 2) / len(first)))
    assert table["published"].sum() == 9 * 5 + 3 + 2 + 5


def test_missing_cells_are_empty_and_averages_wait_for_all_tasks(made: Path) -> None:
    report = (made / "benchmark.md").read_text()
    assert cells_of(report, "Locomotion", "Walker2d medium")["ours, strategy=quantile"] == ""
    assert cells_of(report, "Locomotion", "HalfCheetah medium-expert")["ours, strategy=uniform"] == ""
    average = cells_of(report, "Locomotion", "average of 9")
    assert average["ours, strategy=uniform"] == "1 of 9 tasks"
    assert average["ours, strategy=quantile"] == "2 of 9 tasks"
    assert cells_of(report, "Ant", "Ant medium") == {
        "task": "Ant medium",
        "TT released code": "83.1",
        "ours, strategy=uniform": "",
        "ours, strategy=quantile": "",
    }
    assert "AntMaze" not in report


def test_the_reader_is_told_of_other_data_and_of_failures(made: Path) -> None:
    report = (made / "benchmark.md").read_text()
    assert "beside it: HalfCheetah medium-expert (mujoco/halfcheetah/medium-expert-v0)." in report
    assert "Failed, with the episodes they had: cheetah, strategy=uniform." in report
    detail = report.partition("## Ours in detail")[2]
    assert "2 x 4" in detail
    assert "3 x 4" in detail


def test_published_averages_are_those_of_the_paper(made: Path) -> None:
    average = cells_of((made / "benchmark.md").read_text(), "Locomotion", "average of 9")
    wanted = {"BC": "47.7", "CQL": "77.6", "DT": "74.7", "TT uniform": "72.6", "TT quantile": "78.9"}
    assert {name: average[name] for name in wanted} == wanted
    mazes = next(group for group in read_published() if group.name == "AntMaze")
    assert np.mean([mazes.published(task, "TT with Q")[0] for task in mazes.tasks]) == pytest.approx(84.0)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("hopper-medium-expert-v2", "Hopper medium-expert"),
        ("d4rl/hopper/medium-replay-v2", "Hopper medium-replay"),
        ("mujoco/halfcheetah/medium-v0", "HalfCheetah medium"),
        ("Walker medium_replay", "Walker2d medium-replay"),
        ("half-cheetah medium", "HalfCheetah medium"),
        ("D4RL/antmaze/umaze-v1", "AntMaze umaze"),
        ("antmaze-medium-play", "AntMaze medium-play"),
        ("ant-medium", "Ant medium"),
        ("hopper", None),
        ("hopper-random-v2", None),
        ("hopper-medium, with noise", None),
        ("quant medium", None),
        ("", None),
    ],
)
def test_tasks_are_known_by_their_names(text: str, task: str | None) -> None:
    assert task_name(text, read_published()) == task


def values_table(scores: dict[str, float]) -> pd.DataFrame:
    results = pd.DataFrame(
        [{"task": task, "setting": "", "mean": mean, "error": 1.0} for task, mean in scores.items()]
    )
    return benchmark_table.values_of(read_published()[0], results, [""])


def test_a_whole_table_has_an_average_with_its_error() -> None:
    group = read_published()[0]
    section = benchmark_table.group_section(group, values_table(dict.fromkeys(group.tasks, 50.0)))
    assert cells_of(section, "Locomotion", "average of 9")["ours"] == "50.00 ± 0.33"
    assert "with ours" not in section


def test_a_part_of_a_table_is_averaged_over_the_same_tasks_in_every_column() -> None:
    scores = {"Hopper medium": 60.0, "Walker2d medium": 70.0}
    section = benchmark_table.group_section(read_published()[0], values_table(scores))
    cells = cells_of(section, "Locomotion", "average of the 2 with ours")
    assert cells["ours"] == "65.00 ± 0.71"
    assert cells["BC"] == f"{(63.9 + 77.3) / 2:.1f}"


@pytest.fixture
def study(bins: Any, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bins.uri)
    return load_study(bins.name, bins.uri)


def test_cases_that_are_one_task_keep_their_names(study: Study) -> None:
    trials = study.trials.assign(case=["short", "short", "long", "long"])
    cells = study.cells.assign(**{"params.dataset.id": "d4rl/hopper/medium-v2"})
    results = benchmark_table.ours(replace(study, trials=trials, cells=cells), read_published())
    assert results["task"].tolist() == ["short", "short", "long"]
    assert set(results["group"]) == {"Other tasks"}


def test_a_data_set_that_is_searched_is_a_task_and_no_setting(study: Study) -> None:
    data = study.trials["case"].map({"cheetah": "halfcheetah-medium-v2", "hopper-medium": "hopper-medium-v2"})
    trials = study.trials.assign(case="", **{"dataset.id": data})
    cells = study.cells.assign(**{"params.dataset.id": study.cells["tags.trial.index"].astype(int).map(data)})
    results = benchmark_table.ours(replace(study, trials=trials, cells=cells), read_published())
    assert results["task"].tolist() == ["Hopper medium", "Hopper medium", "HalfCheetah medium"]
    assert results["setting"].tolist() == ["strategy=uniform", "strategy=quantile", "strategy=quantile"]


def test_runs_of_former_trials_say_nothing_of_those_with_their_numbers(study: Study, shrunk: Any) -> None:
    other = load_study(shrunk.name, shrunk.uri)
    results = [benchmark_table.ours(one, read_published()) for one in (study, other)]
    assert results[1]["data"].tolist() == ["d4rl/hopper/medium-v2"] * 2 + [
        "mujoco/halfcheetah/medium-expert-v0"
    ]
    pd.testing.assert_frame_equal(*results)
    for one, result in zip((study, other), results, strict=True):
        remarks = benchmark_table.notes(one, result, ["strategy=uniform", "strategy=quantile"])
        assert (one.gone_text in remarks) == (one is other)


def test_trials_that_were_stopped_are_left_out(study: Study) -> None:
    trials = study.trials.assign(status=["stopped", "finished", "failed", "finished"])
    study = replace(study, trials=trials)
    results = benchmark_table.ours(study, read_published())
    assert results["index"].tolist() == [1, 3]
    notes = benchmark_table.notes(study, results, results["setting"].unique())
    assert "1 trials that the scheduler stopped early are left out." in notes


def test_a_sweep_that_is_not_there_is_one_line_and_exit_code_2(
    run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(benchmark_table.main, "no such sweep", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("benchmark_table.py: error: no sweep 'no such sweep' in MLflow at sqlite:///")
    assert not (tmp_path / "out").exists()
