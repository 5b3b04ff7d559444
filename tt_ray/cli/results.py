"""`tt-ray results`: the runs of an experiment as MLflow has them, once or for as long as a sweep runs."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.follow import followed
from tt_ray.cli.trials import results_view
from tt_ray.cli.view import INTERRUPTED, console, errors
from tt_ray.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def results(
    name: Annotated[str, typer.Argument(help="The experiment's name in MLflow.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the table, all of its columns, here.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the newest sweep has ended.")] = False,
    every: Annotated[float, typer.Option("--interval", help="Seconds between two looks.")] = 5.0,
) -> None:
    """The table of an experiment's runs, read from MLflow; also while they run."""
    from tt_ray.tracking import connect, results_table

    if not 0.1 <= every <= 3600:
        raise UserError(f"--interval {every:g}: expected seconds, from 0.1 to 3600")
    uri = connect(None, must_exist=True)
    frame = results_table(name, uri)
    _write_csv(frame, csv)  # before a long wait: it may be refused
    if follow:
        try:
            frame = followed(frame, lambda: results_table(name, uri), every)
        except KeyboardInterrupt:
            line = f"tt-ray: what runs goes on; `tt-ray results {shlex.quote(name)} --follow` shows it again"
            errors.print(line, soft_wrap=True)
            raise SystemExit(INTERRUPTED) from None
        _write_csv(frame, csv)
    console.print(results_view(frame, name))


def _write_csv(frame: pd.DataFrame, path: Path | None) -> None:
    """Write the table, whole or not at all."""
    if path is None:
        return
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
            frame.to_csv(Path(temporary) / path.name)
            os.replace(Path(temporary) / path.name, path)
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written: {error.strerror}") from error
