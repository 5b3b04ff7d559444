"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a model (runs/models/...), a checkpoint in it, or an MLflow run id."
    ),
]
Critic = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a critic, for the objective q or the baseline iql; default: the experiment's."
    ),
]
DataSet = Annotated[
    str, typer.Argument(metavar="ID", help="Id of the data set, such as mujoco/hopper/medium-v0.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted.")]


def settings(example: str) -> Any:
    """The argument KEY=VALUE ..., with an example for its help."""
    return typer.Argument(help=f"Settings to change, such as {example}.", metavar="KEY=VALUE")
