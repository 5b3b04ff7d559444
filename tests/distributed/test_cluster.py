import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tt_ray.config import ResourcesConfig
from tt_ray.distributed import cluster
from tt_ray.distributed.cluster import Allocation, Offer, connect, object_store_bytes, offer, resolve
from tt_ray.errors import UserError


def shared(workers, gpus_per_worker, actors, cpus_per_actor, gpus_per_actor):
    """What is compared here; the other fields follow from it and from the offer."""
    return (workers, gpus_per_worker, actors, cpus_per_actor, gpus_per_actor)


def parts(allocation: Allocation):
    return shared(
        allocation.workers,
        allocation.gpus_per_worker,
        allocation.evaluation_actors,
        allocation.cpus_per_actor,
        allocation.gpus_per_actor,
    )


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (Offer(cpus=1, gpus=0, hosts=1), shared(1, 0, 1, 1, 0)),
        (Offer(cpus=2, gpus=0, hosts=1), shared(2, 0, 2, 1, 0)),
        (Offer(cpus=64, gpus=0, hosts=4), shared(2, 0, 64, 1, 0)),
        (Offer(cpus=16, gpus=1, hosts=1), shared(1, 1, 4, 1, 0.25)),
        (Offer(cpus=64, gpus=8, hosts=2), shared(8, 1, 32, 1, 0.25)),
        (Offer(cpus=2, gpus=1, hosts=1), shared(1, 1, 4, 0.5, 0.25)),
        (Offer(cpus=0, gpus=0, hosts=1), shared(1, 0, 1, 1, 0)),  # a head that scales up on demand
    ],
)
def test_auto_follows_what_is_there(offered, expected):
    allocation = resolve(ResourcesConfig(), offered)
    assert parts(allocation) == expected
    assert allocation.cpus_per_worker * allocation.workers <= max(1, offered.cpus)
    assert allocation.in_process == (offered.gpus == 0)


@pytest.mark.parametrize(
    ("resources", "offered", "expected"),
    [
        (ResourcesConfig(workers=3), Offer(4, 0, 1), shared(3, 0, 4, 1, 0)),
        (ResourcesConfig(evaluation_actors=7), Offer(4, 0, 1), shared(2, 0, 7, 1, 0)),
        (ResourcesConfig(gpus_per_worker=0.5), Offer(8, 1, 1), shared(2, 0.5, 4, 1, 0.25)),
        (ResourcesConfig(gpus_per_worker=0), Offer(8, 1, 1), shared(2, 0, 4, 1, 0.25)),
        (ResourcesConfig(workers=1, evaluation_actors=2), Offer(8, 1, 1), shared(1, 1, 2, 1, 0.5)),
        (ResourcesConfig(evaluation_actors=6), Offer(64, 4, 1), shared(4, 1, 6, 1, 0.5)),
        (ResourcesConfig(evaluation_actors=1), Offer(64, 4, 1), shared(4, 1, 1, 1, 1)),
    ],
)
def test_what_is_stated_is_kept(resources, offered, expected):
    assert parts(resolve(resources, offered)) == expected


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (ResourcesConfig(workers=2), "resources.workers: 2 workers with 1 GPUs each need 2, but Ray has 1"),
        (ResourcesConfig(gpus_per_worker=2), "1 workers with 2 GPUs each need 2, but Ray has 1"),
        (ResourcesConfig(workers=9, gpus_per_worker=0), "9 workers need a CPU each, but Ray has 8"),
    ],
)
def test_training_workers_that_could_never_start_are_refused(resources, message):
    with pytest.raises(UserError) as caught:
        resolve(resources, Offer(cpus=8, gpus=1, hosts=1))
    assert message in str(caught.value)


def test_object_store_fits_into_shared_memory():
    assert object_store_bytes(24_000_000_000) == 512_000_000
    assert object_store_bytes(200_000_000) == 160_000_000
    assert object_store_bytes(64_000_000) >= 75 * 1024 * 1024  # Ray's least; it then uses /tmp


def test_workers_see_the_drivers_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    variables = cluster.worker_environment()
    assert variables["PYTHONPATH"] == f"{tmp_path}{os.pathsep}/elsewhere"
    assert variables["MUJOCO_GL"] == "egl"
    assert "MINARI_DATASETS_PATH" not in variables


def test_a_ray_job_is_not_told_twice(monkeypatch):
    monkeypatch.setattr(cluster, "_knock", lambda address: None)
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(cluster.ray, "init", lambda address, **options: calls.append((address, options)))
    job = {"runtime_env": {"working_dir": "gcs://package.zip", "env_vars": {"MUJOCO_GL": "egl"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    for name in set(cluster.WORKER_VARIABLES) - {"MUJOCO_GL", "MLFLOW_TRACKING_URI"}:
        monkeypatch.delenv(name, raising=False)
    cluster._join("10.0.0.1:6379")
    ((address, options),) = calls
    assert address == "10.0.0.1:6379"
    assert options["runtime_env"] == {"env_vars": {"MLFLOW_TRACKING_URI": "http://tracking:5000"}}


def test_rays_client_protocol_is_refused():
    with pytest.raises(UserError, match="tt-ray submit"):
        cluster._join("ray://127.0.0.1:10001")


@pytest.mark.ray
def test_a_ray_that_is_there_is_joined_and_left_running(ray_local):
    import ray

    with connect(ResourcesConfig()) as outer, connect(ResourcesConfig()) as inner:
        assert outer == inner
        assert parts(outer) == shared(2, 0, 2, 1, 0)
        assert offer() == Offer(cpus=2, gpus=0, hosts=1)
    assert ray.is_initialized()


PROGRAM = """
import os, sys
from tt_ray.config import ResourcesConfig
from tt_ray.distributed.cluster import connect
import ray

def look():
    import lonely_module
    return lonely_module.ANSWER, os.environ["MLFLOW_TRACKING_URI"], os.environ["RAY_AUTH_MODE"]

with connect(ResourcesConfig(workers=1)) as allocation:
    print(allocation.workers, *ray.get(ray.remote(look).remote()))
assert not ray.is_initialized()
print("ended")
"""


@pytest.mark.ray
def test_a_local_ray_is_started_and_ended(tmp_path):
    (tmp_path / "lonely_module.py").write_text("ANSWER = 42\n")
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "CUDA_VISIBLE_DEVICES")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    root = str(Path(cluster.__file__).parents[2])
    environment |= {"HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "sqlite:///x.db", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 42 sqlite:///x.db token", "ended"]
    assert not (tmp_path / ".ray").exists()  # no token that would lock this user's other clusters


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:port"])
def test_an_address_without_a_cluster_is_one_clear_line(monkeypatch, address):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)  # not the session's own Ray
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"cannot join the Ray cluster at RAY_ADDRESS={address}: "):
        connect(ResourcesConfig()).__enter__()
