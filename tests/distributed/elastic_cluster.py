"""An evaluation on a Ray cluster whose hosts come and go: python elastic_cluster.py STORY FOLDER

STORY is `hosts` (a test's hand adds and kills them) or `autoscaler` (Ray's own, with hosts of its fake
provider; run it in namespaces of its own, since it takes Ray's ports). FOLDER/seen.json tells what happened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import Cluster
from test_rollouts import Factory

from tt_ray.distributed import rollouts
from tt_ray.distributed.cluster import Allocation, room_for_actors
from tt_ray.distributed.patience import patiently
from tt_ray.distributed.rollouts import Places, evaluate_seeds
from tt_ray.evaluation.rollout import EpisodeResult

PATIENCE = 400.0  # seconds for a host to come or go
MOST_HOSTS = 3
STORE = 100_000_000
ROOM = partial(room_for_actors, Allocation(evaluation_actors=1))


class Evaluation(threading.Thread):
    """`evaluate_seeds` in a thread, so that the main one can change the cluster."""

    def __init__(self, folder: Path, episodes: int, step_seconds: float, actors: int | Places) -> None:
        super().__init__(daemon=True)
        folder.mkdir()
        self.factory = Factory(folder, slots=1, step_seconds=step_seconds)
        self.episodes, self.actors = episodes, actors
        self.arrived: Counter[int] = Counter()
        self.results: list[EpisodeResult] = []
        self.error = ""
        self.most_hosts = 0
        self.start()

    def run(self) -> None:
        try:
            self.results = evaluate_seeds(
                range(self.episodes),
                self.factory,
                actors=self.actors,
                on_result=lambda result: self.arrived.update([result.seed]),
            )
        except BaseException as error:
            self.error = repr(error)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds, or the evaluation is over."""
        deadline = time.monotonic() + PATIENCE
        while self.is_alive() and not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.most_hosts = max(self.most_hosts, hosts())
            time.sleep(0.2)

    def report(self) -> dict[str, Any]:
        """What came of it, at its end."""
        self.wait(lambda: False)
        return {
            "error": self.error,
            "arrived": sorted(self.arrived.items()),
            "results": [result.to_json() for result in self.results],
            "begun": len(self.factory.pids()),
            "most_hosts": self.most_hosts,
        }


def hosts() -> int:
    """Hosts that work can run on, as Ray knows them."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def by_hand(folder: Path) -> dict[str, Any]:
    """A host joins, and then the one leaves that the evaluation began on."""
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    with patiently():
        cluster = Cluster(initialize_head=True, head_node_args=head)

    def add() -> Any:
        with patiently():
            return cluster.add_node(num_cpus=1, object_store_memory=STORE)

    try:
        first = add()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        evaluation = Evaluation(folder / "pool", 40, 0.3, ROOM)
        evaluation.wait(lambda: evaluation.arrived.total() >= 2)
        alone = len(evaluation.factory.pids())
        add()
        evaluation.wait(lambda: len(evaluation.factory.pids()) > alone)
        joined = evaluation.arrived.total()
        cluster.remove_node(first, allow_graceful=False)
        return {"alone": alone, "joined_at": joined, **evaluation.report()}
    finally:
        ray.shutdown()
        cluster.shutdown()


def with_autoscaler(folder: Path) -> dict[str, Any]:
    """Two episodes for many actors, and when those hosts have gone, many episodes for whatever there is."""
    start_autoscaled(folder)
    ray.init("127.0.0.1:6379", log_to_driver=False, logging_level="ERROR")
    assert hosts() == 0
    few = Evaluation(folder / "few", 2, 1.0, 8).report()
    deadline = time.monotonic() + PATIENCE
    while left := hosts():
        assert time.monotonic() < deadline, "hosts stay"
        time.sleep(0.5)
    rollouts._LASTING = 1.0
    many = Evaluation(folder / "many", 30, 1.0, ROOM).report()
    return {"few": few, "hosts_between": left, "many": many}


def start_autoscaled(folder: Path) -> None:
    """A head without CPUs, and Ray's autoscaler, which may start `MOST_HOSTS` hosts of one CPU."""
    file = folder / "cluster.yaml"
    nothing: dict[str, Any] = {"node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "elastic",
        "max_workers": MOST_HOSTS,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 10,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": "127.0.0.1:6379",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "docker": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**nothing, "resources": {"CPU": 0}},
            "host": {
                **nothing,
                "resources": {"CPU": 1, "object_store_memory": STORE},
                "max_workers": MOST_HOSTS,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file.write_text(yaml.safe_dump(config))
    options = ["--num-cpus=0", f"--object-store-memory={STORE}", "--include-dashboard=false"]
    command = ["ray", "start", "--head", "--node-ip-address=127.0.0.1", "--port=6379", *options]
    settings = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": 51 * "f" + "00000",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    command, environment = [*command, f"--autoscaling-config={file}"], {**os.environ, **settings}
    for tries_left in (3, 2, 1, 0):  # Ray allows a head 30 seconds to start, too few on a busy machine
        with (folder / "start.txt").open("w") as log:
            process = subprocess.run(command, env=environment, stdout=log, stderr=log)
        if process.returncode == 0:
            return
        # Every Ray in this PID namespace, which is this one.
        subprocess.run(["ray", "stop", "--force"], env=environment, capture_output=True)
        assert tries_left, (folder / "start.txt").read_text()


def own_machine() -> None:
    """In new namespaces: loopback, and places of one's own for what Ray keeps in common places."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    for place in ("/tmp/ray", "/dev/shm"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place], check=True)


if __name__ == "__main__":
    story, place = sys.argv[1], Path(sys.argv[2])
    if story == "autoscaler":
        own_machine()
    seen = with_autoscaler(place) if story == "autoscaler" else by_hand(place)
    (place / "seen.json").write_text(json.dumps(seen))
    os._exit(0)  # Ray's own farewell can hang on hosts that were killed
