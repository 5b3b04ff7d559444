"""Workers that Ray has given up are set up as by Ray itself, and those that do not come are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tt_ray.distributed.launch import joining
from tt_ray.distributed.launch.cluster_file import ClusterFile
from tt_ray.distributed.launch.joining import await_workers
from tt_ray.distributed.launch.report import Node, Report
from tt_ray.distributed.launch.ssh import Host
from tt_ray.errors import UserError

WORKERS = ("127.0.0.2", "127.0.0.3")


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterFile:
    return ClusterFile(
        path=tmp_path / "cluster.yaml",
        name="test",
        provider="local",
        head="127.0.0.1",
        workers=WORKERS,
        user="ray",
        key=tmp_path / "key",
        proxy=None,
        mounts={"~/tt-ray/tt_ray": tmp_path / "tt_ray"},
        worker_setup=("prepare",),
        worker_start=("ray stop", "ray start"),
        settings={"TT_RAY_STORAGE": "/srv"},
    )


class Hosts:
    """In place of ssh: who is in the cluster, and what is done on which host."""

    def __init__(self, there: set[str], startable: set[str]) -> None:
        self.there, self.startable, self.done = there, startable, list[tuple[str, str]]()

    def lines(self, host: Host, name: str, *arguments: str) -> Iterator[str]:
        assert (host.address, name, arguments[:2]) == ("127.0.0.1", "report", ("--until", "3"))
        yield f"{len(self.there)} of 3 nodes have joined\n"
        nodes = [
            Node(address=address, is_head=False, used={}, total={}, actors={})
            for address in sorted(self.there)
        ]
        report = Report(address="10.0.0.1:6379", nodes=nodes, pending=[], jobs=[], mlflow=None)
        yield json.dumps(asdict(report)) + "\n"

    def run(self, host: Host, command: str, **_: object) -> str:
        self.done.append((host.address, command))
        if "ray start" in command and host.address in self.startable:
            self.there.add(host.address)
        return ""

    def copy(self, host: Host, source: Path, target: str) -> None:
        self.done.append((host.address, f"copy {target}"))


def install(monkeypatch: pytest.MonkeyPatch, hosts: Hosts) -> Hosts:
    for name in ("lines", "run", "copy"):
        act = getattr(hosts, name)
        monkeypatch.setattr(Host, name, lambda self, *words, act=act, **rest: act(self, *words, **rest))
    return hosts


def test_nothing_is_done_where_all_have_joined(cluster: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = install(monkeypatch, Hosts({"127.0.0.1", *WORKERS}, set()))
    said: list[str] = []
    assert len(await_workers(cluster, said.append).nodes) == 3
    assert (hosts.done, said) == ([], ["3 of 3 nodes have joined"])


def test_a_worker_that_was_given_up_is_set_up(cluster: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = install(monkeypatch, Hosts({"127.0.0.1", WORKERS[0]}, {WORKERS[1]}))
    said: list[str] = []
    assert len(await_workers(cluster, said.append).nodes) == 3
    told = "bash -c 'export RAY_HEAD_IP=10.0.0.1; {}'"
    actions = ["copy ~/tt-ray/tt_ray", *(told.format(text) for text in ("prepare", "ray stop", "ray start"))]
    assert hosts.done == [(WORKERS[1], action) for action in actions]
    assert said == [
        "2 of 3 nodes have joined",
        f"Ray has given {WORKERS[1]} up; setting up from here",
        "3 of 3 nodes have joined",
    ]


def test_who_does_not_come_is_named(cluster: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Hosts({"127.0.0.1", WORKERS[0]}, set()))
    with pytest.raises(UserError, match=rf"^{WORKERS[1]} did not join; .*monitor.out on 127.0.0.1 says why"):
        await_workers(cluster, lambda text: None)


def test_a_name_that_nobody_knows_is_one_line(cluster: ClusterFile) -> None:
    with pytest.raises(UserError, match=r"host 'no\.such\.host\.invalid' is not known here"):
        joining._address("no.such.host.invalid")
