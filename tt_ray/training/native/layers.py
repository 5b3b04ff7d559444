"""The native layer as an operation with gradients."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tt_ray.model.native.build import VECTORS, NativeUnavailableError, Sources, load_library
from tt_ray.model.transformer import Block, TrajectoryTransformer

_FOLDER = Path(__file__).parent
LAYER = Sources(
    _FOLDER / "layer.cpp",
    (*(_FOLDER / f"{name}.h" for name in ("attention", "elementwise", "layer", "products")), VECTORS),
)
GROUP = 4
"""Windows whose weight gradients one thread adds up."""
WEIGHTS = 12
_Sizes = tuple[int, int, int, int, int, float]


class _Layer(ctypes.Structure):
    """Sizes, dropout and weights of a call; the same fields as in layer.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("windows", "tokens", "width", "heads", "hidden", "slots", "goal")
        ),
        *((name, ctypes.c_int64) for name in ("dropped", "group", "threads", "seed")),
        ("epsilon", ctypes.c_double),
        ("weights", ctypes.c_void_p * WEIGHTS),
    ]


def require_native(model: TrajectoryTransformer) -> None:
    """`NativeUnavailableError` where `NativeLayer` cannot compute the layers of `model`."""
    dtype, width = model.head.dtype, model.config.embed_dim
    if model.head.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        raise NativeUnavailableError(f"it computes in float32 and float64 on a CPU, not in {dtype}")
    lanes = load_library(LAYER).tt_ray_vector_bytes() // dtype.itemsize
    if width % lanes:
        raise NativeUnavailableError(f"model.embed_dim = {width} is no multiple of {lanes}")


class NativeLayer(torch.autograd.Function):
    """A block of the model, with dropout: `NativeLayer.of(block, x, slots, dropped, seed, goal)`.

    The result and its gradients are the same bits whatever the number of threads.
    """

    @classmethod
    def of(cls, block: Block, x: Tensor, slots: int, dropped: int, seed: int, goal: int = 0) -> Tensor:
        """Output [b, T, d] for x [b, T, d], of which `dropped` in 65,536 branches and weights are dropped.

        `seed` decides which ones; after `goal` tokens come those of slot 0 of `slots`, 1, and so on.
        `require_native` says if it works.
        """
        up, down = block.mlp[0], block.mlp[2]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        modules = (block.ln1, block.attention.qkv, block.attention.proj, block.ln2, up, down)
        weights = [tensor for module in modules for tensor in (module.weight, module.bias)]
        sizes = (block.attention.num_heads, slots, goal, dropped, seed, block.ln1.eps)
        return cls.apply(x, sizes, *weights)

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: _Sizes, *weights: Tensor) -> Tensor:
        """Output [b, T, d]; sizes are heads, slots, goal, numbers dropped, seed and the norms' epsilon."""
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        layer = _layer(x, sizes, weights)
        kept = _borrow(len(x) * _function("kept", x)(ctypes.byref(layer)), x.dtype)
        _call("forward", x, layer, x, kept, out)
        ctx.sizes = sizes
        ctx.save_for_backward(x, kept, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, kept, *weights = ctx.saved_tensors
        layer = _layer(x, ctx.sizes, weights)
        counts = [weight.numel() for weight in weights]
        parts = _borrow(-(-len(x) // GROUP) * sum(counts), x.dtype)
        sums, out = torch.empty(sum(counts), dtype=x.dtype), torch.empty_like(x)
        _call("backward", x, layer, x, kept, gradient.contiguous(), out, parts, sums)
        split = sums.split(counts)
        return out, None, *(part.view_as(weight) for part, weight in zip(split, weights, strict=True))


_SIZES = 8
_free: dict[tuple[int, torch.dtype], list[np.ndarray]] = {}


def _borrow(count: int, dtype: torch.dtype) -> Tensor:
    """An array that goes back to a pool when its last user is gone.

    A step fills hundreds of MB; fresh from the system each time, they would cost it a tenth of its time.
    """
    free = _free.setdefault((count, dtype), [])
    if len(_free) > _SIZES:  # the oldest is some earlier job's
        del _free[next(iter(_free))]
    memory = free.pop() if free else torch.empty(count, dtype=dtype).numpy()
    view = memory[:]
    weakref.finalize(view, free.append, memory).atexit = False
    return torch.from_numpy(view)


def _layer(x: Tensor, sizes: _Sizes, weights: Any) -> _Layer:
    heads, slots, goal, dropped, seed, epsilon = sizes
    return _Layer(
        windows=x.shape[0],
        tokens=x.shape[1],
        width=x.shape[2],
        heads=heads,
        hidden=len(weights[8]),
        slots=slots,
        goal=goal,
        dropped=dropped,
        group=GROUP,
        threads=torch.get_num_threads(),
        seed=seed,
        epsilon=epsilon,
        weights=(ctypes.c_void_p * WEIGHTS)(*(weight.data_ptr() for weight in weights)),
    )


def _function(name: str, x: Tensor) -> Any:
    function = getattr(load_library(LAYER), f"tt_ray_layer_{name}_{str(x.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_int64 if name == "kept" else None
    return function


def _call(name: str, x: Tensor, layer: _Layer, *tensors: Tensor) -> None:
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    _function(name, x)(ctypes.byref(layer), *pointers)
