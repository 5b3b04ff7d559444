"""Reading local Minari data sets as `Episodes`."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from tt_ray.config import GoalConfig
from tt_ray.data import observations as flattening
from tt_ray.data.d4rl_names import parse_d4rl_name, reference_scores, resolve_id
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.goals import goal_slots
from tt_ray.data.minari_folder import OWN_METADATA, dataset_folder, datasets_root, local_ids
from tt_ray.data.selection import Selection, select
from tt_ray.errors import UserError

UNREADABLE = (
    OSError,
    ValueError,
    AttributeError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    AssertionError,
    gym.error.Error,
)
"""What Minari, h5py and pyarrow raise when they meet a damaged file."""


class _Rows(NamedTuple):
    """One episode of L transitions."""

    observations: NDArray[np.float32]  # [L, N]
    actions: NDArray[np.float32]  # [L, M]
    rewards: NDArray[np.float32]  # [L]
    terminated: NDArray[np.bool_]  # [L]
    truncated: NDArray[np.bool_]  # [L]


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
    storage = open_storage(dataset_id)
    leaves = flattening.observation_leaves(storage.observation_space)
    chosen = select(leaves, dataset_id, observation_dims, observation_keys, goal is not None)
    digest = hashlib.sha256()
    parts: list[_Rows] = []
    for rows in _read_rows(dataset_id, storage):
        _update(digest, rows)
        parts.append(rows._replace(observations=chosen.of(rows.observations)))
    spec = _data_spec(dataset_id, storage, chosen, digest.hexdigest()[:16])
    goal_slots(goal, spec)  # refuses goals that do not fit
    offsets = np.cumsum([0] + [len(rows.rewards) for rows in parts], dtype=np.int64)
    joined = _Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return Episodes(**joined._asdict(), offsets=offsets, spec=spec)


def open_storage(dataset_id: str) -> MinariStorage:
    """A local data set's storage. `UserError`: missing, damaged, or spaces that are not supported."""
    folder = dataset_folder(dataset_id) / "data"
    if not folder.is_dir():
        raise UserError(_missing(dataset_id))
    with _reading(dataset_id):
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


def _missing(dataset_id: str) -> str:
    text = f"no data set {dataset_id} in {datasets_root()}"
    near = difflib.get_close_matches(dataset_id, local_ids(), n=3)
    if near:
        text += f" (did you mean {' or '.join(near)}?)"
    d4rl = dataset_id.removeprefix("d4rl/").replace("/", "-")
    name = d4rl if parse_d4rl_name(d4rl) else dataset_id
    return f"{text}: get it with `tt-ray data download {name}`, or make one with `tt-ray data collect ENV`"


@contextmanager
def _reading(dataset_id: str) -> Iterator[None]:
    """Turn whatever a damaged file causes into one line that names it."""
    try:
        yield
    except UNREADABLE as error:
        folder = dataset_folder(dataset_id) / "data"
        path = next(iter(folder.glob("main_data.*")), folder)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data set {dataset_id} cannot be read ({path} is damaged?): {reason}") from error


def _read_rows(dataset_id: str, storage: MinariStorage) -> Iterator[_Rows]:
    """The data set's episodes, checked, in order."""
    keys = flattening.observation_keys(storage.observation_space)
    observation_dim = sum(size for _, size in flattening.observation_leaves(storage.observation_space))
    widths = (observation_dim, math.prod(storage.action_space.shape))
    count = 0
    with _reading(dataset_id):
        expected = storage.total_episodes
        if expected == 0:
            raise UserError(f"data set {dataset_id} holds no episodes")
        for episode in storage.get_episodes(range(expected)):
            yield _rows(episode, keys, widths, f"data set {dataset_id}, episode {count}")
            count += 1
    if count != expected:
        raise UserError(f"data set {dataset_id} is damaged: {count} of its {expected} episodes are there")


def _rows(episode: Mapping[str, Any], keys: tuple[str, ...], widths: tuple[int, int], where: str) -> _Rows:
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
    return _Rows(observations, actions, rewards, terminated, truncated)


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


def _update(digest: Any, rows: _Rows) -> None:
    """Hash an episode's shape and values; the file's layout and the machine's byte order do not matter."""
    shape = (*rows.observations.shape, rows.actions.shape[1])
    digest.update(np.array(shape, dtype="<i8").tobytes())
    for array in rows[:3]:
        digest.update(array.astype("<f4", copy=False).tobytes())
    for flags in rows[3:]:
        digest.update(flags.tobytes())


def _data_spec(dataset_id: str, storage: MinariStorage, chosen: Selection, fingerprint: str) -> DataSpec:
    with _reading(dataset_id):
        metadata = MinariStorage.read_raw_metadata(storage.data_path)
        environment = stored_environment(metadata)
        low, high = stored_references(metadata, environment["id"])
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
    raw = MinariStorage.read_raw_metadata(dataset_folder(dataset_id) / "data")
    return raw.get(OWN_METADATA, {}).get("metadata", {})


def stored_environment(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The environment to evaluate in, as JSON data with an `id`, from a Minari set's raw metadata."""
    own = metadata.get(OWN_METADATA, {}).get("environment")
    if own:
        return dict(own)
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    return json.loads(text) if text else {"id": ""}


def stored_references(metadata: Mapping[str, Any], environment_id: str) -> tuple[float | None, float | None]:
    """Random and expert return: the set's own, or else D4RL's for its environment, or else None."""
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if low is None or high is None:
        return reference_scores(environment_id)
    return float(low), float(high)
