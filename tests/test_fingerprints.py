"""What each stage depends on."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from config_examples import EXPERIMENT, WALKING, WITH_GOALS, with_value

from tt_ray.config import (
    DatasetConfig,
    DiscretizerConfig,
    EvaluationConfig,
    ExperimentConfig,
    GoalConfig,
    ModelConfig,
    PlannerConfig,
    ResourcesConfig,
    TrainingConfig,
    flatten,
    to_dict,
)
from tt_ray.fingerprints import (
    critic_fingerprint,
    dynamics_fingerprint,
    evaluation_fingerprint,
    fingerprint,
    model_fingerprint,
    plain_settings,
    tokens_fingerprint,
)

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
    "critic.inverse_temperature": (10.0, NOTHING),  # without a policy
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
    "planner.target": (100.0, EVALUATION),
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
    "evaluation.baselines": (("iql",), CRITIC),  # which is trained with a policy, too
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
    "tracking.films": (0, NOTHING),
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


def test_a_policy_is_part_of_a_critic_only_where_a_baseline_plays_it() -> None:
    asking = with_value(EXPERIMENT, "evaluation.baselines", ("data", "iql"))
    warmer = with_value(asking, "critic.inverse_temperature", 10.0)
    assert changed(stage_fingerprints(asking), stage_fingerprints(warmer)) == CRITIC
    other = with_value(EXPERIMENT, "evaluation.baselines", ("random", "return-conditioned"))
    assert stage_fingerprints(other) == stage_fingerprints(EXPERIMENT)


def test_settings_that_came_later_are_no_part_of_a_runs_identity_until_they_are_used() -> None:
    plain = plain_settings(EXPERIMENT, "name")
    assert "name" not in plain
    assert plain["evaluation"].keys() >= {"episodes"}
    assert not plain["evaluation"].keys() & {"baselines", "environment"}
    assert "target" not in plain["planner"]
    used = with_value(EXPERIMENT, "evaluation.baselines", ("data",))
    assert plain_settings(used)["evaluation"]["baselines"] == ["data"]


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
