"""Trajectories in memory: flat arrays, episode offsets, and the description of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig
from tt_ray.plain import build


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a trained model must know of its data to act without it; saved in every checkpoint."""

    dataset_id: str
    environment: Mapping[str, Any]
    """Gymnasium's EnvSpec as JSON data; `{"id": "package.module:EnvId"}` at the least."""
    observation_keys: tuple[str, ...]
    """Leaves kept of a Dict observation in the order of flattening (sorted paths, `a/b`); () for a Box."""
    observation_dim: int
    """N, after `dataset.observation_dims` has cropped it."""
    action_dim: int
    """M."""
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    ref_min_score: float | None
    """Mean return of a random policy: normalised score 0."""
    ref_max_score: float | None
    """Mean return of the reference expert: normalised score 100."""
    fingerprint: str
    """Hash of the arrays, before any cropping, and of whether there is an environment."""
    cropped: bool = False
    """Whether some of the environment's observation dimensions are left out: by `dataset.observation_dims`,
    by `dataset.observation_keys`, or because they are the goal."""
    goal_keys: tuple[str, ...] = ()
    """Leaves of the Dict observation that hold the goal which the environment asks for; a goal model only."""
    leaf_sizes: tuple[int, ...] = ()
    """Dimensions of each of goal_keys and then of each of observation_keys; a goal model only."""

    @property
    def goal_dim(self) -> int:
        """Dimensions of the goal that the environment asks for; 0 where it asks for none."""
        return sum(self.leaf_sizes[: len(self.goal_keys)])

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`; without goals, what it was before there were any."""
        data = asdict(self)
        return {key: value for key, value in data.items() if value or key not in ("goal_keys", "leaf_sizes")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataSpec:
        """Inverse of `to_json`; `TypeError` or `ValueError` where `data` is no such thing."""
        spec = build(cls, data)
        widths = {len(spec.action_low), len(spec.action_high), spec.action_dim}
        if len(widths) != 1 or min(spec.observation_dim, spec.action_dim, *spec.leaf_sizes, 1) < 1:
            raise ValueError("its dimensions do not fit together")
        return spec


@dataclass(frozen=True)
class Episodes:
    """E episodes of T transitions in all, end to end.

    Episode e is the rows offsets[e]:offsets[e + 1]. A row's observation is the one its action was taken in;
    an episode's final observation, after the last action, is not kept.
    """

    observations: NDArray[np.float32]  # [T, N]
    actions: NDArray[np.float32]  # [T, M]
    rewards: NDArray[np.float32]  # [T]
    terminated: NDArray[np.bool_]  # [T] the environment ended the episode after this row
    truncated: NDArray[np.bool_]  # [T] a time limit, or the end of the record, did
    offsets: NDArray[np.int64]  # [E + 1]
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Transitions of each episode, [E]."""
        return np.diff(self.offsets)

    @property
    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, [E]."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.offsets[:-1])


def tenth(count: int) -> int:
    """How many of `count` episodes are a tenth of them: rounded down, at least one."""
    return max(1, count // 10)


def best_tenth(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest tenth of some returns, ascending."""
    return np.sort(returns)[-tenth(len(returns)) :]


def discounted_values(
    episodes: Episodes, rewards: NDArray[np.float32], discount: float
) -> NDArray[np.float32]:
    """Reward-to-go that excludes the present reward: V_t = sum_{k>=0} discount^k r_{t+1+k}, [T].

    Janner et al. 2021, section 3.1; zero at the last row of an episode.
    """
    values = np.zeros(len(rewards), dtype=np.float64)
    last = np.zeros(len(rewards), dtype=bool)
    last[episodes.offsets[1:] - 1] = True
    running = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        running = 0.0 if last[t] else float(rewards[t + 1]) + discount * running
        values[t] = running
    return values.astype(np.float32)


def apply_terminal_penalty(episodes: Episodes, penalty: float | None) -> NDArray[np.float32]:
    """Rewards [T] with `penalty` in place of the last one of every episode that really terminated."""
    if penalty is None:
        return episodes.rewards
    return np.where(episodes.terminated, np.float32(penalty), episodes.rewards)


def delay_rewards(episodes: Episodes) -> Episodes:
    """The same episodes, each of which pays its whole return with its last row and nothing before."""
    rewards = np.zeros_like(episodes.rewards)
    rewards[episodes.offsets[1:] - 1] = episodes.returns
    return replace(episodes, rewards=rewards)


def treat_rewards(episodes: Episodes, dataset: DatasetConfig) -> Episodes:
    """The same episodes with the rewards to learn from: delayed first, the terminal penalty after that."""
    if dataset.delayed_rewards:
        episodes = delay_rewards(episodes)
    return replace(episodes, rewards=apply_terminal_penalty(episodes, dataset.terminal_penalty))
