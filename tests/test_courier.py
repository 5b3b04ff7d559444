"""One process sends what many others write: against SQLite, and without any store."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import (
    identifier,
    journal_points,
    mlflow_points,
    new_store,
    runs_by_name,
    sent_bytes,
    wait_until,
    writer,
)

from tt_ray.errors import UserError
from tt_ray.tracking import (
    Courier,
    Journal,
    JournalTracker,
    MlflowTracker,
    open_journal,
    send_leftovers,
)

AWAY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated SQLite store for the whole file; its set-up takes seconds."""
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def client(database: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=database)


@pytest.fixture
def sender(database: str, request: pytest.FixtureRequest) -> Iterator[Courier]:
    sender = Courier(database, request.node.name, interval=0.05)
    yield sender
    sender.close(0.0)


@pytest.fixture
def tracker(database: str, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker(database, request.node.name, interval=0.05, finish_wait=10.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "tt_ray" in r.name]


def test_runs_of_many_processes_equal_their_journals(
    tracker: MlflowTracker, sender: Courier, client: Any, tmp_path: Path
) -> None:
    folders = [tmp_path / "cells" / str(seed) for seed in range(30)]
    with tracker.start("sweep", tmp_path / "sweep") as parent:
        for folder in folders:  # before there is a journal
            sender.add(f"cell {folder.name}", folder, parent.identity)
        writers = [writer(folders[i::3], steps=40) for i in range(3)]
        assert [process.wait(60) for process in writers] == [0, 0, 0]
        sender.close()
    assert (sender.under_way, sender.unsent) == (0, 0)
    runs = runs_by_name(client, tracker.experiment)
    assert len(runs) == 31
    for seed, folder in enumerate(folders):
        run = runs[f"cell {seed}"]
        points = journal_points(folder)
        assert len(points) == 80
        assert mlflow_points(client, run.info.run_id) == points
        assert run.data.params == {"planner.horizon": str(seed), "planner.beam_width": "8", "seed": str(seed)}
        assert (run.data.tags["seed"], run.data.tags["kind"]) == (str(seed), "trial")
        assert run.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
        assert run.info.status == "FINISHED"
        assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_restarted_trial_goes_on_in_its_run(sender: Courier, client: Any, tmp_path: Path) -> None:
    sender.add("cell", tmp_path)
    first = open_journal(tmp_path, {"workers": 1}, {"host": "a"})
    first.log({"loss": 1.0}, 1)
    first.log({"loss": 2.0}, 2)
    with pytest.raises(ZeroDivisionError), first:
        _ = 1 / 0
    wait_until(lambda: sender.under_way == 0)
    failed = client.get_run(identifier(tmp_path))
    assert (failed.info.status, failed.data.tags["error"]) == (
        "FAILED",
        "ZeroDivisionError: division by zero",
    )

    again = open_journal(tmp_path, {"workers": 2, "added": 3}, {"host": "b"})  # nobody calls `add`
    again.log({"loss": 9.0}, 2)
    again.log({"loss": 3.0}, 3)
    wait_until(lambda: sender.under_way == 1)
    wait_until(lambda: sender.unsent == 0)
    assert client.get_run(identifier(tmp_path)).info.status == "RUNNING"
    again.finish()
    wait_until(lambda: sender.under_way == 0)
    run = client.get_run(identifier(tmp_path))
    assert run.info.run_id == failed.info.run_id
    assert run.data.params == {"workers": "1", "added": "3"}
    assert (run.info.status, run.data.tags["error"], run.data.tags["host"]) == ("FINISHED", "", "b")
    points = mlflow_points(client, run.info.run_id)
    assert [(step, value) for _, step, _, value in points] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert points == journal_points(tmp_path)


def test_killed_writer_is_ended_by_the_driver_and_may_come_back(
    sender: Courier, client: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "7"
    sender.add("cell", folder)
    process = writer([folder], steps=10**6)
    wait_until(lambda: sent_bytes(folder) > 5_000, seconds=60)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(b'{"time":1,"step":2,"met')  # killed while it wrote
    sender.end(folder, "FAILED", {"error": "its worker was killed"})
    wait_until(lambda: sender.under_way == 0)
    written = journal_points(folder)
    run = client.get_run(identifier(folder))
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "its worker was killed")
    assert mlflow_points(client, run.info.run_id) == written

    done = len(written) // 2
    again = writer([folder], steps=done + 10)  # does all its steps again, and ten more
    assert again.wait(60) == 0
    sender.close()
    points = mlflow_points(client, run.info.run_id)
    assert points == journal_points(folder)
    for key, values in {"train/loss": lambda step: 1 / (step + 1), "train/rate": float}.items():
        curve = [(step, value) for name, step, _, value in points if name == key]
        assert curve == [(step, values(step)) for step in range(done + 10)]
    assert set(written) <= set(points)
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FINISHED", "")


def test_killed_driver_is_followed_by_another(
    sender: Courier, client: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = [tmp_path / str(i) for i in range(4)]
    code = (
        "import sys, time; from tt_ray.tracking import Courier\n"
        f"courier = Courier({sender._store.uri!r}, {request.node.name!r}, interval=0.05)\n"
        "for folder in sys.argv[1:]: courier.add(folder[-1], folder)\n"
        "time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, *map(str, folders)])
    process = writer(folders, steps=10**6, pause=0.002, stop=str(tmp_path / "stop"))
    try:
        wait_until(lambda: all(sent_bytes(folder) > 3_000 for folder in folders), seconds=90)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(30) == -signal.SIGKILL
        before = [identifier(folder) for folder in folders]
        for folder in folders:
            sender.add(folder.name, folder)
    finally:
        driver.kill()
        (tmp_path / "stop").touch()
    assert process.wait(30) == 0
    wait_until(lambda: sender.under_way == 0)
    assert [identifier(folder) for folder in folders] == before
    assert len(runs_by_name(client, request.node.name)) == 4
    for folder in folders:
        assert mlflow_points(client, identifier(folder)) == journal_points(folder)


def test_cell_that_never_started_is_a_failed_run(sender: Courier, client: Any, tmp_path: Path) -> None:
    sender.add("cell", tmp_path)
    wait_until(lambda: sender.under_way == 1)
    sender.end(tmp_path, "KILLED", {"trial.status": "stopped"})
    wait_until(lambda: sender.under_way == 0)
    run = client.get_run(identifier(tmp_path))
    assert (run.info.status, run.data.tags["trial.status"]) == ("KILLED", "stopped")


def test_ended_runs_ask_nothing_of_mlflow_and_of_no_thread(
    sender: Courier, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    threads = set(threading.enumerate())
    for i in range(200):  # cells that wait
        sender.add(f"waits {i}", tmp_path / f"waits-{i}")
    for i in range(5):
        sender.add(f"cell {i}", tmp_path / str(i))
        open_journal(tmp_path / str(i)).finish()
    wait_until(lambda: sender.under_way == 200)
    calls: list[str] = []
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *_, **__: calls.append("search"))
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: calls.append("log"))
    rounds = threading.Semaphore(0)
    take_up = sender._take_up
    monkeypatch.setattr(sender, "_take_up", lambda count: (take_up(count), rounds.release())[0])
    assert all(rounds.acquire(timeout=10) for _ in range(5))
    assert calls == []
    assert set(threading.enumerate()) <= threads


def test_all_ended_runs_are_looked_at_in_turn(
    sender: Courier, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tt_ray.tracking.courier.LOOKS", 2)
    folders = [tmp_path / str(i) for i in range(7)]
    for folder in folders:
        sender.add(folder.name, folder)
        open_journal(folder).finish()
    wait_until(lambda: sender.under_way == 0)
    for folder in folders:
        Journal(folder).append({"late": 1.0}, 0)
    wait_until(lambda: all("late" in client.get_run(identifier(f)).data.metrics for f in folders))


def test_run_added_again_is_sent_again_where_it_is_gone(sender: Courier, client: Any, tmp_path: Path) -> None:
    sender.add("cell", tmp_path)
    with open_journal(tmp_path, {"a": 1}) as run:
        run.log({"loss": 1.0}, 1)
    wait_until(lambda: sender.under_way == 0)
    first = identifier(tmp_path)
    identity = json.loads((tmp_path / "run.json").read_text())["identity"]
    sender.add("cell", tmp_path)
    wait_until(lambda: sender.under_way == 0)
    assert identifier(tmp_path) == first
    client.delete_run(first)
    sender.add("cell", tmp_path)
    wait_until(lambda: sender.under_way == 0)
    second = identifier(tmp_path)
    assert second != first
    assert mlflow_points(client, second) == journal_points(tmp_path)
    assert client.get_run(second).info.status == "FINISHED"
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == identity


def test_child_waits_for_its_parent(
    tracker: MlflowTracker, sender: Courier, client: Any, tmp_path: Path
) -> None:
    parent = JournalTracker(tracker.experiment).start("sweep", tmp_path / "sweep")  # not in MLflow
    sender.add("cell", tmp_path / "cell", parent.identity)
    sender.add("alone", tmp_path / "alone")
    for name in ("cell", "alone"):
        with open_journal(tmp_path / name) as run:
            run.log({"loss": 1.0}, 1)
    wait_until(lambda: sender.under_way == 1)
    assert identifier(tmp_path / "cell") is None
    with tracker.start("sweep", tmp_path / "sweep") as begun:
        wait_until(lambda: sender.under_way == 0)
    child = client.get_run(identifier(tmp_path / "cell"))
    assert child.data.tags["mlflow.parentRunId"] == begun.run_id
    assert len(mlflow_points(client, child.info.run_id)) == 1


def test_artifact_that_is_refused_holds_up_nobody(
    sender: Courier,
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    upload = MlflowClient.log_artifact

    def refuse(self: Any, run_id: str, path: str, folder: str | None = None) -> None:
        if path.endswith("bad.txt"):
            raise OSError("artifact store is full")
        upload(self, run_id, path, folder)

    folders = [tmp_path / str(i) for i in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        for i, folder in enumerate(folders):
            sender.add(f"cell {i}", folder)
            run = open_journal(folder)
            for name in ["bad.txt"] * (i < 2) + ["good.txt"]:
                (folder / name).write_text(name)
                run.artifact(folder / name)
            run.log({"loss": 1.0}, 1)
            run.finish()
        wait_until(lambda: sender.under_way == 2)
        for folder in folders[:2]:
            Journal(folder).append({"loss": 2.0}, 2)
        wait_until(lambda: sender.unsent == 2)
        sender.close(0.5)
    for folder in folders:
        assert mlflow_points(client, identifier(folder)) == journal_points(folder)
        assert [a.path for a in client.list_artifacts(identifier(folder))] == ["good.txt"]
    messages = warnings(caplog)
    assert len(messages) == 2
    assert "does not take run 'cell 0' (artifact store is full)" in messages[0]
    assert messages[1].startswith(f"2 points and artifacts of 2 runs stay below {tmp_path}, because")
    assert send_leftovers(tmp_path, sender._store.uri) == 2
    assert len(client.list_artifacts(identifier(folders[0]))) == 2


def test_server_that_is_away_is_one_warning_for_all_runs(
    database: str,
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    sender = Courier(AWAY, request.node.name, interval=0.05)
    for i in range(5):
        sender.add(f"cell {i}", tmp_path / str(i))
        with open_journal(tmp_path / str(i)) as run:
            run.log({"loss": 1.0, "rate": 2.0}, 1)
    wait_until(lambda: warnings(caplog))
    sender.close(0.5)
    assert (sender.under_way, sender.unsent) == (5, 10)
    first, second = warnings(caplog)
    assert first.startswith(f"MLflow at {AWAY} cannot be used (Connection refused); all results stay")
    assert second == (
        f"10 points and artifacts of 5 runs stay below {tmp_path}, because MLflow at {AWAY} did not take "
        "them (Connection refused); the next command with --resume sends them"
    )
    assert send_leftovers(tmp_path, database) == 5
    runs = runs_by_name(client, request.node.name)
    assert all(
        mlflow_points(client, runs[f"cell {i}"].info.run_id) == journal_points(tmp_path / str(i))
        for i in range(5)
    )


def test_damaged_state_is_refused_and_leftovers_are_removed(sender: Courier, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not a run's state"):
        sender.add("cell", tmp_path)
    assert sender.under_way == 0
    (tmp_path / "run.json").unlink()
    (tmp_path / f".run.json.{os.getpid()}.1").write_text("half")
    sender.add("cell", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
