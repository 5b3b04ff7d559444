"""Local Minari data sets as `Episodes`; a process apart opens their files (`limited.py`)."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from tt_ray.config import GoalConfig
from tt_ray.data import observations as flattening
from tt_ray.data.d4rl_names import parse_d4rl_name, reference_scores, resolve_id
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.goals import goal_slots
from tt_ray.data.limited import Arrays, read_apart
from tt_ray.data.minari_episodes import Rows, open_storage, reading
from tt_ray.data.minari_folder import OWN_METADATA, dataset_folder, datasets_root, local_ids
from tt_ray.data.selection import Selection, select
from tt_ray.errors import UserError

READER = "tt_ray.data.minari_episodes:read_arrays"


def load_episodes(
    dataset_id: str,
    observation_dims: int | None = None,
    observation_keys: Sequence[str] | None = None,
    goal: GoalConfig | None = None,
) -> Episodes:
    """Read a local Minari data set (hdf5, arrow or parquet), given by its id or a D4RL v2 name.

    Keeps the leaves `observation_keys` of a Dict observation (None: all), without the desired goal where a
    `goal` is given, and of these the first `observation_dims` dimensions (None: all). Only the flags of an
    episode's last row count; without one it counts as truncated. The environment is the one meant for
    evaluation where the set names one; its id is "" where the set names none. `UserError`: no such data
    set, damaged or empty, NaN or infinite values, observations other than Box or Dict of Box, actions other
    than Box, keys or dimensions that are not there, goals that do not fit the environment's.
    """
    dataset_id = resolve_id(dataset_id)
    storage = local_storage(dataset_id)
    leaves = flattening.observation_leaves(storage.observation_space)
    chosen = select(leaves, dataset_id, observation_dims, observation_keys, goal is not None)
    folder = dataset_folder(dataset_id) / "data"
    path = next(iter(folder.glob("main_data.*")), folder)
    arrays = read_apart(READER, path, dataset_id=dataset_id)
    with reading(dataset_id, path):
        whole, offsets = _checked(
            arrays, sum(size for _, size in leaves), math.prod(storage.action_space.shape)
        )
    spec = _data_spec(dataset_id, storage, chosen, _fingerprint(whole, offsets))
    goal_slots(goal, spec)  # refuses goals that do not fit
    kept = whole._replace(observations=chosen.of(whole.observations))
    return Episodes(**kept._asdict(), offsets=offsets, spec=spec)


def local_storage(dataset_id: str) -> MinariStorage:
    """A local data set's storage. `UserError`: missing, damaged, or spaces that are not supported."""
    folder = dataset_folder(dataset_id) / "data"
    if not folder.is_dir():
        raise UserError(_missing(dataset_id))
    return open_storage(folder, dataset_id)


def _checked(arrays: Arrays, observation_dim: int, action_dim: int) -> tuple[Rows, NDArray[np.int64]]:
    """All rows and the episodes' offsets [E + 1]; `ValueError` where they are not what was asked for."""
    rows, lengths = Rows(*(arrays[name] for name in Rows._fields)), arrays["lengths"]
    total = len(rows.rewards)
    shapes = [(total, observation_dim), (total, action_dim), (total,), (total,), (total,)]
    kinds = [np.float32, np.float32, np.float32, np.bool_, np.bool_]
    if [array.shape for array in rows] != shapes or [array.dtype for array in rows] != kinds:
        raise ValueError("its arrays do not fit together")
    if lengths.dtype != np.int64 or lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != total:
        raise ValueError("its episodes do not fit its rows")
    return rows, np.concatenate([[0], np.cumsum(lengths)])


def _missing(dataset_id: str) -> str:
    text = f"no data set {dataset_id} in {datasets_root()}"
    near = difflib.get_close_matches(dataset_id, local_ids(), n=3)
    if near:
        text += f" (did you mean {' or '.join(near)}?)"
    d4rl = dataset_id.removeprefix("d4rl/").replace("/", "-")
    name = d4rl if parse_d4rl_name(d4rl) else dataset_id
    return f"{text}: get it with `tt-ray data download {name}`, or make one with `tt-ray data collect ENV`"


def _fingerprint(whole: Rows, offsets: NDArray[np.int64]) -> str:
    """Hash of each episode's shape and values; file layout and byte order do not matter."""
    digest = hashlib.sha256()
    for begin, end in itertools.pairwise(offsets.tolist()):
        shape = (end - begin, whole.observations.shape[1], whole.actions.shape[1])
        digest.update(np.array(shape, dtype="<i8").tobytes())
        for values in whole[:3]:
            digest.update(values[begin:end].astype("<f4", copy=False).tobytes())
        for flags in whole[3:]:
            digest.update(flags[begin:end].tobytes())
    return digest.hexdigest()[:16]


def _data_spec(dataset_id: str, storage: MinariStorage, chosen: Selection, fingerprint: str) -> DataSpec:
    with reading(dataset_id, storage.data_path):
        metadata = MinariStorage.read_raw_metadata(storage.data_path)
        environment = stored_environment(metadata)
        low, high = stored_references(metadata, environment["id"])
    if not environment["id"]:  # a model without one must not stand in for a model with one
        fingerprint = hashlib.sha256(f"{fingerprint}, no environment".encode()).hexdigest()[:16]
    space = storage.action_space
    return DataSpec(
        dataset_id=dataset_id,
        environment=environment,
        observation_keys=chosen.keys,
        observation_dim=len(chosen.columns),
        cropped=chosen.cropped,
        goal_keys=chosen.goal_keys,
        leaf_sizes=chosen.leaf_sizes,
        action_dim=math.prod(space.shape),
        action_low=tuple(map(float, space.low.ravel())),
        action_high=tuple(map(float, space.high.ravel())),
        ref_min_score=low,
        ref_max_score=high,
        fingerprint=fingerprint,
    )


def own_metadata(dataset_id: str) -> dict[str, Any]:
    """What `write_dataset` was given as metadata; empty for data sets of other origin."""
    folder = dataset_folder(dataset_id) / "data"
    with reading(dataset_id, folder):
        return _section(_section(MinariStorage.read_raw_metadata(folder), OWN_METADATA), "metadata")


def stored_environment(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The environment to evaluate in, as JSON data with an `id`, from a Minari set's raw metadata.

    `TypeError` or `ValueError` where the metadata is damaged.
    """
    own = _section(_section(metadata, OWN_METADATA), "environment")
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    found = own or (json.loads(text) if text else {"id": ""})
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise TypeError("its environment is none")
    return dict(found)


def stored_references(metadata: Mapping[str, Any], environment_id: str) -> tuple[float | None, float | None]:
    """Random and expert return: the set's own, or else D4RL's for its environment, or else None."""
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if low is None or high is None:
        return reference_scores(environment_id)
    return float(low), float(high)


def _section(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = metadata.get(name, {})
    if not isinstance(section, dict):
        raise TypeError(f"its {name} is no object")
    return section
