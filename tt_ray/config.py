"""One experiment as frozen dataclasses, the rules they must obey, and the fingerprint of each stage.

Plain dataclasses only: the model, the training loop and the planner need nothing else to run. Reading YAML and
checking types is `experiment_file.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tt_ray.errors import UserError

MAX_BINS = 32766  # int16 tokens, with one value left for the stop token


def require(condition: bool, key: str, message: str) -> None:
    """Raise a `UserError` naming the configuration key `key` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: {message}")


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

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(0 < self.discount <= 1, "dataset.discount", f"must lie in (0, 1], not {self.discount}")
        require(
            0 <= self.validation_fraction < 1,
            "dataset.validation_fraction",
            f"must lie in [0, 1), not {self.validation_fraction}",
        )
        require(
            self.observation_dims is None or self.observation_dims >= 1,
            "dataset.observation_dims",
            f"must be at least 1, not {self.observation_dims}",
        )


@dataclass(frozen=True, kw_only=True)
class DiscretizerConfig:
    """How real values become tokens."""

    strategy: Literal["uniform", "quantile"] = "quantile"
    num_bins: int = 100

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(
            2 <= self.num_bins <= MAX_BINS,
            "discretizer.num_bins",
            f"must lie between 2 and {MAX_BINS} (tokens are 16-bit at most), not {self.num_bins}",
        )


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
        """Refuse impossible values."""
        for name in ("num_layers", "num_heads", "embed_dim"):
            require(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(
            self.context_transitions >= 2,
            "model.context_transitions",
            f"must be at least 2 (one past transition and the present one), not {self.context_transitions}",
        )
        require(
            self.embed_dim % self.num_heads == 0,
            "model.embed_dim",
            f"{self.embed_dim} is not divisible by model.num_heads = {self.num_heads}",
        )
        require(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), not {self.dropout}")


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
        """Refuse impossible values."""
        at_least_one = ("steps", "batch_size", "log_every", "validate_every", "validation_windows")
        for name in at_least_one:
            require(getattr(self, name) >= 1, f"training.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(self.warmup_steps >= 0, "training.warmup_steps", f"must not be negative, not {self.warmup_steps}")
        require(self.learning_rate > 0, "training.learning_rate", f"must be positive, not {self.learning_rate}")
        require(self.gradient_clip > 0, "training.gradient_clip", f"must be positive, not {self.gradient_clip}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", "must lie in [0, 1)")
        for name in ("observation_weight", "action_weight", "reward_weight", "value_weight", "weight_decay"):
            require(getattr(self, name) >= 0, f"training.{name}", "must not be negative")
        fraction = self.final_learning_rate_fraction
        require(0 <= fraction <= 1, "training.final_learning_rate_fraction", "must lie in [0, 1]")


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
        """Refuse impossible values."""
        for name in ("horizon", "beam_width", "n_expand", "k_obs", "plan_every", "max_context_transitions"):
            require(getattr(self, name) >= 1, f"planner.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(self.k_act is None or self.k_act >= 1, "planner.k_act", f"must be at least 1, not {self.k_act}")
        require(
            self.cdf_act is None or 0 <= self.cdf_act < 1,
            "planner.cdf_act",
            f"must lie in [0, 1), not {self.cdf_act}",
        )
        require(
            self.plan_every <= self.horizon,
            "planner.plan_every",
            f"{self.plan_every} steps cannot come from a plan of planner.horizon = {self.horizon}",
        )

    def resolve_window(self, context_transitions: int) -> tuple[int, int]:
        """Window and keep for a model trained on `context_transitions`; `UserError` where they cannot be."""
        window = self.window if self.window is not None else context_transitions
        keep = self.keep if self.keep is not None else max(1, min(self.max_context_transitions - 1, window - 1))
        require(
            window <= context_transitions,
            "planner.window",
            f"{window} is larger than the model's context of {context_transitions} transitions "
            "(model.context_transitions)",
        )
        require(window >= 2, "planner.window", f"must be at least 2, not {window}")
        require(
            1 <= keep < window, "planner.keep", f"must lie between 1 and planner.window - 1 = {window - 1}, not {keep}"
        )
        require(
            self.max_context_transitions <= window,
            "planner.max_context_transitions",
            f"{self.max_context_transitions} is larger than the window of {window} transitions",
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
        """Refuse impossible values."""
        for name in ("episodes", "bootstrap_samples"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1,
            "evaluation.max_steps",
            f"must be at least 1, not {self.max_steps}",
        )
        require(0 < self.confidence < 1, "evaluation.confidence", "must lie between 0 and 1")
        require(self.first_seed >= 0, "evaluation.first_seed", "must not be negative")


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
    alive_bonus: float = 0.0
    """Taken off every step's reward while learning (Hopper pays 1 for being upright); recorded rewards keep it."""
    max_steps: int | None = None
    """Cut an episode after so many steps; None: the environment's own limit."""
    final_episodes: int = 20
    """Episodes of the final policy, recorded last."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("steps", "directions", "top_directions", "final_episodes"):
            require(getattr(self, name) >= 1, f"collect.{name}", f"must be at least 1, not {getattr(self, name)}")
        require(
            self.top_directions <= self.directions,
            "collect.top_directions",
            f"{self.top_directions} is more than collect.directions = {self.directions}",
        )
        require(self.step_size > 0, "collect.step_size", f"must be positive, not {self.step_size}")
        require(self.noise > 0, "collect.noise", f"must be positive, not {self.noise}")
        require(
            self.max_steps is None or self.max_steps >= 1, "collect.max_steps", f"must be at least 1, not {self.max_steps}"
        )


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What the run may use; nothing here changes what a stage computes."""

    workers: int | Literal["auto"] = "auto"
    """Training workers; auto: one for each GPU, or else min(2, CPUs)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    evaluation_actors: int | Literal["auto"] = "auto"
    """Actors that run episodes; auto: one for each CPU, four to a GPU."""
    episodes_per_actor: int = 8
    """Episodes that one actor plans for at once."""
    storage: str = "runs"
    """Folder for models and evaluations; on several hosts, a shared one."""
    max_failures: int = 3
    """Times a crashed worker or actor is replaced before the run gives up."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("workers", "evaluation_actors"):
            value = getattr(self, name)
            require(value == "auto" or value >= 1, f"resources.{name}", f"must be auto or at least 1, not {value}")
        require(
            self.episodes_per_actor >= 1,
            "resources.episodes_per_actor",
            f"must be at least 1, not {self.episodes_per_actor}",
        )
        require(self.max_failures >= 0, "resources.max_failures", "must not be negative")


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


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that identify JSON data; equal settings give equal fingerprints on every machine."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def tokens_fingerprint(config: ExperimentConfig, data_fingerprint: str) -> str:
    """Identity of the token array: the data, what is done to it, and the bins."""
    dataset = {key: value for key, value in to_dict(config.dataset).items() if key != "id"}
    return fingerprint("tokens", data_fingerprint, dataset, to_dict(config.discretizer))


def model_fingerprint(config: ExperimentConfig, tokens: str, seed: int) -> str:
    """Identity of a trained model: its tokens, size, training and seed; not how often curves are drawn."""
    training = {key: value for key, value in to_dict(config.training).items() if key != "log_every"}
    return fingerprint("model", tokens, to_dict(config.model), training, seed)


def evaluation_fingerprint(planner: PlannerConfig, max_steps: int | None, model: str) -> str:
    """Identity of evaluated episodes: the model, the planner and the episode length; each seed is a row."""
    return fingerprint("evaluation", model, to_dict(planner), max_steps)
