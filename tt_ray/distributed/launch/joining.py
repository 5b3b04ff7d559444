"""Workers of one's own hosts that Ray's autoscaler has given up: set up and started from the user's machine.

The autoscaler never again looks after a host whose set-up or start has failed once, nor after one that
was switched off and on. Until Ray on the head is started anew (which ends what runs) such a host has to be
brought back by hand: by the same copies and commands that the autoscaler would have used.
"""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tt_ray.distributed.launch.cluster_file import ClusterFile
from tt_ray.distributed.launch.report import Report
from tt_ray.errors import UserError

JOINING = 900.0  # seconds that workers may take after the head
SETTING_UP = 3600.0  # seconds for one command, which may install the environment

Say = Callable[[str], None]


def await_workers(cluster: ClusterFile, say: Say) -> Report:
    """Wait until all named workers have joined, and bring back those that Ray has given up."""
    report = _wait(cluster, say)
    absent = absent_workers(cluster, report)
    if absent:
        say(f"Ray has given {', '.join(absent)} up; setting up from here")
        head = report.address.rpartition(":")[0]
        with ThreadPoolExecutor(len(absent)) as pool:
            list(pool.map(lambda worker: start_worker(cluster, worker, head), absent))
        report = _wait(cluster, say)
    if absent := absent_workers(cluster, report):
        log = "/tmp/ray/session_latest/logs/monitor.out"
        raise UserError(f"{', '.join(absent)} did not join; {log} on {cluster.head} says why")
    return report


def absent_workers(cluster: ClusterFile, report: Report) -> list[str]:
    """Addresses in the cluster's file that are not in the cluster."""
    there = {node.address for node in report.nodes}
    return [worker for worker in cluster.workers if _address(worker) not in there]


def start_worker(cluster: ClusterFile, worker: str, head: str) -> None:
    """Set one worker up and start Ray there, which joins `head`; `UserError` with what it last said."""
    host = cluster.host(worker)
    for target, source in cluster.mounts.items():
        host.copy(source, target)
    for command in (*cluster.worker_setup, *cluster.worker_start):
        host.run(f"bash -c {shlex.quote(f'export RAY_HEAD_IP={head}; {command}')}", timeout=SETTING_UP)


def _wait(cluster: ClusterFile, say: Say) -> Report:
    """Until all are there, or Ray does nothing any more for those that are not."""
    expected = 1 + len(cluster.workers)
    arguments = ("--until", str(expected), "--patience", f"{JOINING:.0f}")
    for line in cluster.head_host().lines("report", *arguments):
        if line.startswith("{"):
            return Report.parse(line)
        say(line.strip())
    raise UserError(f"{cluster.head}: asked for a report, it gave none")


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"host {host!r} is not known here: {error.strerror}") from None
