"""One experiment as frozen dataclasses, the rules they must obey, and the fingerprint of each stage.

Plain dataclasses only: the model, the training loop and the planner need nothing else to run. Reading YAML
and checking types is `experiment_file.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tt_ray.errors import UserError

MAX_BINS = 32766  # int16 tokens, with one value left for the stop token


def require(condition: bool, key: str, message: str) -> None:
    """Raise a `UserError` naming the configuration key `key` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: {message}")


def _each(section: str, config: Any, names: str, fine: Callable[[Any], bool], must: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(value in (None, "auto") or fine(value), f"{section}.{name}", f"must {must}, not {value}")


def _at_least(minimum: int, section: str, config: Any, names: str) -> None:
    _each(section, config, names, lambda value: value >= minimum, f"be at least {minimum}")


def _positive(section: str, config: Any, names: str) -> None:
    _each(section, config, names, lambda value: value > 0, "be positive")


def _fraction(section: str, config: Any, names: str) -> None:
    _each(section, config, names, lambda value: 0 <= value < 1, "lie in [0, 1)")


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

    def __post_init__(self) -> None:
        require(bool(self.id.strip()), "dataset.id", "must not be empty")
        _each("dataset", self, "discount fraction", lambda value: 0 < value <= 1, "lie in (0, 1]")
        _fraction("dataset", self, "validation_fraction")
        _at_least(1, "dataset", self, "observation_dims")


@dataclass(frozen=True, kw_only=True)
class DiscretizerConfig:
    """How real values become tokens."""

    strategy: Literal["uniform", "quantile"] = "quantile"
    num_bins: int = 100

    def __post_init__(self) -> None:
        limits = f"must lie between 2 and {MAX_BINS} (tokens are 16-bit at most), not {self.num_bins}"
        require(2 <= self.num_bins <= MAX_BINS, "discretizer.num_bins", limits)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size of the Transformer; the defaults are the paper's."""

    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    context_transitions: int = 10
    """Transitions in a training window."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, "model", self, "num_layers num_heads embed_dim")
        _fraction("model", self, "dropout")
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
    batch_size: int = 256
    """Windows in the global batch, shared by all workers."""
    learning_rate: float = 6e-4
    warmup_steps: int = 2_000
    final_learning_rate_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    observation_weight: float = 1.0
    action_weight: float = 5.0
    reward_weight: float = 1.0
    value_weight: float = 1.0
    log_every: int = 20
    """Steps between two points of the training curves."""
    validate_every: int = 1_000
    """Steps between two validations, each of which writes a checkpoint."""
    validation_windows: int = 1_024
    """Windows of the held-out episodes that a validation looks at, at most."""

    def __post_init__(self) -> None:
        _at_least(1, "training", self, "steps batch_size log_every validate_every validation_windows")
        _at_least(0, "training", self, "warmup_steps weight_decay")
        _at_least(0, "training", self, "observation_weight action_weight reward_weight value_weight")
        _positive("training", self, "learning_rate gradient_clip")
        _fraction("training", self, "beta1 beta2")
        final = "final_learning_rate_fraction"
        _each("training", self, final, lambda value: 0 <= value <= 1, "lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """Beam search; the defaults are the authors' for Hopper and Walker2d."""

    objective: Literal["return"] = "return"
    horizon: int = 15
    beam_width: int = 128
    n_expand: int = 2
    k_act: int | None = None
    """Sample each action token among the k most likely; None: all; 1: greedy."""
    cdf_act: float | None = 0.6
    """Drop the least likely action tokens that together hold less than this mass; None keeps all."""
    k_obs: int = 1
    """Sample each observation token among the k most likely; 1: greedy."""
    plan_every: int = 1
    """Environment steps taken from one plan."""
    max_context_transitions: int = 5
    """Transitions given to the search: the past ones and the present, partial one."""
    window: int | None = None
    """Most transitions that the model sees during the search; None: what it was trained on."""
    keep: int | None = None
    """Whole transitions that stay when the window is full; None: max_context_transitions - 1."""

    def __post_init__(self) -> None:
        _at_least(1, "planner", self, "horizon beam_width n_expand k_act k_obs plan_every")
        _at_least(1, "planner", self, "max_context_transitions")
        _fraction("planner", self, "cdf_act")
        short = f"{self.plan_every} steps cannot come from a plan of planner.horizon = {self.horizon}"
        require(self.plan_every <= self.horizon, "planner.plan_every", short)

    def resolve_window(self, context_transitions: int) -> tuple[int, int]:
        """Window and keep for a model trained on `context_transitions`; `UserError` where they cannot be."""
        window = context_transitions if self.window is None else self.window
        default_keep = max(1, min(self.max_context_transitions - 1, window - 1))
        keep = default_keep if self.keep is None else self.keep
        require(
            window <= context_transitions,
            "planner.window",
            f"{window} is larger than the model's context of {context_transitions} transitions "
            "(model.context_transitions)",
        )
        require(window >= 2, "planner.window", f"must be at least 2, not {window}")
        between = f"must lie between 1 and planner.window - 1 = {window - 1}"
        require(1 <= keep < window, "planner.keep", f"{between}, not {keep}")
        require(
            self.max_context_transitions <= window,
            "planner.max_context_transitions",
            f"{self.max_context_transitions} is larger than the window of {window} transitions "
            "(planner.window, or else model.context_transitions)",
        )
        return window, keep


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Closed-loop episodes and how their scores are summarised."""

    episodes: int = 20
    first_seed: int = 10_000
    """Episode i is reset with seed first_seed + i: the same starts for every planner compared."""
    max_steps: int | None = None
    """Cut episodes after so many steps; None: the environment's own limit."""
    confidence: float = 0.95
    bootstrap_samples: int = 10_000

    def __post_init__(self) -> None:
        _at_least(1, "evaluation", self, "episodes bootstrap_samples max_steps")
        _at_least(0, "evaluation", self, "first_seed")
        _each("evaluation", self, "confidence", lambda value: 0 < value < 1, "lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """How `collect` makes a data set: augmented random search, its learning history recorded."""

    environment: str
    """Gymnasium id (`Hopper-v5`) or import path (`package.module:EnvId`)."""
    steps: int = 200_000
    """Environment steps to record, at least; learning stops there."""
    directions: int = 8
    """Directions tried in an iteration, each forwards and backwards."""
    top_directions: int = 4
    """Directions that the update uses."""
    step_size: float = 0.02
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

    def __post_init__(self) -> None:
        _at_least(1, "collect", self, "steps directions top_directions final_episodes max_steps")
        _at_least(0, "collect", self, "action_noise")
        _positive("collect", self, "step_size noise")
        many = f"{self.top_directions} is more than collect.directions = {self.directions}"
        require(self.top_directions <= self.directions, "collect.top_directions", many)


DecoderName = Literal["auto", "native", "compiled", "eager"]


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What the run may use; nothing here changes what a stage computes, but for a decoder's rounding."""

    workers: int | Literal["auto"] = "auto"
    """Training workers; auto: one for each GPU, or else min(2, CPUs)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    evaluation_actors: int | Literal["auto"] = "auto"
    """Actors that run episodes; auto: one for each CPU, four to a GPU."""
    episodes_per_actor: int = 8
    """Episodes that one actor plans for at once."""
    decoder: DecoderName = "auto"
    """How the model decodes while planning; auto: native (C++) on a CPU, graphs (CUDA) on a GPU."""
    storage: str = "runs"
    """Folder for models and evaluations; on several hosts, a shared one."""
    max_failures: int = 3
    """Times a crashed worker or actor is replaced before the run gives up."""

    def __post_init__(self) -> None:
        _at_least(1, "resources", self, "workers evaluation_actors episodes_per_actor")
        _at_least(0, "resources", self, "gpus_per_worker max_failures")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where results are logged."""

    uri: str | None = None
    """MLflow store; None: MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the working folder."""
    experiment: str | None = None
    """MLflow experiment; None: the experiment file's name."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything about one experiment; `sweeps/*.yaml` are such files."""

    name: str
    dataset: DatasetConfig
    question: str = ""
    discretizer: DiscretizerConfig = field(default_factory=DiscretizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    collect: CollectConfig | None = None
    """When given and the data set is not there, `run` collects it first."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seeds: tuple[int, ...] = (0,)
    """Training seeds: one model each."""

    def __post_init__(self) -> None:
        """Refuse combinations that no section can see alone."""
        require(bool(self.name.strip()), "name", "must not be empty")
        require(len(self.seeds) >= 1, "seeds", "needs at least one training seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", "names a seed twice")
        require(all(seed >= 0 for seed in self.seeds), "seeds", "must not be negative")
        self.planner.resolve_window(self.model.context_transitions)
        workers, batch = self.resources.workers, self.training.batch_size
        few = f"{batch} windows cannot be shared by resources.workers = {workers}: raise it, or lower that"
        require(workers == "auto" or batch >= workers, "training.batch_size", few)
        if self.dataset.terminal_penalty is not None:
            require(
                self.discretizer.num_bins >= 4,
                "discretizer.num_bins",
                "must be at least 4 with dataset.terminal_penalty, which needs a bin of its own",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A (nested) configuration dataclass as plain JSON data."""
    return json.loads(json.dumps(asdict(config)))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"num_layers": 2}}` as `{"model.num_layers": 2}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
