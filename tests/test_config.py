"""The rules of every section and of their combinations."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from config_examples import EXPERIMENT

from tt_ray.config import (
    MAX_BINS,
    CollectConfig,
    CriticConfig,
    DatasetConfig,
    DiscretizerConfig,
    EnsembleConfig,
    EvaluationConfig,
    GoalConfig,
    ModelConfig,
    PlannerConfig,
    PredictionConfig,
    ResourcesConfig,
    TrainingConfig,
    flatten,
    to_dict,
)
from tt_ray.errors import UserError

SECTIONS: dict[str, Callable[..., Any]] = {
    "dataset": lambda **values: DatasetConfig(**{"id": "d", **values}),
    "discretizer": DiscretizerConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "planner": PlannerConfig,
    "evaluation": EvaluationConfig,
    "goal": GoalConfig,
    "critic": CriticConfig,
    "prediction": PredictionConfig,
    "ensemble": EnsembleConfig,
    "collect": lambda **values: CollectConfig(environment="Hopper-v5", **values),
    "resources": ResourcesConfig,
}

REFUSED = [
    ("dataset.id", " "),
    ("dataset.discount", 0.0),
    ("dataset.discount", 1.01),
    ("dataset.validation_fraction", -0.1),
    ("dataset.validation_fraction", 1.0),
    ("dataset.observation_dims", 0),
    ("dataset.fraction", 0.0),
    ("dataset.fraction", 1.01),
    ("discretizer.num_bins", 1),
    ("discretizer.num_bins", MAX_BINS + 1),
    ("model.num_layers", 0),
    ("model.num_heads", 0),
    ("model.embed_dim", 0),
    ("model.embed_dim", 130),
    ("model.context_transitions", 1),
    ("model.dropout", 1.0),
    ("model.dropout", -0.1),
    *((f"training.{key}", 0) for key in ("steps", "batch_size", "log_every", "validate_every")),
    ("training.validation_windows", 0),
    ("training.warmup_steps", -1),
    ("training.learning_rate", 0.0),
    ("training.gradient_clip", 0.0),
    ("training.beta1", 1.0),
    ("training.beta2", -0.1),
    ("training.weight_decay", -0.1),
    *((f"training.{kind}_weight", -1.0) for kind in ("observation", "action", "reward", "value")),
    ("training.bin_smoothing", -0.1),
    ("training.final_learning_rate_fraction", 1.1),
    ("training.final_learning_rate_fraction", -0.1),
    *((f"planner.{key}", 0) for key in ("horizon", "beam_width", "n_expand", "k_act", "k_obs", "plan_every")),
    ("planner.max_context_transitions", 0),
    ("planner.cdf_act", 1.0),
    ("planner.cdf_act", -0.1),
    ("planner.plan_every", 16),
    ("evaluation.episodes", 0),
    ("evaluation.bootstrap_samples", 0),
    ("evaluation.max_steps", 0),
    ("evaluation.first_seed", -1),
    ("evaluation.confidence", 0.0),
    ("evaluation.confidence", 1.0),
    ("dataset.hidden_fraction", 1.0),
    ("dataset.hidden_fraction", -0.1),
    ("critic.expectile", 0.0),
    ("critic.expectile", 1.0),
    ("critic.discount", 0.0),
    ("critic.target_rate", 1.01),
    ("critic.reward_shift", float("inf")),
    ("critic.hidden", ()),
    ("critic.inverse_temperature", -1.0),
    ("planner.target", float("inf")),
    ("critic.learning_rate", 0.0),
    *((f"critic.{key}", 0) for key in ("steps", "batch_size", "log_every", "checkpoint_every")),
    ("ensemble.hidden", (8, 0)),
    ("ensemble.learning_rate", 0.0),
    ("ensemble.weight_decay", -0.1),
    *((f"ensemble.{key}", 0) for key in ("members", "steps", "batch_size", "log_every", "checkpoint_every")),
    *((f"prediction.{key}", 0) for key in ("rollouts", "horizon", "starts", "context")),
    ("prediction.floor", 0.0),
    ("prediction.floor", 1.0),
    *(
        (f"collect.{key}", 0)
        for key in ("steps", "directions", "top_directions", "final_episodes", "max_steps")
    ),
    ("collect.top_directions", 9),
    ("collect.step_size", 0.0),
    ("collect.noise", 0.0),
    ("collect.action_noise", -0.1),
    ("collect.segment_cells", 0),
    ("collect.waypoint_noise", -0.1),
    *((f"resources.{key}", 0) for key in ("workers", "evaluation_actors", "episodes_per_actor")),
    ("resources.gpus_per_worker", -0.5),
    ("resources.max_failures", -1),
]


@pytest.mark.parametrize("names", [(), ("data", "data")])
def test_baselines_are_some_once_each(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^evaluation.baselines: (names one twice|.*\bdata\b)"):
        EvaluationConfig(baselines=names)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dotted", "value"), REFUSED)
def test_impossible_values_are_refused_by_name(dotted: str, value: Any) -> None:
    section, _, key = dotted.partition(".")
    with pytest.raises(UserError) as caught:
        SECTIONS[section](**{key: value})
    message = str(caught.value)
    assert message.startswith(f"{dotted}: ")
    assert "\n" not in message
    assert str(value).strip() in message


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("dataset.observation_keys", ()),
        ("dataset.observation_keys", ("a", "a")),
        ("goal.dims", ()),
        ("goal.dims", (2, 2)),
        ("goal.dims", (0, -1)),
    ],
)
def test_impossible_choices_of_parts_are_refused_by_name(dotted: str, value: Any) -> None:
    section, _, key = dotted.partition(".")
    with pytest.raises(UserError, match=f"{dotted}: "):
        SECTIONS[section](**{key: value})


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("dataset.discount", 1.0),
        ("dataset.validation_fraction", 0.0),
        ("dataset.fraction", 1.0),
        ("dataset.fraction", 1e-9),
        ("discretizer.num_bins", 2),
        ("discretizer.num_bins", MAX_BINS),
        ("model.context_transitions", 2),
        ("model.dropout", 0.0),
        ("training.warmup_steps", 0),
        ("training.final_learning_rate_fraction", 0.0),
        ("training.final_learning_rate_fraction", 1.0),
        ("planner.plan_every", 15),
        ("planner.cdf_act", 0.0),
        ("planner.cdf_act", None),
        ("collect.top_directions", 8),
        ("resources.gpus_per_worker", 0),
        ("resources.workers", "auto"),
        ("resources.workers", 1),
    ],
)
def test_the_last_possible_values_are_taken(dotted: str, value: Any) -> None:
    section, _, key = dotted.partition(".")
    assert getattr(SECTIONS[section](**{key: value}), key) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "  "}, "name: must not be empty"),
        ({"seeds": ()}, "seeds: needs at least one training seed"),
        ({"seeds": (1, 1)}, "seeds: names a seed twice"),
        ({"seeds": (0, -1)}, "seeds: must not be negative"),
        (
            {"planner": PlannerConfig(window=11)},
            "planner.window: 11 is larger than the model's context of 10",
        ),
        (
            {"planner": PlannerConfig(max_context_transitions=11)},
            "planner.max_context_transitions: 11 is larger",
        ),
        ({"model": ModelConfig(context_transitions=4)}, "planner.max_context_transitions: 5 is larger"),
        (
            {
                "dataset": DatasetConfig(id="d", terminal_penalty=-100),
                "discretizer": DiscretizerConfig(num_bins=3),
            },
            "discretizer.num_bins: must be at least 4 with dataset.terminal_penalty",
        ),
        (
            {"planner": PlannerConfig(objective="goal")},
            "planner.objective: goal needs a model that is trained",
        ),
        ({"planner": PlannerConfig(goal=(1.0,))}, "planner.goal: needs a model that is trained with goals"),
        (
            {"planner": PlannerConfig(objective="q"), "critic": None},
            "planner.objective: q needs a critic: add a section critic",
        ),
        (
            {"evaluation": EvaluationConfig(baselines=("iql",)), "critic": None},
            "evaluation.baselines: iql needs a critic: add a section critic",
        ),
        (
            {"dataset": DatasetConfig(id="d", hidden_fraction=0.5), "goal": GoalConfig()},
            "dataset.hidden_fraction: cannot be combined with goals",
        ),
        (
            {"dataset": DatasetConfig(id="d", observation_keys=("a", "desired_goal")), "goal": GoalConfig()},
            "dataset.observation_keys: desired_goal is what a model with goals is given",
        ),
        (
            {"dataset": DatasetConfig(id="d", observation_dims=3), "goal": GoalConfig(dims=(0, 3))},
            "goal.dims: 3 is none of the 3 dimensions that dataset.observation_dims keeps",
        ),
        (
            {"goal": GoalConfig(dims=(0, 3)), "planner": PlannerConfig(goal=(0.5,))},
            "planner.goal: 1 numbers for the 2 dimensions of goal.dims",
        ),
    ],
)
def test_impossible_combinations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        replace(EXPERIMENT, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"planner": PlannerConfig(objective="q")},
        {"goal": GoalConfig(), "planner": PlannerConfig(objective="goal")},
        {"dataset": DatasetConfig(id="d", observation_keys=("a", "desired_goal"))},
        {"dataset": DatasetConfig(id="d", observation_dims=4), "goal": GoalConfig(dims=(0, 3))},
        {"goal": GoalConfig(dims=(3, 0)), "planner": PlannerConfig(goal=(0.5, 1.0))},
    ],
)
def test_possible_combinations_are_taken(change: dict[str, Any]) -> None:
    assert vars(replace(EXPERIMENT, **change)).items() >= change.items()


@pytest.mark.parametrize(
    ("planner", "context", "resolved"),
    [
        (PlannerConfig(), 10, (10, 4)),
        (PlannerConfig(window=5), 10, (5, 4)),
        (PlannerConfig(window=5, keep=2), 10, (5, 2)),
        (PlannerConfig(max_context_transitions=1), 10, (10, 1)),
        (PlannerConfig(max_context_transitions=2), 2, (2, 1)),
        (PlannerConfig(max_context_transitions=10), 10, (10, 9)),
    ],
)
def test_window_and_keep(planner: PlannerConfig, context: int, resolved: tuple[int, int]) -> None:
    assert planner.resolve_window(context) == resolved


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        (PlannerConfig(window=1), "planner.window: must be at least 2, not 1"),
        (PlannerConfig(keep=0), "planner.keep: must lie between 1 and planner.window - 1 = 9, not 0"),
        (PlannerConfig(keep=10), "planner.keep: must lie between 1 and planner.window - 1 = 9, not 10"),
        (
            PlannerConfig(window=5, keep=5),
            "planner.keep: must lie between 1 and planner.window - 1 = 4, not 5",
        ),
        (PlannerConfig(window=4), "planner.max_context_transitions: 5 is larger than the window of 4"),
    ],
)
def test_impossible_windows(planner: PlannerConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        planner.resolve_window(10)


def test_to_dict_is_plain_data_and_flatten_joins_its_keys() -> None:
    plain = to_dict(EXPERIMENT)
    assert plain["seeds"] == [0]
    assert plain["planner"]["window"] is None
    assert flatten(plain)["model.num_layers"] == 4
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
