from __future__ import annotations

import pytest
import torch
from reference import ReferenceSearch

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.cache import SearchCache
from tt_ray.model.native import NativeCache
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans, keep_stopped
from tt_ray.planning.expansions import SearchSettings, Uniforms
from tt_ray.planning.objectives import Return

LAYOUT = TokenLayout(observation_dim=3, action_dim=2, num_bins=5)
DISCOUNT = 0.9
STOP_BIAS = 0.6


def random_model(seed: int, context: int = 6) -> TrajectoryTransformer:
    torch.manual_seed(seed)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=context)
    model = TrajectoryTransformer(config, LAYOUT).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the near-uniform distributions of a fresh model
            parameter.copy_(torch.randn_like(parameter) * 0.6)
        # About as likely as each bin of a next observation's first slot, given some beams.
        model.head[LAYOUT.value_slot, LAYOUT.stop_token] += STOP_BIAS * model.final_norm.bias
    return model


def random_contexts(past: list[int], places: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LAYOUT.num_bins, (len(past), places), generator=generator)


def bin_values() -> torch.Tensor:
    return torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 0.0], dtype=torch.float64)


def random_uniforms(settings: SearchSettings, episodes: int, seed: int) -> Uniforms:
    generator = torch.Generator().manual_seed(seed)
    s, n, m = settings, LAYOUT.observation_dim, LAYOUT.action_dim
    actions = torch.rand(
        episodes, s.horizon, m, s.beam_width, s.n_expand, generator=generator, dtype=torch.float64
    )
    shape = (episodes, s.horizon - 1, n, s.beam_width)
    observations = torch.rand(shape, generator=generator, dtype=torch.float64) if s.k_obs > 1 else None
    return Uniforms(actions, observations)


def cached_search(
    model: TrajectoryTransformer,
    settings: SearchSettings,
    window: int,
    keep: int,
    max_context: int,
    contexts: torch.Tensor,
    past: list[int],
    uniforms: Uniforms,
    decoder: str = "native",
) -> Plans:
    sizes = {
        "episodes": len(past),
        "beams": settings.beam_width,
        "copies": settings.n_expand,
        "horizon": settings.horizon,
        "max_context_transitions": max_context,
        "window": window,
        "keep": keep,
    }
    filters = {"k_act": settings.k_act, "cdf_act": settings.cdf_act, "k_obs": settings.k_obs}
    values = {"reward_values": bin_values(), "value_values": bin_values()}
    cache = (
        NativeCache(model, **sizes, **filters, **values)
        if decoder == "native"
        else SearchCache(model, **sizes)
    )
    search = BeamSearch(LAYOUT, settings, Return(DISCOUNT), bin_values(), bin_values())
    with torch.inference_mode():
        return search.run(cache, contexts, past, uniforms)


CASES = {
    "no slide": (SearchSettings(3, 4, 2), 6, 2, 3),
    "slides, keeps one": (SearchSettings(6, 3, 2), 3, 1, 2),
    "slides each transition": (SearchSettings(5, 3, 2, cdf_act=0.6), 3, 2, 3),
    "keeps past and plan": (SearchSettings(4, 3, 2, k_act=3), 5, 4, 4),
    "wide window": (SearchSettings(7, 3, 2, k_act=4, cdf_act=0.3), 6, 3, 4),
    "sampled observations": (SearchSettings(5, 3, 2, k_obs=3), 4, 2, 3),
    "no copies": (SearchSettings(4, 5, 1), 4, 3, 3),
    "greedy": (SearchSettings(4, 1, 1, k_act=1), 3, 2, 2),
    "no past": (SearchSettings(4, 3, 3, k_act=2), 3, 1, 1),
}


