"""Real data on a fresh machine, as a Minari data set: a random search's history, or walks through a maze.

What makes the episodes is a `Method`; this module runs one, keeps its work in a hidden folder beside the data
sets until the set is written, and writes it with a description of how it was made.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import gymnasium as gym
import numpy as np

from tt_ray.config import CollectConfig, to_dict
from tt_ray.data.d4rl_names import reference_scores
from tt_ray.data.episodes import best_tenth
from tt_ray.data.minari_folder import check_new_id
from tt_ray.data.minari_reader import own_metadata
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.errors import UserError
from tt_ray.evaluation.random_search import Search, advance, final_return, learning_episode, start, trials
from tt_ray.evaluation.recording import environment, random_policy_return, undiscounted_return
from tt_ray.evaluation.waypoints import Waypoints
from tt_ray.evaluation.work_folder import WorkFolder
from tt_ray.fingerprints import fingerprint

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map(function, items)`: the results in the order of the items; both pickle."""
Progress = Callable[[int, int, str], None]
"""`progress(steps_done, steps_total, message)` after every round."""

STEPS_PER_SHARD = 10_000  # a crash loses at most about so many environment steps: a second or two
RANDOM_EPISODES = 20

State = TypeVar("State")


class Method(Protocol[State]):
    """How episodes are made: in rounds, each a function of the settings and of the state before it.

    A state is a dataclass of arrays and numbers, among them `steps`, those recorded so far.
    """

    @property
    def algorithm(self) -> str:
        """What the data set calls it."""
        ...

    @property
    def description(self) -> str:
        """One line on what the data set holds."""
        ...

    def start(self) -> State:
        """The state before the first round."""
        ...

    def restore(self, saved: Mapping[str, Any]) -> State:
        """The state whose fields are `saved`."""
        ...

    def round(self, state: State) -> tuple[Callable[[Any], RecordedEpisode], Sequence[Any]]:
        """What makes an episode, and of what: one item for each episode of the round."""
        ...

    def advance(self, state: State, episodes: Sequence[RecordedEpisode]) -> State:
        """The state after a round that gave `episodes`."""
        ...

    def message(self, state: State, episodes: Sequence[RecordedEpisode]) -> str:
        """How it goes after a round, for a progress bar."""
        ...

    def findings(self, state: State, episodes: Iterable[RecordedEpisode], map: Map) -> dict[str, Any]:
        """What the metadata tells of the last state and of all episodes beside returns, as JSON data."""
        ...

    def references(self, metadata: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
        """Returns that count as score 0 and 100, where the environment has none of its own."""
        ...


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
    """Of the learned policy, unperturbed, in episodes that are not part of the data set; none if none was."""
    final_policy_return: float | None
    """Their mean."""
    success_share: float | None
    """Share of the episodes that reached the goal; None where the method knows of none."""
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
    """Make episodes as `config` says and write them as the Minari set `dataset_id`.

    A data set collected with the same settings is reused (`overwrite` makes it anew). Finished episodes are
    kept on disk: interrupted at any moment, the same call goes on and ends with the same data set. The
    metadata holds the settings, the returns, those of random actions, and what the method has found.

    Raises `UserError`: the id is malformed, taken by a data set made otherwise, or being collected by another
    process; the environment is unknown or cannot be used; the folder cannot be written.
    """
    began = time.monotonic()
    identity = fingerprint("collect", config.identity())
    folder = WorkFolder(dataset_id, identity)
    if check_new_id(dataset_id, overwrite=True).exists() and not overwrite:
        metadata = _collected_before(dataset_id, config, identity)
        if folder.path.exists():  # left by a crash after the data set was written, or in use
            with suppress(UserError), folder:
                folder.remove()
        return _report(dataset_id, metadata, time.monotonic() - began, reused=True)
    env, method = environment(config), method_of(config)
    with folder:
        state = _record(config, method, folder, map, progress)
        found = method.findings(state, folder.episodes(), map)
        metadata = {**_metadata(config, identity, folder, map), **found}
        low, high = _references(method, config.environment, metadata)
        episodes = (replace(e, observations=env.unflatten(e.observations)) for e in folder.episodes())
        write_dataset(
            dataset_id,
            episodes,
            environment=_described(config.environment),
            observation_space=env.env.observation_space,
            action_space=env.action_space,
            ref_min_score=low,
            ref_max_score=high,
            algorithm_name=method.algorithm,
            description=method.description,
            metadata=metadata,
            overwrite=overwrite,
        )
        folder.remove()
    return _report(dataset_id, metadata, time.monotonic() - began, reused=False)


def method_of(config: CollectConfig) -> Method[Any]:
    """What `config.method` names; `UserError` unless it can act in the environment."""
    if config.method == "waypoints":
        return Waypoints(config)
    environment(config)  # which says what is wrong with it, if anything is
    return RandomSearch(config)


class RandomSearch:
    """A `Method`: a random search learns linear policies, poor to good, and its whole history is recorded."""

    algorithm = "Augmented random search (ARS V2-t)"
    description = "The learning history of a linear policy, in the order in which it was recorded."

    def __init__(self, config: CollectConfig) -> None:
        self._config = config

    def start(self) -> Search:
        """The search before its first iteration."""
        return start(self._config)

    def restore(self, saved: Mapping[str, Any]) -> Search:
        """The search after some iterations."""
        weights, mean, m2 = saved["weights"], saved["mean"], saved["m2"]
        return Search(weights, mean, m2, int(saved["steps"]), int(saved["iteration"]))

    def round(self, search: Search) -> tuple[Callable[[Any], RecordedEpisode], Sequence[Any]]:
        """The trials of an iteration."""
        run = functools.partial(learning_episode, self._config, search.policy)
        return run, trials(self._config, search.iteration)

    def advance(self, search: Search, episodes: Sequence[RecordedEpisode]) -> Search:
        """The search after an iteration."""
        return advance(self._config, search, episodes)

    def message(self, search: Search, episodes: Sequence[RecordedEpisode]) -> str:
        """The latest iteration's returns."""
        returns = [undiscounted_return(episode) for episode in episodes]
        return f"iteration {search.iteration}: mean return {np.mean(returns):.0f}, best {max(returns):.0f}"

    def findings(self, search: Search, episodes: Iterable[RecordedEpisode], map: Map) -> dict[str, Any]:
        """The learned policy, and its returns without noise."""
        run = functools.partial(final_return, self._config, search.policy)
        return {
            "final_policy_returns": list(map(run, range(self._config.final_episodes))),
            "final_policy": {key: value.tolist() for key, value in vars(search.policy).items()},
        }

    def references(self, metadata: Mapping[str, Any]) -> tuple[float, float]:
        """Random actions and the final policy."""
        return float(np.mean(metadata["random_returns"])), float(np.mean(metadata["final_policy_returns"]))


def _record(
    config: CollectConfig, method: Method[Any], folder: WorkFolder, map: Map, progress: Progress | None
) -> Any:
    """The method's last state; its episodes, and states along the way, go to `folder`."""
    state = folder.resume(method.restore) or method.start()
    saved = state.steps
    unsaved: list[RecordedEpisode] = []
    while state.steps < config.steps:
        run, items = method.round(state)
        episodes = list(map(run, items))
        state = method.advance(state, episodes)
        unsaved += episodes
        if state.steps - saved >= STEPS_PER_SHARD or state.steps >= config.steps:
            folder.save(state, unsaved)
            saved, unsaved = state.steps, []
        if progress is not None:
            progress(state.steps, config.steps, method.message(state, episodes))
    return state


def _metadata(config: CollectConfig, identity: str, folder: WorkFolder, map: Map) -> dict[str, Any]:
    """What every data set says of itself: settings, returns, and those of random actions at the same task."""
    returns = np.array([undiscounted_return(episode) for episode in folder.episodes()])
    task = config if config.segment_cells is None else replace(config, max_steps=None)  # that of a segment
    random = map(functools.partial(random_policy_return, task), range(RANDOM_EPISODES))
    return {
        "collect": to_dict(config),
        "collect_fingerprint": identity,
        "history": {
            "episodes": len(returns),
            "steps": sum(len(episode.rewards) for episode in folder.episodes()),
            "mean_return": float(returns.mean()),
            "best_tenth_return": float(best_tenth(returns).mean()),
        },
        "random_returns": list(random),
    }


def _references(
    method: Method[Any], environment: str, metadata: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """Returns that count as score 0 and 100: D4RL's, or else the method's."""
    known = reference_scores(environment)
    low, high = known if known != (None, None) else method.references(metadata)
    return (low, high) if low is not None and high is not None and high > low else (None, None)


def _described(environment: str) -> str | dict[str, Any]:
    """The environment as the data set is to name it: an import path with what was registered under its id."""
    module, _, name = environment.rpartition(":")
    if not module:
        return environment
    try:
        return {**json.loads(gym.spec(name).to_json()), "id": environment}
    except (gym.error.Error, TypeError, ValueError):  # registered with a function
        return environment


def _collected_before(dataset_id: str, config: CollectConfig, identity: str) -> dict[str, Any]:
    """Metadata of the data set that is there; `UserError` unless it was collected with the same settings."""
    try:
        metadata = own_metadata(dataset_id)
    except UserError as error:
        raise UserError(f"data set {dataset_id} exists, but is damaged: overwrite it ({error})") from error
    if metadata.get("collect_fingerprint") == identity:
        return metadata
    wanted, before = to_dict(config), metadata.get("collect", {})
    if before:  # by an older release, perhaps, which did not have all settings
        usual = {field.name: field.default for field in fields(config) if field.name in config.LATER}
        before = {**usual, **before}
    differ = [
        f"{key} {before[key]}, not {value}"
        for key, value in wanted.items()
        if before.get(key, value) != value
    ]
    how = f"with other settings ({'; '.join(differ)})" if differ else "in another way"
    raise UserError(f"data set {dataset_id} exists, made {how}: choose another id, or overwrite it")


def _report(dataset_id: str, metadata: Mapping[str, Any], seconds: float, *, reused: bool) -> CollectReport:
    final = tuple(metadata.get("final_policy_returns", ()))
    return CollectReport(
        dataset_id=dataset_id,
        **metadata["history"],
        final_policy_returns=final,
        final_policy_return=float(np.mean(final)) if final else None,
        success_share=metadata.get("success_share"),
        random_return=float(np.mean(metadata["random_returns"])),
        seconds=seconds,
        reused=reused,
    )
