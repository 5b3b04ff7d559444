"""`tt-ray cluster`: start one, look at it, end it, and mind the jobs on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.view import confirmed, console, duration, plain_table, waiting
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from tt_ray.distributed.launch.cluster_file import ClusterFile
    from tt_ray.distributed.launch.report import Node, Report

VARIABLE = "TT_RAY_CLUSTER"
USUAL = "cluster.yaml"

cluster_app = typer.Typer(
    help="Start, look at and end clusters; docs/clusters.md tells how.", no_args_is_help=True
)
File = Annotated[
    Path | None,
    typer.Argument(help=f"Cluster file; default: {VARIABLE}, or else {USUAL}.", show_default=False),
]
Job = Annotated[
    str, typer.Argument(metavar="JOB", help="The job, as tt-ray submit and cluster status name it.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Cluster = Annotated[
    Path | None,
    typer.Option("--cluster", help=f"Cluster file; default: {VARIABLE}, or else the cluster of this host."),
]


@cluster_app.command()
def up(file: File = None, yes: Yes = False) -> None:
    """Start a cluster, or bring a running one to what its file says (which starts Ray on it anew)."""
    from tt_ray.distributed.launch.lifecycle import up as start

    cluster = _named(file)
    report = start(cluster, yes=yes, say=_say)
    _show(report, cluster)
    _say(f"submit work with `tt-ray submit FILE --cluster {cluster.path}`")


@cluster_app.command()
def down(
    file: File = None,
    yes: Yes = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where MLflow's database cannot be dumped.")
    ] = False,
) -> None:
    """End a cluster; results stay on its shared storage, MLflow's database among them."""
    from tt_ray.distributed.launch.lifecycle import down as end

    cluster = _named(file)
    if not yes and not confirmed(f"End cluster {cluster.name!r} and all that runs on it?"):
        _say("nothing was ended")
        return
    end(cluster, yes=True, force=force, say=_say)
    _say(f"cluster {cluster.name!r} has ended; {cluster.storage} keeps what it computed")


@cluster_app.command()
def status(file: File = None) -> None:
    """Nodes, what is taken of them, what runs where, and how to open MLflow."""
    from tt_ray.distributed.launch.report import Report

    cluster = chosen(file)
    if cluster is None:
        _show(_own_report(), None)
        return
    with waiting(f"asking {cluster.name}"):
        report = Report.parse(cluster.head_host().module("report"))
    _show(report, cluster)


@cluster_app.command()
def follow(job: Job, cluster: Cluster = None) -> None:
    """Show what a job says until it ends; its exit status becomes this command's."""
    from tt_ray.cli.submit import follow_job
    from tt_ray.distributed.launch.jobs import job_server

    with job_server(chosen(cluster)) as client:
        raise typer.Exit(follow_job(client, job, cluster))


@cluster_app.command()
def stop(job: Job, cluster: Cluster = None) -> None:
    """End a job; what it has finished stays, and submitting it with --resume goes on."""
    from tt_ray.distributed.launch.jobs import job_server
    from tt_ray.distributed.launch.jobs import stop as end

    with job_server(chosen(cluster)) as client:
        _say(f"job {job}: {end(client, job)}")


@cluster_app.command()
def firewall(file: File = None) -> None:
    """Print rules for hosts of one's own that close Ray's and MLflow's ports to others (nftables)."""
    from tt_ray.distributed.launch.firewall import rules

    cluster = _named(file)
    if cluster.head is None:
        raise UserError(f"{cluster.path}: a cloud's security group does this")
    console.out(rules([cluster.head, *cluster.workers]), end="")


def chosen(file: Path | None) -> ClusterFile | None:
    """The cluster whose file is named, here or by TT_RAY_CLUSTER; None: the one that this host is in."""
    from tt_ray.distributed.launch.cluster_file import load_cluster

    name = file or os.environ.get(VARIABLE)
    return load_cluster(Path(name)) if name else None


def _named(file: Path | None) -> ClusterFile:
    from tt_ray.distributed.launch.cluster_file import load_cluster

    return load_cluster(file or Path(os.environ.get(VARIABLE, USUAL)))


def _own_report() -> Report:
    """Of the cluster at RAY_ADDRESS, or the one that this host is set up for."""
    from tt_ray.distributed.launch.report import read_report

    address = os.environ.get("RAY_ADDRESS") or os.environ.get("TT_RAY_HEAD_ADDRESS")
    if not address or address in ("local", "auto"):
        raise UserError("this host is in no cluster: name a cluster's file, or set RAY_ADDRESS to host:6379")
    return read_report(address if ":" in address else f"{address}:6379")


def _show(report: Report, cluster: ClusterFile | None) -> None:
    title = f"Cluster {cluster.name} at {report.address}" if cluster else f"Cluster at {report.address}"
    columns = ["node", "role", "CPU", "GPU", "memory", "object store", "runs"]
    console.print(plain_table(columns, [_node_row(node) for node in report.nodes], title))
    for line in report.pending:
        _say(f"pending: {line}")
    if report.jobs:
        rows = [
            [job.id, job.status.lower(), duration(job.seconds), job.entrypoint] for job in report.jobs[:12]
        ]
        console.print(plain_table(["job", "status", "time", "command"], rows, "Jobs"))
    if report.mlflow:
        console.print()
        _say(f"MLflow, on the cluster:  {report.mlflow}")
        if cluster is not None:
            _say(f"MLflow, from here:       {tunnel_command(cluster, report.mlflow)}")
            _say("    and then             http://127.0.0.1:5000, in a browser or as MLFLOW_TRACKING_URI")


def _node_row(node: Node) -> list[object]:
    def share(name: str, unit: float = 1.0) -> str:
        total = node.total.get(name, 0.0) / unit
        return f"{node.used.get(name, 0.0) / unit:.3g}/{total:.3g}" if total else "-"

    actors = ", ".join(
        f"{count} x {name}" if count > 1 else name for name, count in sorted(node.actors.items())
    )
    memory = [f"{share(name, 1e9)} GB" for name in ("memory", "object_store_memory")]
    return [node.address, "head" if node.is_head else "", share("CPU"), share("GPU"), *memory, actors]


def tunnel_command(cluster: ClusterFile, mlflow: str) -> str:
    """What a user types to have MLflow on the own machine's port 5000."""
    host = cluster.head_host()
    proxy = f" -o ProxyCommand='{host.proxy}'" if host.proxy else ""
    return f"ssh -N -i {host.key}{proxy} -L 127.0.0.1:5000:{mlflow.partition('://')[2]} {host.login}"


def _say(message: str) -> None:
    console.print(message, soft_wrap=True)
