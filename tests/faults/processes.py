"""Finding and killing what a test has started, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

PATIENCE = 300.0  # seconds; far more than anything here takes


def command_line(process: psutil.Process) -> list[str]:
    """Of a process; empty when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def descendants(pid: int, name: str = "") -> list[psutil.Process]:
    """Processes below `pid` whose command line begins with `name`, oldest first."""
    below = psutil.Process(pid).children(recursive=True)
    found = [process for process in below if name in ("", *command_line(process)[:1])]
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def wait_until(condition: Callable[[], bool], what: str, poll: float = 0.002) -> None:
    """Return as soon as `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(poll)


def wait_gone(processes: Iterable[psutil.Process]) -> None:
    """Return when none of `processes` runs any more."""
    _, alive = psutil.wait_procs(list(processes), timeout=PATIENCE)
    assert alive == []


class Growth:
    """The last step in a journal that another process is writing."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.offset, self.step = journal, 0, 0

    def __call__(self) -> int:
        if self.journal.exists():
            with self.journal.open("rb") as file:
                file.seek(self.offset)
                for line in file:
                    if line.endswith(b"\n"):
                        self.offset += len(line)
                        self.step = max(self.step, json.loads(line).get("step", 0))
        return self.step
