"""Augmented random search: a linear policy on normalised observations, tried along random directions.

Mania et al. 2018, "Simple random search provides a competitive approach to reinforcement learning".
Everything is a function of the configuration: every episode has its own seed, and episodes are merged in a
fixed order, so that it does not matter where or in which order they ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import CollectConfig
from tt_ray.data.minari_writer import RecordedEpisode
from tt_ray.evaluation.environments import FlatEnvironment
from tt_ray.evaluation.recording import (
    DIRECTION,
    FINAL,
    LEARNING,
    action_noise,
    environment,
    episode_seed,
    record,
    undiscounted_return,
)


@dataclass(frozen=True)
class LinearPolicy:
    """A linear policy on normalised observations."""

    weights: NDArray[np.float64]  # [M, N]
    mean: NDArray[np.float64]  # [N]
    std: NDArray[np.float64]  # [N]


@dataclass(frozen=True)
class Search:
    """The search between two iterations: the iterate and what was seen so far."""

    weights: NDArray[np.float64]  # [M, N]
    mean: NDArray[np.float64]  # [N] of all observations acted on
    m2: NDArray[np.float64]  # [N] their summed squared deviations
    steps: int = 0  # observations acted on: the environment steps recorded
    iteration: int = 0

    @property
    def policy(self) -> LinearPolicy:
        """The present policy; dimensions that never changed are not scaled."""
        std = np.sqrt(self.m2 / max(self.steps, 1))
        return LinearPolicy(self.weights, self.mean, np.where(std > 1e-7, std, 1.0))


@dataclass(frozen=True)
class Trial:
    """One episode of an iteration: which direction, and forwards (+1) or backwards (-1)."""

    iteration: int
    direction: int
    sign: int


def linear_policy_action(
    weights: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    observation: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Action [M] of a linear policy [M, N] for an observation [N], not yet clipped to the bounds."""
    return weights @ ((observation - mean) / std)


def roll_out(
    env: FlatEnvironment, policy: LinearPolicy, seed: int, name: str, spread: float = 0.0
) -> RecordedEpisode:
    """One recorded episode of `policy`; `spread` is the noise on its actions, as in `action_noise`."""
    noise = action_noise(env, seed, spread)

    def act(observation: NDArray[np.float32]) -> NDArray[np.float64]:
        return linear_policy_action(policy.weights, policy.mean, policy.std, observation) + noise()

    return record(env, act, seed, name)


def learning_episode(config: CollectConfig, policy: LinearPolicy, trial: Trial) -> RecordedEpisode:
    """The episode of one trial: `policy`, perturbed along the trial's direction."""
    direction = _direction(config, trial.iteration, trial.direction, policy.weights.shape)
    perturbed = replace(policy, weights=policy.weights + trial.sign * config.noise * direction)
    seed = episode_seed(config, LEARNING, trial.iteration, trial.direction, int(trial.sign > 0))
    sign = "+" if trial.sign > 0 else "-"
    name = f"ars iteration {trial.iteration} direction {trial.direction} {sign}"
    return roll_out(environment(config), perturbed, seed, name, config.action_noise)


def final_return(config: CollectConfig, policy: LinearPolicy, episode: int) -> float:
    """Undiscounted return of the learned policy, unperturbed, in an episode that is not recorded."""
    env = environment(config)
    return undiscounted_return(roll_out(env, policy, episode_seed(config, FINAL, episode), "final policy"))


def start(config: CollectConfig) -> Search:
    """The search before its first iteration: the policy that does nothing."""
    env = environment(config)
    size = env.observation_space.shape[0]
    return Search(np.zeros((env.action_space.shape[0], size)), np.zeros(size), np.zeros(size))


def trials(config: CollectConfig, iteration: int) -> list[Trial]:
    """The episodes of an iteration in their order."""
    return [Trial(iteration, direction, sign) for direction in range(config.directions) for sign in (1, -1)]


def advance(config: CollectConfig, search: Search, episodes: Sequence[RecordedEpisode]) -> Search:
    """The search after an iteration whose trials gave `episodes`, in the order of `trials`."""
    returns = np.array(
        [undiscounted_return(e) - config.alive_bonus * len(e.rewards) for e in episodes]
    ).reshape(-1, 2)
    top = np.argsort(-returns.max(axis=1), kind="stable")[: config.top_directions]
    spread = returns[top].std()
    weights = search.weights
    if spread > 0:
        shape = search.weights.shape
        directions = np.stack([_direction(config, search.iteration, int(d), shape) for d in top])
        gain = returns[top, 0] - returns[top, 1]
        weights = weights + config.step_size / (len(top) * spread) * np.tensordot(gain, directions, axes=1)
    mean, m2, count = search.mean, search.m2, search.steps
    for episode in episodes:
        mean, m2, count = _merge(mean, m2, count, episode.observations[:-1].astype(np.float64))
    return Search(weights, mean, m2, count, search.iteration + 1)


def _merge(
    mean: NDArray[np.float64], m2: NDArray[np.float64], count: int, rows: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Mean and summed squared deviations [N] of `count` vectors and `rows` [L, N] together (Chan et al.)."""
    total = count + len(rows)
    delta = rows.mean(axis=0) - mean
    m2 = m2 + ((rows - rows.mean(axis=0)) ** 2).sum(axis=0) + delta**2 * (count * len(rows) / total)
    return mean + delta * (len(rows) / total), m2, total


def _direction(
    config: CollectConfig, iteration: int, direction: int, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    key = (DIRECTION, iteration, direction)
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key)).standard_normal(shape)
