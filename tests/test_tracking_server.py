"""Against a real `mlflow server` that goes away in mid-run and comes back."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import Server, journal_points, mlflow_points, wait_until

from tt_ray.errors import UserError
from tt_ray.tracking import MlflowTracker, connect, connection, results_table, send_leftovers


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be replaced")
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


def test_server_lost_in_mid_run_costs_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    caplog.set_level(logging.WARNING)
    client = MlflowClient(tracking_uri=connect(server.uri))
    tracker = MlflowTracker(server.uri, "outage", interval=0.1, finish_wait=60.0)
    run = tracker.start("parent", tmp_path / "parent", params={"steps": 300})
    log_steps(run, 0, 100)
    wait_until(lambda: run.unsent == 0)

    server.stop()
    with pytest.raises(UserError, match="cannot be used"):
        connect(server.uri)
    log_steps(run, 100, 200)
    (tmp_path / "table.md").write_text("| score |")
    run.artifact(tmp_path / "table.md")
    wait_until(lambda: "does not take run 'parent'" in caplog.text)
    hurried = MlflowTracker(server.uri, "outage", interval=0.1, finish_wait=0.5)
    with hurried.start("child", tmp_path / "child", parent=run.identity) as child:
        log_steps(child, 0, 50)
    assert (child.run_id, child.unsent, run.unsent) == (None, 100, 200)

    server.start()
    log_steps(run, 200, 300)
    run.finish()
    assert send_leftovers(tmp_path, server.uri) == 1

    table = results_table("outage", server.uri)
    assert list(table["run"]) == ["parent", "child"]
    assert list(table["parent"]) == ["", "parent"]
    assert list(table["status"]) == ["FINISHED", "FINISHED"]
    for run_id, folder, count in zip(table.index, ["parent", "child"], [600, 100], strict=True):
        points = journal_points(tmp_path / folder)
        assert len(points) == count
        assert mlflow_points(client, run_id) == points
    assert run.run_id == table.index[0]
    assert [a.path for a in client.list_artifacts(run.run_id)] == ["table.md"]
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [m.partition(" (")[0].replace(server.uri, "X") for m in messages] == [
        "MLflow at X does not take run 'parent'",
        "MLflow at X does not take run 'child'",
        f"100 points and artifacts of run 'child' stay in {tmp_path}/child/journal.jsonl, "
        "because MLflow at X did not take them",
    ]


def test_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CHECK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"MLflow at {uri} cannot be used \\(no answer in 1 s\\)"):
            connect(uri)


def log_steps(run: Any, first: int, last: int) -> None:
    for step in range(first, last):
        run.log({"train/loss": 1 / (step + 1), "train/rate": step}, step)
