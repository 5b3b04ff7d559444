"""What a running cluster consists of and does: asked of Ray, without joining it.

`python -m tt_ray.distributed.launch.report` prints it as JSON; with `--until N`, first a line for each change
of the number of nodes, until there are N or `--patience` seconds are over.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from tt_ray.errors import UserError

DASHBOARD = "127.0.0.1:8265"
GIVEN_UP = 45.0  # seconds; a node that is looked after is not without a state for so long
_SHOWN = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A host that is in the cluster."""

    address: str
    is_head: bool
    used: dict[str, float]
    """Of CPU, GPU, memory and object_store_memory (bytes), what tasks and actors have taken."""
    total: dict[str, float]
    actors: dict[str, int]
    """Number of living actors by class."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that has been submitted, or a driver that has joined."""

    id: str
    status: str
    entrypoint: str
    seconds: float
    """Since it began, to its end if it has one."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it."""

    address: str
    nodes: list[Node]
    pending: list[str]
    """Nodes that are being started."""
    jobs: list[Job]
    mlflow: str | None
    """Address of the tracking server, as the cluster's hosts know it."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Out of JSON; `UserError` where it is not what this version writes."""
        try:
            data = json.loads(text)
            nodes, jobs = (
                [Node(**node) for node in data.pop("nodes")],
                [Job(**job) for job in data.pop("jobs")],
            )
            return cls(nodes=nodes, jobs=jobs, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            advice = "it has another tt-ray than you; `tt-ray cluster up` brings yours there"
            raise UserError(f"the head's answer is not understood ({error}): {advice}") from error


def read_report(address: str) -> Report:
    """Ask the cluster at `address` (host:port of its head); `UserError` where none answers.

    Actors and jobs are known to its dashboard, on the head's loopback: elsewhere both are empty.
    """
    status = cluster_status(address)
    actors, heads, jobs = _ask_dashboard()
    nodes = [
        Node(
            address=node.ip_address,
            is_head=node.node_id in heads,
            used={
                use.resource_name: use.used
                for use in node.resource_usage.usage
                if use.resource_name in _SHOWN
            },
            total={
                use.resource_name: use.total
                for use in node.resource_usage.usage
                if use.resource_name in _SHOWN
            },
            actors=dict(actors.get(node.node_id, {})),
        )
        for node in (*status.active_nodes, *status.idle_nodes)
    ]
    nodes.sort(key=lambda node: (not node.is_head, node.address))
    return Report(
        address=address,
        nodes=nodes,
        pending=pending(address),
        jobs=jobs,
        mlflow=os.environ.get("MLFLOW_TRACKING_URI"),
    )


def cluster_status(address: str) -> Any:
    """Ray's own view of its nodes."""
    import socket

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        from ray.autoscaler.v2.sdk import get_cluster_status

        return get_cluster_status(address)
    except Exception as error:  # Ray's clients raise errors of many kinds
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"no Ray cluster answers at {address}: {reason}") from None


def pending(address: str) -> list[str]:
    """What the autoscaler is starting: `address: state` of each node, and what it has asked a cloud for."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        key = DEBUG_AUTOSCALING_STATUS.encode()
        text = GcsClient(address=address).internal_kv_get(key, None, timeout=10)
        report = json.loads(text or b"{}").get("autoscaler_report", {})
        nodes = [f"{ip}: {state}" for ip, _, state in report.get("pending_nodes", [])]
        kinds = report.get("pending_launches", {})
        return sorted(nodes) + [f"{count} x {kind}" for kind, count in kinds.items()]
    except Exception as error:  # of Ray's clients, or a report of another form
        raise UserError(f"the autoscaler of {address} does not answer: {error}") from None


def _ask_dashboard() -> tuple[dict[str, Counter[str]], set[str], list[Job]]:
    """Living actors by node and class, the nodes that are heads, and the jobs."""
    from ray.job_submission import JobSubmissionClient
    from ray.util.state import list_actors, list_nodes

    actors: dict[str, Counter[str]] = {}
    try:
        url = f"http://{DASHBOARD}"
        for actor in list_actors(
            url, filters=[("state", "=", "ALIVE")], limit=10_000, raise_on_missing_output=False
        ):
            actors.setdefault(actor.node_id, Counter())[actor.class_name] += 1
        heads = {node.node_id for node in list_nodes(url, raise_on_missing_output=False) if node.is_head_node}
        jobs = [_job(details) for details in JobSubmissionClient(url).list_jobs()]
    except Exception:  # no dashboard here: this is no head
        return {}, set(), []
    return actors, heads, sorted(jobs, key=lambda job: job.seconds)


def _job(details: Any) -> Job:
    began, ended = details.start_time or 0, details.end_time or time.time() * 1000
    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        seconds=max(0.0, ended - began) / 1000 if began else 0.0,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 and one line where no cluster runs here."""
    parser = argparse.ArgumentParser(prog="python -m tt_ray.distributed.launch.report")
    parser.add_argument("--until", type=int, default=0)
    parser.add_argument("--patience", type=float, default=300.0)
    options = parser.parse_args(arguments)
    address = f"{os.environ['TT_RAY_HEAD_ADDRESS']}:6379"
    try:
        if options.until:
            _wait(address, options.until, options.patience)
        print(json.dumps(asdict(read_report(address))))
    except UserError as error:
        sys.exit(f"tt-ray: {error}")


def _wait(address: str, nodes: int, patience: float) -> None:
    """Until there are so many nodes, or the autoscaler has done nothing for the others for a while."""
    deadline, seen, busy = time.monotonic() + patience, 0, time.monotonic()
    while True:
        status = cluster_status(address)
        now = len(status.active_nodes) + len(status.idle_nodes)
        if now != seen:
            print(f"{now} of {nodes} nodes have joined", flush=True)
        if now != seen or any(not line.endswith(": uninitialized") for line in pending(address)):
            busy = time.monotonic()
        seen = now
        if seen >= nodes or time.monotonic() > min(deadline, busy + GIVEN_UP):
            return
        time.sleep(1.0)


if __name__ == "__main__":
    main()
