"""Which process on which host holds something, and whether it still runs."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import socket
import uuid
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

START_TOLERANCE = 2.0  # seconds by which two readings of a process's start may differ


class Holder(NamedTuple):
    """A process that holds something; `name` is that of its file."""

    host: str
    machine: str
    """Where a process id means the same process: one start of one host, one process namespace."""
    pid: int
    start: int
    """Hundredths of a second from the host's start to the process's: clocks that are set change nothing."""
    token: str

    @classmethod
    def new(cls) -> Holder:
        """This process, under a name that was never used."""
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64]
        return cls(host, _machine(), os.getpid(), _start(psutil.Process()), secrets.token_hex(8))

    @classmethod
    def parse(cls, name: str) -> Holder | None:
        """Inverse of `name`; None for a file that is no holder's."""
        parts = name.split("~")
        if len(parts) != 5 or not (parts[2].isdecimal() and parts[3].isdecimal()):
            return None
        return cls(parts[0], parts[1], int(parts[2]), int(parts[3]), parts[4])

    @property
    def name(self) -> str:
        """The holder as a file name."""
        return "~".join(map(str, self))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def runs(self) -> bool | None:
        """Whether the process still runs, a stopped one too; None where that cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # the latter: a number that no process can have
            return False
        except PermissionError:
            pass  # it exists
        try:
            process = psutil.Process(self.pid)
            same = abs(_start(process) - self.start) <= 100 * START_TOLERANCE
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None  # hidden, as some hosts do with other users' processes


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts = [boot, str(os.stat("/proc/self/ns/pid").st_ino)]
    except OSError:
        parts = [socket.gethostname(), str(uuid.getnode())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _start(process: psutil.Process) -> int:
    return max(0, round(100 * (process.create_time() - psutil.boot_time())))
