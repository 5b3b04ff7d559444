"""The working folder as a job gets it: code and small files, no data, no results, no environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tt_ray.errors import UserError

LIMIT = 50_000_000  # bytes
_FOLDERS = {"runs", "mlruns", "mlartifacts", "build", "dist", "__pycache__", "node_modules", "analysis-out"}
_ENDINGS = (".db", ".db-wal", ".db-shm", ".hdf5", ".h5", ".pyc", ".safetensors", ".mp4", ".log", ".egg-info")


def make_bundle(folder: Path, extra: Path, into: Path, limit: int = LIMIT) -> int:
    """Copy what a job needs of `folder`, and the file `extra`, to `into`; the size in bytes.

    Left out: hidden files, virtual environments, Minari data sets, results, databases. `UserError` above
    `limit`, with the largest parts, before anything is copied.
    """
    files = {path.relative_to(folder): path for path in _files(folder)}
    files[job_path(folder, extra)] = extra.resolve()
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > limit:
        parts: dict[str, int] = {}
        for name, size in sizes.items():
            parts[name.parts[0]] = parts.get(name.parts[0], 0) + size
        largest = sorted(parts, key=lambda part: -parts[part])[:3]
        named = ", ".join(f"{part} {parts[part] / 1e6:.0f} MB" for part in largest)
        raise UserError(
            f"{folder} has {total / 1e6:.0f} MB for the job, and {limit / 1e6:.0f} MB is the limit "
            f"({named}): run this in a folder that holds code only, and push data with `tt-ray data push ID`"
        )
    for name, path in files.items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return total


def job_path(folder: Path, file: Path) -> Path:
    """Where the job finds `file`: at its place in `folder`, or else at the top."""
    file, folder = file.resolve(), folder.resolve()
    return file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not _left_out(here / name))
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and not name.endswith(_ENDINGS) and path.is_file():
                yield path


def _left_out(folder: Path) -> bool:
    """Whether a folder is none of the job's: by its name, or (environments, data sets) its contents."""
    name = folder.name
    if name.startswith(".") or name in _FOLDERS or name.endswith(_ENDINGS):
        return True
    return (folder / "pyvenv.cfg").exists() or (folder / "data" / "main_data.hdf5").exists()
