"""A user at the desk: the cluster's file with this site's values, and the commands that a user types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import hosts
from hosts import CHECKOUT, SHARED, USER, Site

STORAGE = f"{SHARED}/tt-ray"
CLUSTER_FILE = str(CHECKOUT / "this-site.yaml")
_OPTIONS = "--num-cpus=2 --object-store-memory=200000000"  # hosts that see all of this machine


class Clock:
    """The log: what was done when."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)


def cluster_file(site: Site) -> str:
    """cluster.local.yaml with the values at its top changed, and nothing else."""
    text = (CHECKOUT / "cluster.local.yaml").read_text()
    values = {
        r"(?<=  head_ip: )\S+": site.head.address,
        r"(?<=  worker_ips: )\[[^]]*\]": f"[{', '.join(worker.address for worker in site.workers)}]",
        r"(?<=  ssh_user: )\S+": USER,
        r"(?<=  ssh_private_key: )\S+": "/etc/ssh/login",
        r"(?<=export TT_RAY_STORAGE=)\S+": STORAGE,
        r"(?<=export TT_RAY_PYTHON=)\S+": sys.executable,
        r"(?<=export TT_RAY_VENV=)\S+": sys.prefix,
        r'(?<=export TT_RAY_HEAD_OPTIONS=)""': f'"{_OPTIONS}"',
        r'(?<=export TT_RAY_WORKER_OPTIONS=)""': f'"{_OPTIONS}"',
    }
    for pattern, value in values.items():
        text, count = re.subn(pattern, value, text)
        assert count == 1, f"cluster.local.yaml: {pattern}: {count} times"
    return text


def typed(site: Site, *command: str, folder: Path | str = CHECKOUT) -> list[str]:
    """A command as a user types it at the desk, in `folder`."""
    search = os.pathsep.join([str(Path(sys.prefix) / "bin"), hosts.PATH])
    variables = [f"PATH={search}", f"TT_RAY_CLUSTER={CLUSTER_FILE}", "OMP_NUM_THREADS=1", "COLUMNS=160"]
    return [*site.desk.inside, "env", f"--chdir={folder}", *variables, *command]


def desk(site: Site, *command: str, folder: Path | str = CHECKOUT) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(
        typed(site, *command, folder=folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"
    return done.stdout