@pytest.mark.parametrize("decoder", ["native", "eager"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_cached_search_equals_the_uncached_reference(name: str, seed: int, decoder: str) -> None:
    settings, window, keep, max_context = CASES[name]
    model = random_model(seed)
    past = [(seed + i) % max_context for i in range(3)]
    places = (max_context - 1) * LAYOUT.slots + LAYOUT.observation_dim
    contexts = random_contexts(past, places, seed)
    uniforms = random_uniforms(settings, len(past), seed)
    plans = cached_search(model, settings, window, keep, max_context, contexts, past, uniforms, decoder)
    reference = ReferenceSearch(model, settings, window, keep, DISCOUNT, bin_values(), bin_values())
    for e, count in enumerate(past):
        context = contexts[e, places - count * LAYOUT.slots - LAYOUT.observation_dim :].tolist()
        noise = None if uniforms.observations is None else uniforms.observations[e]
        beams = reference.run(context, uniforms.actions[e], noise)
        assert plans.tokens[e].flatten(1).tolist() == [list(beam.plan) for beam in beams]
        torch.testing.assert_close(
            plans.scores[e], torch.tensor([b.score for b in beams], dtype=torch.float64)
        )


def test_stop_tokens_are_in_play() -> None:
    """The cases above would prove little if no beam ever stopped, or all did."""
    settings = SearchSettings(6, 4, 2)
    stops = []
    for seed in range(8):
        contexts = random_contexts([1], LAYOUT.slots + LAYOUT.observation_dim, seed)
        uniforms = random_uniforms(settings, 1, seed)
        plans = cached_search(random_model(seed), settings, 3, 2, 2, contexts, [1], uniforms)
        stops.append((plans.tokens[..., 0] == LAYOUT.stop_token).any(-1).float().mean().item())
    assert 0.05 < sum(stops) / len(stops) < 0.95


def test_a_stopped_beam_keeps_its_score_and_occupies_one_place() -> None:
    candidates = torch.tensor([[[5.0, 6.0], [1.0, 2.0]]])
    kept = keep_stopped(candidates, torch.tensor([[4.0, 3.0]]), torch.tensor([[True, False]]))
    assert kept.tolist() == [[[4.0, float("-inf")], [1.0, 2.0]]]


@pytest.mark.parametrize("seed", range(3))
def test_batched_equals_single_and_neighbours_do_not_matter(seed: int) -> None:
    settings, window, keep, max_context = CASES["slides each transition"]
    model, past = random_model(seed), [0, 2, 1, 2]
    places = (max_context - 1) * LAYOUT.slots + LAYOUT.observation_dim
    contexts = random_contexts(past, places, seed)
    uniforms = random_uniforms(settings, len(past), seed)
    together = cached_search(model, settings, window, keep, max_context, contexts, past, uniforms)
    for e in range(len(past)):
        one = cached_search(
            model,
            settings,
            window,
            keep,
            max_context,
            contexts[e : e + 1],
            past[e : e + 1],
            Uniforms(uniforms.actions[e : e + 1], None),
        )
        assert torch.equal(one.tokens[0], together.tokens[e])
    order = [2, 0, 3, 1]
    shuffled = cached_search(
        model,
        settings,
        window,
        keep,
        max_context,
        contexts[order],
        [past[e] for e in order],
        Uniforms(uniforms.actions[order], None),
    )
    assert torch.equal(shuffled.tokens, together.tokens[order])


def test_padding_before_a_short_past_does_not_matter() -> None:
    settings, window, keep, max_context = CASES["wide window"]
    places = (max_context - 1) * LAYOUT.slots + LAYOUT.observation_dim
    contexts, uniforms = random_contexts([1], places, 0), random_uniforms(settings, 1, 0)
    other = contexts.clone()
    other[:, : places - LAYOUT.slots - LAYOUT.observation_dim] = LAYOUT.stop_token
    first, second = (
        cached_search(random_model(5), settings, window, keep, max_context, tokens, [1], uniforms)
        for tokens in (contexts, other)
    )
    assert torch.equal(first.tokens, second.tokens)
