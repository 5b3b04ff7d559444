"""Searches of models that are told a goal, or from which observations are hidden, against uncached ones."""

from __future__ import annotations

import pytest
import torch
from reference import Beam, ReferenceSearch
from test_beam import CASES, DISCOUNT, bin_values, cached_search, random_uniforms
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.transformer import TrajectoryTransformer

GOALS = [(), (1,), (2, 0), (1, 0, 2)]


def random_model(seed: int, goal_slots: tuple[int, ...]) -> TrajectoryTransformer:
    torch.manual_seed(seed)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=6)
    layout = TokenLayout(3, 2, num_bins=5, goal_slots=goal_slots, partial=True)
    model = TrajectoryTransformer(config, layout).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
        model.head[layout.value_slot, layout.stop_token] += 0.6 * model.final_norm.bias
    return model


def random_contexts(layout: TokenLayout, past: list[int], max_context: int, seed: int) -> Tensor:
    """Goals and contexts, a third of the observations hidden."""
    generator = torch.Generator().manual_seed(seed)
    places = (max_context - 1) * layout.slots + layout.observation_dim
    tokens = torch.randint(0, layout.num_bins, (len(past), places), generator=generator)
    observed = torch.arange(places) % layout.slots < layout.observation_dim
    hidden = (torch.rand(tokens.shape, generator=generator) < 1 / 3) & observed
    goals = torch.randint(0, layout.num_bins, (len(past), layout.goal_dim), generator=generator)
    return torch.cat([goals, tokens.masked_fill(hidden, layout.hidden_token)], dim=1)


class GoalReference(ReferenceSearch):
    """The whole window at every token, the goal in front of it."""

    goal: tuple[int, ...] = ()

    @torch.no_grad()
    def logits(self, beam: Beam) -> Tensor:
        return self.model(torch.tensor([[*self.goal, *beam.visible]]))[0, -1]


@pytest.mark.parametrize("decoder", ["native", "eager"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("goal_slots", GOALS, ids=len)
def test_cached_search_equals_the_uncached_reference(
    name: str, goal_slots: tuple[int, ...], decoder: str
) -> None:
    settings, window, keep, max_context = CASES[name]
    seed = len(goal_slots)
    model = random_model(seed, goal_slots)
    layout, past = model.layout, [(seed + i) % max_context for i in range(3)]
    contexts = random_contexts(layout, past, max_context, seed)
    assert (contexts == layout.hidden_token).any()
    uniforms = random_uniforms(settings, len(past), seed)
    plans = cached_search(model, settings, window, keep, max_context, contexts, past, uniforms, decoder)
    reference = GoalReference(model, settings, window, keep, DISCOUNT, bin_values(), bin_values())
    for e, count in enumerate(past):
        length = count * layout.slots + layout.observation_dim
        reference.goal = tuple(contexts[e, : layout.goal_dim].tolist())
        noise = None if uniforms.observations is None else uniforms.observations[e]
        beams = reference.run(contexts[e, -length:].tolist(), uniforms.actions[e], noise)
        assert plans.tokens[e].flatten(1).tolist() == [list(beam.plan) for beam in beams]
        scores = torch.tensor([beam.score for beam in beams], dtype=torch.float64)
        torch.testing.assert_close(plans.scores[e], scores)


@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_the_goal_decides(decoder: str) -> None:
    """Each goal token changes what is found, after the window has slid too."""
    settings, window, keep, max_context = CASES["slides, keeps one"]
    model = random_model(2, (2, 0))
    contexts = random_contexts(model.layout, [1], max_context, 2)
    uniforms = random_uniforms(settings, 1, 2)
    found = set()
    for first in range(5):
        for second in range(5):
            contexts[0, :2] = torch.tensor([first, second])
            plans = cached_search(
                model, settings, window, keep, max_context, contexts, [1], uniforms, decoder
            )
            found.add(tuple(plans.scores[0].tolist()))
    assert len(found) == 25


@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_padding_between_goal_and_context_does_not_matter(decoder: str) -> None:
    settings, window, keep, max_context = CASES["wide window"]
    model = random_model(3, (1, 0, 2))
    contexts = random_contexts(model.layout, [1], max_context, 0)
    uniforms, length = random_uniforms(settings, 1, 0), model.layout.slots + 3
    other = contexts.clone()
    other[:, 3:-length] = model.layout.stop_token
    first, second = (
        cached_search(model, settings, window, keep, max_context, tokens, [1], uniforms, decoder)
        for tokens in (contexts, other)
    )
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.scores, second.scores)
