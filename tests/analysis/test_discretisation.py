from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import discretisation
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from study import load_study

from tt_ray.errors import UserError

CHEETAH, HOPPER = "mujoco/halfcheetah/medium-expert-v0", "d4rl/hopper/medium-v2"
CELL = {"in_use": 0.9, "entropy": 5.0, "median_error": 0.01, "max_error": 0.5}


def loss(dataset: str, strategy: str, num_bins: int, errors: tuple[float, ...]) -> list[dict[str, Any]]:
    """The rows of one choice of bins, a dimension for each error."""
    place = {"dataset": dataset, "strategy": strategy, "num_bins": num_bins}
    return [{**place, "dimension": i, "rmse": error, **CELL} for i, error in enumerate(errors)]


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    """What the bins of the sweep `bins` lose; and bins that it does not have."""
    rows = [
        row
        for dataset, factor in ((CHEETAH, 1.0), (HOPPER, 2.0))
        for strategy, error in (("uniform", 0.02), ("quantile", 0.04))
        for row in loss(dataset, strategy, 100, (factor * error, 3 * factor * error))
    ]
    pd.DataFrame(rows + loss(CHEETAH, "uniform", 7, (9.0, 9.0))).to_parquet(tmp_path / "bins.parquet")
    return tmp_path / "bins.parquet"


@pytest.fixture
def with_bins(bins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of `bins` say their number of bins, as those of a real sweep do."""

    def load(name: str, uri: str) -> Any:
        study = load_study(name, uri)
        study.cells["params.discretizer.num_bins"] = "100"
        return study

    monkeypatch.setattr(discretisation, "load_study", load)


def test_scores_beside_what_the_bins_lose(
    bins: Any,
    with_bins: None,
    losses: Path,
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(discretisation.main, bins.name, losses, "--out", tmp_path / "out") == 0
    text, folder = capsys.readouterr().out, tmp_path / "out"
    names = {f"discretisation.{kind}" for kind in ("md", "parquet", "png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    table = pd.read_parquet(folder / "discretisation.parquet").set_index(["case", "strategy"])
    assert sorted(table.index) == [
        ("cheetah", "quantile"), ("hopper-medium", "quantile"), ("hopper-medium", "uniform")
    ]  # fmt: skip  # the fourth has failed
    assert table["rmse"].to_dict() == pytest.approx(
        {
            ("cheetah", "quantile"): 0.08,  # the mean of 0.04 and 0.12
            ("hopper-medium", "quantile"): 0.16,
            ("hopper-medium", "uniform"): 0.08,
        }
    )
    scores = bins.trials.set_index(["case", "discretizer.strategy"])["score/mean"]
    for place, score in table["score/mean"].items():
        assert score == scores[place]
    assert "| hopper-medium | quantile |  100 |" in text
    assert "Do quantile bins beat uniform bins?" in text
    assert min(imread(folder / "discretisation.png").shape[:2]) > 400
    words = (folder / "discretisation.svg").read_text()
    assert all(
        f"<!-- {text} -->" in words for text in ("cheetah", "hopper-medium", "uniform", "quantile", "100")
    )


def test_another_error_is_shown_on_request(
    bins: Any, with_bins: None, losses: Path, run_main: Callable[..., int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_main(discretisation.main, bins.name, losses, "--error", "max_error", "--out", out) == 0
    assert "<!-- max_error of held-out data" in (out / "discretisation.svg").read_text()


def test_bins_without_a_table_are_named_with_the_command(
    bins: Any,
    with_bins: None,
    losses: Path,
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = pd.read_parquet(losses)
    table[table["dataset"] == CHEETAH].to_parquet(losses)
    assert run_main(discretisation.main, bins.name, losses, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no uniform bins, 100 a dimension, of d4rl/hopper/medium-v2" in error
    assert "`tt-ray data bins d4rl/hopper/medium-v2 --bins 100`" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_table_is_refused(
    bins: Any, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.parquet").write_text("no table")
    pd.DataFrame({"rmse": [1.0]}).to_parquet(tmp_path / "other.parquet")
    for name in ("text.parquet", "other.parquet", "none.parquet"):
        assert run_main(discretisation.main, bins.name, tmp_path / name, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"{name}: no table of `tt-ray data bins`" in error
        assert error.count("\n") == 1


def test_a_sweep_whose_runs_do_not_say_their_bins_is_refused(bins: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bins.uri)
    with pytest.raises(UserError, match=r"says its discretizer\.num_bins"):
        discretisation.joined(load_study(bins.name, bins.uri), pd.DataFrame())


def test_the_rank_correlation_of_each_data_set() -> None:
    numbers = np.arange(4.0)
    table = pd.DataFrame(
        {
            "case": ["a"] * 4 + ["b"] * 4 + ["c"],
            "dataset": "d",
            "rmse": [*numbers, *numbers, 1.0],
            "score/mean": [*(10 - numbers), 1.0, 2.0, 3.0, 10.0, 5.0],
        }
    )
    lines = discretisation.rank_text(table, "score/mean", "rmse").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2:] == [["a", "4", "-1.00"], ["b", "4", "1.00"], ["c", "1", ""]]
