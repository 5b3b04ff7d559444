"""The rules of every section, and what each stage's fingerprint depends on."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tt_ray.config import (
    MAX_BINS,
    CollectConfig,
    CriticConfig,
    DatasetConfig,
    DiscretizerConfig,
    EnsembleConfig,
    EvaluationConfig,
    ExperimentConfig,
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
from tt_ray.fingerprints import (
    critic_fingerprint,
    dynamics_fingerprint,
    evaluation_fingerprint,
    fingerprint,
    model_fingerprint,
    tokens_fingerprint,
)

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


# Another valid value for every key, and the stages that it makes anew.
MODEL, CRITIC, DYNAMICS = {"model", "evaluation"}, {"critic", "evaluation"}, {"dynamics"}
TOKENS, SPLIT = {"tokens"} | MODEL | DYNAMICS, MODEL | CRITIC | DYNAMICS
DATA, EVALUATION = TOKENS | CRITIC, {"evaluation"}
NOTHING: set[str] = set()
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "name": ("y", NOTHING),
    "question": ("Why?", NOTHING),
    "seeds": ((0, 1), NOTHING),
    "dataset.id": ("the same under another name", NOTHING),
    "dataset.discount": (0.9, TOKENS),
    "dataset.terminal_penalty": (-100.0, DATA),
    "dataset.observation_dims": (3, DATA),
    "dataset.observation_keys": (("observation",), DATA),
    "dataset.delayed_rewards": (True, DATA),
    "dataset.hidden_fraction": (0.5, TOKENS),
    "dataset.validation_fraction": (0.1, SPLIT),
    "dataset.split_seed": (1, SPLIT),
    "dataset.fraction": (0.5, SPLIT),
    "discretizer.strategy": ("uniform", TOKENS),
    "discretizer.num_bins": (99, TOKENS),
    "model.num_layers": (2, MODEL),
    "model.num_heads": (2, MODEL),
    "model.embed_dim": (64, MODEL),
    "model.context_transitions": (8, MODEL),
    "model.dropout": (0.0, MODEL),
    "training.steps": (100, MODEL),
    "training.batch_size": (64, MODEL),
    "training.learning_rate": (1e-3, MODEL),
    "training.warmup_steps": (10, MODEL),
    "training.final_learning_rate_fraction": (0.2, MODEL),
    "training.weight_decay": (0.0, MODEL),
    "training.beta1": (0.8, MODEL),
    "training.beta2": (0.99, MODEL),
    "training.gradient_clip": (2.0, MODEL),
    "training.observation_weight": (2.0, MODEL),
    "training.action_weight": (1.0, MODEL),
    "training.reward_weight": (2.0, MODEL),
    "training.value_weight": (2.0, MODEL),
    "training.bin_smoothing": (0.05, MODEL),
    "training.log_every": (5, NOTHING),
    "training.validate_every": (50, MODEL),
    "training.validation_windows": (64, MODEL),
    "goal.relabel": ("future", MODEL),
    "goal.dims": ((0, 1), TOKENS),
    "critic.expectile": (0.9, CRITIC),
    "critic.discount": (0.9, CRITIC),
    "critic.reward_shift": (-1.0, CRITIC),
    "critic.hidden": ((32,), CRITIC),
    "critic.steps": (100, CRITIC),
    "critic.batch_size": (64, CRITIC),
    "critic.learning_rate": (1e-3, CRITIC),
    "critic.target_rate": (0.1, CRITIC),
    "critic.log_every": (5, NOTHING),
    "critic.checkpoint_every": (50, NOTHING),
    "ensemble.members": (2, DYNAMICS),
    "ensemble.hidden": ((32,), DYNAMICS),
    "ensemble.steps": (100, DYNAMICS),
    "ensemble.batch_size": (64, DYNAMICS),
    "ensemble.learning_rate": (1e-4, DYNAMICS),
    "ensemble.weight_decay": (0.0, DYNAMICS),
    "ensemble.log_every": (5, NOTHING),
    "ensemble.checkpoint_every": (50, DYNAMICS),
    "prediction.rollouts": (10, NOTHING),
    "prediction.horizon": (10, NOTHING),
    "prediction.starts": (10, NOTHING),
    "prediction.context": (2, NOTHING),
    "prediction.floor": (0.1, NOTHING),
    "prediction.seed": (1, NOTHING),
    "planner.objective": ("likelihood", EVALUATION),
    "planner.goal": ((0.5, 1.0), EVALUATION),
    "planner.horizon": (5, EVALUATION),
    "planner.beam_width": (32, EVALUATION),
    "planner.n_expand": (1, EVALUATION),
    "planner.k_act": (1, EVALUATION),
    "planner.cdf_act": (None, EVALUATION),
    "planner.k_obs": (2, EVALUATION),
    "planner.plan_every": (2, EVALUATION),
    "planner.execute": ("means", EVALUATION),
    "planner.max_context_transitions": (4, EVALUATION),
    "planner.window": (5, EVALUATION),
    "planner.keep": (2, EVALUATION),
    "evaluation.episodes": (5, NOTHING),
    "evaluation.first_seed": (7, NOTHING),
    "evaluation.max_steps": (50, EVALUATION),
    "evaluation.environment": ("Other-v0", EVALUATION),
    "evaluation.record": ((0, 1), EVALUATION),
    "evaluation.confidence": (0.9, NOTHING),
    "evaluation.bootstrap_samples": (100, NOTHING),
    "resources.workers": (2, NOTHING),
    "resources.gpus_per_worker": (0.5, NOTHING),
    "resources.evaluation_actors": (2, NOTHING),
    "resources.episodes_per_actor": (2, EVALUATION),
    "resources.decoder": ("eager", EVALUATION),
    "resources.storage": ("elsewhere", NOTHING),
    "resources.max_failures": (0, NOTHING),
    "tracking.uri": ("http://127.0.0.1:5000", NOTHING),
    "tracking.experiment": ("z", NOTHING),
    "collect.environment": ("Walker2d-v5", NOTHING),
    "collect.method": ("waypoints", NOTHING),
    "collect.segment_cells": (2, NOTHING),
    "collect.waypoint_noise": (0.1, NOTHING),
    "collect.action_noise": (0.1, NOTHING),
    "collect.steps": (1, NOTHING),
    "collect.directions": (9, NOTHING),
    "collect.top_directions": (1, NOTHING),
    "collect.step_size": (0.1, NOTHING),
    "collect.noise": (0.1, NOTHING),
    "collect.alive_bonus": (1.0, NOTHING),
    "collect.max_steps": (10, NOTHING),
    "collect.final_episodes": (1, NOTHING),
    "collect.seed": (1, NOTHING),
}


def base(dotted: str) -> ExperimentConfig:
    """The experiment that a setting is changed in: one in which it may be."""
    if dotted == "collect.segment_cells":
        return WALKING
    return WITH_GOALS if dotted == "planner.goal" or dotted.startswith("goal.") else EXPERIMENT


def stage_fingerprints(config: ExperimentConfig, data: str = "data", seed: int = 0) -> dict[str, str]:
    tokens = tokens_fingerprint(config, data)
    model = model_fingerprint(config, tokens, seed)
    critic = critic_fingerprint(config, data, seed)
    return {
        "tokens": tokens,
        "model": model,
        "critic": critic,
        "dynamics": dynamics_fingerprint(config, tokens, seed),
        "evaluation": evaluation_fingerprint(config, config.planner, model, critic),
    }


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {stage for stage in one if one[stage] != other[stage]}


@pytest.mark.parametrize("dotted", CHANGES)
def test_a_setting_changes_the_stages_that_depend_on_it(dotted: str) -> None:
    value, stages = CHANGES[dotted]
    before = base(dotted)
    config = with_value(before, dotted, value)
    assert config != before
    assert changed(stage_fingerprints(before), stage_fingerprints(config)) == stages


def test_no_setting_is_left_out_above() -> None:
    assert CHANGES.keys() == flatten(to_dict(WITH_GOALS)).keys()


def test_data_and_seed_change_their_stages() -> None:
    before = stage_fingerprints(EXPERIMENT)
    assert changed(before, stage_fingerprints(EXPERIMENT, data="other data")) == DATA
    assert changed(before, stage_fingerprints(EXPERIMENT, seed=1)) == SPLIT


def test_goals_change_the_data_and_the_last_state_is_what_a_goal_is_by_default() -> None:
    before, after = stage_fingerprints(EXPERIMENT), stage_fingerprints(WITH_GOALS)
    assert changed(before, after) == DATA
    assert stage_fingerprints(replace(EXPERIMENT, goal=GoalConfig(relabel="last"))) == after


def test_what_is_hidden_depends_on_the_seed_of_the_split() -> None:
    hidden = with_value(EXPERIMENT, "dataset.hidden_fraction", 0.5)
    other = with_value(hidden, "dataset.split_seed", 1)
    assert changed(stage_fingerprints(hidden), stage_fingerprints(other)) == TOKENS | CRITIC


def test_the_order_in_which_observations_are_named_does_not_matter() -> None:
    one, other = (
        with_value(EXPERIMENT, "dataset.observation_keys", keys) for keys in (("a", "b"), ("b", "a"))
    )
    assert stage_fingerprints(one) == stage_fingerprints(other)


def test_an_evaluation_without_a_critic_is_another() -> None:
    model = stage_fingerprints(EXPERIMENT)["model"]
    found = {evaluation_fingerprint(EXPERIMENT, EXPERIMENT.planner, model, critic) for critic in (None, "a")}
    assert len(found) == 2


def test_stages_of_equal_settings_have_different_fingerprints() -> None:
    assert len(set(stage_fingerprints(EXPERIMENT).values())) == 5


def test_fingerprint_ignores_the_order_of_keys_and_how_a_whole_number_is_written() -> None:
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1.0})
    assert fingerprint((1, 2)) == fingerprint([1, 2])
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint(True) != fingerprint(1)
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_fingerprint_stays_what_it_was() -> None:
    """A changed fingerprint makes every stored stage unusable, so it must never change by accident."""
    assert fingerprint("tokens", {"strategy": "uniform", "discount": 0.99}) == "5e4642099579b39e"


OLD_SETTINGS = ExperimentConfig(
    name="x",
    dataset=DatasetConfig(
        id="d",
        discount=0.9,
        terminal_penalty=-100.0,
        observation_dims=7,
        validation_fraction=0.1,
        split_seed=3,
        fraction=0.5,
    ),
    discretizer=DiscretizerConfig(strategy="uniform", num_bins=50),
    model=ModelConfig(num_layers=2, num_heads=2, embed_dim=64, context_transitions=8, dropout=0.0),
    training=TrainingConfig(steps=100, log_every=7),
    planner=PlannerConfig(horizon=5, cdf_act=None, k_act=1, window=6),
    evaluation=EvaluationConfig(max_steps=50),
    resources=ResourcesConfig(episodes_per_actor=2, decoder="eager"),
)


@pytest.mark.parametrize(
    ("config", "seed", "known"),
    [
        (
            ExperimentConfig(name="x", dataset=DatasetConfig(id="d")),
            0,
            ("8998595b1e84ca98", "57088389c1e0dad7", "e09c146b99536634"),
        ),
        (OLD_SETTINGS, 4, ("f07e254c27a24b10", "a42941d4030bf762", "9705c699f987cac5")),
    ],
)
def test_stages_from_before_goals_and_critics_are_still_found(
    config: ExperimentConfig, seed: int, known: tuple[str, str, str]
) -> None:
    tokens = tokens_fingerprint(config, "data")
    model = model_fingerprint(config, tokens, seed)
    assert (tokens, model, evaluation_fingerprint(config, config.planner, model)) == known


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_fingerprints_are_the_same_in_every_process(hash_seed: str) -> None:
    code = (
        "from tt_ray.config import *\n"
        "from tt_ray.fingerprints import *\n"
        "c = ExperimentConfig(dataset=DatasetConfig(id='d'), critic=CriticConfig(), name='x')\n"
        "t = tokens_fingerprint(c, 'data'); m = model_fingerprint(c, t, 0)\n"
        "q = critic_fingerprint(c, 'data', 0); d = dynamics_fingerprint(c, t, 0)\n"
        "print(t, m, q, d, evaluation_fingerprint(c, c.planner, m, q))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.split() == list(stage_fingerprints(EXPERIMENT).values())
