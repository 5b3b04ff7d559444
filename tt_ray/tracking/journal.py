"""The record of one run on disk: JSON lines, appended by any process that sees the folder.

A metrics line is `{"time": ms, "step": 20, "metrics": {"train/loss": 1.5}}`; other lines carry params, tags,
artifacts, data sets or the status. The file only grows, so a byte offset says how much of it has been sent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, SupportsFloat

from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED, convert

Record = dict[str, Any]

MAX_NAME_LENGTH = 250
LARGEST = 2**63 - 1
_HINTS: dict[str, Any] = {
    "time": int,
    "step": int,
    "metrics": dict[str, float],
    "params": dict[str, str],
    "tags": dict[str, str],
    "artifact": list[str],
    "dataset": dict[str, Any],
    "status": str,
}
"""What a record may hold."""


def now() -> int:
    """Milliseconds since 1970, MLflow's unit."""
    return time.time_ns() // 1_000_000


def check_name(name: str) -> None:
    """Raise `ValueError` for a metric, param or tag name that MLflow would refuse later with its batch."""
    unusual = posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == "."
    if not re.fullmatch(r"[/\w.\- :]+", name) or unusual or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{name!r} is no name for a metric, param or tag: letters, digits, / _ . - : and spaces"
        )


def parse(file: BinaryIO, offset: int) -> Iterator[tuple[Record, int]]:
    """Records from byte `offset` on, each with the offset after it.

    An unfinished last line (its writer was killed, or is still writing) is left alone; a damaged one skipped.
    """
    file.seek(offset)
    for line in file:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record = json.loads(line)
            _check(record)
        except MALFORMED:
            continue
        yield record, offset


def _check(record: Any) -> None:
    """One of `MALFORMED` unless this is a record that can be sent."""
    if not isinstance(record, dict) or len(record.get("artifact", ("path", "folder"))) != 2:
        raise TypeError("this is no record")
    for name, hint in _HINTS.items():
        if name in record:
            convert(hint, record[name])
    if "metrics" in record:
        for number in (record["time"], record["step"]):
            if abs(number) > LARGEST:
                raise ValueError(f"{number} is more than MLflow can hold")
        for name in record["metrics"]:
            check_name(name)


def read(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """`parse` on the file at `path`; nothing where there is none."""
    if path.exists():
        with open(path, "rb") as file:
            yield from parse(file, offset)


class HighWater:
    """The last step written for each metric: a step done again after a restart is not logged again."""

    def __init__(self) -> None:
        self._marks: dict[str, int] = {}

    def note(self, record: Record) -> None:
        """Raise the marks by what `record` holds."""
        for key in record.get("metrics", ()):
            self._marks[key] = max(record["step"], self._marks.get(key, record["step"]))

    def unseen(self, metrics: Mapping[str, SupportsFloat], step: int) -> dict[str, float]:
        """Those of `metrics` whose step lies above their mark."""
        for key in metrics:
            check_name(key)
        return {k: float(v) for k, v in metrics.items() if k not in self._marks or step > self._marks[k]}


class Journal:
    """Appends to `<folder>/journal.jsonl`.

    Every line is written at once under a file lock, so that several processes can share the file, and is
    with the operating system when `append` returns: it survives the writer's SIGKILL (not a power cut).
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "journal.jsonl"
        self._marks = HighWater()
        self._end = 0  # offset after the last whole line seen
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot make this folder: {error.strerror}") from None

    def append(self, metrics: Mapping[str, SupportsFloat], step: int, timestamp: int | None = None) -> None:
        """Write the metrics whose `step` is new to them; `timestamp` in ms, None for now."""
        with self._locked() as file:
            if unseen := self._marks.unseen(metrics, step):
                time_ms = now() if timestamp is None else timestamp
                self._write(file, {"time": time_ms, "step": int(step), "metrics": unseen})

    def count(self, metric: str) -> int:
        """How many points of a metric there are."""
        return sum(metric in record.get("metrics", ()) for record, _ in read(self.path))

    def write(self, record: Record) -> None:
        """Write a line that is not metrics, stamped with the time."""
        with self._locked() as file:
            self._write(file, {"time": now(), **record})

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, ours alone, its marks up to date and its torn last line cut off."""
        try:
            with open(self.path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                for record, end in parse(file, self._end):
                    self._marks.note(record)
                    self._end = end
                if os.fstat(file.fileno()).st_size > self._end:
                    os.truncate(file.fileno(), self._end)
                yield file
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the journal: {error.strerror}") from error

    def _write(self, file: BinaryIO, record: Record) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if os.write(file.fileno(), line) != len(
            line
        ):  # what fitted on the disk is a torn line: cut off next time
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)
        self._marks.note(record)


class MemoryJournal:
    """A journal for tests: the same rules, kept in `records`."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._marks = HighWater()

    def append(self, metrics: Mapping[str, SupportsFloat], step: int, timestamp: int | None = None) -> None:
        """As `Journal.append`."""
        if unseen := self._marks.unseen(metrics, step):
            time_ms = now() if timestamp is None else timestamp
            self.write({"time": time_ms, "step": int(step), "metrics": unseen})

    def count(self, metric: str) -> int:
        """As `Journal.count`."""
        return sum(metric in record.get("metrics", ()) for record in self.records)

    def write(self, record: Record) -> None:
        """As `Journal.write`."""
        self.records.append({"time": now(), **record})
        self._marks.note(record)
