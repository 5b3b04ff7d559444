"""The engine with other objectives than the return: goals, critics, and what does not belong together."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_spec import toy_spec

from tt_ray.config import CriticConfig, ModelConfig, PlannerConfig, to_dict
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.critic import Critic, CriticCheckpoint
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.engine import PlanningEngine

Floats = NDArray[np.float32]

PLAIN = TokenLayout(observation_dim=3, action_dim=2, num_bins=9)
WITH_GOALS = replace(PLAIN, goal_slots=(2, 0))
SPEC = toy_spec(3, 2, observation_keys=("observation",))
ASKS = replace(SPEC, goal_keys=("desired_goal",), leaf_sizes=(2, 3))


def checkpoint(layout: TokenLayout = PLAIN, spec: DataSpec = SPEC) -> Checkpoint:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=16, context_transitions=5)
    model = TrajectoryTransformer(config, layout).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        model.final_norm.bias.zero_()  # what every token would have in common
    values = np.random.default_rng(0).normal(size=(2_000, layout.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=layout.num_bins)
    return Checkpoint(model, bins, spec, {}, 1, {})


def critic(spec: DataSpec = SPEC) -> CriticCheckpoint:
    torch.manual_seed(1)
    network = Critic(3, 2, (16, 16)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    settings = {**to_dict(CriticConfig(hidden=(16, 16), reward_shift=-1.0)), "seed": 0}
    return CriticCheckpoint(network, spec, settings, 1, {})


def play(engine: PlanningEngine, seeds: list[int], steps: int, goal: Floats | None = None) -> dict[int, list]:
    """Actions of toy episodes; each observation follows from the seed and the action before."""
    taken: dict[int, list] = {seed: [] for seed in seeds}

    def seen(seed: int, step: int, action: Floats) -> Floats:
        mixed = np.random.default_rng((seed, step)).normal(size=3) + np.tanh(action.sum())
        own = np.zeros(0) if goal is None else goal + 0.1 * seed
        return np.concatenate([own, mixed]).astype(np.float32)

    for seed in seeds:
        engine.add(seed, seed, seen(seed, 0, np.zeros(2, dtype=np.float32)))
    for step in range(1, steps + 1):
        for seed, action in engine.act().items():
            taken[seed].append(action.tolist())
            engine.observe(seed, action, float(action.sum()), seen(seed, step, action))
    return taken


SETTINGS = {"horizon": 3, "beam_width": 4, "n_expand": 2, "max_context_transitions": 3}


def engine_for(objective: str, slots: int = 3) -> PlanningEngine:
    goals = objective == "goal"
    planner = PlannerConfig(objective=objective, **SETTINGS)
    model = checkpoint(WITH_GOALS, ASKS) if goals else checkpoint()
    scorer = critic() if objective == "q" else None
    return PlanningEngine(model, planner, discount=0.9, slots=slots, critic=scorer)


@pytest.mark.parametrize("objective", ["return", "q", "likelihood", "goal", "return-conditioned"])
def test_batched_equals_single(objective: str) -> None:
    goal = np.array([0.3, -0.2], dtype=np.float32) if objective == "goal" else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in PyTorch alone bits depend on them
    try:
        together = play(engine_for(objective), [0, 1, 2], 6, goal)
        for seed in (0, 1, 2):
            assert play(engine_for(objective), [seed], 6, goal)[seed] == together[seed]
    finally:
        torch.set_num_threads(threads)
    # The likeliest plan of a random model may be the same everywhere.
    assert len({str(actions) for actions in together.values()}) > (objective != "likelihood")


def test_objectives_choose_differently() -> None:
    """What each maximises is its own: else the parity above would prove nothing."""
    names = ("return", "q", "likelihood", "return-conditioned")
    chosen = {name: play(engine_for(name), [0], 4)[0] for name in names}
    assert len({str(actions) for actions in chosen.values()}) == 4


def test_the_goal_of_the_environment_decides_what_is_done() -> None:
    goals = [np.array(goal, dtype=np.float32) for goal in ([1.2, -1.0], [-1.2, 1.0])]
    first, second = (play(engine_for("goal"), [0], 4, goal)[0] for goal in goals)
    assert first != second


def test_a_fixed_goal_equals_the_same_one_asked_for() -> None:
    asked = play(engine_for("goal"), [0], 4, np.array([0.5, -0.5], dtype=np.float32))[0]
    planner = PlannerConfig(objective="goal", goal=(0.5, -0.5), **SETTINGS)
    fixed = PlanningEngine(checkpoint(WITH_GOALS, SPEC), planner, discount=0.9, slots=3)
    assert play(fixed, [0], 4)[0] == asked


def test_goals_outside_the_data_clip_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        far = play(engine_for("goal"), [0], 3, np.array([50.0, 0.0], dtype=np.float32))[0]
        farther = play(engine_for("goal"), [0], 3, np.array([500.0, 0.0], dtype=np.float32))[0]
    assert far == farther
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "the goal 50 in observation dimension 2 is outside the data" in lines[0]


@pytest.mark.parametrize(
    ("model", "settings", "scorer", "message"),
    [
        (checkpoint(), {"objective": "goal"}, None, "was not: add a `goal` section and train again"),
        (
            checkpoint(WITH_GOALS, SPEC),
            {"objective": "goal"},
            None,
            "asks for no goal, and the model needs one",
        ),
        (checkpoint(), {"goal": (1.0,)}, None, "planner.goal has 1 dimensions, but the model has none"),
        (checkpoint(WITH_GOALS, ASKS), {"goal": (1.0,)}, None, "but the model has goals of 2 dimensions"),
        (checkpoint(), {"objective": "q"}, None, "planner.objective q needs a critic"),
        (
            checkpoint(),
            {"objective": "q"},
            critic(replace(SPEC, dataset_id="other", fingerprint="1")),
            "the critic was trained on other data than the model: other, fingerprint 1",
        ),
        (checkpoint(), {"objective": "likelyhood"}, None, "did you mean likelihood?"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(
    model: Checkpoint, settings: dict, scorer: CriticCheckpoint | None, message: str
) -> None:
    planner = PlannerConfig(**{**SETTINGS, **settings})
    with pytest.raises(UserError) as caught:
        PlanningEngine(model, planner, discount=0.9, slots=1, critic=scorer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
