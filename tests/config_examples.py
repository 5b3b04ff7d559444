"""Experiments that the tests of the configuration change one setting of."""

from dataclasses import replace
from typing import Any

from tt_ray.config import (
    CollectConfig,
    CriticConfig,
    DatasetConfig,
    ExperimentConfig,
    GoalConfig,
)

EXPERIMENT = ExperimentConfig(
    name="x",
    dataset=DatasetConfig(id="d"),
    critic=CriticConfig(),
    collect=CollectConfig(environment="Hopper-v5"),
)
WITH_GOALS = replace(EXPERIMENT, goal=GoalConfig())
WALKING = replace(EXPERIMENT, collect=CollectConfig(environment="PointMaze_UMaze-v3", method="waypoints"))


def with_value(config: ExperimentConfig, dotted: str, value: Any) -> ExperimentConfig:
    """`config` with one value replaced."""
    section, _, key = dotted.partition(".")
    changed = replace(getattr(config, section), **{key: value}) if key else value
    return replace(config, **{section: changed})
