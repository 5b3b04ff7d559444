"""The native search that chooses beams at every token against the one in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.cache import SearchCache
from tt_ray.model.native import NativeTokenCache
from tt_ray.model.transformer import TrajectoryTransformer

PLAIN = TokenLayout(observation_dim=3, action_dim=2, num_bins=12)
GOAL = TokenLayout(3, 2, num_bins=12, goal_slots=(2, 0), partial=True)
BEAMS, HORIZON = 7, 4
PAST = [2, 0, 1]


def make_model(layout: TokenLayout, dtype: torch.dtype) -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=32, context_transitions=6)
    model = TrajectoryTransformer(config, layout).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def contexts(layout: TokenLayout) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 12, (3, layout.goal_dim + 2 * layout.slots + 3), generator=generator)
    if layout.partial:
        tokens[:, -2] = tokens[0, layout.goal_dim + 7] = layout.hidden_token
    return tokens


def walk(
    cache: NativeTokenCache | SearchCache, tokens: Tensor, past: list[int], rows: list[int]
) -> list[Tensor]:
    """All logits, and the plans, of a walk with parents and tokens by chance, the same for each of `rows`."""
    generator, layout = torch.Generator().manual_seed(2), cache.layout
    count = HORIZON * layout.slots - layout.observation_dim
    parents = torch.randint(0, BEAMS, (count, 3, BEAMS), generator=generator)[:, rows]
    fed = torch.randint(0, 13, (count, 3, BEAMS), generator=generator)[:, rows]
    trace = [cache.open(tokens[rows], [past[row] for row in rows])]
    for step in range(count):
        cache.select(parents[step])
        if step < count - 1:
            trace.append(cache.extend_beams(fed[step]))
    return [*trace, cache.finish(fed[-1])]


def sizes(window: int, keep: int) -> dict[str, int]:
    search = {"beams": BEAMS, "horizon": HORIZON, "max_context_transitions": 3}
    return {**search, "window": window, "keep": keep}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [(6, 5), (6, 2), (3, 1), (3, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("layout", [PLAIN, GOAL], ids=["plain", "goal"])
def test_it_gives_what_the_torch_cache_gives(
    layout: TokenLayout, window: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whatever the beams' ancestry; and each episode alone gets the same bits."""
    model, tokens = make_model(layout, dtype), contexts(layout)
    with torch.inference_mode():
        native = NativeTokenCache(model, episodes=3, **sizes(*window))
        ours = walk(native, tokens, PAST, [0, 1, 2])
        again = walk(native, tokens, PAST, [0, 1, 2])
        torch_cache = SearchCache(model, episodes=3, copies=1, by_token=True, **sizes(*window))
        theirs = walk(torch_cache, tokens, PAST, [0, 1, 2])
        alone = [walk(native, tokens, PAST, [row]) for row in range(3)]
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)
    assert all(map(torch.equal, ours, again))
    for row in range(3):
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[row], ours, strict=True))


def test_the_last_logits_are_the_models_own() -> None:
    """Without a cache: the whole plan through the model, the goal in front."""
    model, tokens = make_model(GOAL, torch.float64), contexts(GOAL)
    with torch.inference_mode():
        *trace, plans = walk(NativeTokenCache(model, episodes=3, **sizes(6, 5)), tokens, PAST, [1])
        for beam in range(BEAMS):
            visible = torch.cat([tokens[1, :2], tokens[1, -3:], plans[0, beam].flatten()[3:-1]])
            torch.testing.assert_close(model(visible[None])[0, -1].softmax(0), expected(trace, plans, beam))


def expected(trace: list[Tensor], plans: Tensor, beam: int) -> Tensor:
    """Probabilities of the token after a plan's last but one, of the beam that it comes of."""
    generator = torch.Generator().manual_seed(2)
    parents = torch.randint(0, BEAMS, (len(trace), 3, BEAMS), generator=generator)[:, 1]
    return trace[-1][0, parents[-1, beam]].softmax(0)
