"""`python -m tt_ray.distributed.launch.halt`: end Ray on this host, and see that it has ended.

`ray down` ends it on the head alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

PATIENCE = 20.0  # seconds that what has been ended may take to be gone
_PROGRAMS = ("raylet", "gcs_server")
_TITLES = ("ray::", "ray-dashboard")
_SCRIPTS = ("ray/autoscaler/_private/monitor.py", "ray/dashboard/dashboard.py", "ray/_private/log_monitor.py")


def main() -> None:
    """Exit code 1 and one line with what still runs, if anything does."""
    subprocess.run([str(Path(sys.executable).parent / "ray"), "stop"], capture_output=True, check=False)
    deadline = time.monotonic() + PATIENCE
    while left := list(ray_processes()):
        if time.monotonic() > deadline:
            sys.exit(f"tt-ray: still running: {', '.join(left)}")
        time.sleep(0.5)
    print("Ray does not run here")


def ray_processes() -> Iterable[str]:
    """`name (pid)` of each process of this user's Ray on this host."""
    me = psutil.Process().username()
    for process in psutil.process_iter(["name", "username", "cmdline", "status", "pid"]):
        line = process.info["cmdline"] or []
        if (
            process.info["username"] == me
            and process.info["status"] != psutil.STATUS_ZOMBIE
            and _is_ray(line)
        ):
            yield f"{Path(line[0].split()[0]).name} ({process.info['pid']})"


def _is_ray(line: list[str]) -> bool:
    if not line or not line[0].strip():
        return False
    return (
        Path(line[0].split()[0]).name in _PROGRAMS
        or line[0].startswith(_TITLES)
        or any(part.endswith(_SCRIPTS) for part in line)
    )


if __name__ == "__main__":
    main()
