from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from toy_spec import toy_spec

from tt_ray.config import DecoderName, ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import Plans
from tt_ray.planning.engine import PlanningEngine, Slot

Floats = NDArray[np.float32]

LAYOUT = TokenLayout(observation_dim=3, action_dim=2, num_bins=11)
SLOTS = 4
SPEC = toy_spec(3, 2, action_low=(-0.3, -1.0), action_high=(1.0, 0.2))
PLANNER = PlannerConfig(horizon=4, beam_width=4, n_expand=2, max_context_transitions=3)
SLIDING = PlannerConfig(horizon=6, beam_width=4, n_expand=2, max_context_transitions=3, window=4, keep=2)


def make_checkpoint(stop_bias: float = 0.0) -> Checkpoint:
    """A random model far from uniform distributions; `stop_bias` makes it end episodes more readily."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=16, context_transitions=6)
    model = TrajectoryTransformer(config, LAYOUT).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        model.head[LAYOUT.value_slot, LAYOUT.stop_token] += stop_bias * model.final_norm.bias
    values = np.random.default_rng(0).normal(size=(2_000, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    return Checkpoint(model, bins, SPEC, {}, 1, {})


class RecordingEngine(PlanningEngine):
    """Keeps every plan, and the context that it was made from."""

    def __init__(
        self,
        planner: PlannerConfig,
        slots: int = SLOTS,
        stop_bias: float = 0.0,
        decoder: DecoderName = "native",
    ) -> None:
        super().__init__(make_checkpoint(stop_bias), planner, discount=0.9, slots=slots, decoder=decoder)
        self.plans: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.contexts: dict[int, list[int]] = {}

    def search_plans(self, due: list[Slot]) -> Plans:
        plans = super().search_plans(due)
        for row, slot in enumerate(due):
            plan = (plans.tokens[row].clone(), plans.scores[row].clone())
            self.plans.setdefault(slot.episode, []).append(plan)
            self.contexts.setdefault(slot.episode, []).append(len(slot.past))
        return plans


def first_observation(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=3).astype(np.float32)


def next_observation(observation: Floats, action: Floats) -> Floats:
    mixed = np.tanh(np.roll(observation, 1) * 1.7 + np.append(action, action.sum()) * 2.0)
    return (2.0 * mixed).astype(np.float32)


class Driver:
    """Toy environments around an engine."""

    def __init__(self, engine: PlanningEngine) -> None:
        self.engine = engine
        self.observations: dict[int, Floats] = {}
        self.actions: dict[int, list[Floats]] = {}

    def add(self, seed: int) -> None:
        self.observations[seed] = first_observation(seed)
        self.engine.add(seed, seed, self.observations[seed])

    def remove(self, seed: int) -> None:
        self.engine.remove(seed)
        del self.observations[seed]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            actions = self.engine.act()
            assert actions.keys() == self.observations.keys()
            for seed, action in actions.items():
                self.actions.setdefault(seed, []).append(action)
                after = next_observation(self.observations[seed], action)
                self.engine.observe(seed, action, float(action.sum()), after)
                self.observations[seed] = after


def alone(planner: PlannerConfig, seed: int, steps: int, decoder: DecoderName = "native") -> RecordingEngine:
    engine = RecordingEngine(planner, decoder=decoder)
    driver = Driver(engine)
    driver.add(seed)
    driver.step(steps)
    return engine


def assert_same_plans(engine: RecordingEngine, other: RecordingEngine, seed: int) -> None:
    """All beams of all decisions, tokens and scores bit for bit."""
    plans, expected = engine.plans[seed], other.plans[seed]
    assert len(plans) == len(expected)
    for (tokens, scores), (expected_tokens, expected_scores) in zip(plans, expected, strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize(
    "planner",
    [
        PLANNER,
        SLIDING,
        replace(SLIDING, k_obs=3, cdf_act=None, k_act=5),
        replace(SLIDING, plan_every=2),
        replace(PLANNER, beam_width=16, n_expand=3),
        replace(SLIDING, beam_width=1, n_expand=1, window=3, keep=1),
    ],
    ids=["plain", "sliding", "sampled observations", "every other step", "wide", "narrow"],
)
@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_an_episode_does_not_depend_on_its_neighbours(planner: PlannerConfig, decoder: DecoderName) -> None:
    steps, watched = 6, 1
    expected = alone(planner, watched, steps, decoder)
    engine = RecordingEngine(planner, decoder=decoder)
    driver = Driver(engine)
    driver.add(5)
    driver.step(2)
    driver.add(6)
    driver.add(watched)  # in the third slot, younger than its neighbours
    driver.step(1)
    driver.remove(5)
    driver.add(8)
    driver.add(9)
    driver.step(steps - 1)
    assert_same_plans(engine, expected, watched)


def test_planning_for_some_equals_planning_for_all() -> None:
    together, apart = RecordingEngine(SLIDING), RecordingEngine(SLIDING)
    driver = Driver(together)
    for seed in range(4):
        driver.add(seed)
        apart.add(seed, seed, first_observation(seed))
    observations = dict(driver.observations)
    driver.step(4)
    for _ in range(4):
        for group in ([2, 0], [3], [1]):
            for seed, action in apart.act(group).items():
                after = next_observation(observations[seed], action)
                apart.observe(seed, action, float(action.sum()), after)
                observations[seed] = after
    for seed in range(4):
        assert_same_plans(apart, together, seed)


def test_slot_and_order_of_adding_do_not_matter() -> None:
    seeds = [1, 2, 3, 4]
    engines = []
    for order in (seeds, seeds[::-1], [3, 1, 4, 2]):
        engine = RecordingEngine(SLIDING)
        driver = Driver(engine)
        for seed in order:
            driver.add(seed)
        driver.step(4)
        engines.append((engine, driver))
    for engine, driver in engines[1:]:
        for seed in seeds:
            assert_same_plans(engine, engines[0][0], seed)
            np.testing.assert_array_equal(driver.actions[seed], engines[0][1].actions[seed])


def test_episodes_of_different_ages_equal_each_one_alone() -> None:
    engine = RecordingEngine(SLIDING)
    driver = Driver(engine)
    for seed in range(4):
        driver.add(seed)
        driver.step()
    driver.step(3)
    for seed in range(4):
        assert_same_plans(engine, alone(SLIDING, seed, 7 - seed), seed)


def test_seeds_and_decisions_draw_other_numbers() -> None:
    engine = RecordingEngine(replace(PLANNER, max_context_transitions=1))
    same = first_observation(0)
    for seed in (1, 2):
        engine.add(seed, seed, same)
    engine.act()
    engine.act()  # without `observe`: the same context again
    (first, _), (second, _) = engine.plans[1]
    assert not torch.equal(first, second)
    assert not torch.equal(first, engine.plans[2][0][0])


def test_greedy_settings_need_no_random_numbers() -> None:
    engine = RecordingEngine(replace(PLANNER, k_act=1))
    same = first_observation(0)
    for seed in (1, 2):
        engine.add(seed, seed, same)
    actions = engine.act()
    np.testing.assert_array_equal(actions[1], actions[2])
    assert torch.equal(engine.plans[1][0][0], engine.plans[2][0][0])


@pytest.mark.parametrize("max_context", [1, 2, 4])
def test_contexts_grow_to_their_limit(max_context: int) -> None:
    planner = replace(PLANNER, max_context_transitions=max_context)
    engine = alone(planner, 1, 6)
    assert engine.contexts[1] == [min(step, max_context - 1) for step in range(6)]


@pytest.mark.parametrize("plan_every", [1, 2, 3])
def test_actions_come_from_the_plan_until_the_next_decision(plan_every: int) -> None:
    planner = replace(PLANNER, plan_every=plan_every)
    engine = RecordingEngine(planner, stop_bias=-50.0)
    driver = Driver(engine)
    driver.add(1)
    driver.step(7)
    assert len(engine.plans[1]) == -(-7 // plan_every)
    n, m = LAYOUT.observation_dim, LAYOUT.action_dim
    tokens = torch.cat([plan[0, :plan_every, n : n + m] for plan, _ in engine.plans[1]]).numpy()
    decoded = np.clip(engine.discretizer.decode(tokens, first=n), engine.low, engine.high)
    np.testing.assert_array_equal(driver.actions[1], decoded[:7])


def test_the_context_is_what_happened() -> None:
    engine = RecordingEngine(replace(PLANNER, max_context_transitions=4))
    driver = Driver(engine)
    driver.add(1)
    driver.step(2)
    rows, observation = [], first_observation(1)
    for action in driver.actions[1]:
        rows.append(np.concatenate([observation, action, [action.sum(), 0.0]]))
        observation = next_observation(observation, action)
    past = np.stack(engine.live[1].past)
    np.testing.assert_array_equal(past, engine.discretizer.encode(np.array(rows, dtype=np.float32)))
    np.testing.assert_array_equal(engine.live[1].observation, observation)


def test_an_environment_may_reuse_its_observation_array() -> None:
    engine, shared = RecordingEngine(PLANNER), np.zeros(3, dtype=np.float32)
    shared[:] = observation = first_observation(1)
    engine.add(1, 1, shared)
    for _ in range(4):
        shared[:] = -9.0
        action = engine.act()[1]
        observation = next_observation(observation, action)
        shared[:] = observation
        engine.observe(1, action, float(action.sum()), shared)
    assert_same_plans(engine, alone(PLANNER, 1, 4), 1)


@pytest.mark.parametrize("plan_every", [1, 4])
def test_a_plan_that_stops_early_still_gives_actions(plan_every: int) -> None:
    engine = RecordingEngine(replace(PLANNER, plan_every=plan_every), stop_bias=50.0)
    driver = Driver(engine)
    driver.add(1)
    driver.add(2)
    driver.step(5)
    lived = [int((tokens[0, :, 0] != LAYOUT.stop_token).sum()) for tokens, _ in engine.plans[1]]
    assert min(lived) < PLANNER.horizon
    taken = [min(count, plan_every) for count in lived]  # the steps that each plan was good for
    assert sum(taken[:-1]) < 5 <= sum(taken)
    assert [len(actions) for actions in driver.actions.values()] == [5, 5]
    assert np.isfinite(np.stack(driver.actions[1])).all()


def test_actions_lie_within_the_bounds() -> None:
    engine = RecordingEngine(PLANNER)
    driver = Driver(engine)
    for seed in range(4):
        driver.add(seed)
    driver.step(6)
    actions = np.concatenate([np.stack(taken) for taken in driver.actions.values()])
    assert actions.shape == (24, 2)
    assert actions.dtype == np.float32
    assert (actions >= engine.low).all()
    assert (actions <= engine.high).all()
    assert (actions == engine.low).any()  # the bins reach further than the bounds
    assert len(np.unique(actions[:, 0])) > 2


def test_slots_are_taken_and_freed() -> None:
    engine = RecordingEngine(PLANNER, slots=2)
    assert engine.act() == {}
    for seed in (1, 2):
        engine.add(seed, seed, first_observation(seed))
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        engine.add(3, 3, first_observation(3))
    engine.remove(1)
    engine.add(3, 3, first_observation(3))
    assert engine.act().keys() == {2, 3}
