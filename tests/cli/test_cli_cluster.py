"""`tt-ray cluster`, `submit` and `data push`, without hosts: what is refused, and what is shown."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, Refused, settings

from tt_ray.cli import cluster as cluster_command
from tt_ray.distributed.launch import lifecycle
from tt_ray.distributed.launch.cluster_file import load_cluster
from tt_ray.distributed.launch.report import Job, Node, Report

SHIPPED = Path(__file__).parents[2] / "cluster.local.yaml"


@pytest.fixture
def mine(here: Path) -> Path:
    """A cluster file of the user's, whose hosts nobody answers at."""
    (here / "key").write_text("no real key")
    data = yaml.safe_load(SHIPPED.read_text())
    data["auth"]["ssh_private_key"] = str(here / "key")
    data["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": ["127.0.0.2"]}
    return write(here, data)


def write(folder: Path, data: Any) -> Path:
    (folder / "mine.yaml").write_text(yaml.safe_dump(data))
    return folder / "mine.yaml"


@pytest.fixture(autouse=True)
def nobody_elses(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """No cluster is named, and nothing is written to the user's own home."""
    for name in ("TT_RAY_CLUSTER", "RAY_ADDRESS", "TT_RAY_HEAD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (here / "home").mkdir()
    monkeypatch.setenv("HOME", str(here / "home"))


@pytest.mark.parametrize(
    "words", [("up", "-y"), ("down", "-y"), ("status",), ("firewall",)], ids=lambda w: w[0]
)
def test_a_file_that_is_none_is_refused(here: Path, refused: Refused, words: tuple[str, ...]) -> None:
    refused("cluster", *words, "none.yaml", parts=("none.yaml: No such file",))
    (here / "text.yaml").write_text("- a\n- b\n")
    refused("cluster", *words, "text.yaml", parts=("text.yaml: this is no cluster file",))
    (here / "text.yaml").write_text("a: [")
    refused("cluster", *words, "text.yaml", parts=("text.yaml: not valid YAML",))
    (here / "text.yaml").write_bytes(b"\xff\xfe\x00")
    refused("cluster", *words, "text.yaml", parts=("text.yaml: not valid YAML",))


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        (("provider", "type"), "gcp", "provider.type is 'gcp', and tt-ray knows local and aws"),
        (("provider", "head_ip"), None, "provider.head_ip is missing"),
        (("provider", "worker_ips"), "10.0.0.2", "provider.worker_ips: write a list"),
        (("auth", "ssh_user"), None, "auth.ssh_user is missing"),
        (("auth", "ssh_user"), "-oProxyCommand=touch x", "auth.ssh_user is missing, or is no text"),
        (("auth", "ssh_private_key"), "/none/key", "there is no file /none/key"),
        (("setup_commands",), [], "TT_RAY_STORAGE is not set"),
        (("setup_commands",), ["cat settings.sh\nexport TT_RAY_STORAGE='/a\n"], "TT_RAY_STORAGE: No closing"),
        (("cluster_name",), "CHANGE-ME", "mine.yaml:"),
        (("cluster_name",), "../auth_token", "cluster_name '../auth_token': use letters"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    mine: Path, refused: Refused, place: tuple[str, ...], value: Any, part: str
) -> None:
    data = yaml.safe_load(mine.read_text())
    section = data if len(place) == 1 else data[place[0]]
    section[place[-1]] = value
    write(mine.parent, data)
    refused("cluster", "status", "mine.yaml", parts=(part,))


def test_the_shipped_cloud_file_asks_for_its_values(here: Path, refused: Refused) -> None:
    (here / "cluster.yaml").write_text((SHIPPED.parent / "cluster.yaml").read_text())
    refused("cluster", "up", "-y", parts=("cluster.yaml:", "CHANGE-ME is still to be replaced"))


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")
def test_hosts_that_do_not_answer_are_named(mine: Path, refused: Refused) -> None:
    known = ("home/.tt-ray", "home/.tt-ray/known_hosts")
    for words in (
        ("status", "mine.yaml"),
        ("down", "-y", "mine.yaml"),
        ("stop", "x", "--cluster", "mine.yaml"),
    ):
        if words[0] == "stop":
            (mine.parent / "home" / ".tt-ray" / "auth_token").write_text("token")
        refused("cluster", *words, parts=("127.0.0.1 cannot be reached by ssh",), left=known)


def test_up_checks_before_it_changes_anything(
    mine: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "need", lambda *programs: None)
    token = ("home/.tt-ray", "home/.tt-ray/auth_token")
    refused("cluster", "up", "-y", "mine.yaml", parts=("there is no LICENSE",), left=token)
    data = yaml.safe_load(mine.read_text())
    data["hed_start_ray_commands"] = []
    write(mine.parent, data)
    refused("cluster", "up", "-y", "mine.yaml", parts=("mine.yaml: ", "hed_start_ray_commands"))


def test_without_a_cluster_one_is_asked_for(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("cluster", "status", parts=("this host is in no cluster", "RAY_ADDRESS"))
    refused("data", "push", "me/task-v0", parts=("which cluster?", "--cluster"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{probe.getsockname()[1]}")
        refused("cluster", "status", parts=("no Ray cluster answers at 127.0.0.1",))


def test_what_cannot_be_submitted_is_refused_here(mine: Path, refused: Refused) -> None:
    refused("submit", "none.yaml", "--cluster", "mine.yaml", parts=("none.yaml",))
    (mine.parent / "one.yaml").write_text(yaml.safe_dump(settings()))
    refused("submit", "one.yaml", "--smoke", parts=("one.yaml has no search section",))
    refused("submit", "one.yaml", "trainig.steps=5", parts=("trainig",))
    refused("submit", "one.yaml", "--cluster", "mine.yaml", parts=("there is no", "auth_token"))


def test_a_data_set_that_is_not_here_is_not_pushed(mine: Path, refused: Refused) -> None:
    refused("data", "push", "me/task-v0", "--cluster", "mine.yaml", parts=("no data set me/task-v0",))
    refused("data", "push", "../task", "--cluster", "mine.yaml", parts=("malformed data set id",))


def test_the_firewall_is_for_hosts_of_ones_own(mine: Path, command: Command) -> None:
    shown = command("cluster", "firewall", "mine.yaml")
    assert shown.code == 0
    assert "ip saddr { 127.0.0.1, 127.0.0.2 } accept" in shown.out


def test_a_report_shows_what_runs_where(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    head = Node(address="10.0.0.1", is_head=True, used={"CPU": 0.0}, total={"CPU": 4.0}, actors={"Board": 1})
    used, total = {"CPU": 3.0, "GPU": 0.5, "memory": 2e9}, {"CPU": 8.0, "GPU": 1.0, "memory": 64e9}
    worker = Node(address="10.0.0.2", is_head=False, used=used, total=total, actors={"Actor": 3})
    jobs = [Job(id="raysubmit_1", status="RUNNING", entrypoint="tt-ray sweep x.yaml", seconds=65.0)]
    report = Report(
        address="10.0.0.1:6379",
        nodes=[head, worker],
        pending=["10.0.0.3: setting-up"],
        jobs=jobs,
        mlflow="http://10.0.0.1:5000",
    )
    cluster_command._show(report, load_cluster(mine))
    shown = capfd.readouterr().out
    for part in (
        "3/8",
        "0.5/1",
        "2/64 GB",
        "3 x Actor",
        "pending: 10.0.0.3",
        "raysubmit_1",
        "tt-ray sweep x.yaml",
    ):
        assert part in shown
    tunnel = f"ssh -N -i {mine.parent}/key -L 127.0.0.1:5000:10.0.0.1:5000 ray@127.0.0.1"
    assert tunnel in shown
