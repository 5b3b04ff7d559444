"""The whole experiment, its resources and tracking, and what combinations are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tt_ray.config.acting import EvaluationConfig, PlannerConfig, PredictionConfig
from tt_ray.config.data import CollectConfig, DatasetConfig, DiscretizerConfig, GoalConfig
from tt_ray.config.learning import CriticConfig, EnsembleConfig, ModelConfig, TrainingConfig
from tt_ray.config.rules import at_least, require

DecoderName = Literal["auto", "native", "compiled", "eager"]


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What the run may use; nothing here changes what a stage computes, but for a decoder's rounding."""

    workers: int | Literal["auto"] = "auto"
    """Training workers; auto: one for each GPU, or else min(2, CPUs)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of a training worker; auto: one where there are any, else none."""
    evaluation_actors: int | Literal["auto"] = "auto"
    """Actors that run episodes; auto: one for each CPU, four to a GPU, of later hosts too."""
    episodes_per_actor: int = 8
    """Episodes that one actor plans for at once."""
    decoder: DecoderName = "auto"
    """How the model decodes while planning; auto: native (C++) on a CPU, graphs (CUDA) on a GPU."""
    storage: str = "runs"
    """Folder for models and evaluations; on several hosts, a shared one."""
    max_failures: int = 3
    """Times a crashed worker or actor is replaced before the run gives up."""

    def __post_init__(self) -> None:
        at_least(1, "resources", self, "workers evaluation_actors episodes_per_actor")
        at_least(0, "resources", self, "gpus_per_worker max_failures")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where results are logged."""

    uri: str | None = None
    """MLflow store; None: MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the working folder."""
    experiment: str | None = None
    """MLflow experiment; None: the experiment file's name."""
    films: int = 1
    """Episodes of the planner that are played once more, filmed, and drawn with their plans; in a sweep, of
    each winner. 0: none."""

    def __post_init__(self) -> None:
        at_least(0, "tracking", self, "films")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything about one experiment; `sweeps/*.yaml` are such files."""

    name: str
    """Of the study: its folder, its experiment in MLflow, its registered model."""
    dataset: DatasetConfig
    question: str = ""
    """What the study asks, in a sentence: its description in MLflow."""
    discretizer: DiscretizerConfig = field(default_factory=DiscretizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    goal: GoalConfig | None = None
    """When given, the model is told where an episode ends up before it sees how (objective: goal)."""
    critic: CriticConfig | None = None
    """When given, a critic is trained too (objective: q)."""
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
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
        self._check_goals()
        objective = self.planner.objective
        without = "q needs a critic: add a section critic"
        require(objective != "q" or self.critic is not None, "planner.objective", without)
        iql = "iql needs a critic: add a section critic (to tt-ray evaluate: --critic FOLDER)"
        missing = "iql" in self.evaluation.baselines and self.critic is None
        require(not missing, "evaluation.baselines", iql)

    @property
    def extracts_policy(self) -> bool:
        """Whether the critic's training is to give a policy, too."""
        return self.critic is not None and "iql" in self.evaluation.baselines

    def _check_goals(self) -> None:
        """Refuse goals that no model of this experiment could be given."""
        data, planner = self.dataset, self.planner
        if self.goal is None:
            need = "needs a model that is trained with goals: add a section goal"
            require(planner.objective != "goal", "planner.objective", f"goal {need}")
            require(planner.goal is None, "planner.goal", need)
            return
        whole = "cannot be combined with goals, which the model has to see"
        require(data.hidden_fraction == 0, "dataset.hidden_fraction", whole)
        desired = [key for key in data.observation_keys or () if key.split("/")[0] == "desired_goal"]
        require(
            not desired,
            "dataset.observation_keys",
            "desired_goal is what a model with goals is given as its goal: it cannot be observed too",
        )
        dims, most = self.goal.dims, data.observation_dims
        if dims is not None and most is not None:
            beyond = f"{max(dims)} is none of the {most} dimensions that dataset.observation_dims keeps"
            require(max(dims) < most, "goal.dims", beyond)
        if dims is not None and planner.goal is not None:
            other = f"{len(planner.goal)} numbers for the {len(dims)} dimensions of goal.dims"
            require(len(planner.goal) == len(dims), "planner.goal", other)


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
