"""What is learned: the Transformer, the critic, and the ensemble that predictions are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tt_ray.config.rules import at_least, each, fraction, positive, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size of the Transformer; the defaults are the paper's."""

    num_layers: int = 4
    num_heads: int = 4
    """Heads of each layer's attention; they share its width."""
    embed_dim: int = 128
    """Width of the vectors between the layers."""
    context_transitions: int = 10
    """Transitions in a training window."""
    dropout: float = 0.1
    """Share of the activations (embeddings, attention, residuals) left out in training."""

    def __post_init__(self) -> None:
        at_least(1, "model", self, "num_layers num_heads embed_dim")
        fraction("model", self, "dropout")
        require(
            self.context_transitions >= 2,
            "model.context_transitions",
            f"must be at least 2 (one past transition and the present one), not {self.context_transitions}",
        )
        uneven = f"{self.embed_dim} is not divisible by model.num_heads = {self.num_heads}"
        require(self.embed_dim % self.num_heads == 0, "model.embed_dim", uneven)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation; the defaults are the authors' code's, with one cosine over the whole run."""

    steps: int = 195_000
    """Updates."""
    batch_size: int = 256
    """Windows in the global batch, shared by all workers."""
    learning_rate: float = 6e-4
    """Highest one; it follows a cosine from there."""
    warmup_steps: int = 2_000
    """Steps in which the learning rate rises from 0."""
    final_learning_rate_fraction: float = 0.1
    """Of the highest learning rate, what is left at the end."""
    weight_decay: float = 0.1
    """AdamW's, of the matrices of linear layers and the heads."""
    beta1: float = 0.9
    beta2: float = 0.95
    """AdamW's decay rates of the means of gradients (`beta1`) and of their squares."""
    gradient_clip: float = 1.0
    """Largest norm of a gradient."""
    observation_weight: float = 1.0
    action_weight: float = 5.0
    reward_weight: float = 1.0
    value_weight: float = 1.0
    """Weights of the kinds of tokens in the loss."""
    bin_smoothing: float = 0.0
    """Spread a bin's gradients over its neighbours, so wide a share of the bins; 0: no.
    For little data: neighbouring bins then learn together."""
    log_every: int = 20
    """Steps between two points of the training curves."""
    validate_every: int = 1_000
    """Steps between two validations, each of which writes a checkpoint."""
    validation_windows: int = 1_024
    """Windows of the held-out episodes that a validation looks at, at most."""

    def __post_init__(self) -> None:
        at_least(1, "training", self, "steps batch_size log_every validate_every validation_windows")
        at_least(0, "training", self, "warmup_steps weight_decay")
        at_least(0, "training", self, "observation_weight action_weight reward_weight value_weight")
        positive("training", self, "learning_rate gradient_clip")
        each("training", self, "bin_smoothing", lambda value: 0 <= value < 1, "lie in [0, 1)")
        fraction("training", self, "beta1 beta2")
        final = "final_learning_rate_fraction"
        each("training", self, final, lambda value: 0 <= value <= 1, "lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The critic of implicit Q-learning and its optimisation; the defaults are its paper's for locomotion."""

    expectile: float = 0.7
    """0.5: V is the behaviour's mean; towards 1: the best action's in the data (0.9 for mazes)."""
    discount: float = 0.99
    """Of rewards, in the critic and in the search that it scores."""
    reward_shift: float = 0.0
    """Added to every reward (-1 for AntMaze), in the critic and in the search that it scores."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of each network."""
    steps: int = 1_000_000
    """Updates of all networks."""
    batch_size: int = 256
    """Transitions of one update."""
    learning_rate: float = 3e-4
    """Adam's."""
    target_rate: float = 0.005
    """Share of the way that the target networks go towards the Q networks with each update."""
    inverse_temperature: float = 3.0
    """Of the baseline iql: 0 clones the data, larger prefers actions of large advantage (10 for mazes)."""
    log_every: int = 1_000
    """Steps between two points of the training curves."""
    checkpoint_every: int = 20_000
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        each("critic", self, "expectile", lambda value: 0 < value < 1, "lie between 0 and 1")
        each("critic", self, "discount target_rate", lambda value: 0 < value <= 1, "lie in (0, 1]")
        each("critic", self, "reward_shift", math.isfinite, "be finite")
        at_least(0, "critic", self, "inverse_temperature")
        positive("critic", self, "learning_rate")
        each(
            "critic",
            self,
            "hidden",
            lambda value: bool(value) and min(value) > 0,
            "be one or more positive widths",
        )
        at_least(1, "critic", self, "steps batch_size log_every checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """The probabilistic feed-forward ensemble that predictions are compared with (PETS, Chua et al. 2018)."""

    members: int = 5
    """Networks, each trained on a bootstrap of its own."""
    hidden: tuple[int, ...] = (200, 200, 200)
    """Widths of the hidden layers of each network."""
    steps: int = 50_000
    """Updates of each network."""
    batch_size: int = 256
    """Transitions of one update."""
    learning_rate: float = 1e-3
    """AdamW's."""
    weight_decay: float = 1e-5
    """AdamW's."""
    log_every: int = 500
    """Steps between two points of the training curves."""
    checkpoint_every: int = 5_000
    """Steps between two validations, each of which writes a checkpoint; the best one is used."""

    def __post_init__(self) -> None:
        each(
            "ensemble",
            self,
            "hidden",
            lambda value: bool(value) and min(value) > 0,
            "be one or more positive widths",
        )
        positive("ensemble", self, "learning_rate")
        at_least(0, "ensemble", self, "weight_decay")
        at_least(1, "ensemble", self, "members steps batch_size log_every checkpoint_every")
