"""A transition as D tokens in a fixed order, and whole data sets as one token array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig, DiscretizerConfig, GoalConfig
from tt_ray.data.discretizer import Discretizer, token_dtype
from tt_ray.data.episodes import Episodes, discounted_values, treat_rewards
from tt_ray.data.goals import goal_slots
from tt_ray.plain import build


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

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenLayout:
        """Inverse of `to_json`, also from before there were goals.

        `TypeError` or `ValueError` where `data` is no such thing.
        """
        layout = build(cls, data)
        slots_exist = all(0 <= slot < layout.observation_dim for slot in layout.goal_slots)
        if min(layout.observation_dim, layout.action_dim, layout.num_bins) < 1 or not slots_exist:
            raise ValueError("its slots do not fit together")
        return layout

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
    episodes: Episodes,
    dataset: DatasetConfig,
    discretizer: DiscretizerConfig,
    goal: GoalConfig | None = None,
) -> tuple[NDArray[np.integer], Discretizer, TokenLayout]:
    """The token array [T, D] of `episodes`, with the bins fitted to them.

    Values are the discounted reward-to-go without the present reward; rewards are delayed, and a terminal
    penalty is applied, before. The bins are fitted to all observations, those too that are then hidden.
    """
    spec = episodes.spec
    layout = TokenLayout(
        spec.observation_dim,
        spec.action_dim,
        discretizer.num_bins,
        goal_slots=goal_slots(goal, spec),
        partial=dataset.hidden_fraction > 0,
    )
    columns = token_columns(episodes, dataset)
    reserved = {} if dataset.terminal_penalty is None else {layout.reward_slot: dataset.terminal_penalty}
    bins = Discretizer.fit(
        columns, strategy=discretizer.strategy, num_bins=discretizer.num_bins, reserved=reserved
    )
    tokens = bins.encode(columns)
    return (_hide(tokens, layout, dataset) if layout.partial else tokens), bins, layout


def token_columns(episodes: Episodes, dataset: DatasetConfig) -> NDArray[np.float32]:
    """What becomes tokens, [T, D]: rewards as they are learned from, and their values."""
    rewards = treat_rewards(episodes, dataset).rewards
    values = discounted_values(episodes, rewards, dataset.discount)
    parts = [episodes.observations, episodes.actions, rewards[:, None], values[:, None]]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _hide(tokens: NDArray[np.integer], layout: TokenLayout, dataset: DatasetConfig) -> NDArray[np.integer]:
    """`tokens` [T, D] with a share of the observations hidden: always the same, for one split_seed."""
    tokens = tokens.astype(token_dtype(layout.stop_token + 1))
    observations = tokens[:, : layout.observation_dim]
    # The second number keeps the stream apart from that of the split.
    draws = np.random.default_rng((dataset.split_seed, 1)).random(observations.shape)
    observations[draws < dataset.hidden_fraction] = layout.hidden_token
    return tokens
