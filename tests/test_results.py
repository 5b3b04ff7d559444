"""The table of an experiment's runs as pandas has it."""

import math
import socket

import pytest
from mlflow_study import CAUSE, Study, make_study

from tt_ray.errors import UserError
from tt_ray.tracking import connect, results_table
from tt_ray.tracking.results import COLUMNS, MlflowAwayError, further_columns


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite store for the whole file; its set-up takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "to be replaced")
        return connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


def test_a_sweep_in_the_table(database: str) -> None:
    _, ids = make_study(database)
    table = results_table("a study", database)
    order = ["plain", "sweep", "finished", "failed", "running", "stopped"]  # by trial, then by seed
    assert list(table.index) == [ids[name] for name in order]
    table.index = order  # type: ignore[assignment]
    assert list(table["status"]) == ["FINISHED", "RUNNING", "FINISHED", "FAILED", "RUNNING", "STOPPED"]
    assert list(table["kind"]) == ["", "sweep", *["trial"] * 4]
    assert table["parent"].eq("bins").tolist() == [False, False, True, True, True, True]
    assert list(table["trial"])[2:] == [f"horizon={5 * index}, beam_width=128" for index in (1, 1, 2, 10)]
    assert list(table["seed"])[2:] == ["0", "1", "0", "0"]
    assert table["cause"].to_dict() == dict.fromkeys(order, "") | {"failed": CAUSE}
    assert table.loc["stopped", "reused"] == "tokens, model 0, 20 episodes (planner, seed 0)"
    assert (table.loc["stopped", "seconds"], table.loc["stopped", "saved"]) == (1280.0, 1230.0)
    assert math.isnan(table.loc["running", "seconds"])
    assert table.loc["running", "val/loss"] == 4.75
    assert table.loc["sweep", ["best/score/mean", "best/val/loss", "confirmed/score/mean"]].tolist() == [
        70,
        4.5,
        66,
    ]
    assert table["best/score/mean"].isna().sum() == 5
    assert table["metric"].to_dict() == dict.fromkeys(order, "") | {"sweep": "score/mean"}
    assert list(table["fingerprint"])[2:] == [f"{index:016x}" for index in (1, 1, 2, 10)]


def test_trials_that_share_a_number_are_kept_apart(database: str) -> None:
    """Number 0 is "a" now, and was "c" before that was taken out of the file; "b" is half renamed."""
    study = Study(database, "extended")
    sweep = study.sweep()
    placed = [("b", 5, 1), ("c", 0, 1), ("a", 0, 2), ("c", 0, 0), ("b", 1, 0), ("a", 0, 10), ("d", 2, 0)]
    for fingerprint, index, seed in placed:
        study.trial(sweep, index, seed, fingerprint, horizon=7)
    trials = results_table("extended", database).iloc[1:]
    found = [f"{run['fingerprint']}{run['seed']}" for _, run in trials.iterrows()]
    assert found == ["a2", "a10", "c0", "c1", "b0", "b1", "d0"]


def test_the_last_point_of_any_curve_is_known(database: str) -> None:
    from mlflow.entities import Metric

    study = Study(database, "points")
    trial = study.trial(study.sweep(), 0, horizon=1)
    start = study.client.get_run(trial).info.start_time
    times = [results_table("points", database).loc[trial, "updated"]]
    for later in (60_000, 30_000):
        study.client.log_batch(trial, metrics=[Metric(f"train/{later}", 1.0, start + later, 0)])
        times.append(results_table("points", database).loc[trial, "updated"])
    assert [time.timestamp() - start / 1000 for time in times] == pytest.approx([0.0, 60.0, 60.0])


def test_columns_that_every_experiment_has_come_first(database: str) -> None:
    make_study(database, "columns")
    table = results_table("columns", database)
    assert tuple(table.columns[: len(COLUMNS)]) == COLUMNS
    assert further_columns(table) == ["planner.beam_width", "planner.horizon"]
    assert list(table.groupby("trial")["planner.horizon"].first())[1:] == ["10", "5", "50"]


@pytest.mark.parametrize(
    ("status", "tag", "shown", "cause"),
    [
        ("FINISHED", "finished", "FINISHED", ""),
        ("FINISHED", "failed", "FAILED", "why"),
        ("KILLED", "failed", "KILLED", ""),  # tried again, and interrupted
        ("RUNNING", "failed", "RUNNING", ""),  # is being tried again
        ("RUNNING", "stopped", "RUNNING", ""),
        ("KILLED", "stopped", "STOPPED", ""),
        ("FAILED", "", "FAILED", "why"),
    ],
)
def test_status_of_a_trial(database: str, status: str, tag: str, shown: str, cause: str) -> None:
    study, _ = make_study(database, f"{status} {tag}")
    trial = study.trial(study.sweep("again"), 0, horizon=1)
    study.client.set_tag(trial, "trial.status", tag)
    study.client.set_tag(trial, "error", "why")
    if status != "RUNNING":
        study.end(trial, status)
    table = results_table(study.name, database)
    assert (table.loc[trial, "status"], table.loc[trial, "cause"]) == (shown, cause)


def test_a_store_that_does_not_answer_is_told_from_one_without_the_experiment(database: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(MlflowAwayError, match=r"does not answer \(Connection refused\)"):
        results_table("a study", uri)
    with pytest.raises(UserError, match="no experiment 'nothing'") as caught:
        results_table("nothing", database)
    assert not isinstance(caught.value, MlflowAwayError)
