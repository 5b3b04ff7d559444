"""Folders that hold a trained model: written whole or not at all, with a checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from tt_ray.errors import UserError

CHECKSUMS = "checksums.json"
"""SHA-256 of each of the folder's other files."""


def write_folder(folder: Path, what: str, write: Callable[[Path], None]) -> None:
    """Write `folder` whole or not at all: `write(temporary)` under another name first, renamed once complete.

    A folder of that name is replaced. `UserError`, which speaks of `what`, where the disk is full or cannot
    be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        if folder.exists():
            remove_folder(folder)
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{folder}: cannot write the {what}: {error}") from error
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: whoever is killed half-way must not leave half of one under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
