from __future__ import annotations

import json
import math
from pathlib import Path

import mlflow
import pytest
from commands import as_refusal, files_below, tt_ray

KEYS = {
    *("kind", "configuration", "episodes", "per_second", "p50_ms", "p95_ms", "gflop", "gflops"),
    *("limit_gflops", "share", "ratio"),
}


def test_rows_of_planning_and_training(tmp_path: Path) -> None:
    arguments = ("--only", "halfcheetah", "--only", "train", "--seconds", "0", "--threads", "1")
    outcome = tt_ray(tmp_path, "bench", *arguments, "--json", "rows.json", "--mlflow")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("limit: ")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["kind"], row["episodes"]) for row in rows] == [("plan", 1), ("plan", 8), ("train", 64)]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["share"] == pytest.approx(row["gflops"] / row["limit_gflops"])
        assert row["gflops"] == pytest.approx(row["gflop"] * row["per_second"])
        assert all(math.isfinite(value) and value > 0 for value in row.values() if isinstance(value, float))
    assert rows[0]["p50_ms"] <= rows[0]["p95_ms"]
    assert {row["how"] for row in rows[:2]} == {"native"}

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["tt-ray bench"], output_format="list")
    assert run.data.metrics["plan/halfcheetah-8/share"] == pytest.approx(rows[1]["share"])
    assert run.data.metrics["train/hopper-64/ratio"] == pytest.approx(rows[2]["ratio"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--only", "cheetah"), ("--only cheetah", "halfcheetah")),
        (("--decoder", "fast"), ("--decoder fast", "native")),
        (("--device", "tpu"), ("--device tpu", "cpu")),
        (("--threads", "0"), ("threads",)),
        (("--threads", "99999999999"), ("threads",)),
        (("--json", ""), ("--json",)),
        (("--json", "/tmp"), ("--json /tmp", "no file")),
        (("--json", "nowhere/rows.json"), ("nowhere",)),
    ],
)
def test_mistakes_are_refused_at_once(
    tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    as_refusal(tt_ray(tmp_path, "bench", *arguments), *parts)
    assert files_below(tmp_path) == set()


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_trial_costs(tmp_path: Path) -> None:
    outcome = tt_ray(tmp_path, "bench", "--only", "sweep", "--seconds", "0", "--mlflow")
    assert outcome.code == 0, outcome.err
    assert "Cost of a trial" in outcome.out
    assert "driver rss 100" in outcome.out
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["tt-ray bench"], output_format="list")
    assert run.data.metrics["sweep/trials"] == 200
    assert run.data.metrics["sweep/overhead_seconds"] > 0
