"""Pickles and `.pt` files of other projects as plain data: nothing that they name is imported or called.

An object of theirs becomes a `Record` of what was stored with it. `read_run` is a reader for
`tt_ray.data.limited`: it runs in a process apart, whose memory and time are bounded, and hands back arrays.
No other module of the package may open a pickle (`tests/test_no_execution.py`).
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.errors import UserError

SETTINGS_BYTES = 1 << 20
"""Largest file of settings; the published ones have less than a kilobyte."""
SETTINGS_VALUES = 10_000
SETTINGS_DEPTH = 20
_FLOATS = {"f4": "<f4", "f8": "<f8"}


class Record:
    """An object of a class that is not known here: its constructor's arguments and its state, inert."""

    name = ""
    """Module and name of the class, as the file has them."""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        """Keeps the arguments, whatever they are."""
        record = object.__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Does nothing with them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Bins(Record):
    """The port's discretizer."""


class _Array(Record):
    """A NumPy array: its state is (version, shape, type, by column, bytes)."""


class _Type(Record):
    """A NumPy type: its first argument is its name, the second item of its state its byte order."""


_STAND_INS: list[Any] = [
    (_Bins, "trajectory.utils.discretization.KBinsDiscretizer"),
    (_Array, "numpy.core.multiarray._reconstruct"),
    (_Array, "numpy._core.multiarray._reconstruct"),
    (_Array, "numpy.ndarray"),
    (_Type, "numpy.dtype"),
]
"""What torch's own restricted reader may make of what the port's discretizer names."""


class _Unpickler(pickle.Unpickler):
    """Every class and function is a `Record`: there is nothing else that it could make or call."""

    def find_class(self, module: str, name: str) -> type[Record]:
        return type("Record", (Record,), {"name": f"{module}.{name}"})


def read_run(folder: Path, weights: str, settings: list[str], bins: str | None) -> dict[str, NDArray[Any]]:
    """The files of a run: `weights`, the pickled `settings`, and the port's `bins`.

    Gives `weights/NAME` for each tensor (float32, or flags), `settings`, the JSON of all settings by file
    name, and `bins/edges` and `bins/centers`, [D, V + 1] and [D, V] float64.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    plain = {name: read_settings(folder / name) for name in settings}
    arrays = {f"weights/{name}": value for name, value in read_weights(folder / weights).items()}
    if bins is not None:
        state = _read_bins(folder / bins)
        plain[bins] = {"strategy": state.get("strategy"), "n_bins": state.get("n_bins")}
        arrays["bins/edges"] = _array(state.get("bin_edges"), folder / bins)
        arrays["bins/centers"] = _array(state.get("bin_centers"), folder / bins)
    return {**arrays, "settings": np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)}


def read_settings(file: Path) -> dict[str, Any]:
    """A pickled `Config` of the released code as plain data: its arguments, and `_class`, a name.

    `UserError` where the file is missing, far too large, or holds anything else.
    """
    if _size(file) > SETTINGS_BYTES:
        raise UserError(f"{file}: {_size(file)} bytes are far more than settings need: not read")
    try:
        state = _Unpickler(io.BytesIO(file.read_bytes())).load().state
        count = iter(range(SETTINGS_VALUES))
        return {"_class": _plain(state["_class"], count), **_plain(state["_dict"], count)}
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file}: not the settings of a run of the released code ({reason})") from None


def _plain(value: Any, count: Any, depth: int = 0) -> Any:
    """`value` as JSON data, a class as its name; `ValueError` for anything else, or for too much."""
    if next(count, None) is None or depth > SETTINGS_DEPTH:
        raise ValueError("it holds too many values")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, count, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, count, depth + 1) for key, item in value.items()}
    if isinstance(value, type) and issubclass(value, Record):
        return value.name
    name = value.name if isinstance(value, Record) else type(value).__name__
    raise ValueError(f"it holds an object: {name}")


def read_weights(file: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a state dict, as float32 or as flags; `UserError` where it holds anything else."""
    loaded = _load(file, [])
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{file}: not a state dict, which is tensors by name")
    return {name: _tensor(value, f"{file}: {name}") for name, value in loaded.items()}


def _tensor(value: Any, where: str) -> NDArray[Any]:
    if type(value) is not Tensor or value.layout != torch.strided or value.is_complex() or value.is_quantized:
        raise UserError(f"{where}: not a tensor of numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{where}: claims to be larger than what is stored")
    if value.dtype == torch.bool:
        return value.contiguous().numpy()
    return value.detach().to(torch.float32).contiguous().numpy()


def _read_bins(file: Path) -> Mapping[str, Any]:
    loaded = _load(file, _STAND_INS)
    if not isinstance(loaded, _Bins) or not isinstance(loaded.state, dict):
        raise UserError(f"{file}: not a discretizer of the port")
    return loaded.state


def _array(value: Any, file: Path) -> NDArray[np.float64]:
    """The numbers of an array's record."""
    try:
        _, shape, kind, by_column, content = value.state
        if kind.state[1] not in ("<", "="):
            raise ValueError("byte order")
        flat = np.frombuffer(content, dtype=_FLOATS[kind.arguments[0]])
        return np.ascontiguousarray(flat.reshape(shape, order="F" if by_column else "C"), dtype=np.float64)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: its bins are no array of numbers") from None


def _load(file: Path, stand_ins: list[Any]) -> Any:
    """What torch's restricted reader makes of a `.pt` file, zipped or of the older kind."""
    _check_archive(file)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile files can make it raise anything
        text = " ".join(str(error).split())
        wanted = re.search(r"GLOBAL ([\w.]+)", text)
        if wanted:
            raise UserError(f"{file}: refused, it asks for {wanted[1]}, which weights do not need") from None
        raise UserError(f"{file}: damaged, or not weights alone ({type(error).__name__})") from None


def _check_archive(file: Path) -> None:
    """Refuse archives that are not as torch writes them: packed, or with places outside themselves."""
    size = _size(file)
    if tarfile.is_tarfile(file):
        raise UserError(f"{file}: a tar archive, as PyTorch wrote before 2018: save it again with PyTorch")
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{file}: its parts are compressed, which PyTorch never does: not read")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{file}: its parts claim to be larger than the file: not read")
    names = [entry.filename for entry in entries]
    if any(name.startswith("/") or ".." in name.split("/") or "\\" in name for name in names):
        raise UserError(f"{file}: names places outside itself: not read")


def _size(file: Path) -> int:
    if not file.is_file():
        raise UserError(f"{file}: missing from the run's folder")
    return file.stat().st_size
