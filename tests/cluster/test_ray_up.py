"""A cluster of three hosts from cluster.local.yaml, from `tt-ray cluster up` to `down` and up again.

The tests stand in the order in which a user does things; each one needs the fixtures before it and no more.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hosts
import pandas as pd
import pytest
from desk import CLUSTER_FILE, Clock, cluster_file, desk, typed
from hosts import Host, Site
from ports import SSH, listeners, open_beyond

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
SWEEP = "sweeps/quickstart.yaml"
SPREAD = ("resources.episodes_per_actor=1", "resources.evaluation_actors=2")
"""A trial takes three CPUs, and two trials all six of the cluster; each uses both of its actors."""
PATIENCE = 900.0  # seconds; far more than anything here takes
NAMES = re.compile(r"ray::(ImplicitFunc|Evaluator)\b")
"""Titles of the processes that do a sweep's work: its trials, and their evaluation actors."""
OTHER_IN_EVERY_RUN = ("speed/", "seconds", "saved", "reused")
MAKE_DATA = "import sys; sys.path.insert(0, 'tests/data'); import minari_examples as m; m.write('my/tiny-v0')"
READ_MLFLOW = """
import json, socket, time, mlflow
for _ in range(100):  # the tunnel
    try:
        socket.create_connection(("127.0.0.1", 5000)).close()
        break
    except OSError:
        time.sleep(0.1)
client = mlflow.MlflowClient()
found = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
runs = client.search_runs(found)
print(json.dumps([[r.info.run_id, r.info.status, r.data.tags["kind"], r.data.metrics.get("score/mean"),
                   len(client.list_artifacts(r.info.run_id))] for r in runs]))
"""


@dataclass
class Cluster:
    """The site with a cluster that is up."""

    site: Site
    say: Clock


@dataclass
class Swept:
    """The sweep's job: it has lost a host in the middle, and is over."""

    output: str
    worked: dict[str, set[str]]
    """What of it was seen on which host."""
    lost: Host
    trials: pd.DataFrame
    alone: pd.DataFrame
    """The same sweep's table from one machine alone."""

    def living(self, site: Site) -> list[Host]:
        """The cluster's hosts that are left."""
        return [host for host in site.cluster if host is not self.lost]


