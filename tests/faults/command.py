"""The command line in a process of its own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from processes import descendants, wait_gone


def is_agent(process: psutil.Process) -> bool:
    """Whether this is one of the helpers of Ray's raylet."""
    return process.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Command:
    """`python -m tt_ray ...` in `folder`, in a session of its own."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tt_ray", *arguments],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the command alone; returns when all that it had started is gone by itself.

        All but Ray's two agents, which hold nothing of ours and notice after a minute.
        """
        started = [process for process in descendants(self.process.pid) if not is_agent(process)]
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL
        wait_gone(started)
        return started

    def wait(self, expected: int = 0) -> str:
        """What it has printed by its end, which comes with the exit code `expected`."""
        code = self.process.wait()
        text = self.output.read_text()
        assert code == expected, text
        return text


def run(folder: Path, *arguments: str | Path, expected: int = 0) -> str:
    """Run a command to its end; what it printed."""
    return Command(folder, *arguments).wait(expected)
