"""What the tests of tracking share: both sides of a comparison, a server to lose, writers to kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tt_ray.tracking import connect, open_journal, read

Point = tuple[str, int, int, float]  # key, step, time, value


def new_store(folder: Path) -> str:
    """URI of a migrated SQLite store; making one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "to be replaced")
        return connect(f"sqlite:///{folder}/mlflow.db")


def journal_points(folder: Path) -> list[Point]:
    return sorted(
        (key, record["step"], record["time"], value)
        for record, _ in read(folder / "journal.jsonl")
        for key, value in record.get("metrics", {}).items()
    )


def mlflow_points(client: Any, run_id: str) -> list[Point]:
    keys = client.get_run(run_id).data.metrics
    history = [m for key in keys for m in client.get_metric_history(run_id, key)]
    return sorted((m.key, m.step, m.timestamp, m.value) for m in history)


def identifier(folder: Path) -> str | None:
    return json.loads((folder / "run.json").read_text())["run_id"]


def runs_by_name(client: Any, experiment: str) -> dict[str, Any]:
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    return runs


def sent_bytes(folder: Path) -> int:
    path = folder / "run.json"
    return json.loads(path.read_text())["offset"] if path.exists() else 0


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Fail when `condition` does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def write_cells(folders: Iterable[str], steps: int, pause: float, stop: str) -> None:
    """A trial's process: in turns a step of every cell, until `steps`, or until the file `stop` appears."""
    runs = {}
    for folder in map(Path, folders):
        seed = int(folder.name)
        params = {"planner": {"horizon": seed, "beam_width": 8}, "seed": seed}
        runs[folder] = open_journal(folder, params, {"seed": seed, "kind": "trial"})
    for step in range(steps):
        for run in runs.values():
            run.log({"train/loss": 1 / (step + 1), "train/rate": step}, step)
        time.sleep(pause)
        if os.path.exists(stop):
            break
    for folder, run in runs.items():
        (folder / "config.yaml").write_text(f"seed: {folder.name}")
        run.artifact(folder / "config.yaml")
        run.finish()


def writer(
    folders: Iterable[Path], steps: int, pause: float = 0.0, stop: str = ""
) -> subprocess.Popen[bytes]:
    """`write_cells` in a process of its own."""
    arguments = ([str(folder) for folder in folders], steps, pause, stop)
    code = f"from tracking_tools import write_cells; write_cells(*{arguments!r})"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


class Server:
    """One `mlflow server` on a free port of this host, stopped with all its workers."""

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        """backend: URI of its database; else an SQLite file in `folder`."""
        self.folder = folder
        self.backend = backend or f"sqlite:///{folder}/server.db"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = {
            "--backend-store-uri": self.backend,
            "--artifacts-destination": str(self.folder / "artifacts"),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.healthy, seconds=120)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None
            wait_until(lambda: not self.healthy(), seconds=30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
