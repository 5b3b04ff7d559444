"""`--figures DIR`: the pictures and videos of a command once more, in a folder of the user's choice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from tt_ray.cli.view import made_folder, show_line
from tt_ray.files import whole_file

Figures = Annotated[
    Path | None,
    typer.Option("--figures", metavar="DIR", help="Also write the pictures (and videos) to this folder."),
]
KINDS = (".png", ".svg", ".mp4")


def figures_folder(folder: Path | None) -> None:
    """Make the folder of `--figures`; `UserError` where that cannot be, before anything is computed."""
    if folder is not None:
        made_folder(folder, "--figures")


def copy_figures(source: Path, folder: Path | None) -> None:
    """Copy a command's pictures, those in `source` and in its `figures`, and say where they are."""
    if folder is None:
        return
    found = [path for place in (source, source / "figures") for path in sorted(place.glob("[!.]*"))]
    pictures = [path for path in found if path.suffix in KINDS]
    for path in pictures:
        with whole_file(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    say_figures(folder, [path.name for path in pictures])


def say_figures(folder: Path, names: list[str]) -> None:
    """Say what has been written to the folder of `--figures`."""
    show_line("figures", f"{folder}: {', '.join(names) or 'nothing to draw'}")
