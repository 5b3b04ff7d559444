"""`tt-ray data import`: files of one's own, examined first and then written as a Minari data set."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.data_view import show_found, show_made
from tt_ray.cli.view import Bars, console

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tt_ray.distributed.line import Update

_TABLES = "Columns of a table"


def _column(means: str) -> typer.models.OptionInfo:
    return typer.Option(metavar="NAME", help=means, rich_help_panel=_TABLES)


def import_command(
    files: Annotated[
        list[Path],
        typer.Argument(help="HDF5 in D4RL's layout, CSV, Parquet, .npz; folders of these or .npy."),
    ],
    dataset: Annotated[str, typer.Option("--id", help="Id of the new data set, such as me/task-v0.")],
    environment: Annotated[
        str | None, typer.Option("--env", "--environment", help="Environment id or module:EnvId.")
    ] = None,
    reference_scores: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Returns that score 0 and 100; default: D4RL's, where known."),
    ] = None,
    observations: Annotated[str | None, _column("Names and patterns: 'obs_*' or x,y,vx.")] = None,
    actions: Annotated[str | None, _column("Names and patterns: 'act_*' or left,right.")] = None,
    next_observations: Annotated[str | None, _column("As observations, after the action.")] = None,
    reward: Annotated[str | None, _column("Reward of the action; none: all are 0.")] = None,
    episode: Annotated[str | None, _column("What names a row's episode.")] = None,
    terminated: Annotated[str | None, _column("Whether the task ended after the row.")] = None,
    truncated: Annotated[str | None, _column("Whether a time limit ended the episode.")] = None,
    done: Annotated[
        str | None, _column("Whether either did; termination where nothing else says so.")
    ] = None,
    time: Annotated[str | None, _column("Number or date by which rows are ordered and gaps found.")] = None,
    joined: Annotated[
        bool, typer.Option("--joined", help="Files are parts of one log: episodes may go on in the next.")
    ] = False,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Leave out episodes with errors in their rows.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what is in the files.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of that id.")] = False,
) -> None:
    """Turn HDF5 files in D4RL's layout, or tables of one's own, into a Minari data set; report first.

    A role whose column is not named is looked for by its usual names; `none` says that there is none.
    """
    from tt_ray.data.importing import ImportOptions, find, write
    from tt_ray.data.log_files import find_files
    from tt_ray.data.log_layout import Columns
    from tt_ray.data.minari_folder import check_new_id
    from tt_ray.evaluation.environments import make_environment

    check_new_id(dataset, overwrite or dry_run)
    options = ImportOptions(
        environment=environment,
        reference_scores=reference_scores,
        columns=Columns(
            observations=observations,
            actions=actions,
            next_observations=next_observations,
            reward=reward,
            episode=episode,
            terminated=terminated,
            truncated=truncated,
            done=done,
            time=time,
        ),
        joined=joined,
        drop_incomplete=drop_incomplete,
    )
    paths = find_files(files)
    with _bar("reading", len(paths)) as update:
        found = find(
            paths,
            dataset,
            options,
            make=lambda name: make_environment({"id": name}),
            progress=lambda done, _: update(done, "" if done == len(paths) else paths[done].name),
        )
    show_found(found)
    if dry_run:
        found.refuse_errors()
        console.print("nothing was written (--dry-run)")
        return
    with _bar(f"writing {dataset}", found.report.episodes) as update:
        write(found, dataset, overwrite=overwrite, progress=lambda done, _: update(done, ""))
    show_made(dataset)


def _bar(title: str, total: int) -> AbstractContextManager[Update]:
    """A bar on a terminal; elsewhere the report is enough."""
    return Bars().stage(title, total) if console.is_terminal else nullcontext(lambda done, message: None)
