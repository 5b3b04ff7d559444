"""The training pass for CPUs: what TrajectoryTransformer computes, in operations that are quick there.

The layers are native code (see `native`), or where that cannot be compiled torch's operations, made quick by
three things. Products go to oneDNN, whose float32 kernels use AVX-512 on every CPU that has it
(MKL, behind torch's own, only on Intel's: on AMD Zen 5 that is 2.3 times). Dropout takes its masks from a
vector of random bits (torch draws them one at a time, a quarter of a step). Attention skips the blocks that
the causal mask hides. Sequences are padded to whole transitions: 160 tokens, not 159.

Shape letters: b windows, T tokens (a goal's G, and whole transitions), d embed_dim, h heads, w width of a
head, V bins.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tt_ray.model.native import NativeUnavailableError
from tt_ray.model.transformer import Block, TrajectoryTransformer, visibility
from tt_ray.training.native import NativeLayer, require_native

logger = logging.getLogger(__name__)

QUERY_BLOCK = 32
"""Queries that attention treats at once: they read no key after the last of them."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in malloc.h
_STEPS = 1 << 16  # dropout rates are multiples of 1 / 65,536


class Dropout:
    """Dropout masks of one forward pass, from a stream that torch's generator seeds."""

    def __init__(self, rate: float) -> None:
        self.dropped = min(round(rate * _STEPS), _STEPS - 1)
        """How many of 65,536 are dropped."""
        self.scale = _STEPS / (_STEPS - self.dropped)
        """Factor on what is kept, so that the mean stays."""
        self._threshold = self.dropped - _STEPS // 2
        self._bits = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.dropped > 0

    def seed(self) -> int:
        """Seed of masks that someone else draws."""
        return int(self._bits.integers(1 << 63))

    def mask(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Ones and zeros, each zero with the rate's probability, independent of all others."""
        count = prod(shape)
        words = self._bits.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64)
        numbers = torch.from_numpy(words.view(np.int16))[:count].view(*shape)
        return (numbers >= self._threshold).to(dtype)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """`x` plus a residual branch of its shape, with dropout."""
        if not self.active:
            return x + branch
        return torch.addcmul(x, branch, self.mask(branch.shape, branch.dtype), value=self.scale)


def training_logits(model: TrajectoryTransformer, tokens: Tensor) -> Tensor:
    """`model(tokens)` in training mode, own dropout: tokens [b, G + T] -> logits [b, T, V + 1]."""
    drop, slots, goal = Dropout(model.config.dropout), model.layout.slots, model.layout.goal_dim
    length = tokens.shape[1] - goal
    embedded = model.embed(tokens, model.slots[: goal + length], torch.arange(goal + length))
    x = F.pad(embedded, (0, 0, 0, -length % slots))
    if drop.active:
        x = x * (drop.mask(x.shape, x.dtype) * drop.scale)
    if _is_native(model):
        for block in model.blocks:
            assert isinstance(block, Block)
            x = NativeLayer.of(block, x, slots, drop.dropped, drop.seed(), goal)
    else:
        x = _layers(model, x, drop)
    by_slot = model.final_norm(x[:, goal:]).unflatten(1, (-1, slots)).flatten(0, 1).transpose(0, 1)
    logits = torch.bmm(by_slot, model.head.transpose(1, 2)).transpose(0, 1)
    return logits.reshape(len(tokens), -1, logits.shape[-1])[:, :length]


