"""`planner.execute: means` against the model run by hand, on both decoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_spec import toy_spec

from tt_ray.config import ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.cache import SearchCache
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.native import NativeTokenCache
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.engine import PlanningEngine
from tt_ray.planning.expansions import SearchSettings, Uniforms
from tt_ray.planning.objectives import Likelihood

LAYOUT = TokenLayout(observation_dim=2, action_dim=2, num_bins=5)
VALUES = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64).pow(3).expand(2, -1)
HORIZON, BEAMS, PAST = 2, 3, [0, 2]


def random_model(dtype: torch.dtype = torch.float64) -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=5)
    model = TrajectoryTransformer(config, LAYOUT).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the near-uniform distributions of a fresh model
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return model


def contexts() -> Tensor:
    places = 2 * LAYOUT.slots + LAYOUT.observation_dim
    return torch.randint(0, LAYOUT.num_bins, (2, places), generator=torch.Generator().manual_seed(1))


def search(model: TrajectoryTransformer, decoder: str) -> Plans:
    sizes = {"episodes": 2, "beams": BEAMS, "horizon": HORIZON, "max_context_transitions": 3} | {
        "window": 5,
        "keep": 2,
    }
    native = decoder == "native"
    cache = (
        NativeTokenCache(model, **sizes) if native else SearchCache(model, copies=1, by_token=True, **sizes)
    )
    none = torch.zeros(LAYOUT.num_bins + 1, dtype=torch.float64)
    settings = SearchSettings(HORIZON, BEAMS, 1)
    nothing = Uniforms(torch.zeros(2, HORIZON, 0, BEAMS, 1), None)
    beams = BeamSearch(LAYOUT, settings, Likelihood(), none, none, VALUES)
    with torch.inference_mode():
        return beams.run(cache, contexts(), PAST, nothing)


def mean_of(model: TrajectoryTransformer, visible: list[int], action: int) -> float:
    """Mean of the action dimension that the model expects after the tokens `visible`."""
    with torch.no_grad():
        logits = model(torch.tensor([visible]))[0, -1, : LAYOUT.num_bins]
    return float(logits.softmax(0) @ VALUES[action])


@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_means_are_those_of_the_distributions_that_each_plan_chose_from(decoder: str) -> None:
    model = random_model()
    plans, lived = search(model, decoder), 0
    assert plans.actions is not None
    assert plans.actions.shape == (2, BEAMS, HORIZON, 2)
    for episode, past in enumerate(PAST):
        given = contexts()[episode, -(past * LAYOUT.slots + LAYOUT.observation_dim) :].tolist()
        for beam in range(BEAMS):
            plan = plans.tokens[episode, beam].flatten().tolist()
            for step in range(HORIZON):
                start = step * LAYOUT.slots + LAYOUT.observation_dim
                if LAYOUT.stop_token in plan[: start + 2]:
                    continue
                for action in range(2):
                    # A plan begins with the observation that the context ends with.
                    told = plan[LAYOUT.observation_dim : start + action]
                    expected = mean_of(model, [*given, *told], action)
                    assert plans.actions[episode, beam, step, action] == pytest.approx(expected, rel=1e-9)
                    lived += 1
    assert lived > 12


def checkpoint() -> Checkpoint:
    values = np.random.default_rng(0).normal(size=(2_000, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    spec = toy_spec(2, 2, action_low=(-0.1, -9.0), action_high=(0.1, 9.0))
    return Checkpoint(random_model(torch.float32), bins, spec, {}, 1, {})


def first_action(execute: str, decoder: str = "native", **settings: object) -> np.ndarray:
    planner = PlannerConfig(
        **{"objective": "likelihood", "horizon": 1, "beam_width": 1} | settings, execute=execute
    )
    engine = PlanningEngine(checkpoint(), planner, discount=1.0, slots=1, decoder=decoder)
    engine.add(0, 0, np.array([0.4, -1.0], dtype=np.float32))
    return engine.act()[0]


def test_the_engine_executes_means_within_the_bounds_of_the_actions() -> None:
    made = checkpoint()
    observation = made.discretizer.encode(np.array([0.4, -1.0], dtype=np.float32)).tolist()
    with torch.no_grad():
        logits = made.model(torch.tensor([observation]))[0, -1, : LAYOUT.num_bins]
        first = int(logits.argmax())
        next_logits = made.model(torch.tensor([[*observation, first]]))[0, -1, : LAYOUT.num_bins]
    means = [
        made.discretizer.expectation(part.softmax(0).numpy(), slot)
        for part, slot in ((logits, LAYOUT.observation_dim), (next_logits, LAYOUT.observation_dim + 1))
    ]
    assert abs(means[0]) > 0.1
    for decoder in ("native", "eager"):
        taken = first_action("means", decoder)
        assert taken == pytest.approx([np.clip(means[0], -0.1, 0.1), means[1]], rel=1e-5)
    assert not np.allclose(first_action("bins"), first_action("means"))


def test_means_of_drawn_actions_are_refused_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        first_action("means", objective="return")
    assert "planner.execute: means is for objectives that choose single tokens, and return" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
