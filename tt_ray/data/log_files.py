"""The files of somebody's log: which are meant, and what the processes apart that open them say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tt_ray.data.limited import Arrays, read_apart
from tt_ray.data.log_layout import OPTIONS, VECTORS, Columns, Layout
from tt_ray.data.log_rows import Part
from tt_ray.errors import UserError

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is in all: files that are read, episodes that are written."""
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".npz")
"""Files that hold a table; a folder of .npy files is one too."""
_HDF5_READER = "tt_ray.data.d4rl_file:read_arrays"
_TABLE_READER = "tt_ray.data.log_tables:read_table"
_VALUES = {
    **dict.fromkeys(("observations", "actions", "next_observations"), (2, np.float32)),
    "rewards": (1, np.float32),
    **dict.fromkeys(("terminals", "timeouts"), (1, np.bool_)),
    "times": (1, np.float64),
    "episodes": (1, np.int64),
}


def is_hdf5(path: Path) -> bool:
    """Whether a file is read as HDF5: by its name, since a reader that opens it may crash."""
    return path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES


def find_files(files: Sequence[Path]) -> list[Path]:
    """The files that are meant, all of one format: a folder stands for the tables in it, by their names.

    A folder with .npy files is one table. `UserError`: not there, of several formats, given twice.
    """
    found: list[Path] = []
    for path in files:
        if not path.exists():
            raise UserError(f"no file {path}")
        if path.is_dir() and not any(path.glob("*.npy")):
            inside = [file for file in path.iterdir() if file.suffix.lower() in TABLE_SUFFIXES]
            if not inside:
                raise UserError(f"{path} holds none of *{', *'.join(TABLE_SUFFIXES)} and no *.npy")
            found += sorted(inside, key=_by_number)
        else:
            found.append(path)
    if not found:
        raise UserError("no files are given")
    kinds = {_kind(path) for path in found}
    if len(kinds) > 1:
        raise UserError(f"files of one data set have one format, not {' and '.join(sorted(kinds))}")
    resolved = [path.resolve() for path in found]
    for index, path in enumerate(found):
        if resolved[index] in resolved[:index]:
            raise UserError(f"{path} is given twice")
    return found


def read_files(
    paths: Sequence[Path], columns: Columns, crop: Mapping[str, int], progress: Progress
) -> list[Part]:
    """The rows of the files; the first one's columns are looked for in all the others.

    `crop` are arguments of the HDF5 reader. `UserError`: not readable, or columns that cannot be told.
    """
    parts: list[Part] = []
    said = [OPTIONS[role] for role, value in asdict(columns).items() if value is not None]
    if said and is_hdf5(paths[0]):
        raise UserError(f"{paths[0]}: {said[0]} is for tables; D4RL's layout says itself what its arrays are")
    progress(0, len(paths))
    for path in paths:
        if is_hdf5(path):
            arrays = read_apart(_HDF5_READER, path, **crop)
        else:
            arrays = read_apart(_TABLE_READER, path, columns=asdict(columns))
        parts.append(_part(path, arrays))
        columns = parts[0].layout.as_columns()
        progress(len(parts), len(paths))
    return parts


def _part(path: Path, arrays: Arrays) -> Part:
    """What a process apart has sent, which is believed no more than the file."""
    try:
        notes = json.loads(str(arrays.pop("notes")))
        layout = Layout.from_json(notes["layout"])
        labels = [str(label) for label in arrays.pop("labels", ())]
        for name, values in arrays.items():
            if (values.ndim, values.dtype) != _VALUES[name] or len(values) != len(arrays["rewards"]):
                raise ValueError(f"{name} is {values.dtype} {values.shape}")
        for role in VECTORS:
            width = arrays[role].shape[1] if role in arrays else 0
            names = notes["dimensions"][role]
            if width != len(names) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{role} has {width} dimensions and {len(names)} names")
        codes = arrays.get("episodes", np.zeros(0, np.int64))
        if len(arrays["rewards"]) == 0 or not ((codes >= 0) & (codes < max(len(labels), 1))).all():
            raise ValueError("its rows name no episodes")
        return Part(path, arrays, layout, notes["dimensions"], labels, dict(notes.get("metadata", {})))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its arrays do not fit together: {' '.join(str(error).split())}") from error


def _kind(path: Path) -> str:
    return "a folder of .npy" if path.is_dir() else path.suffix.lower() if not is_hdf5(path) else ".hdf5"


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sorts part-2 before part-10."""
    return [(int(text or 0), word) for word, text in re.findall(r"(\D*)(\d*)", file.name)]
