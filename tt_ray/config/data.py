"""Which trajectories, what is done to them, and how they become tokens; and how to make them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from tt_ray.config.rules import MAX_BINS, at_least, each, fraction, positive, require


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which trajectories, and how rewards become values."""

    id: str
    """Minari id (`mujoco/hopper/medium-v0`) or a D4RL v2 name (`hopper-medium-replay-v2`)."""
    discount: float = 0.99
    """Discount of the reward-to-go in the value token, and of rewards in the search."""
    terminal_penalty: float | None = None
    """Reward put in place of the last one of an episode that really terminated; None leaves it."""
    observation_dims: int | None = None
    """Keep only the first so many flattened observation dimensions; None keeps all."""
    validation_fraction: float = 0.05
    """Share of the episodes held out for the validation loss."""
    split_seed: int = 0
    """Seed of the train/validation split."""
    fraction: float = 1.0
    """Share of the training episodes to learn from, nested; held-out episodes and bins stay as they are."""

    observation_keys: tuple[str, ...] | None = None
    """Parts of a Dict observation to keep, such as [observation]; None: all (of which a goal model's
    observations never include the desired goal)."""
    delayed_rewards: bool = False
    """Pay an episode's whole return with its last step, and nothing before: sparse rewards."""
    hidden_fraction: float = 0.0
    """Probability with which each observation value is hidden from the model: partial observation."""

    def __post_init__(self) -> None:
        require(bool(self.id.strip()), "dataset.id", "must not be empty")
        each("dataset", self, "discount fraction", lambda value: 0 < value <= 1, "lie in (0, 1]")
        fraction("dataset", self, "hidden_fraction")
        keys = self.observation_keys
        require(
            keys is None or len(keys) == len(set(keys)) > 0,
            "dataset.observation_keys",
            "must name some, once each",
        )
        fraction("dataset", self, "validation_fraction")
        at_least(1, "dataset", self, "observation_dims")


@dataclass(frozen=True, kw_only=True)
class DiscretizerConfig:
    """How real values become tokens."""

    strategy: Literal["uniform", "quantile"] = "quantile"
    """uniform: bins of one width. quantile: bins of one count."""
    num_bins: int = 100
    """Of each dimension: the size of a token's vocabulary."""

    def __post_init__(self) -> None:
        limits = f"must lie between 2 and {MAX_BINS} (tokens are 16-bit at most), not {self.num_bins}"
        require(2 <= self.num_bins <= MAX_BINS, "discretizer.num_bins", limits)


@dataclass(frozen=True, kw_only=True)
class GoalConfig:
    """Goal-conditioned models: the goal's tokens come before the trajectory (hindsight relabelling)."""

    relabel: Literal["last", "future"] = "last"
    """Which later state of a window's episode is its goal: the last one, or any after the window's first."""
    dims: tuple[int, ...] | None = None
    """Observation dimensions that form a goal; None: the achieved goal where there is one, or all."""

    def __post_init__(self) -> None:
        dims = self.dims
        require(
            dims is None or len(dims) == len(set(dims)) > 0,
            "goal.dims",
            "must name some dimensions, once each",
        )
        require(dims is None or min(dims) >= 0, "goal.dims", "counts dimensions from 0")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """How `collect` makes a data set: who acts, and where."""

    LATER: ClassVar = ("method", "segment_cells", "waypoint_noise")
    """Settings younger than collected data sets, which must stay what they are."""

    environment: str
    """Gymnasium id (`Hopper-v5`) or import path (`package.module:EnvId`)."""
    method: Literal["random_search", "waypoints"] = "random_search"
    """random_search: the learning history of linear policies (augmented random search). waypoints: a
    controller that walks through a point maze."""
    steps: int = 200_000
    """Environment steps to record, at least."""
    segment_cells: int | None = None
    """Waypoints: walk between random cells that are at most so many cells apart, wherever the goal is
    (undirected data); None: walk from the environment's start to its goal."""
    waypoint_noise: float = 0.5
    """Waypoints: standard deviation of normal noise on every action, in halves of the action range."""
    directions: int = 8
    """Directions tried in an iteration, each forwards and backwards."""
    top_directions: int = 4
    """Directions that the update uses."""
    step_size: float = 0.02
    """Of an update; it is divided by the standard deviation of the returns that it is made from."""
    noise: float = 0.03
    """Standard deviation of a direction's entries."""
    action_noise: float = 0.0
    """Standard deviation of normal noise on every recorded action, in halves of the action range."""
    alive_bonus: float = 0.0
    """Taken off every step's reward while learning (Hopper pays 1 for being upright); the record keeps it."""
    max_steps: int | None = None
    """Cut an episode after so many steps; None: the environment's own limit."""
    final_episodes: int = 20
    """Episodes that the final policy is scored on; they are no part of the data set."""
    seed: int = 0
    """Of everything that is random: the same settings give the same data."""

    def __post_init__(self) -> None:
        counts = "steps directions top_directions final_episodes max_steps segment_cells"
        at_least(1, "collect", self, counts)
        at_least(0, "collect", self, "action_noise waypoint_noise")
        positive("collect", self, "step_size noise")
        many = f"{self.top_directions} is more than collect.directions = {self.directions}"
        require(self.top_directions <= self.directions, "collect.top_directions", many)
        walks = self.method == "waypoints" or self.segment_cells is None
        require(walks, "collect.segment_cells", "is a setting of collect.method = waypoints")

    def identity(self) -> dict[str, Any]:
        """The settings that tell data sets apart; later ones only where they differ from their defaults."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = {field.name: field.default for field in fields(self) if field.name in self.LATER}
        return {name: value for name, value in given.items() if name not in usual or value != usual[name]}
