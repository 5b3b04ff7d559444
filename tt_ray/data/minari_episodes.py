"""Minari data sets as flat arrays: what opens their files, and so runs in a process apart (`limited.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from tt_ray.data import observations as flattening
from tt_ray.data.limited import Arrays, allow_files
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED

UNREADABLE = (*MALFORMED, RuntimeError, AssertionError, ImportError, gym.error.Error)
"""What Minari, h5py and pyarrow raise when they meet a damaged file."""


class Rows(NamedTuple):
    """One episode of L transitions."""

    observations: NDArray[np.float32]  # [L, N]
    actions: NDArray[np.float32]  # [L, M]
    rewards: NDArray[np.float32]  # [L]
    terminated: NDArray[np.bool_]  # [L]
    truncated: NDArray[np.bool_]  # [L]


def read_arrays(path: Path, dataset_id: str) -> Arrays:
    """The fields of `Rows` of all episodes end to end, and `lengths` [E], each episode's L.

    `path` is the data set's file or folder of files. `UserError` where they are damaged, or hold values that
    are not finite.
    """
    storage = open_storage(path if path.is_dir() else path.parent, dataset_id)
    parts = list(_read_rows(dataset_id, storage, path))
    joined = Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return {**joined._asdict(), "lengths": np.array([len(rows.rewards) for rows in parts], dtype=np.int64)}


def open_storage(folder: Path, dataset_id: str) -> MinariStorage:
    """A data set's storage, which reads no more than its metadata as yet.

    `UserError`: damaged, or spaces that are not supported.
    """
    with reading(dataset_id, folder):
        _check_metadata(MinariStorage.read_raw_metadata(folder), dataset_id)
        storage = MinariStorage.read(folder)
    space = storage.action_space
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        raise UserError(f"data set {dataset_id} has the discrete action space {space}: a Box is needed")
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"data set {dataset_id} has the action space {space}: it must be a Box")
    try:
        flattening.observation_keys(storage.observation_space)
    except UserError as error:
        raise UserError(f"data set {dataset_id}: {error}") from error
    return storage


@contextmanager
def reading(dataset_id: str, path: Path) -> Iterator[None]:
    """Turn whatever a damaged file causes into one line that names it, a `UserError`."""
    try:
        yield
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data set {dataset_id} cannot be read ({path} is damaged?): {reason}") from error


def _check_metadata(metadata: Any, dataset_id: str) -> None:
    """Refuse what Minari would act upon: without spaces it makes whatever its `env_spec` names."""
    if not isinstance(metadata, dict):
        raise TypeError("metadata.json holds no object")
    for name in ("observation_space", "action_space"):
        if name not in metadata:
            raise UserError(f"data set {dataset_id} does not say what its {name} is (metadata.json)")
        _check_space(json.loads(metadata[name]))
    if metadata.get("data_format") == "hdf5":
        return
    if metadata.get("data_format") not in ("arrow", "parquet"):
        raise UserError(f"data set {dataset_id} has the format {metadata.get('data_format')!r}, not hdf5")


def _check_space(space: Any) -> None:
    """`ValueError` for a Box with fewer bounds than its shape says: a tiny file could fill the memory."""
    if space["type"] == "Box":
        if not np.shape(space["low"]) == np.shape(space["high"]) == tuple(space["shape"]):
            raise ValueError("a space's bounds do not have its shape")
        if np.dtype(space["dtype"]).kind not in "biuf":
            raise ValueError(f"a space holds {space['dtype']}, not numbers")
    subspaces = space.get("subspaces", ())
    for inner in subspaces.values() if isinstance(subspaces, dict) else subspaces:
        _check_space(inner)


def _read_rows(dataset_id: str, storage: MinariStorage, path: Path) -> Iterator[Rows]:
    """The data set's episodes, checked, in order."""
    keys = flattening.observation_keys(storage.observation_space)
    observation_dim = sum(size for _, size in flattening.observation_leaves(storage.observation_space))
    widths = (observation_dim, math.prod(storage.action_space.shape))
    count = 0
    with reading(dataset_id, path):
        expected = storage.total_episodes
        if expected == 0:
            raise UserError(f"data set {dataset_id} holds no episodes")
        if storage.FORMAT == "hdf5":
            allow_files(1)
        for episode in storage.get_episodes(range(expected)):
            yield _rows(episode, keys, widths, f"data set {dataset_id}, episode {count}")
            count += 1
    if count != expected:
        raise UserError(f"data set {dataset_id} is damaged: {count} of its {expected} episodes are there")


def _rows(episode: Mapping[str, Any], keys: tuple[str, ...], widths: tuple[int, int], where: str) -> Rows:
    rewards = np.asarray(episode["rewards"], dtype=np.float32).reshape(-1)
    length = len(rewards)
    if length == 0:
        raise UserError(f"{where}: it is empty; remove it, every episode needs at least one step")
    # A final observation, after the last action, is usual but not needed.
    observations = flattening.flatten_observation(episode["observations"], keys, batch_dims=1)[:length]
    actions = np.asarray(episode["actions"], dtype=np.float32).reshape(length, -1)
    flags = [np.asarray(episode[key], dtype=bool).reshape(-1) for key in ("terminations", "truncations")]
    lengths = {len(observations), *map(len, flags)}
    if (observations.shape[1], actions.shape[1]) != widths or lengths != {length}:
        raise UserError(f"{where}: its arrays do not fit together, or not the data set's spaces")
    terminated, truncated = np.zeros((2, length), dtype=bool)
    terminated[-1] = flags[0][-1]
    truncated[-1] = flags[1][-1] or not terminated[-1]
    _check_finite(where, observations, actions, rewards)
    return Rows(observations, actions, rewards, terminated, truncated)


def _check_finite(
    where: str, observations: NDArray[np.float32], actions: NDArray[np.float32], rewards: NDArray[np.float32]
) -> None:
    for name, array in (("observation", observations), ("action", actions), ("reward", rewards[:, None])):
        finite = np.isfinite(array)
        if not finite.all():
            step, column = (int(index[0]) for index in np.nonzero(~finite))
            label = name if name == "reward" else f"{name} {column}"
            kind = "NaN" if np.isnan(array[step, column]) else "infinite"
            raise UserError(f"{where}, step {step}: {label} is {kind}; repair or remove the episode")
