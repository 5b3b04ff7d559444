from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sweep_report

FIGURES = ("curves", "frontier", "parallel", "parameters")


@pytest.fixture
def report(
    bins: Any, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, Path]:
    assert run_main(sweep_report.main, bins.name, "--out", tmp_path / "out") == 0
    return capsys.readouterr().out, tmp_path / "out"


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("## ")[0]


def test_report(report: tuple[str, Path], bins: Any) -> None:
    text, folder = report
    files = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == files | {
        "report.md",
        "trials.parquet",
        "parameters.parquet",
    }
    assert text.startswith((folder / "report.md").read_text())
    assert "Do quantile bins beat uniform bins?" in text
    assert "4 trials (grid): 3 finished, 1 failed. maximize score/mean." in text
    best = bins.trials.iloc[3]
    assert f"{best['score/mean']:.1f} [{best['score/ci_low']:.1f}, " in section(text, "Best")
    assert f"{best['confirmed/mean']:.1f} [{best['confirmed/ci_low']:.1f}, " in section(text, "Best")
    assert "hopper-medium, strategy=quantile" in section(text, "Best")
    assert "strategy=uniform" not in section(text, "Best")
    assert "OSError: no space left on device" in section(text, "Failed")
    saved = (
        "5.00 min of computing; reuse of stages saved 2.50 min (33 % of what it would have taken), in 3 of 4"
    )
    assert saved in section(text, "Time")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), bins.trials)


def test_a_curve_for_each_model(report: tuple[str, Path]) -> None:
    words = (report[1] / "curves.svg").read_text()
    labels = [
        f"{case}, strategy={s}, seed {n}"
        for case, s, n in (("hopper-medium", "uniform", 2), ("cheetah", "quantile", 0))
    ]
    assert all(f"<!-- {label} -->" in words for label in labels)
    assert "<!-- hopper-medium, strategy=quantile, seed 2 -->" not in words  # the missing cell
    assert "<!-- cheetah, strategy=uniform" not in words  # the failed trial


