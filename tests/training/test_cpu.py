from __future__ import annotations

import math
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.transformer import TrajectoryTransformer, visibility
from tt_ray.training import cpu
from tt_ray.training.cpu import CausalAttention, Dropout, Product, training_logits
from tt_ray.training.native import require_native

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)  # D = 5


def make_model(
    dropout: float = 0.0, dtype: torch.dtype = torch.float64, layout: TokenLayout = LAYOUT
) -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=16, context_transitions=9, dropout=dropout)
    model = TrajectoryTransformer(config, layout).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def tokens_of(length: int) -> Tensor:
    return torch.randint(0, 7, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["native", "torch"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of layers in turn."""
    if request.param == "native":
        require_native(make_model(dtype=torch.float32))
    else:
        monkeypatch.setattr(cpu, "_is_native", lambda model: False)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("length", [1, 5, 14, 31, 44])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_model(length: int, dtype: torch.dtype) -> None:
    """Logits and every gradient; 44 tokens are two blocks of queries."""
    model, tokens = make_model(dtype=dtype), tokens_of(length)
    weights = torch.randn(3, length, 7, dtype=dtype)
    results = []
    for logits in (model(tokens), training_logits(model, tokens)):
        gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        results.append([logits, *gradients])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("goal", [(0,), (1, 0), (0, 1, 0), (1, 0) * 4], ids=len)
@pytest.mark.parametrize("length", [1, 14, 44])
def test_equals_the_model_with_a_goal_in_front(goal: tuple[int, ...], length: int) -> None:
    """Logits and every gradient in float64, with goals shorter and longer than a transition."""
    layout = TokenLayout(observation_dim=2, action_dim=1, num_bins=6, goal_slots=goal, partial=True)
    model, tokens = make_model(layout=layout), tokens_of(len(goal) + length)
    tokens[0, ::7] = layout.hidden_token
    weights = torch.randn(3, length, 7, dtype=torch.float64)
    results = []
    for logits in (model(tokens), training_logits(model, tokens)):
        gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [(8, 24), (24, 8), (8, 8)])
def test_onednn_products_have_torchs_gradients(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, sizes[0], requires_grad=True)
    weight = torch.randn(sizes[1], sizes[0], requires_grad=True)
    bias = torch.randn(sizes[1], requires_grad=True)
    target = torch.randn(2, 5, sizes[1])
    results = []
    for output in (F.linear(x, weight, bias), Product.apply(x, weight, bias)):
        results.append([output, *torch.autograd.grad((output * target).sum(), [x, weight, bias])])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_dropout_drops_so_many_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    drop, count = Dropout(rate), 1_000_000
    mask = drop.mask((1_000, 1_000), torch.float32)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    deviation = math.sqrt(rate * (1 - rate) / count)
    assert float((mask == 0).double().mean()) == pytest.approx(rate, abs=5 * deviation + 1e-5)
    assert float(mask.double().mean()) * drop.scale == pytest.approx(1.0, abs=6 * deviation)
    neighbours = (mask[:, 1:] == 0) & (mask[:, :-1] == 0)
    assert float(neighbours.double().mean()) == pytest.approx(rate**2, abs=6 * rate / 1_000)
    again = drop.mask((1_000, 1_000), torch.float32)
    assert float(((mask == 0) & (again == 0)).double().mean()) == pytest.approx(rate**2, abs=6 * rate / 1_000)


def test_no_rate_drops_everything() -> None:
    assert not Dropout(0.0).active
    assert Dropout(0.0).scale == 1.0
    assert Dropout(0.9999999).scale == 65_536


def plain_attention(qkv: Tensor, heads: int, bias: Tensor, drop: Dropout) -> Tensor:
    """Attention as written in books, its weights masked block by block in the same order."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias).softmax(-1)
    mask, block = torch.zeros_like(weights), cpu.QUERY_BLOCK
    for start in range(0, weights.shape[2], block):
        end = min(start + block, weights.shape[2])
        part = drop.mask((len(qkv) * heads, end - start, end), weights.dtype)
        mask[:, :, start:end, :end] = part.unflatten(0, (len(qkv), heads))
    return (weights * mask * drop.scale @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [6, 32, 70])
def test_attention_drops_weights_after_the_softmax(length: int) -> None:
    torch.manual_seed(0)
    hidden = ~visibility(length, 5)
    bias = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -math.inf)
    qkv = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, length, 8, dtype=torch.float64)
    results = []
    for attend in (plain_attention, CausalAttention.apply):
        torch.manual_seed(1)
        output = attend(qkv, 2, bias, Dropout(0.3))
        results.append((output, *torch.autograd.grad((output * target).sum(), [qkv])))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("layers")
def test_masks_are_torchs_seeds() -> None:
    model, tokens = make_model(dropout=0.2), tokens_of(44)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return training_logits(model, tokens)

    assert torch.equal(logits(3), logits(3))
    assert not torch.equal(logits(3), logits(4))


@pytest.mark.usefixtures("layers")
def test_dropout_is_as_strong_as_the_models_own() -> None:
    """The spread of a logit over masks, on both paths."""
    model, tokens = make_model(dropout=0.2, dtype=torch.float32).train(), tokens_of(20)[:1].expand(20_000, 20)
    torch.manual_seed(0)
    with torch.no_grad():
        ours, theirs = training_logits(model, tokens), model(tokens)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0)  # heavy tails
    spread = theirs.std(0) / math.sqrt(10_000)
    assert float(((ours.mean(0) - theirs.mean(0)).abs() / spread).max()) < 5


FAULTS = """
import resource, torch
from tt_ray.training.cpu import keep_freed_memory
keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(5 << 18).fill_(1.0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    """An array of 1,280 pages, again and again, in a process that begins by keeping nothing."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    faults = [int(line) for line in done.stdout.split()]
    assert sum(faults[4:]) < 1_280
