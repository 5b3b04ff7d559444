"""The unfinished collection of a data set on disk, so that a crash loses little and changes nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from tt_ray.data.minari_folder import datasets_root
from tt_ray.data.minari_writer import RecordedEpisode
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED

State = TypeVar("State")


class WorkFolder:
    """Numbered shards in a hidden folder beside the data sets; a context manager that holds its lock.

    Each shard is written at once: the state of the work after some rounds, and the episodes that led there.
    """

    def __init__(self, dataset_id: str, identity: str) -> None:
        self.path = datasets_root() / ".collecting" / f"{dataset_id.replace('/', '-')}-{identity}"
        self._dataset_id = dataset_id
        self._lock: Any = None

    def __enter__(self) -> WorkFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(f"data set {self._dataset_id} is being collected by another process") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def save(self, state: Any, episodes: Sequence[RecordedEpisode]) -> None:
        """Add a shard: `state` (its fields are arrays or numbers), and the episodes since the last one.

        `UserError` where it cannot be written; the shards before it stay.
        """
        path = self.path / f"{len(self._shards()):06d}.npz"
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **vars(state), **_pack(episodes))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def resume(self, restore: Callable[[Mapping[str, Any]], State]) -> State | None:
        """What `restore` makes of the last whole shard's fields of the state; None where there is no shard.

        Damaged shards, and those after them, are dropped.
        """
        state = None
        paths = self._shards()
        for index, path in enumerate(paths):
            try:
                with np.load(path, allow_pickle=False) as shard:
                    for _ in _unpack(shard):
                        pass
                    state = restore(shard)
            except (*MALFORMED, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error):
                for damaged in paths[index:]:
                    damaged.unlink()
                break
        return state

    def episodes(self) -> Iterator[RecordedEpisode]:
        """All episodes so far, in the order in which they were saved."""
        for path in self._shards():
            with np.load(path, allow_pickle=False) as shard:
                yield from _unpack(shard)

    def remove(self) -> None:
        """Delete the folder: the data set is written."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # others are being collected
            self.path.parent.rmdir()

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("*.npz"))


def _pack(episodes: Sequence[RecordedEpisode]) -> dict[str, Any]:
    return {
        "observations": np.concatenate([episode.observations for episode in episodes]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "terminations": np.concatenate([episode.terminations for episode in episodes]),
        "truncations": np.concatenate([episode.truncations for episode in episodes]),
        "lengths": np.array([len(episode.rewards) for episode in episodes]),
        "seeds": np.array([episode.seed for episode in episodes], dtype=np.int64),
        "names": np.array([episode.behavior_policy for episode in episodes]),
    }


def _unpack(shard: Mapping[str, Any]) -> Iterator[RecordedEpisode]:
    """The inverse of `_pack`; an episode has one observation more than steps."""
    columns = {
        key: shard[key] for key in ("observations", "actions", "rewards", "terminations", "truncations")
    }
    begin = 0
    for index, (length, seed, name) in enumerate(
        zip(shard["lengths"], shard["seeds"], shard["names"], strict=True)
    ):
        first = begin + index
        rows = {key: column[begin : begin + length] for key, column in columns.items()}
        rows["observations"] = columns["observations"][first : first + length + 1]
        yield RecordedEpisode(seed=int(seed), behavior_policy=str(name), **rows)
        begin += int(length)
