"""Writing Minari data sets: all of a data set or nothing of it appears in the local Minari folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from tt_ray.data.minari_folder import (
    OWN_METADATA,
    check_new_id,
    install,
    staging_folder,
    writing,
)
from tt_ray.data.observations import flatten_observation, observation_keys
from tt_ray.errors import UserError

_BLOCK = 1 << 24  # bytes by which the file grows in memory


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """One episode of L steps, as an environment gave it."""

    observations: Any
    """[L + 1, ...] array, or a (nested) dict of such arrays: the last one follows the last action."""
    actions: NDArray[Any]  # [L, ...]
    rewards: NDArray[Any]  # [L]
    terminations: NDArray[Any]  # [L]
    truncations: NDArray[Any]  # [L]
    behavior_policy: str
    seed: int | None = None
    """What the environment was reset with; None where it is not known."""


def write_dataset(
    dataset_id: str,
    episodes: Iterable[RecordedEpisode],
    *,
    environment: str | Mapping[str, Any],
    observation_space: gym.Space,
    action_space: gym.Space,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    algorithm_name: str = "",
    description: str = "",
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a Minari data set (hdf5) and return its folder; `episodes` may be a generator.

    `environment` is Gymnasium's EnvSpec as JSON data, or an id (`Hopper-v5`, `package.module:EnvId`).
    `metadata` is further JSON data. Seed and behaviour policy become metadata of each episode. `UserError`:
    id malformed or taken (unless `overwrite`), no episodes, arrays that do not fit together, a folder that
    cannot be written.
    """
    check_new_id(dataset_id, overwrite)
    references = {"ref_min_score": ref_min_score, "ref_max_score": ref_max_score}
    described = _describe(environment)
    further: dict[str, Any] = {
        "dataset_id": dataset_id,
        "minari_version": minari.__version__,
        "algorithm_name": algorithm_name,
        "description": description,
        OWN_METADATA: {"environment": described, "metadata": dict(metadata or {})},
        **{key: float(value) for key, value in references.items() if value is not None},
        **_minari_spec(described),
    }
    with staging_folder(dataset_id) as staging:
        data = staging / dataset_id / "data"
        with writing(dataset_id):
            data.mkdir(parents=True)
            storage = MinariStorage.new(
                data,
                observation_space=observation_space,
                action_space=action_space,
                jpeg_encoding=False,
            )
            storage.update_metadata(further)
        _write_episodes(storage, dataset_id, episodes)
        return install(staging, dataset_id, overwrite)


def _write_episodes(storage: MinariStorage, dataset_id: str, episodes: Iterable[RecordedEpisode]) -> None:
    """Write the episodes to the storage's file; errors of `episodes` itself pass through unchanged.

    Minari's own writer chunks every array, which takes ten times as long with short episodes. The file is
    composed in memory because HDF5 does not report a full disk: it floods stderr and crashes the process.
    """
    keys = observation_keys(storage.observation_space)
    count = steps = 0
    path = storage.data_path / "main_data.hdf5"
    memory = {"driver": "core", "backing_store": False, "block_size": _BLOCK}
    with h5py.File(path, "w", track_order=True, **memory) as file:
        for episode in episodes:
            _check_lengths(episode, keys, f"data set {dataset_id}, episode {count}")
            _write_episode(file.create_group(f"episode_{count}"), count, episode)
            count += 1
            steps += len(episode.rewards)
        file.flush()
        image = file.id.get_file_image()
    if count == 0:
        raise UserError(f"data set {dataset_id} would hold no episodes: nothing was written")
    with writing(dataset_id):
        path.write_bytes(image)
        size = float(storage.get_size())
        storage.update_metadata({"total_episodes": count, "total_steps": steps, "dataset_size": size})


def _write_episode(group: h5py.Group, index: int, episode: RecordedEpisode) -> None:
    """One episode in Minari's layout."""
    group.attrs["id"] = index
    group.attrs["total_steps"] = len(episode.rewards)
    group.attrs["behavior_policy"] = episode.behavior_policy
    if episode.seed is not None:
        group.attrs["seed"] = int(episode.seed)
    _write_tree(group, "observations", episode.observations)
    group["actions"] = np.asarray(episode.actions)
    group["rewards"] = np.asarray(episode.rewards)
    group["terminations"] = np.asarray(episode.terminations, dtype=bool)
    group["truncations"] = np.asarray(episode.truncations, dtype=bool)


def _write_tree(group: h5py.Group, name: str, values: Any) -> None:
    if isinstance(values, Mapping):
        child = group.create_group(name)
        for key, value in values.items():
            _write_tree(child, key, value)
    else:
        group[name] = np.asarray(values)


def _check_lengths(episode: RecordedEpisode, keys: tuple[str, ...], where: str) -> None:
    length = len(episode.rewards)
    if length == 0:
        raise UserError(f"{where}: it is empty; every episode needs at least one step")
    observations = len(flatten_observation(episode.observations, keys, batch_dims=1))
    if observations != length + 1:
        raise UserError(f"{where}: {length} steps need {length + 1} observations, not {observations}")
    for name in ("actions", "terminations", "truncations"):
        if len(getattr(episode, name)) != length:
            raise UserError(f"{where}: {length} rewards, but {len(getattr(episode, name))} {name}")


def _describe(environment: str | Mapping[str, Any]) -> dict[str, Any]:
    """The environment as JSON data: the registered EnvSpec of an id, where there is one."""
    if not isinstance(environment, str):
        return dict(environment)
    try:
        return {**json.loads(gym.spec(environment).to_json()), "id": environment}
    except (gym.error.Error, TypeError, ValueError):  # an import path, or registered with a function
        return {"id": environment}


def _minari_spec(environment: Mapping[str, Any]) -> dict[str, str]:
    """Minari's own `env_spec` entry, left out where Gymnasium cannot parse it: Minari would read nothing."""
    text = json.dumps({"additional_wrappers": [], **environment})
    try:
        EnvSpec.from_json(text)
    except (gym.error.Error, TypeError, ValueError):
        return {}
    return {"env_spec": text}
