"""A real `mlflow server` that goes away while many processes write, and comes back."""

import importlib.util
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import Server, free_port, journal_points, mlflow_points, sent_bytes, wait_until, writer

from tt_ray.tracking import Courier, MlflowTracker, connect

OUTAGE = 15  # seconds, besides those that the server takes to start
TOOLS = ("initdb", "pg_ctl", "postgres")


class Postgres:
    """A PostgreSQL in a folder of its own, reached over 127.0.0.1 only."""

    def __init__(self, folder: Path) -> None:
        self.data, self.port = folder / "data", free_port()
        self.uri = f"postgresql+psycopg://tracker@127.0.0.1:{self.port}/postgres"
        self.user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            shutil.chown(folder, "postgres")
            self.user = ["runuser", "-u", "postgres", "--"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.user, *command], check=True, stdout=subprocess.DEVNULL, cwd=self.data.parent)

    def start(self) -> None:
        self.run("initdb", "-D", str(self.data), "-A", "trust", "-U", "tracker", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data} -c fsync=off"
        log = str(self.data / "log")
        self.run("pg_ctl", "-D", str(self.data), "-l", log, "-w", "-t", "60", "-o", options, "start")

    def stop(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")


def missing_for_postgres() -> str:
    """Why the test on PostgreSQL cannot run here; "" if it can."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return f"no {', '.join(tools)} on the PATH"
    if importlib.util.find_spec("psycopg") is None:
        return "no driver: pip install 'psycopg[binary]'"
    if os.geteuid() == 0 and (
        shutil.which("runuser") is None or "postgres" not in {user.pw_name for user in pwd.getpwall()}
    ):
        return "root needs runuser and a user called postgres"
    return ""


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if reason := missing_for_postgres():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other users
    database = Postgres(folder)
    try:
        database.start()
        yield database
    finally:
        database.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be replaced")
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_on_postgres(
    server: Server, postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.backend = postgres.uri
    lose_server_in_mid_sweep(server, tmp_path, caplog)


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_on_a_server_with_sqlite(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lose_server_in_mid_sweep(server, tmp_path, caplog)


def lose_server_in_mid_sweep(server: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three processes write twelve runs before, during and after the outage; MLflow ends with all of it."""
    from mlflow import MlflowClient

    server.start()
    client = MlflowClient(tracking_uri=connect(server.uri))
    caplog.set_level(logging.INFO, logger="tt_ray")
    tracker = MlflowTracker(server.uri, "sweeps", interval=0.2, finish_wait=60.0)
    parent = tracker.start("sweep", folder / "sweep")
    cells = [folder / "cells" / str(seed) for seed in range(12)]
    courier = Courier(server.uri, "sweeps", interval=0.2)
    for cell in cells:
        courier.add(f"cell {cell.name}", cell, parent.identity)
    stop = folder / "stop"
    writers = [writer(cells[i:11:3], 10**5, pause=0.05, stop=str(stop)) for i in range(3)]
    try:
        wait_until(lambda: all(sent_bytes(cell) > 1000 for cell in cells[:11]), 60)
        before = count(cells)
        server.stop()
        away = time.monotonic()
        wait_until(lambda: "cannot be used" in caplog.text, 60)
        writers.append(writer(cells[11:], 20))  # a trial that starts and ends meanwhile
        time.sleep(OUTAGE)
        server.start()
        print(f"away for {time.monotonic() - away:.1f} s; points {before} before, {count(cells)} at its end")
        during = count(cells)
        wait_until(lambda: "is back" in caplog.text, 90)
        wait_until(lambda: count(cells) > during)
        stop.touch()
        assert [process.wait(60) for process in writers] == [0, 0, 0, 0]
    finally:
        stop.touch()
    courier.close(60.0)
    parent.finish()
    assert (courier.under_way, courier.unsent) == (0, 0)
    assert 0 < before < during < count(cells)
    compare(client, parent, cells)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "tt_ray" in r.name]
    assert sorted(line.partition(" (")[0] for line in lines) in (
        [f"MLflow at {server.uri} cannot be used"],
        [f"MLflow at {server.uri} cannot be used", f"MLflow at {server.uri} does not take run 'sweep'"],
    )


def compare(client: Any, parent: Any, cells: list[Path]) -> None:
    """Every point, param, tag, artifact and parent."""
    runs = {run.info.run_name: run for run in children(client, parent)}
    total = 0
    for cell in cells:
        run = runs.pop(f"cell {cell.name}")
        points = journal_points(cell)
        assert mlflow_points(client, run.info.run_id) == points
        assert [step for key, step, _, _ in points if key == "train/rate"] == list(range(len(points) // 2))
        assert (run.info.status, run.data.tags["seed"]) == ("FINISHED", cell.name)
        assert run.data.params == {"planner.horizon": cell.name, "planner.beam_width": "8", "seed": cell.name}
        assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
        total += len(points)
    assert runs == {}
    print(f"{total} points of {len(cells)} runs compared")


def children(client: Any, parent: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"))


def count(cells: list[Path]) -> int:
    return sum(len(journal_points(cell)) for cell in cells)