def test_runs_of_former_trials_are_left_out_and_counted(
    shrunk: Any, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(sweep_report.main, shrunk.name, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert text.count("2 runs of sweep 'shrunk bins' are not in its table") == 1
    assert "4 trials (grid): 3 finished, 1 failed." in text
    words = (tmp_path / "out" / "curves.svg").read_text()
    assert words.count(", seed 0 -->") == 3  # the fourth trial has failed


def grid_of(function: Callable[[str, int, float], float]) -> pd.DataFrame:
    rows = [
        {"case": case, "strategy.x": strategy, "horizon.x": horizon, "m": function(strategy, horizon, shift)}
        for case, shift in (("easy", 50.0), ("hard", 0.0))
        for strategy in ("uniform", "quantile")
        for horizon in (1, 5, 15)
    ]
    return pd.DataFrame(rows)


def test_main_effects_are_shares_of_the_variance() -> None:
    """By hand: strategy -+3 has variance 9, the horizon's 0, 1, 5 have 14/3; cases do not matter."""
    gains = {1: 0.0, 5: 1.0, 15: 5.0}
    table = grid_of(lambda strategy, horizon, shift: shift + gains[horizon] + 6.0 * (strategy == "quantile"))
    effects = sweep_report.main_effects(table, ["horizon.x", "strategy.x"], "m", "maximize")
    assert effects["parameter"].tolist() == ["strategy.x", "horizon.x"]
    assert effects["share"].tolist() == pytest.approx([9 / (9 + 14 / 3), 14 / 3 / (9 + 14 / 3)])
    assert effects["chance"].tolist() == pytest.approx([1 / 10, 2 / 10])
    assert effects["best"].tolist() == ["quantile", "15"]
    assert effects["worst"].tolist() == ["uniform", "1"]
    assert effects["gain"].tolist() == pytest.approx([6.0, 5.0])
    less = sweep_report.main_effects(table, ["horizon.x"], "m", "minimize")
    assert less["best"].tolist() == ["1"]


def test_a_parameter_without_effect_has_the_share_of_chance() -> None:
    random, shares = np.random.default_rng(0), []
    for _ in range(300):
        table = grid_of(lambda *_: random.normal())
        shares.append(
            sweep_report.main_effects(table, ["horizon.x"], "m", "maximize").loc[0, ["share", "chance"]]
        )
    found = pd.DataFrame(shares).astype(float).mean()
    assert found["share"] == pytest.approx(found["chance"], abs=0.03)


def test_continuous_parameters_are_cut_into_ranges() -> None:
    rates = np.geomspace(1e-5, 1e-2, 40)
    table = pd.DataFrame({"case": "", "rate.x": rates, "m": np.log(rates)})
    effects = sweep_report.main_effects(table, ["rate.x"], "m", "maximize")
    assert effects.loc[0, "values"] == 4
    assert effects.loc[0, "share"] > 0.9
    assert effects.loc[0, "best"].endswith("to 0.01")
    assert effects.loc[0, "worst"].startswith("1e-05 to")


def test_cases_with_one_trial_and_constant_metrics_say_nothing() -> None:
    lone = pd.DataFrame({"case": ["a", "b"], "k.x": [1, 2], "m": [1.0, 5.0]})
    assert sweep_report.main_effects(lone, ["k.x"], "m", "maximize").empty
    same = pd.DataFrame({"case": "", "k.x": [1, 1, 2, 2], "m": 3.0})
    assert sweep_report.main_effects(same, ["k.x"], "m", "maximize")["share"].tolist() == [0.0]


def test_a_sweep_in_which_everything_failed(
    write_sweep: Callable[..., None],
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {
            "index": i,
            "trial": f"horizon={h}",
            "case": "",
            "status": "failed",
            "cause": "out of | memory",
            "planner.horizon": h,
        }
        for i, h in enumerate((5, 15))
    ]
    write_sweep("all failed", pd.DataFrame(rows))
    assert run_main(sweep_report.main, "all failed", "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "No trial has finished with a number." in text
    assert "Too few trials or parameters to tell." in text
    assert "out of \\| memory" in text
    for name in ("parameters", "parallel", "frontier"):
        assert "no finished trials" in (tmp_path / "out" / f"{name}.svg").read_text()


def test_a_losing_metric_is_minimized_and_none_is_a_value(
    write_sweep: Callable[..., None],
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = {None: 2.0, 10: 1.0, 40: 3.0}
    rows = [
        {"index": i, "trial": f"k_act={json.dumps(k)}", "case": "", "status": "finished", "planner.k_act": k}
        | {"val/loss": loss + extra, "speed/latency_p50_ms": 10.0 * i}
        for i, (k, loss, extra) in enumerate((k, loss, e) for k, loss in losses.items() for e in (0.0, 0.1))
    ]
    tags = {"search.metric": "val/loss"}
    write_sweep("losses", pd.DataFrame(rows), **tags)
    assert run_main(sweep_report.main, "losses", "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert section(text, "Best").splitlines()[3].split("|")[1:3] == [" k_act=10 ", f"{'1.00':>20} "]
    effects = pd.read_parquet(tmp_path / "out" / "parameters.parquet")
    assert effects.loc[0, ["best", "worst"]].tolist() == ["10", "40"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bins of all kind"],
            "no sweep 'bins of all kind' in MLflow at {uri}: did you mean bins of all kinds",
        ),
        (["bins of all kinds", "--cost", "speed/x"], "sweep 'bins of all kinds' has no column 'speed/x'"),
        (["x", "--uri", "file:mlruns"], "tracking URI 'file:mlruns' is a file store"),
        (["x", "--uri", "sqlite:////nowhere/mlflow.db"], "no MLflow database /nowhere/mlflow.db"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    bins: Any,
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(sweep_report.main, *arguments, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sweep_report.py: error: {message.format(uri=bins.uri)}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()