def _is_native(model: TrajectoryTransformer) -> bool:
    try:
        require_native(model)
    except NativeUnavailableError as reason:
        _log_once(f"training steps are not native code: {reason}")
        return False
    return True


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def _layers(model: TrajectoryTransformer, x: Tensor, drop: Dropout) -> Tensor:
    """All blocks of the model on a goal and whole transitions x [b, T, d], in torch's operations."""
    hidden = ~visibility(x.shape[1], model.layout.slots, model.layout.goal_dim)
    bias = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, float("-inf"))
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, (widen, gelu, narrow, _) = block.attention, block.mlp
        qkv = linear(attention.qkv, block.ln1(x))
        mixed = CausalAttention.apply(qkv, attention.num_heads, bias, drop)
        x = drop.add(x, linear(attention.proj, mixed))
        x = drop.add(x, linear(narrow, gelu(linear(widen, block.ln2(x)))))
    return x


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep up to 256 MiB that this process frees.

    It would hand the arrays of a step back to the system, which gives them out again emptied, page by page: a
    twentieth of a step. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it accepts
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)` of an nn.Linear, x [..., in] -> [..., out], by oneDNN where it can."""
    return Product.apply(x, layer.weight, layer.bias) if _has_onednn(x) else layer(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in float32 by oneDNN, without gradients: x [..., in], weight [out, in], bias [out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn(x: Tensor) -> bool:
    usable = x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return usable and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Product(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Output [..., n] of x [..., k], weight [n, k] and bias [n]."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        rows, out = x.flatten(0, -2), gradient.flatten(0, -2)
        # oneDNN reads its second factor across rows at full speed, not its first: copy the narrower one.
        if rows.shape[1] <= out.shape[1]:
            weight_gradient = product(rows.t().contiguous(), out.t()).t()
        else:
            weight_gradient = product(out.t().contiguous(), rows.t())
        return product(gradient, weight.t()), weight_gradient, out.sum(0)


class CausalAttention(torch.autograd.Function):
    """Attention under a causal mask, with dropout of its weights, in blocks of queries.

    With weights P, their kept part K (P where the mask is 1, else 0) and the dropout's scale c the output is
    O = c K V. In the backward pass the softmax's sum over keys is that of gradient * O over a head's width,
    so that neither the mask nor the dropped weights' gradients are needed.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, bias: Tensor, drop: Dropout) -> Tensor:
        """Output [b, T, d] of queries, keys and values [b, T, 3 d]; `bias` [T, T] is 0 or minus infinity."""
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        query = query * query.shape[-1] ** -0.5
        saved, parts = [], []
        for block, seen in _query_blocks(query.shape[1]):
            scores = torch.bmm(query[:, block], key[:, seen].transpose(1, 2)).add_(bias[block, seen])
            weights = torch.softmax(scores, dim=-1, out=scores)
            kept = weights * drop.mask(weights.shape, weights.dtype) if drop.active else weights
            parts.append(torch.bmm(kept, value[:, seen]))
            saved += [weights, kept]
        output = torch.cat(parts, dim=1).mul_(drop.scale)
        ctx.heads, ctx.scale = heads, drop.scale
        ctx.save_for_backward(query, key, value, output, *saved)
        return output.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient [b, T, 3 d] of queries, keys and values."""
        query, key, value, output, *saved = ctx.saved_tensors
        gradient = gradient.unflatten(-1, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)
        total = (gradient * output).sum(-1, keepdim=True)
        gradient = gradient * ctx.scale
        result = torch.zeros(3, *query.shape, dtype=query.dtype)
        for i, (block, seen) in enumerate(_query_blocks(query.shape[1])):
            weights, kept = saved[2 * i : 2 * i + 2]
            out = gradient[:, block]
            scores = torch.bmm(out, value[:, seen].transpose(1, 2))
            scores.mul_(kept).addcmul_(weights, total[:, block], value=-1)
            result[0, :, block] = torch.bmm(scores, key[:, seen])
            result[1, :, seen] += torch.bmm(scores.transpose(1, 2), query[:, block])
            result[2, :, seen] += torch.bmm(kept.transpose(1, 2), out)
        result[0] *= query.shape[-1] ** -0.5
        by_token = result.unflatten(1, (-1, ctx.heads)).permute(1, 3, 0, 2, 4)
        return by_token.flatten(2), None, None, None


def _query_blocks(length: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that each may see."""
    ends = [*range(QUERY_BLOCK, length, QUERY_BLOCK), length]
    return [(slice(start, end), slice(0, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
