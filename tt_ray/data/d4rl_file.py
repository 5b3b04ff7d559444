"""D4RL's flat HDF5 layout: what opens such a file, and so runs in a process apart (`limited.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from tt_ray.data.limited import Arrays, allow_files
from tt_ray.data.log_layout import Layout
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED

SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""How an HDF5 file begins."""
VECTORS = ("observations", "actions", "next_observations")
"""Arrays [T, N], [T, M] and, if the file has it, [T, N]."""
FLAGS = ("terminals", "timeouts")
_REQUIRED = ("observations", "actions", "rewards", *FLAGS)


def read_arrays(path: Path, recorded_dim: int | None = None, observation_dim: int | None = None) -> Arrays:
    """The file's arrays as `log_tables.read_table` gives a table's.

    Of observations with `recorded_dim` dimensions the first `observation_dim` are kept. `notes` also has the
    plain values of the file's `metadata`. `UserError` for a file in which the arrays are not.
    """
    try:
        allow_files(1)
        with h5py.File(path, "r") as file:
            _check_arrays(file, path)
            crop = observation_dim if file["observations"].shape[1] == recorded_dim else None
            columns = _read_columns(file, crop)
            return {**columns, "notes": np.array(json.dumps(_notes(file, columns)))}
    except (*MALFORMED, RuntimeError) as error:
        raise UserError(f"{path} is not a readable HDF5 file: {' '.join(str(error).split())}") from error


def _check_arrays(file: h5py.File, path: Path) -> None:
    """The arrays that D4RL's layout needs are there, with the right number of axes and equal lengths."""
    missing = [key for key in _REQUIRED if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: D4RL's flat layout has {', '.join(_REQUIRED)} (it holds: "
            f"{', '.join(file) or 'nothing'})"
        )
    for key in (*_REQUIRED, "next_observations"):
        if key not in file:
            continue
        shape = file[key].shape
        if file[key].is_virtual or file[key].external:
            raise UserError(f"{path}: {key} lies in other files; copy the data into one file")
        if (len(shape) != 2) if key in VECTORS else (len(shape) == 0 or np.prod(shape[1:]) != 1):
            raise UserError(
                f"{path}: {key} has shape {list(shape)}, not {'[T, D]' if key in VECTORS else '[T]'}"
            )
        if file[key].dtype.kind not in "biuf":
            raise UserError(f"{path}: {key} holds {file[key].dtype}, not numbers")
        if len(file[key]) != len(file["observations"]):
            raise UserError(
                f"{path}: {key} has {len(file[key])} rows, but observations {len(file['observations'])}"
            )
    if len(file["observations"]) == 0:
        raise UserError(f"{path} holds no rows")
    if "next_observations" in file and file["next_observations"].shape != file["observations"].shape:
        raise UserError(f"{path}: observations and next_observations differ in their dimensions")


def _read_columns(file: h5py.File, crop: int | None) -> Arrays:
    columns: dict[str, NDArray[Any]] = {}
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key not in file:
            continue
        array = file[key]
        values = array[:, :crop] if "observations" in key else array[()]
        with np.errstate(over="ignore"):  # too large for float32: infinite, which the report tells
            columns[key] = values.astype(np.float32, copy=False).reshape(len(values), -1)
    columns["rewards"] = columns["rewards"][:, 0]
    for key in FLAGS:
        columns[key] = file[key][()].reshape(-1).astype(bool)
    return columns


def _notes(file: h5py.File, columns: Arrays) -> dict[str, Any]:
    """What the arrays are, what else is there, and the single values of its `metadata`."""
    there = [key for key in VECTORS if key in columns]
    layout = Layout(
        observations=("observations",),
        actions=("actions",),
        next_observations=("next_observations",) if "next_observations" in there else (),
        reward="rewards",
        terminated="terminals",
        truncated="timeouts",
        unused=tuple(key for key in file if key not in (*there, "rewards", *FLAGS, "metadata")),
    )
    dimensions = {key: [f"{key}[{i}]" for i in range(columns[key].shape[1])] for key in there}
    found = file.get("metadata")
    values = {key: _plain(found[key]) for key in found} if isinstance(found, h5py.Group) else {}
    metadata = {key: value for key, value in values.items() if value is not None}
    return {
        "layout": layout.to_json(),
        "dimensions": {key: dimensions.get(key, []) for key in VECTORS},
        "metadata": metadata,
    }


def _plain(item: Any) -> Any:
    """A short text or a number; None for anything else."""
    if not isinstance(item, h5py.Dataset) or item.shape != () or item.is_virtual or item.external:
        return None
    value = item[()]
    if isinstance(value, bytes):
        return value[:200].decode(errors="replace")
    return value.item() if isinstance(value, np.number | np.bool_) and np.isfinite(value) else None
