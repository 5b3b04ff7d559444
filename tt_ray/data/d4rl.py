"""D4RL's flat HDF5 files: downloading them, and turning them (or a user's own) into Minari data sets."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tt_ray.data.d4rl_file import FLAGS, SIGNATURE, VECTORS
from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS, D4RL_QUALITIES, parse_d4rl_name, resolve_id
from tt_ray.data.limited import Arrays, read_apart
from tt_ray.data.minari_folder import check_new_id, staging_folder
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.errors import UserError

__all__ = ["convert", "download", "import_file", "resolve_id"]

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
"""Where D4RL publishes its files; TT_RAY_D4RL_URL names a mirror."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have arrived and the bytes in all (None: the server does not say)."""

READER = "tt_ray.data.d4rl_file:read_arrays"
_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def download(name: str, progress: Progress | None = None, overwrite: bool = False) -> str:
    """Download D4RL's file for a v2 name (`hopper-medium-replay-v2`) and convert it; returns the Minari id.

    A data set that is here already is left as it is unless `overwrite`. `UserError`: unknown name, server not
    reached, file missing, incomplete or not HDF5; nothing is left behind then.
    """
    parts = parse_d4rl_name(name)
    if parts is None:
        raise UserError(
            f"{name!r} is no D4RL v2 data set: it must be one of {', '.join(D4RL_ENVIRONMENTS)}, a dash, and "
            f"one of {', '.join(f'{quality}-v2' for quality in D4RL_QUALITIES)}"
        )
    dataset_id = resolve_id(name)
    if check_new_id(dataset_id, overwrite=True).exists() and not overwrite:
        return dataset_id
    file_name = f"{parts[0]}_{parts[1].replace('-', '_')}-v2.hdf5"
    url = f"{os.environ.get('TT_RAY_D4RL_URL', D4RL_URL).rstrip('/')}/{file_name}"
    with staging_folder(dataset_id) as staging:
        path = staging / file_name
        _fetch(url, path, progress)
        convert(path, dataset_id, overwrite=overwrite)
    return dataset_id


def import_file(
    path: str | Path,
    dataset_id: str,
    environment: str | None = None,
    *,
    overwrite: bool = False,
    make: Callable[[str], gym.Env] = gym.make,
) -> str:
    """Turn the user's own flat HDF5 file into a Minari data set; arguments and errors as `convert`."""
    convert(path, dataset_id, environment, overwrite=overwrite, make=make)
    return dataset_id


def convert(
    path: str | Path,
    dataset_id: str,
    environment: str | None = None,
    *,
    overwrite: bool = False,
    make: Callable[[str], gym.Env] = gym.make,
) -> Path:
    """Write a flat HDF5 file in D4RL's layout as the Minari data set `dataset_id`; returns its folder.

    The file holds observations [T, N], actions [T, M], rewards, terminals, timeouts [T] and, if it can,
    next_observations [T, N]; an episode ends at a terminal or a timeout, and an unfinished one at the end
    counts as truncated. `environment` is an id that `make` understands, and its spaces must fit; None: D4RL's
    own environment, told by the words of the data set's id or the file's name. `UserError`: no such file, no
    HDF5, arrays missing or of unequal length, NaN or infinite values, dimensions that do not fit.
    """
    path = Path(path)
    check_new_id(dataset_id, overwrite)
    if environment is None:
        target = _deduced_target(path, dataset_id)
    else:
        target = _made_target(environment, make)
    if not path.is_file():
        raise UserError(f"no file {path}")
    columns = read_apart(
        READER,
        path,
        environment=target.environment["id"],
        recorded_dims=target.recorded_dims,
        observation_dim=target.observation_dim,
        action_dim=target.action_space.shape[0],
    )
    _check_columns(path, columns)
    return write_dataset(
        dataset_id,
        _split(columns, behavior_policy=path.stem),
        environment=target.environment,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (target.observation_dim,), np.float32),
        action_space=target.action_space,
        ref_min_score=target.references[0],
        ref_max_score=target.references[1],
        algorithm_name="unknown",
        description=f"Converted from {path.name}",
        metadata={"source": path.name, "next_observations": "next_observations" in columns},
        overwrite=overwrite,
    )


