"""MLflow's server and its database on a cluster's head, kept running; dumped regularly and at the end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]

from tt_ray.distributed.launch.database import Database, choose
from tt_ray.distributed.launch.dumps import Keeper
from tt_ray.distributed.launch.host import MARKER, MLFLOW_PORT
from tt_ray.errors import UserError
from tt_ray.files import whole_file
from tt_ray.locks import exclusive

logger = logging.getLogger(__name__)

TICK = 1.0  # seconds between two looks at the processes
SERVED_EVERY = 20.0  # seconds between two notes that the database is in use
STARTUP = 300.0  # seconds that the server may take until it answers
HUNG = (
    60.0  # seconds without an answer after which a server that has answered before is ended and started again
)
MOUNTING = 60.0  # seconds for the shared storage to appear
GRACE = 15.0  # seconds that it has to end by itself
LONGEST_PAUSE = 30.0  # seconds between two attempts to start it
UNSAVED = "unsaved"  # a file that is there from when the database is served until its last dump
RECORD = "server.json"  # of the server's process, for whoever finds it without its supervisor
_LOG_BYTES = 20_000_000  # a larger log is put away when the server starts; one old one is kept
_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True)
class Service:
    """What is to be served, and where."""

    storage: str
    """The shared storage; dumps and artifacts are in its folder `mlflow`."""
    state: str
    """A folder on this host's disk, of nobody else."""
    address: str
    """The head's address in the cluster; nothing listens on any other."""
    port: int = MLFLOW_PORT
    database: str = "auto"
    dump_every: float = 600.0
    """Seconds."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """As ~/.tt-ray/environment.sh has it; `UserError` where a setting is missing or no number."""
        try:
            root = "/var/lib/tt-ray" if os.geteuid() == 0 else f"{environment['HOME']}/.tt-ray"
            return cls(
                storage=environment["TT_RAY_STORAGE"],
                state=environment.get("TT_RAY_STATE", f"{root}/tracking"),
                address=environment["TT_RAY_HEAD_ADDRESS"],
                port=int(environment.get("TT_RAY_MLFLOW_PORT", MLFLOW_PORT)),
                database=environment.get("TT_RAY_DATABASE", "auto"),
                dump_every=float(environment.get("TT_RAY_DUMP_EVERY", 600)),
            )
        except KeyError as error:
            raise UserError(f"{error.args[0]} is not set: read ~/.tt-ray/environment.sh first") from None
        except ValueError as error:
            raise UserError(f"TT_RAY_MLFLOW_PORT or TT_RAY_DUMP_EVERY: {error}") from None

    @property
    def uri(self) -> str:
        """The server's address."""
        return f"http://{self.address}:{self.port}"

    @property
    def dumps(self) -> Path:
        """The folder of dumps."""
        return Path(self.storage) / "mlflow" / "dumps"

    def answers(self, timeout: float = 5.0) -> bool:
        """Whether the server serves requests."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=timeout) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def running(self) -> Service | None:
        """What the supervisor in `state` serves, if one was started there."""
        try:
            return Service(**json.loads((Path(self.state) / "service.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def supervise(service: Service) -> None:
    """Serve until SIGTERM or SIGINT.

    `UserError` where it cannot be started, is being served already, or the shared storage is not there.
    """
    state = Path(service.state)
    database = choose(service.database, state)
    over = threading.Event()
    _await_storage(Path(service.storage))  # until it is there, a signal ends the process at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with exclusive(state, "the tracking service runs already"):
        server = Server(service, database)
        end_leftover(state)
        for name, text in (("json", json.dumps(asdict(service))), ("pid", str(os.getpid()))):
            with whole_file(state / f"service.{name}") as path:
                path.write_text(text)
        database.start()
        try:
            keeper = Keeper(database, service.dumps, state)
            logger.info("%s", keeper.bring_back())
            _serve(server, keeper, over)
        finally:
            server.stop()
            database.stop()


def _await_storage(storage: Path) -> None:
    """After a reboot the service may be up before the network disk, whose empty mount point has no dumps."""
    deadline = time.monotonic() + MOUNTING
    while not (storage / MARKER).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"TT_RAY_STORAGE={storage} is not the shared storage (no file {MARKER} there): mount it, "
                "or run `tt-ray cluster up` again"
            )
        time.sleep(TICK)


def _serve(server: Server, keeper: Keeper, over: threading.Event) -> None:
    """Watch until `over`; then stop the server and dump."""
    unsaved = Path(server.service.state) / UNSAVED
    unsaved.touch()
    dump_at, note_at = time.monotonic() + server.service.dump_every, 0.0
    while not over.is_set():
        server.watch()
        if time.monotonic() >= note_at:
            _try(keeper.database.start, "the database could not be started")
            _try(keeper.in_use, "it cannot be noted that the database is in use")
            note_at = time.monotonic() + SERVED_EVERY
        if time.monotonic() >= dump_at:
            _try(keeper.save, "the database could not be dumped")
            dump_at = time.monotonic() + server.service.dump_every
        over.wait(TICK)
    server.stop()
    if keeper.database.exists():
        logger.info("dumped to %s", keeper.save())
    unsaved.unlink()


def _try(action: Callable[[], object], problem: str) -> None:
    """What fails for a while, such as a storage that is full, must not end the service."""
    try:
        action()
    except (OSError, UserError, sqlite3.Error) as error:
        logger.warning("%s: %s", problem, error)


class Server:
    """MLflow's server as a child process."""

    def __init__(self, service: Service, database: Database) -> None:
        self.service, self.database = service, database
        self._process: subprocess.Popen[bytes] | None = None
        self._record, self._log = Path(service.state) / RECORD, Path(service.state) / "mlflow.log"
        self._next_start, self._pause = 0.0, TICK
        self._silent_since, self._has_answered = 0.0, False

    def watch(self) -> None:
        """Start the server where it does not run, or is long silent, with growing pauses."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            self._listen(now)
            return
        if self._process is not None:
            logger.warning("MLflow has ended with code %s, see %s", self._process.returncode, self._log)
            self.stop()  # its children
        if now >= self._next_start:
            _try(self._start, "MLflow could not be started")
            self._next_start = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _listen(self, now: float) -> None:
        if self.service.answers():
            self._silent_since, self._has_answered, self._pause = now, True, TICK
        elif now - self._silent_since > (HUNG if self._has_answered else STARTUP):
            logger.warning("MLflow does not answer and is started again")
            self.stop()

    def stop(self) -> None:
        """End the server and all that it has started."""
        if self._process is not None:
            _end_group(self._process.pid)
            self._process.wait()
            self._process = None
        self._record.unlink(missing_ok=True)

    def _start(self) -> None:
        self.database.start()  # it may have died too
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES:
            os.replace(self._log, self._log.with_suffix(".log.1"))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(self.service, self.database),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.service.state,
                env={**os.environ, **_ENVIRONMENT},
            )
        created = psutil.Process(self._process.pid).create_time()
        with whole_file(self._record) as path:
            path.write_text(json.dumps({"pid": self._process.pid, "created": created}))
        self._silent_since, self._has_answered = time.monotonic(), False


def end_leftover(state: Path) -> None:
    """End a server that a killed supervisor has left; only where none runs, or by the one that does."""
    record = state / RECORD
    with suppress(OSError, ValueError, KeyError, psutil.NoSuchProcess):
        left = json.loads(record.read_text())
        if abs(psutil.Process(left["pid"]).create_time() - left["created"]) < 0.1:
            _end_group(left["pid"])
    record.unlink(missing_ok=True)


def _command(service: Service, database: Database) -> list[str]:
    hosts = ",".join(f"{name}:*" for name in (service.address, "localhost", "127.0.0.1"))
    return [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", service.address, "--port", str(service.port), "--allowed-hosts", hosts),
        *("--backend-store-uri", database.uri),
        *("--artifacts-destination", f"{service.storage}/mlflow/artifacts"),
        *("--uvicorn-opts", "--log-level warning"),
    ]


def _end_group(leader: int) -> None:
    """SIGTERM to a process group, SIGKILL to what of it is left after the grace period."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and _alive(leader):
            time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)


def _alive(group: int) -> bool:
    """Whether a process of the group runs; one that has only to be waited for does not count."""
    for process in psutil.process_iter(["status"]):
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False
