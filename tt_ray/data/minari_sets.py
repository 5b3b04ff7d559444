"""Minari data sets on this machine: reading them as `Episodes`, listing, describing and downloading them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minari
import numpy as np
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from tt_ray.data.episodes import Episodes, best_tenth
from tt_ray.data.minari_episodes import UNREADABLE
from tt_ray.data.minari_folder import (
    OWN_METADATA,
    dataset_folder,
    datasets_root,
    install,
    local_ids,
    staging_folder,
)
from tt_ray.data.minari_reader import (
    load_episodes,
    local_storage,
    own_metadata,
    stored_environment,
    stored_references,
)
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.data.observations import observation_leaves
from tt_ray.errors import UserError

__all__ = [
    "ColumnStats",
    "DatasetDescription",
    "DatasetInfo",
    "RecordedEpisode",
    "describe",
    "download_minari",
    "list_datasets",
    "load_episodes",
    "write_dataset",
]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A line of `data list`."""

    id: str
    environment: str
    episodes: int
    steps: int
    format: str
    size_mb: float
    ref_min_score: float | None
    ref_max_score: float | None
    problem: str | None = None
    """Why the data set cannot be used; the other fields are then empty."""


def list_datasets() -> list[DatasetInfo]:
    """The local Minari data sets by id; one with broken metadata is listed with its `problem`."""
    return [_info(dataset_id) for dataset_id in local_ids()]


def _info(dataset_id: str) -> DatasetInfo:
    folder = datasets_root() / dataset_id
    try:
        metadata = MinariStorage.read_raw_metadata(folder / "data")
        environment = stored_environment(metadata)["id"]
        low, high = stored_references(metadata, environment)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return DatasetInfo(
            id=dataset_id,
            environment=environment,
            episodes=int(metadata["total_episodes"]),
            steps=int(metadata["total_steps"]),
            format=str(metadata["data_format"]),
            size_mb=size / 1e6,
            ref_min_score=low,
            ref_max_score=high,
        )
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return DatasetInfo(
            id=dataset_id, environment="", episodes=0, steps=0, format="", size_mb=0.0,
            ref_min_score=None, ref_max_score=None, problem=problem,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ColumnStats:
    """One column of the transitions (`observation 3`, `achieved_goal 0`, `action 1`, `reward`)."""

    name: str
    minimum: float
    maximum: float
    mean: float
    std: float
    distinct: int


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """What `data show` prints."""

    info: DatasetInfo
    observation_space: str
    action_space: str
    flattening: tuple[tuple[str, int], ...]
    """Path ("" for a Box) and dimensions of each part of a flat observation, in order."""
    columns: tuple[ColumnStats, ...]
    returns: Mapping[str, float]
    """mean, std, min, max, best_tenth (mean of the best tenth of the episodes)."""
    lengths: Mapping[str, float]
    """mean, min, max steps of an episode."""
    terminations: int
    truncations: int
    fingerprint: str
    metadata: Mapping[str, Any]


def describe(dataset_id: str) -> DatasetDescription:
    """Statistics and metadata of a local data set; the `UserError`s of `load_episodes`."""
    episodes = load_episodes(dataset_id)
    dataset_id = episodes.spec.dataset_id
    storage = local_storage(dataset_id)
    raw = MinariStorage.read_raw_metadata(storage.data_path)
    hidden = {"observation_space", "action_space", "env_spec", "eval_env_spec", OWN_METADATA}
    leaves = observation_leaves(storage.observation_space)
    returns = episodes.returns
    spread = {"std": float(returns.std()), "best_tenth": float(best_tenth(returns).mean())}
    return DatasetDescription(
        info=_info(dataset_id),
        observation_space=str(storage.observation_space),
        action_space=str(storage.action_space),
        flattening=leaves,
        columns=_column_stats(episodes, leaves),
        returns={**_summary(returns), **spread},
        lengths=_summary(episodes.lengths),
        terminations=int(episodes.terminated.sum()),
        truncations=int(episodes.truncated.sum()),
        fingerprint=episodes.spec.fingerprint,
        metadata={
            **{key: value for key, value in raw.items() if key not in hidden},
            **own_metadata(dataset_id),
        },
    )


def _summary(values: NDArray[Any]) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _column_stats(episodes: Episodes, leaves: tuple[tuple[str, int], ...]) -> tuple[ColumnStats, ...]:
    names = [f"{path or 'observation'} {index}" for path, size in leaves for index in range(size)]
    names += [f"action {index}" for index in range(episodes.spec.action_dim)] + ["reward"]
    columns = [*episodes.observations.T, *episodes.actions.T, episodes.rewards]
    return tuple(
        ColumnStats(
            name=name,
            minimum=float(column.min()),
            maximum=float(column.max()),
            mean=float(column.mean(dtype=np.float64)),
            std=float(column.std(dtype=np.float64)),
            distinct=len(np.unique(column)),
        )
        for name, column in zip(names, columns, strict=True)
    )


def download_minari(dataset_id: str) -> str:
    """Download a data set from Minari's hub, unless it is here already; returns its local id.

    `UserError` where the hub does not know it or cannot be reached; nothing half-downloaded is left.
    """
    local_id = dataset_id.partition("://")[2].partition("/")[2] or dataset_id
    if dataset_folder(local_id).exists():
        return local_id
    with staging_folder(local_id) as staging:
        try:
            _download(dataset_id, staging)
        except ImportError as error:
            raise UserError('Minari\'s hub needs a further package: pip install "minari[hf]"') from error
        except Exception as error:  # the hub's clients raise errors of many libraries
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"data set {dataset_id} cannot be downloaded from Minari's hub: {reason}"
            ) from error
        # A combined data set brings its parts with it.
        folders = (path.parents[1] for path in staging.glob("**/data/metadata.json"))
        arrived = {folder.relative_to(staging).as_posix() for folder in folders}
        if local_id not in arrived:
            raise UserError(f"data set {dataset_id} cannot be downloaded: Minari's hub sent nothing for it")
        for part in sorted(arrived):
            if part == local_id or not dataset_folder(part).exists():
                install(staging, part)
    return local_id


def _download(dataset_id: str, folder: Path) -> None:
    """Minari's own download, quietly and into `folder`: it knows the environment variable only."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            minari.download_dataset(dataset_id)
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
