"""Tables of others (CSV, Parquet, NumPy): what opens them, and so runs in a process apart (`limited.py`)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from tt_ray.data.limited import Arrays
from tt_ray.data.log_layout import VECTORS, Columns, Layout, find_layout
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED, build

BLOCK_BYTES = 1 << 22
BLOCK_ROWS = 1 << 16
_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0", ""), False),
}

Block = Mapping[str, pa.Array]
Table = tuple[list[str], Callable[[list[str]], Iterator[Block]]]
"""Names of a file's columns, and a function that gives those of them that are asked for, block by block."""


def read_table(path: Path, columns: Mapping[str, Any]) -> Arrays:
    """A file's rows in the layout that `columns` (`Columns` as JSON data) says, T of them.

    observations [T, N], actions [T, M], rewards [T] and, where the file has them, next_observations [T, N]:
    float32, NaN where a cell is empty; terminals, timeouts [T] bool; times [T] float64 in the file's unit
    (seconds for dates); episodes [T] int64, an index of `labels`; `notes`, JSON text: the layout, and the
    names of the single dimensions of every vector. `UserError` with file, row (counted from 0) and column for
    what is no number.
    """
    pa.set_memory_pool(pa.system_memory_pool())  # others reserve more memory than this process may have
    try:
        names, blocks = _open(path)
        layout = find_layout(names, build(Columns, columns), str(path))
        reader = _Reader(path, layout)
        for block in blocks(list(layout.used)):
            reader.add(block)
        return reader.finish()
    except (*MALFORMED, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _open(path: Path) -> Table:
    if path.is_dir():
        return _arrays({file.stem: _load(file) for file in sorted(path.glob("*.npy"))})
    match path.suffix.lower():
        case ".npz":
            with np.load(path, allow_pickle=False) as file:
                return _arrays({name: file[name] for name in file.files})
        case ".parquet":
            return _parquet(path)
        case _:
            return _csv(path)


def _load(file: Path) -> NDArray[Any]:
    return np.asarray(np.load(file, allow_pickle=False))


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline(1 << 20)
    delimiter = max(",;\t", key=first.count)
    head = next(csv.reader([first.rstrip("\r\n")], delimiter=delimiter), [])
    names = [name.strip() or f"unnamed {index}" for index, name in enumerate(head)]
    if not head or all(_is_number(name) for name in names):
        raise UserError(f"{path} has no header: its first line must name the columns")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"{path} has two columns of the name {double[0]!r}")

    def blocks(wanted: list[str]) -> Iterator[Block]:
        reader = pa_csv.open_csv(
            path,
            read_options=pa_csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=1
            ),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                include_columns=wanted,
            ),
        )
        for batch in reader:
            yield dict(zip(wanted, batch.columns, strict=True))

    return names, blocks


def _parquet(path: Path) -> Table:
    file = pa_parquet.ParquetFile(path)
    names = [field.name for field in file.schema_arrow if not pa.types.is_struct(field.type)]

    def blocks(wanted: list[str]) -> Iterator[Block]:
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=wanted, use_threads=False):
            yield {name: batch.column(name) for name in wanted}

    return names, blocks


def _arrays(found: Mapping[str, NDArray[Any]]) -> Table:
    """Arrays [T] and [T, D]; observations may have one row more, after the last action."""
    usable = {name: array for name, array in found.items() if 1 <= array.ndim <= 2}

    def blocks(wanted: list[str]) -> Iterator[Block]:
        yield {name: _as_arrow(name, usable[name]) for name in wanted}

    return list(usable), blocks


