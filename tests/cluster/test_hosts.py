"""The test hosts themselves, and that the scan of their ports finds what is open."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hosts
import pytest
from hosts import CHECKOUT, HOME, SHARED, USER, Site
from ports import SSH, listeners, open_beyond

from tt_ray.distributed.launch.firewall import rules

pytestmark = pytest.mark.cluster
LOGIN = ("ssh", "-i", "/etc/ssh/login", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR")
PORTS = {7001: "0.0.0.0", 7002: "::", 7003: hosts.ADDRESSES["head"], 7004: "127.0.0.1", 7005: "::1"}
LISTEN = f"""
import socket, time
made = [
    socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    for port, address in {PORTS}.items()
]
time.sleep(600)
"""


def test_hosts_share_a_folder_and_nothing_else(site: Site) -> None:
    desk, head, (worker, other) = site.desk, site.head, site.workers
    desk.run(*LOGIN, f"{USER}@{head.address}", f"echo hello > {SHARED}/note; touch /tmp/mine ~/mine")
    head.run("touch", "/opt/mine")
    desk.run("rsync", "-e", " ".join(LOGIN), f"{SHARED}/note", f"{USER}@{worker.address}:")
    assert worker.run("cat", f"{HOME}/note", f"{SHARED}/note") == "hello\nhello\n"
    for folder in ("/tmp", HOME, "/opt"):
        assert "mine" in head.run("ls", folder)
        assert "mine" not in other.run("ls", folder)
    assert not Path("/opt/mine").exists()
    assert head.run("hostname") == "head\n" != f"{socket.gethostname()}\n"
    for host in site.cluster:  # the code gets there as it does on a cluster, or not at all
        assert "tt_ray" not in host.run("ls", str(CHECKOUT))
    assert "tt_ray" in desk.run("ls", str(CHECKOUT))


def test_open_ports_are_found_and_the_firewall_closes_them(site: Site) -> None:
    head, desk, peer = site.head, site.desk, site.workers[0]
    with subprocess.Popen([*head.inside, sys.executable, "-c", LISTEN]) as process:
        try:
            _wait_for(lambda: {7001, 7002, 7003} <= {one.port for one in listeners(head)})
            assert {one.port for one in listeners(head)} == {SSH, 7001, 7002, 7003}
            assert [one.port for one in open_beyond(head, desk)] == [7001, 7002, 7003]
            peers = [host.address for host in site.cluster]
            for admitted in (peers, [*peers, *map(hosts.address6, peers)]):  # the second replaces the first
                head.run("nft", "-f", "-", stdin=rules(admitted))
            assert open_beyond(head, desk) == []
            assert [one.port for one in open_beyond(head, peer)] == [7001, 7002, 7003]
        finally:
            process.kill()


def test_a_powered_off_host_is_silent_and_nothing_of_it_lives_on(site: Site) -> None:
    head, (worker, _) = site.head, site.workers
    pids = hosts.ip("netns", "pids", worker.namespace).split()
    worker.power_off()
    _wait_for(lambda: not any(map(_runs, pids)))
    knock = f"import socket; socket.create_connection(({worker.address!r}, 22), timeout=1)"
    with pytest.raises(AssertionError, match=r"TimeoutError|No route to host"):
        head.run(sys.executable, "-c", knock)


def test_the_next_run_removes_what_a_killed_one_has_left(possible: None, tmp_path: Path) -> None:
    script = f"import hosts, time, pathlib\nwith hosts.site(pathlib.Path({str(tmp_path)!r})): time.sleep(600)"
    log = tmp_path / "worker2.log"
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent) as process:
        try:
            _wait_for(lambda: log.exists() and "Server listening" in log.read_text())
            left = [pid for name in _namespaces() for pid in hosts.ip("netns", "pids", name).split()]
        finally:
            process.kill()
    assert left
    assert all(map(_runs, left))
    (tmp_path / "again").mkdir()
    with hosts.site(tmp_path / "again") as made:
        assert not any(map(_runs, left))
        assert made.head.run("hostname") == "head\n"
    assert not _namespaces()


def _namespaces() -> list[str]:
    listed = hosts.ip("netns", "list").splitlines()
    return [line.split()[0] for line in listed if line.startswith(hosts.PREFIX)]


def _runs(pid: str) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: it has ended, and waits to be noticed
    except OSError:
        return False


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + hosts.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
