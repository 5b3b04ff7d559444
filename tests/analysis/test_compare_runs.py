from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_runs
import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def compare(
    run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, pd.DataFrame]]:
    """The report and the table of differences of what is named."""

    def compare(*names: str) -> tuple[str, pd.DataFrame]:
        assert run_main(compare_runs.main, *names, "--out", tmp_path / "out") == 0, capsys.readouterr().err
        return capsys.readouterr().out, pd.read_parquet(tmp_path / "out" / "differences.parquet")

    return compare


def test_sweeps_are_compared_by_their_best_trials(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any, later: Any, tmp_path: Path
) -> None:
    text, table = compare(bins.name, later.name)
    names = ["curves.png", "curves.svg", "differences.png", "differences.svg"]
    files = [*names, "comparison.md", "differences.parquet", "params.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    assert table["case"].tolist() == ["hopper-medium", "cheetah", "all cases", "cheetah"]
    assert table["episodes"].tolist() == ["all trials'"] * 3 + ["fresh"]
    assert table["pairs"].tolist() == [4, 4, 8, 3]
    assert table[["difference", "low", "high"]].to_numpy() == pytest.approx(2.0)  # in every pair
    assert table["won"].tolist() == [1.0] * 4
    errors = {}
    for case, index, seeds in (("hopper-medium", 1, (0, 1)), ("cheetah", 3, (0, 1, 2))):
        played = bins.episodes[(bins.episodes["trial_index"] == index) & ~bins.episodes["fresh"]]
        means = [played[played["training_seed"] == seed]["score"].mean() for seed in seeds]
        errors[case] = np.sqrt(2.0 * np.var(means, ddof=1) / len(seeds))
    wanted = [*errors.values(), 0.5 * np.sqrt(sum(error**2 for error in errors.values()))]
    assert table["seed_error"][:3].tolist() == pytest.approx(wanted)
    assert "2.00 [2.00, 2.00]" in text


def test_the_settings_that_differ_are_named(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any, later: Any, tmp_path: Path
) -> None:
    compare(bins.name, later.name)
    params = pd.read_parquet(tmp_path / "out" / "params.parquet")
    assert params.to_numpy().tolist() == [["planner.horizon", "5", "7"]]


def test_trials_are_paired_by_episode_seed(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any
) -> None:
    text, table = compare(f"{bins.name}#0", f"{bins.name}#1")
    means = [
        bins.episodes[bins.episodes["trial_index"] == index].groupby("seed")["score"].mean()
        for index in (0, 1)
    ]
    gaps = (means[1] - means[0]).to_numpy()
    assert gaps.std() > 0
    row = table.iloc[0]
    assert row["difference"] == pytest.approx(gaps.mean())
    random = np.random.default_rng(5)
    drawn = gaps[random.integers(len(gaps), size=(20_000, len(gaps)))].mean(axis=1)
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.1)
    assert "| discretizer.strategy | uniform" in text


def test_one_training_seed_is_named_by_its_run(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any
) -> None:
    _, table = compare(bins.cells[3, 0], bins.cells[3, 2])
    played = bins.episodes[(bins.episodes["trial_index"] == 3) & ~bins.episodes["fresh"]]
    means = [played[played["training_seed"] == seed]["score"].mean() for seed in (0, 2)]
    assert table.loc[0, ["first_mean", "other_mean"]].tolist() == pytest.approx(means)
    assert table["seed_error"].isna().all()  # a single model on each side


def test_a_sweep_goes_by_its_run_id_too(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any, later: Any
) -> None:
    _, by_id = compare(bins.run_id, later.run_id)
    _, by_name = compare(bins.name, later.name)
    pd.testing.assert_frame_equal(by_id.drop(columns="other"), by_name.drop(columns="other"))


def test_learning_curves_are_overlaid(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any, later: Any, tmp_path: Path
) -> None:
    compare(f"{bins.name}#3", f"{later.name}#3")
    words = (tmp_path / "out" / "curves.svg").read_text()
    assert "<!-- bins of all kinds#3, cheetah, 3 seeds -->" in words
    assert "<!-- later bins#3, cheetah, 3 seeds -->" in words


