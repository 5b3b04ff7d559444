"""Jobs on a cluster: submitted, followed and stopped through its head's dashboard."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tt_ray.distributed.launch.bundle import job_path, make_bundle
from tt_ray.distributed.launch.cluster_file import ClusterFile
from tt_ray.distributed.launch.lifecycle import as_client
from tt_ray.distributed.launch.report import DASHBOARD
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
TAKING = 180.0  # seconds in which a busy head may take a job
SETTLING = 15.0  # seconds from the end of a job's output to its status


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that the cluster has taken."""

    id: str
    bytes: int
    """Size of the working folder that it got."""
    command: str


@contextmanager
def job_server(cluster: ClusterFile | None) -> Iterator[JobSubmissionClient]:
    """The cluster's job server for a block: through a tunnel, or (without a file) this host's own.

    `UserError` where none answers; also for what Ray's client raises within the block.
    """
    if cluster is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token" if _host_token().exists() else "disabled")
        yield _client(DASHBOARD)
        return
    with as_client(), cluster.head_host().tunnel(DASHBOARD) as port:
        yield _client(f"127.0.0.1:{port}")


def submit(
    client: JobSubmissionClient, verb: str, file: Path, arguments: Sequence[str], say: Callable[[str], None]
) -> Submitted:
    """Have the cluster run `tt-ray VERB FILE ARGUMENTS`, in a copy of the working folder.

    What it computes goes to the shared storage, unless an argument says where.
    """
    folder = Path.cwd()
    command = shlex.join(["tt-ray", verb, str(job_path(folder, file)), *arguments])
    if not any(argument.startswith("resources.storage=") for argument in arguments):
        command += ' resources.storage="${TT_RAY_STORAGE:?is not set, so this is no cluster of tt-ray}/runs"'
    with tempfile.TemporaryDirectory(prefix="tt-ray-job-") as place:
        size = make_bundle(folder, file, Path(place))
        say(f"sending {size / 1e6:.1f} MB of {folder}")
        logging.getLogger("ray").setLevel(logging.WARNING)
        job = _send(client, command, place)
    return Submitted(id=job, bytes=size, command=command)


def _send(client: JobSubmissionClient, command: str, folder: str) -> str:
    """The id of the job, once the cluster has taken it; a head that is too busy to say so is asked again."""
    job, deadline = f"job-{secrets.token_hex(6)}", time.monotonic() + TAKING
    while True:
        try:
            with _refusals():
                environment = {"working_dir": folder}
                return str(client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment))
        except UserError as error:
            if "already exists" in str(error):  # it had been taken
                return job
            if "status code 50" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2)


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Hand on what a job says until it ends; its exit code, 1 where Ray or a user has ended it.

    `UserError` where there is no such job, or the cluster is gone.
    """
    with _refusals():
        client.get_job_status(job)

        async def tail() -> None:
            async for text in client.tail_job_logs(job):
                write(text)

        asyncio.run(tail())
        deadline = time.monotonic() + SETTLING
        while (info := client.get_job_info(job)).status.value not in ENDED and time.monotonic() < deadline:
            time.sleep(0.3)
    if info.status.value == "SUCCEEDED":
        return 0
    if not info.driver_exit_code or info.driver_exit_code < 0:
        write(f"job {job}: {info.status.value}: {info.message or 'no reason given'}\n")
        return 1
    return int(info.driver_exit_code)


def stop(client: JobSubmissionClient, job: str) -> str:
    """Ask a job to end; its status."""
    with _refusals():
        client.stop_job(job)
        deadline = time.monotonic() + SETTLING
        while (status := client.get_job_status(job).value) not in ENDED and time.monotonic() < deadline:
            time.sleep(0.3)
    return str(status)


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        raise UserError(
            f"no job server answers at {address}: name the cluster's file with --cluster, or run this "
            "on its head"
        ) from None
    with _refusals():
        return JobSubmissionClient(f"http://{address}")


@contextmanager
def _refusals() -> Iterator[None]:
    """What Ray's client and its network raise, as one line."""
    import aiohttp
    import requests

    try:
        yield
    except (
        RuntimeError,
        ConnectionError,
        ValueError,
        aiohttp.ClientError,
        requests.RequestException,
    ) as error:
        lines: Any = [line for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error)
        )
        raise UserError(f"the cluster's job server: {str(reason).strip()[:300]}") from error


def _host_token() -> Path:
    return Path.home() / ".ray" / "auth_token"
