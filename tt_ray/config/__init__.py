"""One experiment as frozen dataclasses, and the rules that they must obey.

Plain dataclasses only: the model, the training loop and the planner need nothing else to run. Reading YAML
and checking types is `experiment_file.py`; what makes two stages the same is `fingerprints.py`.
"""

from tt_ray.config.acting import BaselineName, EvaluationConfig, PlannerConfig, PredictionConfig
from tt_ray.config.data import CollectConfig, DatasetConfig, DiscretizerConfig, GoalConfig
from tt_ray.config.experiment import (
    DecoderName,
    ExperimentConfig,
    ResourcesConfig,
    TrackingConfig,
    flatten,
    to_dict,
)
from tt_ray.config.learning import CriticConfig, EnsembleConfig, ModelConfig, TrainingConfig
from tt_ray.config.rules import MAX_BINS, require

__all__ = [
    "MAX_BINS",
    "BaselineName",
    "CollectConfig",
    "CriticConfig",
    "DatasetConfig",
    "DecoderName",
    "DiscretizerConfig",
    "EnsembleConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "GoalConfig",
    "ModelConfig",
    "PlannerConfig",
    "PredictionConfig",
    "ResourcesConfig",
    "TrackingConfig",
    "TrainingConfig",
    "flatten",
    "require",
    "to_dict",
]
