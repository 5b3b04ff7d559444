"""Real data on a fresh machine: the learning history of a random search, poor to good, as a Minari data set.

Until the data set is written, work is kept in a hidden folder beside the data sets, so that a crash loses
little and changes nothing.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from minari.dataset.minari_storage import MinariStorage

from tt_ray.config import CollectConfig, to_dict
from tt_ray.data.d4rl_names import reference_scores
from tt_ray.data.minari_folder import OWN_METADATA, check_new_id, dataset_folder, datasets_root
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.errors import UserError
from tt_ray.evaluation.random_search import (
    LinearPolicy,
    Search,
    advance,
    environment,
    final_return,
    learning_episode,
    random_policy_return,
    start,
    trials,
    undiscounted_return,
)
from tt_ray.fingerprints import fingerprint

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map(function, items)`: the results in the order of the items; both pickle."""
Progress = Callable[[int, int, str], None]
"""`progress(steps_done, steps_total, message)` after every iteration."""

STEPS_PER_SHARD = 10_000  # a crash loses at most about so many environment steps: a second or two
RANDOM_EPISODES = 20


@dataclass(frozen=True, kw_only=True)
class CollectReport:
    """What was collected; returns are undiscounted."""

    dataset_id: str
    episodes: int
    steps: int
    mean_return: float
    best_tenth_return: float
    """Mean of the best tenth of the episodes."""
    final_policy_returns: tuple[float, ...]
    """Of the learned policy, unperturbed, in episodes that are not part of the data set."""
    final_policy_return: float
    """Their mean."""
    random_return: float
    """Mean return of uniformly random actions."""
    seconds: float
    reused: bool
    """The data set was there already."""


