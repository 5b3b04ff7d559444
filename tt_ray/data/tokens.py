"""A transition as D tokens in a fixed order, and whole data sets as one token array."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig, DiscretizerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import Episodes, apply_terminal_penalty, discounted_values


class Kind(IntEnum):
    """What a slot of a transition holds."""

    OBSERVATION = 0
    ACTION = 1
    REWARD = 2
    VALUE = 3


@dataclass(frozen=True)
class TokenLayout:
    """Slots of one transition: N observation dimensions, M action dimensions, reward, value."""

    observation_dim: int
    action_dim: int
    num_bins: int
    goal_slots: tuple[int, ...] = ()
    """Observation slots that form a goal, whose tokens come before the trajectory; () for none."""
    partial: bool = False
    """Whether observation tokens may be hidden: one token more."""

    @property
    def goal_dim(self) -> int:
        """G, tokens before the first transition."""
        return len(self.goal_slots)

    @property
    def hidden_token(self) -> int:
        """Token in place of an observation that is hidden; one past the stop token."""
        return self.num_bins + 1

    @property
    def slots(self) -> int:
        """D, tokens a transition takes."""
        return self.observation_dim + self.action_dim + 2

    @property
    def reward_slot(self) -> int:
        """Slot of the reward token."""
        return self.observation_dim + self.action_dim

    @property
    def value_slot(self) -> int:
        """Slot of the value token, the last."""
        return self.reward_slot + 1

    @property
    def stop_token(self) -> int:
        """Token of every slot after an episode's end: one past the last bin."""
        return self.num_bins

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of each slot, [D]."""
        observations, actions = (Kind.OBSERVATION,) * self.observation_dim, (Kind.ACTION,) * self.action_dim
        return (*observations, *actions, Kind.REWARD, Kind.VALUE)


def fit_tokens(
    episodes: Episodes, dataset: DatasetConfig, discretizer: DiscretizerConfig
) -> tuple[NDArray[np.integer], Discretizer, TokenLayout]:
    """The token array [T, D] of `episodes`, with the bins fitted to them.

    Values are the discounted reward-to-go without the present reward; a terminal penalty is applied before.
    """
    layout = TokenLayout(episodes.spec.observation_dim, episodes.spec.action_dim, discretizer.num_bins)
    rewards = apply_terminal_penalty(episodes, dataset.terminal_penalty)
    values = discounted_values(episodes, rewards, dataset.discount)
    columns = np.concatenate(
        [episodes.observations, episodes.actions, rewards[:, None], values[:, None]], axis=1, dtype=np.float32
    )
    reserved = {} if dataset.terminal_penalty is None else {layout.reward_slot: dataset.terminal_penalty}
    bins = Discretizer.fit(
        columns, strategy=discretizer.strategy, num_bins=discretizer.num_bins, reserved=reserved
    )
    return bins.encode(columns), bins, layout
