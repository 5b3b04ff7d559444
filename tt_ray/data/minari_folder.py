"""Minari's local folder: where data sets lie, and how a finished one gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.namespace import NAMESPACE_METADATA_FILENAME

from tt_ray.errors import UserError

OWN_METADATA = "tt_ray"
"""Key of a Minari set's metadata under which the environment and further metadata are kept."""


def datasets_root() -> Path:
    """Minari's local folder: MINARI_DATASETS_PATH, or else ~/.minari/datasets. It need not exist."""
    configured = os.environ.get("MINARI_DATASETS_PATH")
    return Path(configured) if configured else Path.home() / ".minari" / "datasets"


def dataset_folder(dataset_id: str) -> Path:
    """The folder of a data set, which need not exist. `UserError` where `dataset_id` is malformed."""
    if not DATASET_ID_RE.fullmatch(dataset_id):
        raise UserError(
            f"malformed data set id {dataset_id!r}: write it like mujoco/hopper/medium-v0 (namespace/name-vN)"
        )
    return datasets_root() / dataset_id


def check_new_id(dataset_id: str, overwrite: bool = False) -> Path:
    """The folder that a new data set will have. `UserError` where its id is malformed or already taken."""
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if not match or match["namespace"] is None or match["version"] is None:
        raise UserError(
            f"data set id {dataset_id!r} must have the form namespace/name-vN, like mujoco/hopper/mine-v0"
        )
    folder = datasets_root() / dataset_id
    if folder.exists() and not overwrite:
        raise UserError(f"data set {dataset_id} exists already ({folder}): delete it or choose another id")
    return folder


def local_ids() -> list[str]:
    """Ids of everything in the local folder that looks like a data set, sorted."""
    root = datasets_root()
    found = []
    for folder, subfolders, _ in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "data" in subfolders:
            found.append(Path(folder).relative_to(root).as_posix())
            subfolders.clear()
    return sorted(found)


@contextmanager
def staging_folder(dataset_id: str) -> Iterator[Path]:
    """A hidden folder beside the data sets, on their file system; gone afterwards, whatever happens."""
    root = datasets_root()
    with writing(dataset_id):
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".tt-ray-", dir=root))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def install(staging: Path, dataset_id: str, overwrite: bool = False) -> Path:
    """Rename the finished data set `staging`/`dataset_id` to its place in Minari's folder; returns that."""
    folder = check_new_id(dataset_id, overwrite)
    with writing(dataset_id):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for parent in folder.relative_to(datasets_root()).parents[:-1]:
            _mark_namespace(datasets_root() / parent)
        replaced = staging / "replaced"
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(staging / dataset_id, folder)
        except OSError:
            if replaced.exists():
                os.rename(replaced, folder)
            raise
    return folder


def _mark_namespace(folder: Path) -> None:
    """Give a folder of data sets the file by which Minari knows it as a namespace."""
    marker = folder / NAMESPACE_METADATA_FILENAME
    if not marker.exists():
        marker.write_text("{}")


@contextmanager
def writing(dataset_id: str) -> Iterator[None]:
    """Turn failures of the file system into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        message = f"data set {dataset_id} cannot be written under {datasets_root()}: {reason}"
        raise UserError(message) from error
