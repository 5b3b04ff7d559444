"""The tracking service as a head runs it: supervised, dumped at its end, and brought back elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tracking_tools import wait_until

from tt_ray.distributed.launch import supervisor, tracking
from tt_ray.distributed.launch.database import find_postgres
from tt_ray.distributed.launch.dumps import finished
from tt_ray.distributed.launch.host import MARKER
from tt_ray.distributed.launch.ssh import free_port
from tt_ray.distributed.launch.supervisor import UNSAVED, Service
from tt_ray.errors import UserError

KINDS = [
    "sqlite",
    pytest.param(
        "postgresql", marks=pytest.mark.skipif(not find_postgres(), reason="PostgreSQL is not installed")
    ),
]


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that PostgreSQL's own user can enter, with a short name."""
    with tempfile.TemporaryDirectory(prefix="tt-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class Head:
    """A head's disk, on which the service is started and stopped by its commands."""

    def __init__(self, disk: Path, name: str, kind: str) -> None:
        (disk / "storage").mkdir(exist_ok=True)
        (disk / "storage" / MARKER).touch()
        self.state, self.storage = disk / name, disk / "storage"
        self.variables = {
            **os.environ,
            "HOME": str(disk),
            "TT_RAY_STORAGE": str(self.storage),
            "TT_RAY_STATE": str(self.state),
            "TT_RAY_HEAD_ADDRESS": "127.0.0.1",
            "TT_RAY_MLFLOW_PORT": str(free_port()),
            "TT_RAY_DATABASE": kind,
        }
        self.service = Service.from_environment(self.variables)

    def tracking(self, action: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "tt_ray.distributed.launch.tracking", action]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def server(self) -> int:
        return int(json.loads((self.state / "server.json").read_text())["pid"])

    def processes(self) -> list[int]:
        """Those whose command line or environment names this head's disk."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.state) in " ".join(process.cmdline()) + str(
                    process.environ().get("TT_RAY_STATE")
                ):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return [pid for pid in found if pid != os.getpid()]


@pytest.fixture
def heads(disk: Path) -> Iterator[list[Head]]:
    made: list[Head] = []
    yield made
    for head in made:
        head.tracking("stop")
        for pid in head.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # four starts of MLflow, on a machine that may be busy
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_logged_outlives_the_server_the_supervisor_and_the_head(
    disk: Path, heads: list[Head], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = Head(disk, "first", kind)
    heads.append(first)
    code, said = first.tracking("start")
    assert code == 0, said
    client = MlflowClient(tracking_uri=first.service.uri)
    run = client.create_run(client.create_experiment("study"))
    client.log_metric(run.info.run_id, "score/mean", 61.5)
    client.log_text(run.info.run_id, "hello", "note.txt")

    killed = first.server()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: (first.state / "server.json").exists() and first.server() != killed, 200)
    wait_until(first.service.answers, 400)
    assert first.tracking("start")[0] == 0  # it runs, and is left alone

    os.kill(int((first.state / "service.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: first.tracking("status")[0] == 3, 200)
    assert first.tracking("start")[0] == 0  # ends what the killed one has left, and takes its place
    assert client.get_run(run.info.run_id).data.metrics == {"score/mean": 61.5}

    code, said = first.tracking("stop")
    dump = finished(first.service.dumps)[0]
    assert (code, str(dump.path) in said, dump.kind) == (0, True, kind)
    assert first.processes() == []
    assert first.tracking("stop") == (0, "MLflow does not run\n")

    second = Head(disk, "second", kind)
    heads.append(second)
    code, said = second.tracking("start")
    assert code == 0, said
    client = MlflowClient(tracking_uri=second.service.uri)
    assert client.get_run(run.info.run_id).data.metrics == {"score/mean": 61.5}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(disk: Path, heads: list[Head]) -> None:
    head = Head(disk, "head", "sqlite")
    heads.append(head)
    dumps = head.storage / "mlflow" / "dumps"
    dumps.mkdir(parents=True)
    (dumps / "20260102T030405Z-sqlite-89abcdef-0123456789abcdef.dump").write_text("cut short")
    code, said = head.tracking("start")
    assert code == 1
    assert said.splitlines()[-1].startswith("tt-ray: MLflow's service has ended: tt-ray: no dump in ")
    assert "Traceback" not in said
    assert head.processes() == []


def test_a_storage_that_is_not_mounted_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOUNTING", 0.0)
    storage = tmp_path / "storage"
    storage.mkdir()
    service = Service(str(storage), str(tmp_path / "state"), "127.0.0.1", database="sqlite")
    with pytest.raises(UserError, match="is not the shared storage"):
        supervisor.supervise(service)
    assert not (tmp_path / "state" / "service.pid").exists()


def test_a_service_that_has_ended_without_its_dump_is_not_taken_for_a_stopped_one(disk: Path) -> None:
    head = Head(disk, "head", "sqlite")
    head.state.mkdir()
    assert tracking.stop(head.service) == "MLflow does not run"
    (head.state / UNSAVED).touch()
    with pytest.raises(UserError, match="ended without dumping its database, there is no dump in"):
        tracking.stop(head.service)


def test_settings_that_are_missing_or_wrong_are_named() -> None:
    good = {"HOME": "/root", "TT_RAY_STORAGE": "/srv", "TT_RAY_HEAD_ADDRESS": "10.0.0.1"}
    service = Service.from_environment(good)
    assert (service.uri, service.database) == ("http://10.0.0.1:5000", "auto")
    with pytest.raises(UserError, match="TT_RAY_HEAD_ADDRESS is not set"):
        Service.from_environment({"HOME": "/root", "TT_RAY_STORAGE": "/srv"})
    with pytest.raises(UserError, match="TT_RAY_MLFLOW_PORT"):
        Service.from_environment(good | {"TT_RAY_MLFLOW_PORT": "http"})


def test_the_unit_restarts_the_supervisor_and_lets_it_dump() -> None:
    service = Service(storage="/mnt/tt-ray", state="/home/ray/.tt-ray/tracking", address="10.0.0.1")
    text = tracking.unit(service, Path("/home/ray"), "ray")
    assert "\nRestart=always\n" in text
    assert "\nRequiresMountsFor=/mnt/tt-ray\n" in text
    assert "\nTimeoutStopSec=300\n" in text
    assert "\nUser=ray\n" in text
    assert (
        "ExecStart=/bin/bash -c '. /home/ray/.tt-ray/environment.sh && cd /home/ray/tt-ray && exec " in text
    )
