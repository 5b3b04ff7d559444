from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import study
import sweep_report

from tt_ray.errors import UserError


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (44.04, 0.312, "44.04 ± 0.31"),
        (110.0, 2.7, "110.0 ± 2.7"),
        (95.0, 0.0, "95.0 ± 0.0"),
        (5.0, float("nan"), "5.00"),
        (float("nan"), 1.0, ""),
    ],
)
def test_means_with_their_errors(value: float, error: float, text: str) -> None:
    assert study.error_text(value, error) == text


def test_markdown_tables_line_up_and_keep_their_cells_apart() -> None:
    table = study.markdown_table(["a", "number"], [["x | y", "1.5"], ["line\nbreak", ""]])
    assert table.splitlines() == [
        "| a          | number |",
        "| ---------- | -----: |",
        "| x \\| y     |    1.5 |",
        "| line break |        |",
    ]


def test_a_study_is_found_by_name_by_experiment_and_by_run_id(
    bins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bins.uri)
    for name in (bins.name, f"study of {bins.name}", bins.run_id):
        found = study.load_study(name, bins.uri)
        assert (found.run_id, found.name) == (bins.run_id, bins.name)
    assert found.keys == ["discretizer.strategy"]
    assert (found.metric, found.goal) == ("score/mean", "maximize")
    assert len(found.cells) == 11
    assert found.winners()["trial"].tolist() == [
        "hopper-medium, strategy=quantile",
        "cheetah, strategy=quantile",
    ]
    assert len(found.episodes) == 12 + 8 + 12 + 9


def test_a_trial_that_was_taken_out_is_not_the_one_with_its_number(
    bins: Any, shrunk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shrunk.uri)
    found, whole = study.load_study(shrunk.name, shrunk.uri), study.load_study(bins.name, bins.uri)
    assert (found.gone, len(found.cells)) == (2, 11)
    assert set(found.cells["tags.trial"]) == {"f0", "f1", "f2", "f3"}
    assert found.gone_text == (
        "2 runs of sweep 'shrunk bins' are not in its table (taken out of the file, or just begun) and are "
        "left out."
    )
    assert (whole.gone, whole.gone_text) == (0, "")
    label = sweep_report.model_label(found)
    curves = study.learning_curves(found.cells, label)
    assert curves == study.learning_curves(whole.cells, sweep_report.model_label(whole))


def test_episodes_go_to_their_trials_while_these_have_other_numbers(
    analysis_store: str, write_sweep: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extended sweep has written its table of trials, and not yet its episodes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", analysis_store)
    names = ["horizon=1", "horizon=5", "horizon=15"]
    trials = pd.DataFrame({"index": [0, 1], "trial": [names[2], names[0]], "status": "finished"})
    episodes = pd.DataFrame({"trial_index": [0, 1, 2], "trial": names, "training_seed": 0, "seed": 7})
    episodes["fingerprint"] = ["f1", "taken out", "f0"]
    episodes["score"] = episodes["episode_return"] = [1.0, 5.0, 15.0]
    write_sweep("renumbered", trials, episodes)
    found = study.load_study("renumbered", analysis_store)
    assert found.episodes[["fingerprint", "score"]].to_numpy().tolist() == [["f1", 1.0], ["f0", 15.0]]
    for number, score in enumerate((15.0, 1.0)):
        mine = found.episodes_of(found.trials[found.trials["index"] == number])
        assert mine["score"].tolist() == [score]


def test_two_sweeps_of_one_name_are_told_apart_by_run_id(
    analysis_store: str, write_sweep: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", analysis_store)
    trials = pd.DataFrame({"index": [0], "trial": ["one"], "status": ["waiting"]})
    write_sweep("first", trials, sweep="twins")
    write_sweep("second", trials, sweep="twins")
    with pytest.raises(UserError, match="2 sweeps go by 'twins': give the run id of one of them: ") as raised:
        study.load_study("twins", analysis_store)
    run_id = str(raised.value).rpartition("them: ")[2].partition(" ")[0]
    assert study.load_study(run_id, analysis_store).trials["trial"].tolist() == ["one"]


def test_settings_are_named_in_short_unless_that_is_ambiguous(
    bins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bins.uri)
    found = study.load_study(bins.name, bins.uri)
    trial = {"planner.horizon": 5.0, "a.seed": None, "b.seed": True}
    assert found.settings_text(trial, list(trial)) == "horizon=5, a.seed=none, b.seed=True"


def test_cells_that_share_a_model_have_one_curve(bins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bins.uri)
    cells = study.load_study(bins.name, bins.uri).cells
    label = sweep_report.model_label(study.load_study(bins.name, bins.uri))
    curves = study.learning_curves(cells, label)
    assert len(curves) == 8
    steps, losses = curves["cheetah, strategy=quantile, seed 1"]
    assert steps == [0, 100, 200, 300, 400, 500]
    assert losses == pytest.approx([4.1, 2.1, 4 / 3 + 0.1, 1.1, 0.9, 4 / 6 + 0.1])
    shared = study.learning_curves(cells.assign(**{"tags.stage.model": "one model"}), label)
    assert len(shared) == 1


def test_a_study_without_a_table_is_refused(
    analysis_store: str, tmp_path: Path, run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=analysis_store)
    experiment = client.create_experiment("only begun", artifact_location=(tmp_path / "artifacts").as_uri())
    client.create_run(experiment, tags={"kind": "sweep", "sweep": "only begun"}, run_name="only begun")
    assert run_main(sweep_report.main, "only begun", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "sweep 'only begun' has no table trials.parquet in MLflow that can be read" in error
    assert error.count("\n") == 1


def test_files_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").mkdir()
    with pytest.raises(OSError, match="directory"):
        study.write_table(pd.DataFrame({"a": [1]}), tmp_path / "table.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