def _as_arrow(name: str, array: NDArray[Any]) -> pa.Array:
    if array.dtype.kind not in "biufUM":
        raise UserError(f"array {name} holds {array.dtype}, not numbers")
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    if array.ndim == 1:
        return pa.array(array)
    if array.shape[1] == 1:
        return pa.array(array[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


class _Reader:
    """Collects the blocks of a file as arrays of numbers."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout, self.rows = path, layout, 0
        self.parts: dict[str, list[NDArray[Any]]] = {}
        self.widths: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.dates: bool | None = None  # whether the times are written as dates

    def add(self, block: Block) -> None:
        """The next rows."""
        layout = self.layout
        for role in VECTORS:
            if columns := layout.columns_of(role):
                self._keep(
                    role, np.concatenate([self._matrix(name, block[name]) for name in columns], axis=1)
                )
        if layout.reward:
            self._keep("rewards", self._matrix(layout.reward, block[layout.reward])[:, 0])
        for role in ("terminated", "truncated", "done"):
            if name := getattr(layout, role):
                self._keep(role, self._flags(name, block[name]))
        if layout.time:
            self._keep("times", self._times(layout.time, block[layout.time]))
        if layout.episode:
            self._keep("episodes", self._codes(layout.episode, block[layout.episode]))
        self.rows += max(map(len, block.values()), default=0)

    def finish(self) -> Arrays:
        """All rows, as `read_table` says."""
        arrays = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        if not len(arrays.get("actions", ())):
            raise UserError(f"{self.path} holds no rows")
        arrays.setdefault("rewards", np.zeros(len(arrays["actions"]), np.float32))
        self._settle_lengths(arrays)
        _settle_flags(arrays)
        if "episodes" in arrays:
            arrays["labels"] = np.array(list(self.labels))
        dimensions = {role: self._dimensions(role) for role in VECTORS}
        if "next_observations" in arrays:
            dimensions["next_observations"] = dimensions["next_observations"] or dimensions["observations"]
        notes = {"layout": self.layout.to_json(), "dimensions": dimensions}
        return {**arrays, "notes": np.array(json.dumps(notes))}

    def _settle_lengths(self, arrays: Arrays) -> None:
        """All arrays have a row for each action; a last observation more is that after the last action."""
        steps = len(arrays["actions"])
        observations = arrays["observations"]
        if len(observations) == steps + 1 and self.layout.episode is None:
            ends = [arrays[name][:-1] for name in ("terminated", "truncated", "done") if name in arrays]
            if any(flags.any() for flags in ends):
                raise UserError(
                    f"{self.path}: {len(observations)} observations for {steps} actions: one more is "
                    "understood where a file holds one episode, but its flags end several"
                )
            arrays["observations"], arrays["next_observations"] = observations[:-1], observations[1:]
            if "times" in arrays:
                arrays["times"] = arrays["times"][:steps]
        for name, values in arrays.items():
            if len(values) != steps:
                raise UserError(f"{self.path}: {name} has {len(values)} rows, but actions {steps}")

    def _dimensions(self, role: str) -> list[str]:
        names = []
        for column in self.layout.columns_of(role):
            width = self.widths[column]
            names += [column] if width == 1 else [f"{column}[{index}]" for index in range(width)]
        return names

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values)

    def _matrix(self, name: str, column: pa.Array) -> NDArray[np.float32]:
        """A column of numbers [n, 1], or of vectors [n, D]."""
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            self.widths[name] = 1
            return _narrow(self._numbers(name, column))[:, None]
        there = column.is_valid().to_numpy(zero_copy_only=False)
        rows = column.drop_null()
        lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False)
        width = self.widths.setdefault(name, int(lengths[0]) if len(lengths) else 1)
        if (lengths != width).any():
            row = self.rows + int(np.flatnonzero(there)[np.flatnonzero(lengths != width)[0]])
            raise UserError(f"{self.path}, row {row}: {name} has not {width} numbers as in the rows before")
        matrix = np.full((len(column), width), np.nan, np.float32)
        matrix[there] = _narrow(self._numbers(name, rows.flatten())).reshape(-1, width)
        return matrix

    def _numbers(self, name: str, column: pa.Array) -> NDArray[np.float64]:
        """Float64, NaN for what is missing."""
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
        try:
            values = column.cast(pa.float64(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            for row, value in enumerate(column.to_pylist()):
                if value is not None and not _is_number(value):
                    raise self._odd(name, row, value, "a number") from error
            raise
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)

    def _flags(self, name: str, column: pa.Array) -> NDArray[np.bool_]:
        """Yes or no; what is missing is no."""
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return np.nan_to_num(self._numbers(name, column)) != 0
        words = pc.utf8_lower(pc.utf8_trim_whitespace(column)).fill_null("").dictionary_encode()
        known = [_WORDS.get(word) for word in words.dictionary.to_pylist()]
        codes = words.indices.to_numpy()
        for row in np.flatnonzero(np.array([flag is None for flag in known], bool)[codes])[:1].tolist():
            raise self._odd(name, row, column[row].as_py(), "a flag (true or false, 1 or 0)")
        return np.array(known, bool)[codes]

    def _times(self, name: str, column: pa.Array) -> NDArray[np.float64]:
        """Numbers as they are; dates in seconds."""
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if column.null_count == len(column):  # says nothing of what the next blocks hold
            return np.full(len(column), np.nan)
        if self.dates is None:
            first = next(value for value in column.to_pylist() if value is not None) if text else 0
            self.dates = pa.types.is_temporal(column.type) or (text and not _is_number(first))
        if not self.dates:
            return self._numbers(name, column)
        if text:
            column = self._parsed(name, pc.utf8_trim_whitespace(column))
        kind = pa.duration("ns") if pa.types.is_duration(column.type) else pa.timestamp("ns")
        ticks = column.cast(kind, safe=False).cast(pa.int64())
        missing = ~column.is_valid().to_numpy(zero_copy_only=False)
        seconds = ticks.fill_null(0).to_numpy().astype(np.float64) / 1e9
        return np.where(missing, np.nan, seconds)

    def _parsed(self, name: str, column: pa.Array) -> pa.Array:
        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
            try:
                return column.cast(kind)
            except pa.ArrowInvalid:
                continue
        raise UserError(f"{self.path}: {name} holds neither numbers nor dates like 2030-01-31T12:00:00.5")

    def _codes(self, name: str, column: pa.Array) -> NDArray[np.int64]:
        if column.null_count:
            row = int(np.flatnonzero(~column.is_valid().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{self.path}, row {self.rows + row}: {name} is empty, and names the episode")
        words = column.cast(pa.string()).dictionary_encode()
        codes = [
            self.labels.setdefault(word.strip(), len(self.labels)) for word in words.dictionary.to_pylist()
        ]
        return np.array(codes, np.int64)[words.indices.to_numpy()]

    def _odd(self, name: str, row: int, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.path}, row {self.rows + row}: {name} is {str(value)[:40]!r}, not {wanted}")


def _settle_flags(arrays: Arrays) -> None:
    """Terminals and timeouts of what there is of the flags terminated, truncated and done."""
    terminated, truncated, done = (arrays.pop(name, None) for name in ("terminated", "truncated", "done"))
    if done is not None:
        if terminated is None:
            terminated = done if truncated is None else done & ~truncated
        else:
            rest = done & ~terminated
            truncated = rest if truncated is None else truncated | rest
    for name, flags in (("terminals", terminated), ("timeouts", truncated)):
        if flags is not None:
            arrays[name] = flags


def _narrow(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large for float32: infinite, which the report tells
        return values.astype(np.float32)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
