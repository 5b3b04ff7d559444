"""What the rest of the project sees of tracking: a `Tracker` starts a `Run`, which writes a journal."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, SupportsFloat, get_args

from tt_ray.config import flatten
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED, build, read_json
from tt_ray.tracking.journal import Journal, MemoryJournal, check_name

Status = Literal["FINISHED", "FAILED", "KILLED"]
FINAL: tuple[str, ...] = get_args(Status)


@dataclass
class RunState:
    """`<folder>/run.json`: who this run is, and how much of its journal MLflow has."""

    name: str
    experiment: str
    parent: str | None = None
    """Identity of the parent run."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The run's own name for itself, a tag in MLflow: finds the run again on any server."""
    uri: str | None = None
    run_id: str | None = None
    offset: int = 0
    """Bytes of the journal that MLflow has accepted."""
    pending: list[list[str]] = field(default_factory=list)
    """Artifacts [path, folder] that are still to be uploaded."""
    status: str = ""
    """The last status that MLflow has accepted."""

    @classmethod
    def load(cls, folder: Path) -> RunState | None:
        """The state in `folder`, or None where there is none."""
        path = folder / "run.json"
        try:
            state = build(cls, read_json(path))
            if state.offset < 0 or any(len(entry) != 2 for entry in state.pending):
                raise ValueError("it is no state")
            return state
        except FileNotFoundError:
            return None
        except MALFORMED:
            raise UserError(f"{path}: not a run's state; remove it to start a new MLflow run here") from None

    def save(self, folder: Path) -> None:
        """Write the state at once or not at all."""
        temporary = folder / f".run.json.{os.getpid()}.{threading.get_ident()}"
        temporary.write_text(json.dumps(asdict(self), indent=1))
        os.replace(temporary, folder / "run.json")


class Run:
    """One run; as a context manager it finishes by itself (FAILED after an exception, KILLED after Ctrl-C).

    This class only writes the journal; `MlflowRun` also sends it on. `state` is None where another process
    keeps it.
    """

    def __init__(self, state: RunState | None, journal: Journal | MemoryJournal) -> None:
        self.state = state
        self.journal = journal
        self.finished = False

    @property
    def identity(self) -> str:
        """What a child passes as `parent`, in whatever process it runs."""
        if self.state is None:
            raise ValueError("only the process that keeps a run's state knows its identity")
        return self.state.identity

    def log(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        """Record metrics at `step`; those already recorded at this step or a later one are left out."""
        self.journal.append(metrics, step)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set or overwrite tags."""
        self.journal.write({"tags": as_strings(tags)})

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Upload a file, or what a directory holds, to `folder` (a directory: by default its own name).

        It is uploaded later, by another thread, so it must stay in place until the run has finished.
        """
        path = Path(path).resolve()
        if not path.exists():
            raise FileNotFoundError(f"no such artifact: {path}")
        target = folder if folder is not None else path.name if path.is_dir() else ""
        self.journal.write({"artifact": [str(path), target]})

    def log_dataset(
        self,
        name: str,
        source: str,
        fingerprint: str,
        profile: Mapping[str, Any] | None = None,
        context: str = "training",
    ) -> None:
        """Record the data set as an input: `source` is a path, URL or id; `profile` holds its counts."""
        dataset = {"name": name, "source": source, "digest": fingerprint, "profile": dict(profile or {})}
        self.journal.write({"dataset": {**dataset, "context": context}})

    def finish(self, status: Status = "FINISHED") -> None:
        """Record how the run ended; only the first call counts."""
        if not self.finished:
            self.finished = True
            self.journal.write({"status": status})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("FINISHED")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.finish("KILLED")
        else:
            self.set_tags({"error": f"{type(error).__name__}: {error}"})
            self.finish("FAILED")


class Tracker(Protocol):
    """Starts runs."""

    def start(
        self,
        name: str,
        folder: Path | str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Run:
        """Start the run that lives in `folder`, or continue it.

        params: the (nested) config, logged once: on a continued run only keys it does not have yet.
        parent: `Run.identity` of the parent.
        """


class JournalTracker:
    """Runs that are recorded on disk only; started again by an `MlflowTracker`, they go to MLflow whole."""

    def __init__(self, experiment: str = "default") -> None:
        self.experiment = experiment

    def start(
        self,
        name: str,
        folder: Path | str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Run:
        """See `Tracker.start`."""
        state, journal = open_folder(name, self.experiment, Path(folder), params, tags, parent)
        return Run(state, journal)


class MemoryTracker:
    """Runs for tests: nothing on disk, everything in `runs[i].journal.records`."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def start(
        self,
        name: str,
        folder: Path | str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Run:
        """See `Tracker.start`; `folder` is not used."""
        run = Run(RunState(name, "memory", parent), MemoryJournal())
        run.journal.write(_start_record(params, tags))
        self.runs.append(run)
        return run


def open_journal(
    folder: Path | str, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
) -> Run:
    """The run in `folder`, started or continued by a process that only writes the journal.

    Another process keeps its `run.json` and sends it: see `Courier`. params: the (nested) config; those that
    an earlier start has logged stay as they are.
    """
    journal = Journal(folder)
    start = _start_record(params, tags)
    if journal.path.exists():
        start["tags"].setdefault("error", "")  # that of an earlier try
    journal.write(start)
    return Run(None, journal)


def open_folder(
    name: str,
    experiment: str,
    folder: Path,
    params: Mapping[str, Any] | None,
    tags: Mapping[str, Any] | None,
    parent: str | None,
) -> tuple[RunState, Journal]:
    """The state and journal in `folder`, made where they are missing, with this start recorded in both."""
    start = _start_record(params, tags)
    journal = Journal(folder)
    state = RunState.load(folder)
    if state is None:
        state = RunState(name, experiment, parent)
    else:
        state.name, state.experiment, state.parent = name, experiment, parent
        start["tags"].setdefault("error", "")  # that of an earlier try
    state.save(folder)
    journal.write(start)
    return state, journal


def _start_record(params: Mapping[str, Any] | None, tags: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"status": "RUNNING", "params": as_strings(flatten(params or {})), "tags": as_strings(tags or {})}


def as_strings(values: Mapping[str, Any]) -> dict[str, str]:
    """Params or tags as MLflow keeps them. `ValueError` for a name that it would refuse."""
    for key in values:
        check_name(key)
    return {key: str(value) for key, value in values.items()}


def provenance_tags(seed: int | None = None) -> dict[str, str]:
    """Where a run's code and libraries come from: host, versions, and in a git checkout the commit."""
    tags = {"host": socket.gethostname(), "version.python": platform.python_version()}
    for package in ("torch", "ray", "mlflow", "tt-ray"):
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags if seed is None else {**tags, "seed": str(seed)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