def collect(
    dataset_id: str,
    config: CollectConfig,
    *,
    map: Map = map,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> CollectReport:
    """Learn by random search and write the learning history, poor to good, as the Minari set `dataset_id`.

    A data set collected with the same settings is reused (`overwrite` makes it anew). Finished episodes are
    kept on disk: interrupted at any moment, the same call goes on and ends with the same data set. The
    metadata holds the settings, the final policy and its returns, and those of random actions.

    Raises `UserError`: the id is malformed, taken by a data set made otherwise, or being collected by another
    process; the environment is unknown or cannot be used; the folder cannot be written.
    """
    began = time.monotonic()
    identity = fingerprint("collect", to_dict(config))
    folder = WorkFolder(dataset_id, identity)
    if check_new_id(dataset_id, overwrite=True).exists() and not overwrite:
        metadata = _collected_before(dataset_id, config, identity)
        if folder.path.exists():  # left by a crash after the data set was written, or in use
            with suppress(UserError), folder:
                folder.remove()
        return _report(dataset_id, metadata, time.monotonic() - began, reused=True)
    env = environment(config)
    with folder:
        policy = _learn(config, folder, map, progress).policy
        metadata = _metadata(config, identity, policy, folder, map)
        low, high = _references(config.environment, metadata)
        episodes = (replace(e, observations=env.unflatten(e.observations)) for e in folder.episodes())
        write_dataset(
            dataset_id,
            episodes,
            environment=config.environment,
            observation_space=env.env.observation_space,
            action_space=env.action_space,
            ref_min_score=low,
            ref_max_score=high,
            algorithm_name="Augmented random search (ARS V2-t)",
            description="The learning history of a linear policy, in the order in which it was recorded.",
            metadata=metadata,
            overwrite=overwrite,
        )
        folder.remove()
    return _report(dataset_id, metadata, time.monotonic() - began, reused=False)


def _learn(config: CollectConfig, folder: WorkFolder, map: Map, progress: Progress | None) -> Search:
    """The search's last state; its episodes, and all of its states along the way, go to `folder`."""
    search = folder.resume() or start(config)
    saved = search.steps
    unsaved: list[RecordedEpisode] = []
    while search.steps < config.steps:
        run = functools.partial(learning_episode, config, search.policy)
        episodes = list(map(run, trials(config, search.iteration)))
        search = advance(config, search, episodes)
        unsaved += episodes
        if search.steps - saved >= STEPS_PER_SHARD or search.steps >= config.steps:
            folder.save(search, unsaved)
            saved, unsaved = search.steps, []
        if progress is not None:
            returns = [undiscounted_return(episode) for episode in episodes]
            latest = f"mean return {np.mean(returns):.0f}, best {max(returns):.0f}"
            progress(search.steps, config.steps, f"iteration {search.iteration}: {latest}")
    return search


def _metadata(
    config: CollectConfig, identity: str, policy: LinearPolicy, folder: WorkFolder, map: Map
) -> dict[str, Any]:
    """What the data set says of itself: settings, policy, and the returns that `CollectReport` tells."""
    returns = np.array([undiscounted_return(episode) for episode in folder.episodes()])
    best = np.sort(returns)[-max(1, len(returns) // 10) :]
    final = map(functools.partial(final_return, config, policy), range(config.final_episodes))
    random = map(functools.partial(random_policy_return, config), range(RANDOM_EPISODES))
    return {
        "collect": to_dict(config),
        "collect_fingerprint": identity,
        "history": {
            "episodes": len(returns),
            "steps": sum(len(episode.rewards) for episode in folder.episodes()),
            "mean_return": float(returns.mean()),
            "best_tenth_return": float(best.mean()),
        },
        "final_policy_returns": list(final),
        "random_returns": list(random),
        "final_policy": {key: value.tolist() for key, value in vars(policy).items()},
    }


def _references(environment: str, metadata: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns that count as score 0 and 100: D4RL's, or else random actions and the final policy."""
    known = reference_scores(environment)
    if known != (None, None):
        return known
    low, high = (float(np.mean(metadata[key])) for key in ("random_returns", "final_policy_returns"))
    return (low, high) if high > low else (None, None)


def _collected_before(dataset_id: str, config: CollectConfig, identity: str) -> dict[str, Any]:
    """Metadata of the data set that is there; `UserError` unless it was collected with the same settings."""
    try:
        raw = MinariStorage.read_raw_metadata(dataset_folder(dataset_id) / "data")
    except (OSError, ValueError) as error:
        raise UserError(f"data set {dataset_id} exists, but is damaged: overwrite it ({error})") from error
    metadata = raw.get(OWN_METADATA, {}).get("metadata", {})
    if metadata.get("collect_fingerprint") == identity:
        return metadata
    before = metadata.get("collect", {})
    wanted = to_dict(config).items()
    differ = [f"{key} {before[key]}, not {value}" for key, value in wanted if before.get(key, value) != value]
    how = f"with other settings ({'; '.join(differ)})" if differ else "in another way"
    raise UserError(f"data set {dataset_id} exists, made {how}: choose another id, or overwrite it")


def _report(dataset_id: str, metadata: Mapping[str, Any], seconds: float, *, reused: bool) -> CollectReport:
    return CollectReport(
        dataset_id=dataset_id,
        **metadata["history"],
        final_policy_returns=tuple(metadata["final_policy_returns"]),
        final_policy_return=float(np.mean(metadata["final_policy_returns"])),
        random_return=float(np.mean(metadata["random_returns"])),
        seconds=seconds,
        reused=reused,
    )


class WorkFolder:
    """The unfinished collection of one data set on disk; a context manager that holds its lock.

    Numbered shards, each written at once: the search after some iterations, and the episodes that led there.
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

    def save(self, search: Search, episodes: Sequence[RecordedEpisode]) -> None:
        """Add a shard: `search`, and the episodes since the last one."""
        path = self.path / f"{len(self._shards()):06d}.npz"
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **vars(search), **_pack(episodes))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def resume(self) -> Search | None:
        """The search after the last whole shard; damaged shards, and those after them, are dropped."""
        search = None
        paths = self._shards()
        for index, path in enumerate(paths):
            try:
                with np.load(path) as shard:
                    search = _unpack_search(shard)
                    for _ in _unpack_episodes(shard):
                        pass
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                for damaged in paths[index:]:
                    damaged.unlink()
                break
        return search

    def episodes(self) -> Iterator[RecordedEpisode]:
        """All episodes so far, in the order in which they were saved."""
        for path in self._shards():
            with np.load(path) as shard:
                yield from _unpack_episodes(shard)

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


def _unpack_search(shard: Mapping[str, Any]) -> Search:
    return Search(shard["weights"], shard["mean"], shard["m2"], int(shard["steps"]), int(shard["iteration"]))


def _unpack_episodes(shard: Mapping[str, Any]) -> Iterator[RecordedEpisode]:
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