def test_runs_of_former_trials_are_left_out_and_counted(
    compare: Callable[..., tuple[str, pd.DataFrame]], bins: Any, shrunk: Any, tmp_path: Path
) -> None:
    text, table = compare(f"{bins.name}#0", f"{shrunk.name}#0", f"{shrunk.name}#1")
    assert text.count("2 runs of sweep 'shrunk bins' are not in its table") == 1
    assert table.loc[0, ["pairs", "difference"]].tolist() == [4, 0.0]
    params = pd.read_parquet(tmp_path / "out" / "params.parquet")
    assert params.to_numpy().tolist() == [["discretizer.strategy", "uniform", "uniform", "quantile"]]
    words = (tmp_path / "out" / "curves.svg").read_text()
    assert "<!-- shrunk bins#0, hopper-medium, 3 seeds -->" in words


def test_a_run_of_a_former_trial_is_refused(
    bins: Any, shrunk: Any, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=shrunk.uri)
    experiment = client.get_experiment_by_name(f"study of {shrunk.name}")
    (run, _) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'gone seed 0'")
    assert run_main(compare_runs.main, bins.name, run.info.run_id, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error == (
        "compare_runs.py: error: run 'gone seed 0': its trial is not in the table of sweep 'shrunk bins'\n"
    )


def side(label: str, case: str, seeds: list[int], scores: list[float | None]) -> compare_runs.Side:
    episodes = pd.DataFrame(
        {
            "case": case,
            "training_seed": 0,
            "seed": seeds,
            "fresh": False,
            "score": scores,
            "episode_return": 1.0,
        }
    )
    return compare_runs.Side(label, label, episodes, pd.DataFrame())


def test_a_single_case_needs_no_name() -> None:
    first, other = side("a", "", [1, 2, 3], [1.0, 2.0, 3.0]), side("b", "hopper", [2, 3, 4], [5.0, 4.0, 9.0])
    table = compare_runs.differences(first, other)
    assert table[["pairs", "difference"]].to_numpy().tolist() == [[2, 2.0]]


def test_returns_are_compared_where_scores_are_missing() -> None:
    first, other = side("a", "", [1, 2], [1.0, 2.0]), side("b", "", [1, 2], [None, None])
    assert compare_runs.value_of([first, other]) == "episode_return"
    assert compare_runs.differences(first, other)["difference"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bins of all kinds"], "one name is nothing to compare"),
        (["bins of all kinds", "bins of all kinds"], "'bins of all kinds' is given twice"),
        (["bins of all kinds", "nothing"], "no sweep 'nothing' in MLflow at"),
        (
            ["bins of all kinds#0", "bins of all kinds#9"],
            "'bins of all kinds#9': sweep 'bins of all kinds' has no such",
        ),
        (["bins of all kinds", "0" * 32], f"no sweep '{'0' * 32}' in MLflow at"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    names: list[str],
    message: str,
    bins: Any,
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(compare_runs.main, *names, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare_runs.py: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_runs_outside_of_a_sweep_are_compared_by_their_planner(
    compare: Callable[..., tuple[str, pd.DataFrame]], analysis_store: str, tmp_path: Path
) -> None:
    """As `tt-ray run` leaves them: the parent has the episodes of all its training seeds and policies."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=analysis_store)
    experiment = client.create_experiment("plain", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = client.create_run(experiment, run_name="plain").info.run_id
    rows = [
        {"policy": policy, "training_seed": seed, "seed": episode, "return": 1.0, "score": score + seed}
        for policy, score in (("planner", 10.0), ("greedy decoding", 99.0))
        for seed in (0, 1)
        for episode in (5, 6)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "episodes.parquet")
    client.log_artifact(parent, str(tmp_path / "episodes.parquet"))
    tags = {"mlflow.parentRunId": parent, "seed": "1"}
    child = client.create_run(experiment, run_name="plain seed 1", tags=tags).info.run_id
    _, table = compare(parent, child)
    assert table[["pairs", "first_mean", "other_mean"]].to_numpy().tolist() == [[2, 10.5, 11.0]]
