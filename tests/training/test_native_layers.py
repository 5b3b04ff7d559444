"""The layer in C++ against the model's own in torch."""

from __future__ import annotations

import logging
import math
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.native import NativeUnavailableError, build
from tt_ray.model.transformer import Block, TrajectoryTransformer, visibility
from tt_ray.training import cpu
from tt_ray.training.native import NativeLayer, require_native

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)  # D = 5
SLOTS = LAYOUT.slots


def make_model(width: int = 16, heads: int = 2, dtype: torch.dtype = torch.float64) -> TrajectoryTransformer:
    config = ModelConfig(num_layers=1, num_heads=heads, embed_dim=width, context_transitions=9, dropout=0.0)
    return TrajectoryTransformer(config, LAYOUT).to(dtype)


def make_block(width: int = 16, heads: int = 2, dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(0)
    block = make_model(width, heads, dtype).blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) * (width**-0.5 if parameter.dim() > 1 else 0.5))
    return block


def results_of(block: Block, output: Tensor, x: Tensor) -> list[Tensor]:
    """Output, its gradients by x and by every parameter, given random gradients of its own."""
    target = torch.randn(output.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    return [output, *torch.autograd.grad((output * target).sum(), [x, *block.parameters()])]


def input_of(windows: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(windows, tokens, width, dtype=dtype, generator=generator).requires_grad_()


def compare(windows: int, tokens: int, width: int, heads: int, dtype: torch.dtype, goal: int = 0) -> None:
    block, x = make_block(width, heads, dtype), input_of(windows, tokens, width, dtype)
    expected = results_of(block, block(x, visibility(tokens, SLOTS, goal))[0], x)
    ours = results_of(block, NativeLayer.of(block, x, SLOTS, 0, 3, goal), x)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for result, reference in zip(ours, expected, strict=True):
        atol = tolerance * float(reference.detach().abs().max())
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=atol)


SHAPES = [(1, 1, 16, 1), (9, 33, 16, 2), (2, 44, 48, 3), (5, 20, 96, 4), (2, 160, 128, 4), (3, 15, 160, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_models_layer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Output and every gradient: windows in one and in several groups, heads of whole vectors and not."""
    compare(*shape, dtype)


@pytest.mark.parametrize("goal", [1, 2, 4, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_models_layer_after_a_goal(goal: int, dtype: torch.dtype) -> None:
    compare(2, goal + 30, 48, 3, dtype, goal)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_narrower_vectors_give_the_same(
    march: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if march == "haswell" and "avx2" not in build._processor():
        pytest.skip("this processor has no AVX2")
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", tuple(flags))
    for shape in SHAPES[1:4]:
        compare(*shape, torch.float64)
        compare(*shape, torch.float32)


def test_gradients_are_those_of_the_output_with_dropout() -> None:
    block, x = make_block(8), input_of(2, 9, 8, torch.float64)
    torch.autograd.gradcheck(
        lambda x, *_: NativeLayer.of(block, x, SLOTS, 20_000, 7), (x, *block.parameters()), fast_mode=False
    )


@pytest.mark.parametrize("dropped", [0, 6_554])
def test_threads_change_no_bit(dropped: int) -> None:
    block, x = make_block(32, dtype=torch.float32), input_of(13, 44, 32, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(results_of(block, NativeLayer.of(block, x, SLOTS, dropped, 3), x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_passes_may_wait_for_each_other_and_be_repeated() -> None:
    """The memory of a pass is its own until its gradients are done."""
    block, x = make_block(), input_of(3, 14, 16, torch.float64)

    def output(seed: int) -> Tensor:
        return NativeLayer.of(block, x, SLOTS, 6_554, seed)

    alone = [results_of(block, output(seed), x) for seed in (1, 2)]
    together = [output(seed) for seed in (1, 2)]
    for expected, result in zip(alone, together, strict=True):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(result.square().sum(), [x], retain_graph=True)
            repeated = torch.autograd.grad(result.square().sum(), [x], retain_graph=True)[0]
            assert torch.equal(gradient, repeated)
        assert all(map(torch.equal, expected, results_of(block, result, x)))


def branch_masks(which: str, dropped: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Factors [b, T, d] of the attention's or the MLP's branch."""
    block, x = make_block(128, dtype=dtype), torch.zeros(20, 15, 128, dtype=dtype)
    with torch.no_grad():
        for linear in (block.attention.proj, block.mlp[2]):
            linear.weight.zero_()
            linear.bias.zero_()
        {"attention": block.attention.proj, "mlp": block.mlp[2]}[which].bias.fill_(1.0)
        return NativeLayer.of(block, x, SLOTS, dropped, seed).clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_so_many_of_a_branch_are_dropped(rate: float, dtype: torch.dtype) -> None:
    dropped = round(rate * 65_536)
    masks = [branch_masks(which, dropped, seed, dtype) for which in ("attention", "mlp") for seed in (1, 2)]
    share, count = dropped / 65_536, masks[0].numel()
    for mask in masks:
        values = mask.unique()
        assert values[0] == 0.0
        torch.testing.assert_close(values[1:], torch.tensor([1 / (1 - share)], dtype=dtype))
        assert float((mask == 0).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(share / count))
    pairs = [(masks[i], masks[j]) for i in range(4) for j in range(i)]
    pairs += [(m[1:], m[:-1]) for m in masks] + [(m[:, 1:], m[:, :-1]) for m in masks]
    shifts = (1, 4, 8, 16, 32)
    pairs += [(m[..., s:], m[..., :-s]) for m in masks for s in shifts]
    pairs += [(m[:, :-1, s:], m[:, 1:, :-s]) for m in masks for s in shifts]
    for one, other in pairs:  # sites, seeds, windows, tokens and columns are independent
        both = float(((one == 0) & (other == 0)).double().mean())
        assert both == pytest.approx(share**2, abs=6 * share / math.sqrt(one.numel()))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_attention_drops_weights_after_the_softmax(rate: float) -> None:
    """Of n equal weights on values of 1 the sum has mean 1 and variance rate / (1 - rate) / n."""
    block, tokens, width = make_block(32, 2), 24, 32
    with torch.no_grad():
        block.attention.qkv.weight.zero_()
        block.attention.qkv.bias.zero_()
        block.attention.qkv.bias[2 * width :] = 1.0
        block.attention.proj.weight.copy_(torch.eye(width))
        block.attention.proj.bias.zero_()
        block.mlp[2].weight.zero_()
        block.mlp[2].bias.zero_()
    x = torch.zeros(4_000, tokens, width, dtype=torch.float64)
    with torch.no_grad():
        out = NativeLayer.of(block, x, SLOTS, round(rate * 65_536), 5)
    # A column is the branch's factor times its head's sum, so the largest of a head's is scale * sum.
    sums = out.unflatten(-1, (2, 16)).amax(-1) * (1 - rate)
    seen = visibility(tokens, SLOTS).sum(1).double()
    expected = rate / (1 - rate) / seen
    torch.testing.assert_close(sums.mean(0), torch.ones(tokens, 2, dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(sums.var(0), expected[:, None].expand(-1, 2), rtol=0.15, atol=0)
    first, last = sums[:, 0].T, sums[:, -1].T
    for one, other in ((first[0], first[1]), (first[0, 1:], first[0, :-1]), (first[0], last[0])):
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1].abs()) < 0.1  # heads, windows, tokens


def test_what_it_cannot_compute_is_said() -> None:
    with pytest.raises(NativeUnavailableError, match="bfloat16"):
        require_native(make_model(dtype=torch.bfloat16))
    with pytest.raises(NativeUnavailableError, match="embed_dim = 10"):
        require_native(make_model(width=10, dtype=torch.float32))


def test_without_a_compiler_steps_are_torchs_and_one_line_says_so(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens = make_model(), torch.randint(0, 7, (2, 12))
    native = cpu.training_logits(model, tokens)
    build.load_library.cache_clear()
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    cpu._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(cpu.training_logits(model, tokens), native, rtol=1e-10, atol=1e-10)
    assert [record.message for record in caplog.records] == [
        "training steps are not native code: no C++ compiler (g++ or clang++) is installed"
    ]
    cpu._log_once.cache_clear()