@pytest.fixture(scope="module")
def cluster(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with hosts.site(tmp_path_factory.mktemp("site")) as site:
        cluster = Cluster(site, Clock())
        _up(cluster)
        yield cluster


@pytest.fixture(scope="module")
def swept(cluster: Cluster) -> Swept:
    site, say = cluster.site, cluster.say
    log = site.shared.parent / "job.log"
    say(f"tt-ray submit {SWEEP} --smoke {' '.join(SPREAD)}")
    with log.open("w") as output:
        job = subprocess.Popen(
            typed(site, "tt-ray", "submit", SWEEP, "--smoke", *SPREAD),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    alone = None
    try:
        worked, lost = _until_all_hosts_work(site, job, log, say)
        say(f"power off {lost.name}, which runs {', '.join(sorted(_at_work(lost)))}")
        lost.power_off()
        alone = subprocess.Popen(
            typed(site, "sh", "-c", f"mkdir /root/alone && cd /root/alone && {_ALONE}"),
            stdout=subprocess.DEVNULL,
        )
        assert job.wait(PATIENCE) == 0, log.read_text()[-4000:]
        say("the job has ended")
        assert alone.wait(PATIENCE) == 0
        say("the same sweep has ended at the desk, alone")
    finally:
        for process in (job, alone):
            if process is not None and process.poll() is None:
                process.kill()
    trials = _table(next((site.shared / "tt-ray" / "runs" / "sweeps").glob("*/trials.parquet")))
    return Swept(log.read_text(), worked, lost, trials, _table(site.shared / "alone.parquet"))


_TRY = f"tt-ray sweep {hosts.CHECKOUT}/{SWEEP} --smoke --resume {SPREAD[0]}"
_ALONE = f"({_TRY} || {_TRY} || {_TRY}) && cp runs/sweeps/*/trials.parquet {hosts.SHARED}/alone.parquet"
"""Ray gives itself 30 seconds to start, and this machine may be busy."""


def test_status_names_every_host(cluster: Cluster) -> None:
    shown = desk(cluster.site, "tt-ray", "cluster", "status", CLUSTER_FILE)
    for host in cluster.site.cluster:
        assert host.address in shown
    assert f"http://{cluster.site.head.address}:5000" in shown


def test_the_firewall_rules_close_what_ray_opens(cluster: Cluster) -> None:
    """Before the sweep, whose processes then listen behind them."""
    site = cluster.site
    rules = desk(site, "tt-ray", "cluster", "firewall", CLUSTER_FILE)
    for host in site.cluster:
        there = open_beyond(host, site.desk)
        assert {one.program for one in there} >= {"raylet"}  # else this file's scan sees nothing
        for one in there:  # nothing is bound to an address that is neither loopback's nor the cluster's
            assert one.everywhere or one.address in (host.address, f"::ffff:{host.address}"), one
        assert not [one for one in listeners(host) if one.port == 8265]  # the dashboard: loopback
        assert {one.address for one in listeners(host) if one.port == 5000} <= {host.address}  # MLflow
        host.run("nft", "-f", "-", stdin=rules)
        assert open_beyond(host, site.desk) == []
    cluster.say("firewall rules loaded")


def test_a_sweep_uses_all_hosts_and_outlives_one(cluster: Cluster, swept: Swept) -> None:
    assert set(swept.worked) == {host.name for host in cluster.site.cluster}
    assert (swept.trials["status"] == "finished").all(), swept.output[-4000:]
    assert len(swept.trials) == 4
    pd.testing.assert_frame_equal(swept.trials, swept.alone, check_exact=True)
    runs = cluster.site.shared / "tt-ray" / "runs"
    left = [path for path in runs.rglob("*") if "~" in path.name or path.name.startswith(".tmp")]
    assert left == []


def test_mlflow_is_read_through_a_tunnel(cluster: Cluster, swept: Swept) -> None:
    kinds = [
        kind
        for _, status, kind, _, artifacts in _mlflow_runs(cluster.site)
        if status == "FINISHED" and artifacts
    ]
    assert kinds.count("sweep") == 1
    assert kinds.count("trial") == 4


def test_nothing_is_open_beyond_the_cluster_after_work(cluster: Cluster, swept: Swept) -> None:
    for host in swept.living(cluster.site):
        assert {one.port for one in listeners(host)} > {SSH}
        assert open_beyond(host, cluster.site.desk) == []


def test_a_data_set_is_pushed(cluster: Cluster) -> None:
    site = cluster.site
    desk(site, sys.executable, "-c", MAKE_DATA)
    assert "is on the cluster" in desk(site, "tt-ray", "data", "push", "my/tiny-v0")
    there = site.shared / "tt-ray" / "datasets" / "my" / "tiny-v0" / "data"
    assert sorted(path.name for path in there.iterdir()) == ["main_data.hdf5", "metadata.json"]
    assert "already" in desk(site, "tt-ray", "data", "push", "my/tiny-v0")
    cluster.say("tt-ray data push: done")


def test_down_leaves_no_process_and_new_hosts_have_the_runs_again(cluster: Cluster, swept: Swept) -> None:
    site, say = cluster.site, cluster.say
    before = _mlflow_runs(site)
    say("tt-ray cluster down --yes")
    down = subprocess.run(
        typed(site, "tt-ray", "cluster", "down", "--yes", CLUSTER_FILE),
        capture_output=True,
        text=True,
        check=False,
    )
    said = down.stdout + down.stderr
    assert down.returncode == 2, said  # nobody knows what the lost host does
    assert f"{swept.lost.address} cannot be reached" in said
    say("down")
    for host in swept.living(site):
        assert host.processes() == {}
    cluster.site = site.renewed()
    _up(cluster)
    assert _mlflow_runs(cluster.site) == before
    say("the runs are back")
    desk(cluster.site, "tt-ray", "cluster", "down", "--yes", CLUSTER_FILE)
    for host in cluster.site.cluster:
        assert host.processes() == {}
    say("down")


def _up(cluster: Cluster) -> None:
    """`tt-ray cluster up`, and what every host must then run."""
    site, say = cluster.site, cluster.say
    site.desk.run("tee", CLUSTER_FILE, stdin=cluster_file(site))
    say("tt-ray cluster up --yes")
    desk(site, "tt-ray", "cluster", "up", "--yes", CLUSTER_FILE)
    say("up, all hosts have joined")
    for host in site.cluster:
        assert any("/raylet/raylet " in line for line in host.processes().values())


def _until_all_hosts_work(
    site: Site, job: subprocess.Popen[bytes], log: Path, say: Clock
) -> tuple[dict[str, set[str]], Host]:
    """What works where, once every host has worked, and a worker that is in the middle of something."""
    worked: dict[str, set[str]] = {}
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert job.poll() is None, f"it has ended too early: {worked}\n{log.read_text()[-4000:]}"
        now = {host.name: _at_work(host) for host in site.cluster}
        for name, titles in now.items():
            for title in titles - worked.get(name, set()):
                say(f"{name} runs {title}")
            if titles:
                worked.setdefault(name, set()).update(titles)
        busy = [worker for worker in site.workers if now[worker.name]]
        if len(worked) == len(site.cluster) and busy:
            return worked, busy[-1]
        time.sleep(0.5)
    raise AssertionError(f"not all hosts work: {worked}\n{log.read_text()[-4000:]}")


def _at_work(host: Host) -> set[str]:
    """Titles of the processes on a host that do the sweep's work."""
    return {match[0] for line in host.processes().values() if (match := NAMES.match(line))}


def _table(path: Path) -> pd.DataFrame:
    """What a sweep's table has to say, without what depends on the machine's speed."""
    frame = pd.read_parquet(path)
    kept = [name for name in frame if not name.startswith(OTHER_IN_EVERY_RUN)]
    return frame[kept].sort_values("index", ignore_index=True)


def _mlflow_runs(site: Site) -> list[list[object]]:
    """The runs as the user's own machine sees them, with the tunnel that `status` tells of."""
    shown = desk(site, "tt-ray", "cluster", "status", CLUSTER_FILE)
    tunnel = re.search(r"ssh -N .*", shown)
    assert tunnel is not None, shown
    options = "-o StrictHostKeyChecking=accept-new -o ExitOnForwardFailure=yes"  # nobody is there to say yes
    script = f'{tunnel[0]} {options} & trap "kill $!" EXIT; "$@"'
    uri = "MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
    said = desk(site, "env", uri, "bash", "-c", script, "bash", sys.executable, "-c", READ_MLFLOW)
    return sorted(json.loads(said.splitlines()[-1]))
