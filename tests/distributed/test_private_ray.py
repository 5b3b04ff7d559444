"""A Ray that a command starts for itself: on loopback alone, and with a token of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tt_ray.tracking import connection

OPEN = """
import json, os, subprocess, sys
import psutil, ray
from tt_ray.config import ResourcesConfig
from tt_ray.distributed import cluster

ASK = (
    "import sys; from ray._raylet import GcsClient;"
    "print('nodes', len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=60)))"
)


def ask(**changes):
    command = [sys.executable, "-c", ASK, ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env={**os.environ, **changes}, capture_output=True, text=True, timeout=200)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


with cluster.connect(ResourcesConfig(workers=1, evaluation_actors=1)):
    assert ray.get(ray.remote(lambda: 3).remote()) == 3
    me = psutil.Process()
    open_ports = [
        connection.laddr.ip
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    ]
    said = [ask(), ask(RAY_AUTH_MODE="disabled"), ask(RAY_AUTH_TOKEN="0" * 64)]
print(json.dumps({"addresses": open_ports, "said": said}))
"""


@pytest.mark.ray
@pytest.mark.timeout(1300)
def test_nobody_else_is_let_in(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", OPEN],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
        if "timed out during startup" not in done.stderr:  # Ray's own patience with a busy machine is short
            break
    assert done.returncode == 0, done.stderr
    assert "token" not in done.stderr.lower()  # Ray's own notice
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["addresses"]) >= 4
    assert {address.removeprefix("::ffff:") for address in found["addresses"]} == {"127.0.0.1"}
    assert found["said"][0] == "nodes 1"
    assert all("InvalidAuthToken" in line for line in found["said"][1:])
    assert list(tmp_path.rglob("auth_token")) == []


def test_the_server_that_is_suggested_is_on_loopback() -> None:
    """MLflow's own default, which a machine alone is never advised to change."""
    assert "--host" not in connection.START_SERVER
    from mlflow.cli import server

    (option,) = (option for option in server.params if option.name == "host")
    assert option.default == "127.0.0.1"
