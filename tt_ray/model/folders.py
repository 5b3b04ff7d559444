"""Folders that hold a trained model: written whole or not at all, with a checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED, convert, read_json

CHECKSUMS = "checksums.json"
"""SHA-256 of each of the folder's other files."""
DAMAGED = (*MALFORMED, RuntimeError, SafetensorError, UserError)
"""What reading a folder raises whose files are not what they should be."""

Network = TypeVar("Network", bound=nn.Module)


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


def read_network(folder: Path, make: Callable[[], Network], depth: int) -> Network:
    """The network that `make` makes, of `depth` layers, with the weights in a folder.

    The sizes are compared first: those that a damaged file asks for may fill the memory, or take for ever.
    One of `DAMAGED` where they differ, or the file cannot be read.
    """
    weights = load_file(folder / "model.safetensors")
    if depth > len(weights):
        raise ValueError(f"there are no weights for {depth} layers")
    with torch.device("meta"):
        outline = make().state_dict()
    differing = [name for name in {**outline, **weights} if _shape(outline, name) != _shape(weights, name)]
    if differing:
        raise ValueError(f"the weights are not of the size that config.json says: {min(differing)}")
    network = make()
    network.load_state_dict(weights)
    return network


def _shape(tensors: dict[str, Any], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def read_metrics(folder: Path) -> dict[str, float]:
    """A folder's metrics; one of `MALFORMED` where they are none."""
    return convert(dict[str, float], read_json(folder / "metrics.json"))
