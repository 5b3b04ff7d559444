"""Episodes that are recorded: this process's environment, seeds of their own, and the loop that runs one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_ray.config import CollectConfig
from tt_ray.data.minari_writer import RecordedEpisode
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import FlatEnvironment, make_environment, random_return

# What a random stream is for: the first part of its SeedSequence's spawn key.
DIRECTION, LEARNING, FINAL, RANDOM, WALK = range(5)


def environment(config: CollectConfig) -> FlatEnvironment:
    """This process's environment, built once: every episode resets it with a seed of its own."""
    return _make(config.environment, config.max_steps)


def episode_seed(config: CollectConfig, *key: int) -> int:
    """The seed of the episode that `key` names: what it is for, and its numbers."""
    return int(np.random.SeedSequence(config.seed, spawn_key=key).generate_state(1)[0])


def action_noise(env: FlatEnvironment, seed: int, spread: float) -> Callable[[], NDArray[np.float64]]:
    """Draws of normal noise [M] on an action; `spread` is its deviation in halves of the action range."""
    stream = np.random.default_rng([seed, 2])  # apart from the environment's own stream, default_rng(seed)
    space = env.action_space
    scale = spread * (space.high - space.low) / 2 if spread > 0 else np.float32(0)
    return lambda: scale * stream.standard_normal(len(space.low))


def record(
    env: FlatEnvironment,
    act: Callable[[NDArray[np.float32]], ArrayLike],
    seed: int,
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    arrived: Callable[[NDArray[np.float32]], bool] | None = None,
) -> RecordedEpisode:
    """One episode of `act` (observation [N] to action [M]), its actions as the environment took them.

    `options` are the reset's; where `arrived` says so of an observation, the record ends, truncated. Raises
    `UserError` where the environment gives a number that is not finite.
    """
    observation, _ = env.reset(seed=seed, options=None if options is None else dict(options))
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        action = env.clip(act(observation))
        observation, reward, terminated, truncated, _ = env.step(action)
        truncated = truncated or (not terminated and arrived is not None and arrived(observation))
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    if not (np.isfinite(rewards).all() and np.isfinite(observations).all()):
        raise UserError(f"{env.unwrapped} gave a number that is not finite in the episode of seed {seed}")
    last = np.arange(1, len(rewards) + 1) == len(rewards)
    return RecordedEpisode(
        seed=seed,
        behavior_policy=name,
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.asarray(rewards, dtype=np.float32),
        terminations=last & terminated,
        truncations=last & truncated,
    )


def random_policy_return(config: CollectConfig, episode: int) -> float:
    """Undiscounted return of uniformly random actions."""
    return random_return(environment(config), episode_seed(config, RANDOM, episode))


def undiscounted_return(episode: RecordedEpisode) -> float:
    """Sum of the episode's rewards."""
    return float(episode.rewards.sum(dtype=np.float64))


@functools.lru_cache(maxsize=1)
def _make(environment_id: str, max_steps: int | None) -> FlatEnvironment:
    return make_environment({"id": environment_id}, max_steps=max_steps)
