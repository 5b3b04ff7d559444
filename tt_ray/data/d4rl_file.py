"""D4RL's flat HDF5 layout: what opens such a file, and so runs in a process apart (`limited.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from tt_ray.data.limited import Arrays, allow_files
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED

SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""How an HDF5 file begins."""
VECTORS = ("observations", "actions", "next_observations")
"""Arrays [T, N], [T, M] and, if the file has it, [T, N]."""
FLAGS = ("terminals", "timeouts")
_REQUIRED = ("observations", "actions", "rewards", *FLAGS)


def read_arrays(
    path: Path, environment: str, recorded_dims: Sequence[int], observation_dim: int, action_dim: int
) -> Arrays:
    """The file's arrays for an environment: `rewards` float32 [T], `FLAGS` bool [T], `VECTORS` float32.

    Of observations, which have one of `recorded_dims`, the first `observation_dim` are kept. `UserError` for
    a file in which they are not, and for values that are not finite.
    """
    try:
        allow_files(1)
        with h5py.File(path, "r") as file:
            _check_arrays(file, path)
            _check_width(path, "observations", file["observations"].shape[1], recorded_dims, environment)
            _check_width(path, "actions", file["actions"].shape[1], [action_dim], environment)
            return _read_columns(file, path, observation_dim)
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


def _check_width(path: Path, key: str, width: int, allowed: Sequence[int], environment: str) -> None:
    if width not in allowed:
        has = " or ".join(str(dims) for dims in dict.fromkeys(allowed))
        raise UserError(f"{path}: {key} have {width} dimensions, but {environment} has {has}")


def _read_columns(file: h5py.File, path: Path, observation_dim: int) -> Arrays:
    columns: dict[str, NDArray[Any]] = {}
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key not in file:
            continue
        array = file[key]
        values = array[:, :observation_dim] if "observations" in key else array[()]
        columns[key] = values.astype(np.float32, copy=False).reshape(len(values), -1)
        finite = np.isfinite(columns[key])
        if not finite.all():
            row, column = (int(index[0]) for index in np.nonzero(~finite))
            kind = "NaN" if np.isnan(columns[key][row, column]) else "infinite"
            raise UserError(f"{path}: {key} row {row}, column {column} is {kind}; repair the file")
    columns["rewards"] = columns["rewards"][:, 0]
    for key in FLAGS:
        columns[key] = file[key][()].reshape(-1).astype(bool)
    return columns
