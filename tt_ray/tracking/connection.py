"""Which MLflow store, and is it there: checked in seconds, before any work starts."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tt_ray.errors import UserError

START_SERVER = "mlflow server --port 5000 --backend-store-uri sqlite:///mlflow.db"
START_SHARED_SERVER = f"{START_SERVER} --host 0.0.0.0 --allowed-hosts 'THIS_HOST:5000'"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
CHECK_SECONDS = 8.0

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the shipper tries again itself; MLflow's retries take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def prepare_environment() -> None:
    """Settings that mlflow reads from the environment, for this process and its children; yours win."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else a new database prints its fifty migrations


def connect(uri: str | None = None, *, must_exist: bool = False) -> str:
    """Resolve the tracking URI, check that the store answers, and export it as MLFLOW_TRACKING_URI.

    `uri`, or else MLFLOW_TRACKING_URI, or else `sqlite:///<working folder>/mlflow.db`. Raises `UserError`
    within seconds when it is malformed, a file store, not reachable or not writable; `must_exist`: also when
    it is an SQLite file that is not there, which is made otherwise.
    """
    prepare_environment()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme = _scheme(uri)
    if scheme == "sqlite":
        path = _sqlite_path(uri, must_exist)
        uri = f"sqlite:///{path}"
        with _alone_in(path.parent):  # two processes that migrate one new database get in each other's way
            _check(uri)
    else:
        answer = _within(CHECK_SECONDS, lambda: _check(uri))
        if not answer:
            raise _unreachable(uri, f"no answer in {CHECK_SECONDS:.0f} s")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a (resolved) sqlite URI, None for other stores; a file serves one host only."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else None


def _scheme(uri: str) -> str:
    """`http`, `https`, or a database's name; `UserError` for anything else."""
    try:
        parts = urlsplit(uri)
        _ = parts.port  # raises when it is no number
    except ValueError as error:
        raise UserError(f"tracking URI {uri!r} is malformed: {error}") from None
    scheme = parts.scheme.split("+")[0]
    if scheme in ("http", "https"):
        if not parts.hostname:
            raise UserError(f"tracking URI {uri!r} names no host: it looks like http://127.0.0.1:5000")
        return scheme
    if scheme in DATABASES:
        return scheme
    if scheme in ("", "file"):
        raise UserError(
            f"tracking URI {uri!r} is a file store, which MLflow has given up: "
            "use sqlite:////absolute/path/mlflow.db or a server, http://host:5000"
        )
    raise UserError(
        f"tracking URI {uri!r} is none that is known here: use http://host:5000, "
        "sqlite:////absolute/path/mlflow.db or postgresql://user@host/database"
    )


def _sqlite_path(uri: str, must_exist: bool) -> Path:
    """The database's absolute path, in a folder that can be written."""
    name = uri.partition(":///")[2].partition("?")[0]
    if not name or name == ":memory:":
        raise UserError(f"tracking URI {uri!r} names no file, and each process would see its own store")
    path = Path(name).expanduser().absolute()
    if must_exist and not path.exists():
        raise UserError(
            f"no MLflow database {path}: run this where the experiments ran, or set MLFLOW_TRACKING_URI"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            head = file.read(16)
    except OSError as error:
        raise UserError(f"tracking URI {uri!r}: cannot write {path}: {error.strerror}") from None
    if head not in (b"", b"SQLite format 3\0"):
        raise UserError(f"tracking URI {uri!r}: {path} is not an SQLite database")
    return path


def _check(uri: str) -> bool:
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            raise UserError(
                f"tracking URI {uri!r}: its database driver is missing: install {error.name}"
            ) from error
        raise _unreachable(uri, one_line(error)) from error
    return True


def _unreachable(uri: str, reason: str) -> UserError:
    advice = "is its address right, and does it run? "
    if "Invalid Host header" in reason:
        advice = "it refuses this host name: add it to the server's --allowed-hosts. "
    return UserError(f"MLflow at {uri} cannot be used ({reason}): {advice}Start one with: {START_SERVER}")


def one_line(error: BaseException, limit: int = 200) -> str:
    """The error as one line of at most `limit` characters: what the system said, if it comes down to that."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result, or None when it takes longer; its exception is raised here."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    import mlflow  # noqa: F401  # seconds on a slow disk: not part of the time allowed

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome and isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0] if outcome else None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time in this block, for `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
