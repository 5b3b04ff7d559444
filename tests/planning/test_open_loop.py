from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_spec import toy_spec

from tt_ray.config import ModelConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.open_loop import RolloutSampler, sample_rollouts, stream_of
from tt_ray.planning.sampling import EpisodeStream

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=4)
SPEC = toy_spec(2, 1)


def random_checkpoint(context: int = 4, layout: TokenLayout = LAYOUT, stop: float = 0.5) -> Checkpoint:
    """A model in double precision, far from uniform distributions; `stop` is how often it ends an episode."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=context)
    model = TrajectoryTransformer(config, layout).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
        model.head *= 0.5
        model.head[layout.value_slot, layout.stop_token] = stop * model.final_norm.bias
    values = np.tile(np.arange(4, dtype=np.float32)[:, None], layout.slots)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=layout.num_bins)
    return Checkpoint(model, bins, SPEC, {}, 1, {})


def random_context(transitions: int, seed: int = 0, layout: TokenLayout = LAYOUT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = (transitions - 1) * layout.slots + layout.observation_dim
    return torch.randint(0, layout.num_bins, (length,), generator=generator)


def drawn(logits: Tensor, u: float) -> int:
    """The first token at which the cumulative probability exceeds u."""
    p = logits.softmax(0)
    return int((p.cumsum(0) <= u * p.sum()).sum())


@torch.no_grad()
def naive_rollout(checkpoint: Checkpoint, context: list[int], horizon: int, keep: int, u: Any) -> list[int]:
    """One rollout a token at a time: the whole visible window through the model, again and again."""
    model, layout = checkpoint.model, checkpoint.model.layout
    window, bins = model.config.context_transitions, layout.num_bins
    visible, plan, stopped = list(context), [], False
    acted = (horizon + 1) * layout.action_dim
    slots = [
        s for h in range(horizon + 1) for s in range(layout.slots) if (h, s) >= (0, layout.observation_dim)
    ]
    for place, slot in enumerate(slots):
        h, logits = (place + layout.observation_dim) // layout.slots, model(torch.tensor([visible]))[0, -1]
        if slot < layout.observation_dim:
            number = u[acted + (h - 1) * layout.observation_dim + slot]
            token = drawn(logits if slot == 0 else logits[:bins], number)
            stopped = stopped or token == bins
            token = bins if stopped else token
        elif slot < layout.reward_slot:
            token = drawn(logits[:bins], u[h * layout.action_dim + slot - layout.observation_dim])
        else:
            token = int(logits[:bins].argmax())
        plan.append(bins if stopped else token)
        visible.append(token)
        if len(visible) == window * layout.slots:
            visible = visible[-keep * layout.slots :]
    return plan[layout.slots - layout.observation_dim :]


@pytest.mark.parametrize("decoder", ["eager", "native"])
@pytest.mark.parametrize(("window", "context", "horizon"), [(4, 3, 6), (4, 1, 4), (2, 2, 5), (6, 4, 1)])
def test_rollouts_are_those_of_naive_uncached_sampling(
    decoder: Any, window: int, context: int, horizon: int
) -> None:
    """(2, 2) is the Markovian Transformer: it always sees one whole transition."""
    checkpoint, past = random_checkpoint(window), [context - 1, 0]
    contexts = torch.stack([random_context(context, e) for e in range(2)])
    found = sample_rollouts(
        checkpoint, contexts, past, horizon=horizon, rollouts=5, seed=3, decoder=decoder, chunk=2
    )
    assert found.shape == (2, 5, horizon, LAYOUT.slots)
    size = (horizon + 1) * LAYOUT.action_dim + horizon * LAYOUT.observation_dim
    for e, count in enumerate(past):
        shown = contexts[e, len(contexts[e]) - count * LAYOUT.slots - LAYOUT.observation_dim :].tolist()
        stream = EpisodeStream(stream_of(3, e))
        for r in range(5):
            u = stream.uniforms(r, (size,)).astype(np.float64)
            expected = naive_rollout(checkpoint, shown, horizon, max(1, context - 1), u)
            assert found[e, r].flatten().tolist() == expected


def test_some_rollouts_end_and_stay_ended() -> None:
    """The test above would prove less if none of its rollouts ended, or all at once."""
    found = sample_rollouts(random_checkpoint(), random_context(3)[None], [2], horizon=6, rollouts=50, seed=3)
    ended = (found[0] == LAYOUT.stop_token).all(dim=-1)
    assert ended.any(dim=0).any()
    assert not ended[:, -1].all()
    assert torch.equal(ended, ended.cummax(dim=1).values)
    assert ((found[0] == LAYOUT.stop_token).any(dim=-1) == ended).all()


def test_chunks_make_no_difference_and_seeds_do() -> None:
    checkpoint, context = random_checkpoint(), random_context(3)[None]

    def rollouts(seed: int, chunk: int, count: int = 7) -> Tensor:
        return sample_rollouts(checkpoint, context, [2], horizon=4, rollouts=count, seed=seed, chunk=chunk)

    whole = rollouts(0, 100)
    assert torch.equal(whole, rollouts(0, 3))
    assert torch.equal(whole, rollouts(0, 1))
    assert torch.equal(whole[:, :4], rollouts(0, 100, count=4))
    assert not torch.equal(whole, rollouts(1, 100))
    assert len({tuple(rollout.flatten().tolist()) for rollout in whole[0]}) > 1


def test_rollouts_have_the_models_distribution() -> None:
    """The first predicted token, over all actions: drawn shares against the exact sum over the actions."""
    checkpoint, context = random_checkpoint(stop=1.0), random_context(2)
    found = sample_rollouts(checkpoint, context[None], [1], horizon=1, rollouts=4_000, seed=0, chunk=4_000)
    shares = torch.bincount(found[0, :, 0, 0], minlength=LAYOUT.num_bins + 1) / 4_000
    expected = torch.zeros(LAYOUT.num_bins + 1, dtype=torch.float64)
    with torch.no_grad():
        acting = checkpoint.model(context[None])[0, -1, : LAYOUT.num_bins].softmax(0)
        for action, weight in enumerate(acting):
            tokens = [*context.tolist(), action]
            for _ in range(2):  # reward and value: the likeliest
                tokens.append(
                    int(checkpoint.model(torch.tensor([tokens]))[0, -1, : LAYOUT.num_bins].argmax())
                )
            expected += weight * checkpoint.model(torch.tensor([tokens]))[0, -1].softmax(0)
    assert expected[LAYOUT.stop_token] > 0.02  # one of the outcomes that must not be left out
    assert (shares - expected).abs().max() < 4 * 0.5 / 4_000**0.5


def test_what_cannot_be_rolled_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"prediction\.context: 5 transitions are more than the model's 4"):
        RolloutSampler(random_checkpoint(), context=5, horizon=2, rollouts=2)
    layout = replace(LAYOUT, goal_slots=(0,))
    with pytest.raises(UserError, match="a model with goals cannot be rolled out"):
        RolloutSampler(random_checkpoint(layout=layout), context=2, horizon=2, rollouts=2)


def test_hidden_observations_in_the_context() -> None:
    """Hidden is not the same as any bin, and the decoders agree on it."""
    layout = replace(LAYOUT, partial=True)
    checkpoint, context = random_checkpoint(layout=layout), random_context(3, layout=layout)
    hidden = context.clone()
    hidden[0] = hidden[-1] = layout.hidden_token

    def rollouts(shown: Tensor, decoder: Any) -> Tensor:
        return sample_rollouts(checkpoint, shown[None], [2], horizon=4, rollouts=30, seed=0, decoder=decoder)

    assert torch.equal(rollouts(hidden, "eager"), rollouts(hidden, "native"))
    assert not torch.equal(rollouts(hidden, "eager"), rollouts(context, "eager"))
    assert (rollouts(hidden, "eager") != layout.hidden_token).all()
    size = 5 * layout.action_dim + 4 * layout.observation_dim
    u = EpisodeStream(stream_of(0, 0)).uniforms(0, (size,)).astype(np.float64)
    expected = naive_rollout(checkpoint, hidden.tolist(), 4, 2, u)
    assert rollouts(hidden, "eager")[0, 0].flatten().tolist() == expected
