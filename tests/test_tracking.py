"""Runs of one process in MLflow."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import journal_points, mlflow_points, new_store, sent_bytes, wait_until

from tt_ray.errors import UserError
from tt_ray.locks import exclusive
from tt_ray.tracking import (
    JournalTracker,
    MlflowTracker,
    connect,
    read,
    results_table,
    send_leftovers,
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated SQLite store for the whole file; its set-up takes seconds."""
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def client(database: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=database)


@pytest.fixture
def tracker(database: str, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker(database, request.node.name, interval=0.05, finish_wait=10.0)


def test_run_in_mlflow_equals_its_journal(tracker: MlflowTracker, client: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text("| score |")
    curves = tmp_path / "curves"
    (curves / "deep").mkdir(parents=True)
    (curves / "deep" / "loss.txt").write_text("1")
    params = {"planner": {"horizon": 15}, "question": "x" * 7000}
    with tracker.start("run", tmp_path / "run", params=params, tags={"seed": 4}) as run:
        for step in range(700):
            run.log({"train/loss": 1 / (step + 1), "train/rate": step}, step)
        run.log({"odd": float("inf")}, 0)
        run.artifact(table)
        run.artifact(curves)
        run.log_dataset("hopper", "mujoco/hopper/medium-v0", "f" * 64, {"episodes": 3})
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"planner.horizon": "15", "question": "x" * 6000}
    assert stored.data.tags["seed"] == "4"
    points = [p for p in mlflow_points(client, run.run_id) if p[0] != "odd"]
    assert points == [p for p in journal_points(tmp_path / "run") if p[0] != "odd"]
    assert len(points) == 1400
    assert [a.path for a in client.list_artifacts(run.run_id)] == ["curves", "table.md"]
    assert [a.path for a in client.list_artifacts(run.run_id, "curves/deep")] == ["curves/deep/loss.txt"]
    (dataset,) = (entry.dataset for entry in stored.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("hopper", "f" * 36)
    assert run.unsent == 0


def test_continued_run_keeps_its_id_params_and_points(
    tracker: MlflowTracker, client: Any, tmp_path: Path
) -> None:
    first = tracker.start("run", tmp_path, params={"workers": 1})
    first.log({"loss": 1.0}, 1)
    first.set_tags({"error": "worker lost"})
    first.finish("FAILED")
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert client.get_run(first.run_id).data.tags["error"] == "worker lost"
    second = tracker.start("run", tmp_path, params={"workers": 2, "added": True})
    second.log({"loss": 9.0}, 1)
    second.log({"loss": 2.0}, 2)
    wait_until(lambda: second.unsent == 0)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.finish()
    second.finish("FAILED")
    stored = client.get_run(first.run_id)
    assert second.run_id == first.run_id
    assert (stored.info.status, stored.data.tags["error"]) == ("FINISHED", "")
    assert stored.data.params == {"workers": "1", "added": "True"}
    assert [(step, value) for _, step, _, value in mlflow_points(client, first.run_id)] == [
        (1, 1.0),
        (2, 2.0),
    ]


def test_sending_a_batch_again_doubles_nothing(tracker: MlflowTracker, client: Any, tmp_path: Path) -> None:
    with tracker.start("run", tmp_path, params={"a": 1}) as run:
        for step in range(20):
            run.log({"loss": float("nan") if step == 7 else step}, step)
        run.log_dataset("hopper", "somewhere", "abc")
    state = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**state, "offset": 0}))  # died before noting what was sent
    with tracker.start("run", tmp_path, params={"a": 1}) as again:
        again.log({"loss": 20}, 20)
    history = client.get_metric_history(run.run_id, "loss")
    assert again.run_id == run.run_id
    assert sorted(m.step for m in history) == list(range(21))
    assert len(client.get_run(run.run_id).inputs.dataset_inputs) == 1


def test_lines_of_another_process_are_sent_too(tracker: MlflowTracker, client: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from tt_ray.tracking import Journal\n"
        f"Journal({str(tmp_path)!r}).append({{'train/loss': 0.5}}, 3, timestamp=1234567890123)"
    )
    with tracker.start("run", tmp_path) as run:
        subprocess.run([sys.executable, "-c", code], check=True)
        wait_until(lambda: run.unsent == 0)
        assert mlflow_points(client, run.run_id) == [("train/loss", 3, 1234567890123, 0.5)]


