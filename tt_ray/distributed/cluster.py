"""Join or start Ray, see what it offers, and share that out."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private import ray_constants

from tt_ray.config import ResourcesConfig, require
from tt_ray.distributed.patience import patiently
from tt_ray.distributed.vigil import PRIVATE, SHARED, while_ray_lives
from tt_ray.errors import UserError

ACTORS_PER_GPU = 4  # evaluation actors that share a GPU: one steps its environments while the others plan
WORKER_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MINARI_DATASETS_PATH",
    "MUJOCO_GL",
)
"""Environment variables that every Ray process must see as the driver does, on every host."""

_OBJECT_STORE_BYTES = 512_000_000
_SMALLEST_OBJECT_STORE = 80_000_000  # Ray refuses less than 75 MiB
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what `ray job submit` hands to its driver


@dataclass(frozen=True)
class Offer:
    """What the cluster has, used or not."""

    cpus: int
    gpus: int
    hosts: int


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """`ResourcesConfig` with every `auto` decided."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    in_process: bool = True
    """A single worker trains in the process that asks for it, on that process's GPU if it is to have one."""
    evaluation_actors: int = 0
    """0: episodes run in the process that asks for them."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    elastic: bool = False
    """Their number follows what the cluster has; `evaluation_actors` is what there was room for at first."""
    reserved: bool = False
    """The actors' places were reserved together with this process's (Ray's placement group)."""


@contextmanager
def connect(resources: ResourcesConfig) -> Iterator[Allocation]:
    """Ray for the duration of a block, and what this run takes of it.

    Joins the Ray that this process already has, else the cluster named by RAY_ADDRESS (a Ray job has it
    set), else starts one on this machine and ends it afterwards. `UserError` where there is no cluster at the
    address, or it cannot hold `resources`, or it dies.
    """
    auto = resources.evaluation_actors == "auto"
    if ray.is_initialized():
        yield replace(resolve(resources, offer()), elastic=auto)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    private = address in ("", "local")
    try:
        if private:
            _start_local()
        else:
            _join(address)
        with while_ray_lives(PRIVATE if private else SHARED):
            yield replace(resolve(resources, offer()), elastic=auto and not private)
    finally:
        ray.shutdown()


def offer() -> Offer:
    """What the connected cluster has."""
    total = ray.cluster_resources()
    hosts = sum(bool(node["Alive"]) for node in ray.nodes())
    return Offer(cpus=int(total.get("CPU", 0)), gpus=int(total.get("GPU", 0)), hosts=hosts)


def room_for_actors(allocation: Allocation) -> int:
    """Evaluation actors that the connected cluster can hold now, whatever runs there; at least one."""
    total = ray.cluster_resources()
    shares = {"CPU": allocation.cpus_per_actor, "GPU": allocation.gpus_per_actor}
    # Three thirds of a GPU are one.
    return max(1, min(int(total.get(kind, 0) / share + 1e-6) for kind, share in shares.items() if share))


def resolve(resources: ResourcesConfig, offered: Offer) -> Allocation:
    """Decide what is `auto`; `UserError` for training workers that could never start."""
    workers, gpus_per_worker = _training(resources, offered)
    default_actors = ACTORS_PER_GPU * offered.gpus or max(1, offered.cpus)
    actors = default_actors if resources.evaluation_actors == "auto" else resources.evaluation_actors
    return Allocation(
        workers=workers,
        cpus_per_worker=max(1, offered.cpus // workers),
        gpus_per_worker=gpus_per_worker,
        in_process=not offered.gpus,  # with GPUs, Ray knows where one is free
        evaluation_actors=actors,
        cpus_per_actor=min(1.0, max(1, offered.cpus) / actors) if offered.gpus else 1.0,
        gpus_per_actor=1 / math.ceil(actors / offered.gpus) if offered.gpus else 0.0,
    )


def _training(resources: ResourcesConfig, offered: Offer) -> tuple[int, float]:
    """Training workers, and the GPUs of each."""
    share = resources.gpus_per_worker
    gpus = (1.0 if offered.gpus else 0.0) if share == "auto" else float(share)
    if resources.workers != "auto":
        workers = resources.workers
    elif gpus:
        workers = max(1, int(offered.gpus / gpus))
    else:
        workers = max(1, min(2, offered.cpus))
    require(
        workers * gpus <= offered.gpus,
        "resources.workers",
        f"{workers} workers with {gpus:g} GPUs each need {workers * gpus:g}, but Ray has {offered.gpus}; "
        "lower it or resources.gpus_per_worker",
    )
    require(
        workers <= max(1, offered.cpus),
        "resources.workers",
        f"{workers} workers need a CPU each, but Ray has {offered.cpus}; lower it",
    )
    return workers, gpus


def worker_environment() -> dict[str, str]:
    """Environment variables for Ray's processes: those of `WORKER_VARIABLES` that are set, and PYTHONPATH.

    With the working folder on PYTHONPATH, environments named `module:EnvId` import in actors as they do here.
    """
    variables = {name: os.environ[name] for name in WORKER_VARIABLES if name in os.environ}
    folders = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    return variables


def object_store_bytes(free_shared_memory: int) -> int:
    """Size of a local Ray's object store: modest, and less where /dev/shm is small (64 MB in a container)."""
    return max(_SMALLEST_OBJECT_STORE, min(_OBJECT_STORE_BYTES, int(0.8 * free_shared_memory)))


def _start_local() -> None:
    # Ray asks for a token unless RAY_AUTH_MODE says otherwise, and would keep it in ~/.ray for all of this
    # user's clusters: a private instance has its own, in memory.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else _OBJECT_STORE_BYTES
    try:
        with on_loopback(), patiently():
            ray.init(
                "local", object_store_memory=object_store_bytes(shared), **_options(worker_environment())
            )
        _silence()
    except Exception as error:  # Ray raises a bare Exception when the machine is too busy
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"Ray cannot be started on this machine: {cause}; run the command again") from error


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started in this block listens on 127.0.0.1 alone; else, on every address of the machine.

    Ray does so by itself where it cannot form clusters, as on macOS, and only asks for this once.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address}: Ray's client protocol cannot stream results; "
            "have the cluster run it, with `tt-ray submit FILE`"
        )
    variables = worker_environment()
    job = os.environ.get(_JOB_VARIABLE)
    if job is not None:
        # The job's settings and working folder reach every process already; Ray refuses to hear them twice.
        given = (json.loads(job).get("runtime_env") or {}).get("env_vars") or {}
        variables = {
            key: value for key, value in variables.items() if key not in given and key != "PYTHONPATH"
        }
    try:
        _knock(address)
        ray.init(address, **_options(variables))
        _silence()
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot join the Ray cluster at RAY_ADDRESS={address}: {cause}; "
            "check that it runs, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _silence() -> None:
    # Whatever log_to_driver says, Ray would report a dead process in many lines, in the midst of a table.
    ray._private.worker._worker_logs_enabled = False


def _knock(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host:  # not "auto"
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _options(variables: dict[str, str]) -> dict[str, Any]:
    return {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": variables},
    }