def _fetch(url: str, path: Path, progress: Progress | None) -> None:
    """Download `url` to `path` and check that it is a whole HDF5 file."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
            size = response.headers.get("Content-Length")
            expected = int(size) if size else None
            received = 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                if progress:
                    progress(received, expected)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} cannot be downloaded: the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(f"{url} cannot be downloaded: {reason}") from error
    if expected is not None and received != expected:
        raise UserError(f"{url} arrived incomplete ({received} of {expected} bytes): try again")
    with path.open("rb") as file:
        begins = file.read(len(SIGNATURE))
    if begins != SIGNATURE:
        raise UserError(f"{url} is not an HDF5 file: is TT_RAY_D4RL_URL right?")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What the file's rows are to fit."""

    environment: Mapping[str, Any]
    recorded_dims: tuple[int, ...]  # what the file's observations may have
    observation_dim: int  # what is kept of them
    action_space: gym.spaces.Box
    references: tuple[float | None, float | None] = (None, None)


def _deduced_target(path: Path, dataset_id: str) -> _Target:
    """The D4RL environment that the data set's id or the file's name speaks of."""
    words = re.split(r"[/_-]", f"{dataset_id}/{path.stem}".lower())
    named = {word for word in words if word in D4RL_ENVIRONMENTS}
    if len(named) != 1:
        raise UserError(f"{path}: neither {dataset_id} nor the file's name tells the environment: give it")
    known = D4RL_ENVIRONMENTS[named.pop()]
    return _Target(
        environment=known.description(),
        recorded_dims=(known.observation_dim, known.recorded_dims),
        observation_dim=known.observation_dim,
        action_space=gym.spaces.Box(-1.0, 1.0, (known.action_dim,), np.float32),
        references=(known.ref_min_score, known.ref_max_score),
    )


def _made_target(environment: str, make: Callable[[str], gym.Env]) -> _Target:
    """The spaces of an environment that `make` makes."""
    try:
        env = make(environment)
    except (ImportError, gym.error.Error, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"environment {environment} cannot be made: {reason}") from error
    try:
        for word, space in (("observation", env.observation_space), ("action", env.action_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise UserError(f"environment {environment}: its {word} space {space} is not a flat Box")
        description = json.loads(env.spec.to_json()) if env.spec else {}
    except (TypeError, ValueError):  # registered with a function: the id alone must do
        description = {}
    finally:
        env.close()
    dims = env.observation_space.shape[0]
    return _Target(
        environment={**description, "id": environment},
        recorded_dims=(dims,),
        observation_dim=dims,
        action_space=env.action_space,
    )


def _check_columns(path: Path, columns: Arrays) -> None:
    """`UserError` unless the arrays are what `d4rl_file.read_arrays` promises."""
    names = {"rewards", *FLAGS, *(name for name in VECTORS if name in columns)}
    lengths = {len(columns[name]) for name in names if name in columns}
    kinds = [columns[name].dtype == np.bool_ for name in FLAGS if name in columns]
    if columns.keys() != names or not names >= set(VECTORS[:2]) or len(lengths) != 1 or not all(kinds):
        raise UserError(f"{path}: its arrays do not fit together")


def _split(columns: Mapping[str, NDArray[Any]], behavior_policy: str) -> Iterator[RecordedEpisode]:
    """Cut the rows into episodes after every terminal or timeout, and after the last row."""
    observations = columns["observations"]
    # Without next_observations the one after an episode's last action is unknown; nothing reads it.
    following = columns.get("next_observations", observations)
    over = columns["terminals"] | columns["timeouts"]
    stops = np.union1d(np.flatnonzero(over) + 1, [len(over)])
    start = 0
    for stop in stops.tolist():
        truncations = columns["timeouts"][start:stop].copy()
        truncations[-1] |= not columns["terminals"][stop - 1]
        yield RecordedEpisode(
            observations=np.concatenate([observations[start:stop], following[stop - 1 : stop]]),
            actions=columns["actions"][start:stop],
            rewards=columns["rewards"][start:stop],
            terminations=columns["terminals"][start:stop],
            truncations=truncations,
            behavior_policy=behavior_policy,
        )
        start = stop