def test_killed_process_continues_without_loss_or_double(
    tracker: MlflowTracker, client: Any, tmp_path: Path
) -> None:
    code = (
        "import sys; from tt_ray.tracking import MlflowTracker\n"
        f"run = MlflowTracker({tracker.uri!r}, {tracker.experiment!r}, interval=0.05)"
        f".start('run', {str(tmp_path)!r}, params={{'a': 1}})\n"
        "for step in range(10**6): run.log({'loss': step}, step)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: sent_bytes(tmp_path) > 20_000, seconds=90)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    written = journal_points(tmp_path)
    with tracker.start("run", tmp_path, params={"a": 1}) as run:
        run.log({"loss": -1.0}, len(written) - 1)  # done again after the restart
        run.log({"loss": -2.0}, len(written))
    stored = mlflow_points(client, run.run_id)
    assert stored[:-1] == written
    assert [(step, value) for _, step, _, value in written] == [(i, float(i)) for i in range(len(written))]
    assert stored[-1][1::2] == (len(written), -2.0)
    (only,) = client.search_runs([client.get_experiment_by_name(tracker.experiment).experiment_id])
    assert only.info.run_id == run.run_id


def test_children_stand_below_their_parent_in_the_table(
    tracker: MlflowTracker, database: str, tmp_path: Path
) -> None:
    with tracker.start("sweep", tmp_path / "sweep") as parent:
        for seed, horizon in enumerate([5, 15]):
            params = {"planner": {"horizon": horizon, "beam_width": 8}}
            folder = tmp_path / f"trial{seed}"
            with tracker.start(
                f"trial{seed}", folder, params=params, tags={"seed": seed}, parent=parent.identity
            ) as run:
                run.log({"score/mean": 10.0 * seed, "val/loss": 0.5}, 1)
    table = results_table(tracker.experiment, database)
    assert list(table["run"]) == ["sweep", "trial0", "trial1"]
    assert list(table["parent"]) == ["", "sweep", "sweep"]
    assert list(table["status"]) == ["FINISHED"] * 3
    assert list(table["seed"])[1:] == ["0", "1"]
    assert list(table["score/mean"])[1:] == [0.0, 10.0]
    assert table["return/mean"].isna().all()
    assert [name for name in table.columns if name.startswith("planner.")] == ["planner.horizon"]
    assert list(table["planner.horizon"])[1:] == ["5", "15"]


def test_table_of_unknown_experiment_names_near_ones(
    tracker: MlflowTracker, database: str, tmp_path: Path
) -> None:
    tracker.start("run", tmp_path).finish()
    with pytest.raises(UserError, match=f"did you mean .*{tracker.experiment}"):
        results_table(tracker.experiment[:-2], database)


def test_deleted_run_and_experiment_come_back_whole(
    tracker: MlflowTracker, client: Any, tmp_path: Path
) -> None:
    with tracker.start("run", tmp_path, params={"a": 1}) as run:
        run.log({"loss": 1.0}, 1)
    client.delete_run(run.run_id)
    with tracker.start("run", tmp_path, params={"a": 1}) as new:
        new.log({"loss": 2.0}, 2)
    assert new.run_id != run.run_id
    assert mlflow_points(client, new.run_id) == journal_points(tmp_path)
    client.delete_experiment(client.get_experiment_by_name(tracker.experiment).experiment_id)
    with tracker.start("run", tmp_path):
        pass
    assert client.get_experiment_by_name(tracker.experiment).lifecycle_stage == "active"


def test_run_deleted_while_it_runs_is_made_again(tracker: MlflowTracker, client: Any, tmp_path: Path) -> None:
    with tracker.start("run", tmp_path) as run:
        first = run.run_id
        run.log({"loss": 1.0}, 1)
        wait_until(lambda: run.unsent == 0)
        client.delete_run(first)
        run.log({"loss": 2.0}, 2)
        wait_until(lambda: run.unsent == 0)
    assert run.run_id != first
    assert mlflow_points(client, run.run_id) == journal_points(tmp_path)
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_another_store_gets_the_whole_run_and_the_first_its_own_again(
    tracker: MlflowTracker, client: Any, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    shutil.copy(tracker.uri.removeprefix("sqlite:///"), tmp_path / "other.db")
    other = MlflowTracker(f"sqlite:///{tmp_path}/other.db", tracker.experiment, interval=0.05)
    ids = []
    for step, store in enumerate([tracker, other, tracker]):
        with store.start("run", tmp_path / "run", params={"a": 1}) as run:
            run.log({"loss": step}, step)
        ids.append(run.run_id)
        points = mlflow_points(MlflowClient(tracking_uri=store.uri), run.run_id)
        assert points == journal_points(tmp_path / "run")
        assert len(points) == step + 1
    assert ids[0] == ids[2] != ids[1]


def test_journal_of_a_run_without_mlflow_can_be_sent_later(
    database: str, client: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tracker = JournalTracker(request.node.name)
    parent = tracker.start("sweep", tmp_path / "z")
    with tracker.start("trial", tmp_path / "a", params={"x": 1}, parent=parent.identity) as child:
        child.log({"loss": 1.0}, 1)
    parent.finish()
    with pytest.raises(UserError, match=r"does not take what earlier runs left: .*/z: "):
        send_leftovers(tmp_path, "http://127.0.0.1:1")
    assert send_leftovers(tmp_path, database) == 2
    assert send_leftovers(tmp_path, database) == 0
    table = results_table(request.node.name, database)
    assert list(table["run"]) == ["sweep", "trial"]
    assert mlflow_points(client, table.index[1]) == journal_points(tmp_path / "a")
    assert client.get_run(table.index[1]).info.status == "FINISHED"


def test_leftovers_below_a_sweep_that_another_process_runs_are_left_to_it(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tracker = JournalTracker(request.node.name)
    parent = tracker.start("sweep", tmp_path / "sweep")
    cell = tmp_path / "sweep" / "cells" / "a-0"
    tracker.start("cell", cell, parent=parent.identity).finish()
    with exclusive(tmp_path / "sweep", "held"):
        assert send_leftovers(tmp_path, database) == 0
    assert sent_bytes(cell) == 0
    assert send_leftovers(tmp_path, database) == 2


def test_artifacts_that_fail_stay_pending_and_do_not_hold_up_metrics(
    tracker: MlflowTracker, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    table = tmp_path / "table.md"
    table.write_text("| score |")

    def refuse(*_: Any) -> None:
        raise OSError("artifact store is full")

    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        tracker.finish_wait = 0.5
        with tracker.start("run", tmp_path / "run") as run:
            run.artifact(table)
            run.log({"loss": 1.0}, 1)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tt_ray")]
    assert len(messages) == 2  # once when it fails, once at the end
    assert "artifact store is full" in messages[0]
    assert messages[1].startswith("1 points and artifacts of run 'run' stay in")
    assert mlflow_points(client, run.run_id) == journal_points(tmp_path / "run")
    assert send_leftovers(tmp_path, tracker.uri) == 1
    assert [a.path for a in client.list_artifacts(run.run_id)] == ["table.md"]


def test_interrupt_with_the_server_away_ends_the_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, time; from tt_ray.tracking import MlflowTracker\n"
        "tracker = MlflowTracker('http://127.0.0.1:1', 'away', finish_wait=0.5)\n"
        f"with tracker.start('run', {str(tmp_path)!r}) as run:\n"
        "    run.log({'loss': 1.0}, 1)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGINT
    warnings = [line for line in result.stderr.splitlines() if line.startswith(("MLflow at", "1 points"))]
    assert len(warnings) == 2
    assert "the next command with --resume sends them" in warnings[1]
    assert [record["status"] for record, _ in read(tmp_path / "journal.jsonl") if "status" in record] == [
        "RUNNING",
        "KILLED",
    ]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:1", r"\(Connection refused\).* Start one with: mlflow server"),
        ("mssql+nosuchdriver://u@127.0.0.1:1/db", "cannot be used"),
        ("http://:5000", "names no host"),
        ("http://127.0.0.1:port", "malformed"),
        ("http://127.0.0.1:99999", "malformed"),
        ("localhost:5000", "none that is known"),
        ("./mlruns", "is a file store"),
        ("file:///tmp/mlruns", "is a file store"),
        ("sqlite://", "names no file"),
        ("sqlite:////dev/null/mlflow.db", "cannot write /dev/null/mlflow.db"),
    ],
)
def test_unusable_store_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, uri: str, message: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "as before")
    with pytest.raises(UserError, match=message) as caught:
        connect(uri)
    assert "\n" not in str(caught.value)
    assert os.environ["MLFLOW_TRACKING_URI"] == "as before"


def test_other_file_is_not_taken_for_a_database(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are my notes, no database")
    with pytest.raises(UserError, match=r"notes\.txt is not an SQLite database"):
        connect(f"sqlite:///{tmp_path}/notes.txt")


@pytest.mark.slow
def test_first_use_by_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "from tt_ray.tracking import *; import os\n"
        "uri = connect(); assert os.environ['MLFLOW_TRACKING_URI'] == uri\n"
        "MlflowTracker(uri, 'same').start('run', f'{os.getpid()}').finish(); print(uri)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == [
        f"sqlite:///{tmp_path}/mlflow.db"
    ] * 2
    assert len(results_table("same", f"sqlite:///{tmp_path}/mlflow.db")) == 2
