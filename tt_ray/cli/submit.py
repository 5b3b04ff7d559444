"""`tt-ray submit` and `tt-ray data push`: what goes from here to a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.arguments import DataSet, Resume, settings
from tt_ray.cli.cluster import Cluster, chosen
from tt_ray.cli.view import console, errors
from tt_ray.errors import UserError
from tt_ray.sweep_file import load_sweep

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def submit(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML), with a search section or without.")],
    overrides: Annotated[list[str] | None, settings("seeds=[0]")] = None,
    cluster: Cluster = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
    resume: Resume = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The same study shrunk to seconds (sweeps).")
    ] = False,
) -> None:
    """Run a sweep, or train, as a job on a cluster, with this folder's code; Ctrl-C leaves it running."""
    from tt_ray.distributed.launch import jobs

    verb = _verb(file, overrides or [])
    if smoke and verb != "sweep":
        raise UserError(f"{file} has no search section, and --smoke is for sweeps")
    flags = [flag for flag, given in (("--resume", resume), ("--smoke", smoke)) if given]
    with jobs.job_server(chosen(cluster)) as client:
        job = jobs.submit(client, verb, file, [*(overrides or []), *flags], _say)
        _say(f"job {job.id}: {verb} of {file}")
        if detach:
            _say(_later(job.id, cluster))
            return
        raise typer.Exit(follow_job(client, job.id, cluster))


def follow_job(client: JobSubmissionClient, job: str, cluster: Path | None) -> int:
    """Show what a job says; its exit code, or 0 after Ctrl-C, which leaves the job alone."""
    from tt_ray.distributed.launch import jobs

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return jobs.follow(client, job, write)
    except KeyboardInterrupt:
        errors.print(f"job {job} goes on", soft_wrap=True)
        _say(_later(job, cluster))
        return 0


def push(
    dataset: DataSet,
    cluster: Cluster = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another data set of that id there.")
    ] = False,
) -> None:
    """Copy a data set of this machine to a cluster's shared storage."""
    from tt_ray.distributed.launch.push import push as send

    named = chosen(cluster)
    if named is None:
        raise UserError("which cluster? Name its file with --cluster, or set TT_RAY_CLUSTER")
    _say(send(named, dataset, force=force, say=_say))


def _verb(file: Path, overrides: list[str]) -> str:
    """`sweep` or `train`, by what the file holds; its mistakes are reported here and not on the cluster."""
    loaded = load_sweep(file, overrides)
    return "sweep" if loaded.search.parameters or loaded.search.cases else "train"


def _later(job: str, cluster: Path | None) -> str:
    where = f" --cluster {cluster}" if cluster else ""
    return f"tt-ray cluster follow {job}{where}   shows it\ntt-ray cluster stop {job}{where}     ends it"


def _say(message: str) -> None:
    console.print(message, soft_wrap=True)
