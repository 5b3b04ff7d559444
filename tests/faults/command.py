"""The command line in a process of its own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
from processes import command_line, wait_gone, wait_until

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Helpers of Ray's raylet, which hold nothing of ours; they notice after a minute that it is gone."""
STARTS = 4
"""Times that a command is started which says that Ray was too slow to start."""

STARTED: list[subprocess.Popen[bytes]] = []
"""Every command so far, for the end of a test that fails."""


class Command:
    """`python -m tt_ray ...` in `folder`, in a session of its own; on the cluster at `address`, if given."""

    def __init__(self, folder: Path, *arguments: str | Path, address: str | None = None) -> None:
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        if address is not None:
            environment["RAY_ADDRESS"] = address
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tt_ray", *arguments],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        STARTED.append(self.process)

    def kill(self) -> None:
        """SIGKILL to the command alone; returns when what it had started is gone, but for `AGENTS`."""
        os.kill(self.process.pid, signal.SIGSTOP)  # looking at all processes takes time on a busy machine
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.kill_only()
        wait_gone(process for process in started if "".join(command_line(process)[:1]) not in AGENTS)

    def kill_only(self) -> None:
        """SIGKILL to the command alone; what it had started may live on for seconds."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def wait(self, expected: int = 0) -> str:
        """What it has printed by its end, which comes with the exit code `expected`."""
        code = self.process.wait()
        text = self.output.read_text()
        assert code == expected, text
        return text

    def ray_was_slow(self) -> bool:
        """It has ended because Ray gives itself 30 seconds to start, too few on a busy machine."""
        return self.process.poll() == 2 and "Ray cannot be started on this machine" in self.output.read_text()


def run(folder: Path, *arguments: str | Path, expected: int = 0, address: str | None = None) -> str:
    """Run a command to its end; what it printed."""
    for _ in range(STARTS):
        command = Command(folder, *arguments, address=address)
        command.process.wait()
        if not command.ray_was_slow():
            break
    return command.wait(expected)


def start_until(
    folder: Path, come: Callable[[], bool], *arguments: str | Path, address: str | None = None
) -> Command:
    """A command, still under way as `come` holds."""
    for _ in range(STARTS):
        command = Command(folder, *arguments, address=address)
        process = command.process
        wait_until(lambda process=process: process.poll() is not None or come(), "the time has come")
        if not command.ray_was_slow():
            break
    assert command.process.poll() is None, command.output.read_text()
    return command
