"""What the machine can do at most: its rate of matrix products.

On a CPU the faster of two libraries counts, MKL (behind torch.mm) and oneDNN: on some processors the one has
less than half the rate of the other, and a share of that would flatter.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tt_ray.config import ModelConfig


@dataclass(frozen=True)
class Limit:
    """Rates in GFLOP/s (1e9 operations a second), by the library that has the best one."""

    library: str
    square: float
    """Of a large square product."""
    shapes: float
    """Of the model's own products, the best of several numbers of rows."""
    others: dict[str, float]
    """The larger of the two by other libraries."""

    @property
    def gflops(self) -> float:
        """The larger of the two: what shares are of."""
        return max(self.square, self.shapes)


def measure_limit(model: ModelConfig, device: torch.device, size: int = 2048, repeats: int = 5) -> Limit:
    """Best of `repeats` runs each, with torch's threads; float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size *= 4 if device.type == "cuda" else 1
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: dict[str, tuple[float, float]] = {}
    for name, product in _products(device).items():
        square = _rate(functools.partial(product, a, b), 2.0 * size**3, device, repeats)
        shapes = (_shapes(product, model, rows, device, dtype, repeats) for rows in (64, 256, 1024, 4096))
        rates[name] = square, max(shapes)
    best = max(rates, key=lambda name: max(rates[name]))
    return Limit(best, *rates[best], {name: max(rate) for name, rate in rates.items() if name != best})


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(a [m, k], b [n, k]) -> a times b transposed, as a linear layer has it."""


def _products(device: torch.device) -> dict[str, Product]:
    products: dict[str, Product] = {"torch.mm": lambda a, b: torch.mm(a, b.t())}
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if device.type == "cpu" and has_onednn:
        products["oneDNN"] = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return products


def _shapes(
    product: Product, model: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> float:
    """Rate of one layer's four products on `rows` rows, a few layers in a run."""
    width, again = model.embed_dim, max(1, 8192 // rows)
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    pairs = [
        (torch.randn(rows, i, device=device, dtype=dtype), torch.randn(o, i, device=device, dtype=dtype))
        for i, o in sizes
    ]

    def layers() -> None:
        for _ in range(again):
            for x, weight in pairs:
                product(x, weight)

    return _rate(layers, again * sum(2.0 * rows * i * o for i, o in sizes), device, repeats)


def _rate(run: Callable[[], object], operations: float, device: torch.device, repeats: int) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return operations / best / 1e9


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
