"""Real values to bins and back, one dimension at a time.

Bin k of a dimension is [edges[k], edges[k + 1]); the first and the last also take what lies outside. Edges
are float32 numbers and distinct, and a bin's representative lies inside it, so encode(decode(k)) == k for
every bin in use. Bins that come with an imported checkpoint are the exception: they may repeat an edge, and
the bins between are then never an encode's answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]


def token_dtype(num_bins: int) -> type[np.uint8] | type[np.int16]:
    """Smallest token type that holds `num_bins` bins and the stop token."""
    return np.uint8 if num_bins <= 255 else np.int16


@dataclass(frozen=True)
class Discretizer:
    """Bins of D dimensions, at most V each. A dimension with fewer distinct edges uses fewer bins."""

    strategy: str
    num_bins: int
    """V: bins a dimension may use."""
    edges: Float32s
    """[D, V + 1], ascending, some of them equal in imported bins; past a dimension's last edge, +inf."""
    representatives: Float32s
    """[D, V]: the value that a bin decodes to, its midpoint; unused bins repeat the last one in use.

    Quantile bins of a column with at most V distinct values (a sparse reward) decode to those values instead.
    """

    @classmethod
    def fit(
        cls, values: Float32s, *, strategy: str, num_bins: int, reserved: Mapping[int, float] | None = None
    ) -> Discretizer:
        """Bins for the columns of `values` [T, D].

        `reserved` gives a dimension one special value (a terminal penalty): it gets a bin of its own, and the
        other bins are fitted without it.
        """
        reserved = reserved or {}
        dims = values.shape[1]
        edges = np.full((dims, num_bins + 1), np.inf, dtype=np.float32)
        representatives = np.zeros((dims, num_bins), dtype=np.float32)
        for d in range(dims):
            column, inside = _column_bins(values[:, d], strategy, num_bins, reserved.get(d))
            used = len(inside)
            edges[d, : used + 1] = column
            representatives[d, :used], representatives[d, used:] = inside, inside[-1]
        return cls(strategy, num_bins, edges, representatives)

    @property
    def dims(self) -> int:
        """D."""
        return len(self.edges)

    @property
    def bins_in_use(self) -> NDArray[np.int64]:
        """Bins of each dimension that an encode can answer, [D]."""
        return np.isfinite(self.edges).sum(axis=1) - 1

    def encode(self, values: NDArray[np.floating[Any]], first: int = 0) -> NDArray[np.integer[Any]]:
        """Tokens [..., d] of values [..., d], whose last axis are the dimensions first, first + 1, ...

        Values outside the data clip to the outermost bins. The type is that of `token_dtype`.
        """
        values = np.asarray(values, dtype=np.float32)
        tokens = np.empty(values.shape, dtype=token_dtype(self.num_bins))
        used = self.bins_in_use
        for i in range(values.shape[-1]):
            inner_edges = self.edges[first + i, 1 : used[first + i]]
            tokens[..., i] = np.searchsorted(inner_edges, values[..., i], side="right")
        return tokens

    def decode(self, tokens: NDArray[np.integer[Any]], first: int = 0) -> Float32s:
        """Representative values [..., d] of tokens [..., d], dimensions as in `encode`."""
        dims = first + np.arange(tokens.shape[-1])
        return self.representatives[dims, tokens]

    def expectation(self, probabilities: NDArray[np.floating[Any]], slot: int) -> NDArray[np.floating[Any]]:
        """Mean value [...] of dimension `slot` under probabilities [..., V] or [..., V + 1].

        The mass of the stop token, the last of V + 1, counts as value 0.
        """
        return probabilities[..., : self.num_bins] @ self.representatives[slot].astype(probabilities.dtype)

    def to_arrays(self) -> dict[str, Float32s]:
        """The arrays to save; `from_arrays` takes them back."""
        return {"edges": self.edges, "representatives": self.representatives}

    @classmethod
    def from_arrays(cls, strategy: str, arrays: Mapping[str, NDArray[Any]]) -> Discretizer:
        """Inverse of `to_arrays`: edges [D, V + 1], representatives [D, V]; `ValueError` for others."""
        # Contiguous: safetensors writes an array's memory as it lies.
        edges = np.ascontiguousarray(arrays["edges"], dtype=np.float32)
        representatives = np.ascontiguousarray(arrays["representatives"], dtype=np.float32)
        dims, bins = edges.shape[0], edges.shape[1] - 1
        if edges.ndim != 2 or bins < 1 or representatives.shape != (dims, bins):
            raise ValueError("the bins' arrays do not fit together")
        if not (np.isfinite(edges[:, :2]).all() and np.isfinite(representatives).all()):
            raise ValueError("bins are not finite")
        with np.errstate(invalid="ignore"):  # unused edges: infinity less infinity
            if not ((np.diff(edges) >= 0) | (edges[:, 1:] == np.inf)).all():
                raise ValueError("the bins' edges do not ascend")
        return cls(strategy, bins, edges, representatives)


def _column_bins(
    column: Float32s, strategy: str, num_bins: int, reserved: float | None
) -> tuple[Float32s, Float32s]:
    """Distinct ascending float32 edges of one dimension, 2 to num_bins + 1, and what its bins decode to."""
    if reserved is None:
        return _plain_bins(column, strategy, num_bins)
    special = np.float32(reserved)
    own_bin = np.array([special, _next(special)], dtype=np.float32)
    ordinary = column[column != special]
    if not len(ordinary):
        return own_bin, own_bin[:1]
    # A bin of its own can split another in two, or leave a gap beside it: both cost two bins.
    plain_edges, inside = _plain_bins(ordinary, strategy, num_bins - 2)
    edges = np.unique(np.concatenate([plain_edges, own_bin]))
    representatives = _midpoints(edges)
    representatives[np.searchsorted(edges, inside, side="right") - 1] = inside
    # The gap between a far-off special value and the ordinary ones stands for the nearest ordinary value.
    if special < plain_edges[0] and len(edges) > len(plain_edges) + 1:
        representatives[1] = np.nextafter(edges[2], np.float32(-np.inf))
    elif special > plain_edges[-1]:
        representatives[-2] = plain_edges[-1]
    return edges, representatives


def _plain_bins(column: Float32s, strategy: str, num_bins: int) -> tuple[Float32s, Float32s]:
    values = np.unique(column)
    if strategy == "quantile" and len(values) <= num_bins:
        return _bins_of_values(values)
    if strategy == "uniform":
        cuts = np.linspace(np.float64(values[0]), np.float64(values[-1]), num_bins + 1)
    else:
        cuts = np.quantile(column.astype(np.float64), np.linspace(0.0, 1.0, num_bins + 1))
    # An edge that repeats is one value with at least a bin's worth of mass (a sparse reward, a contact force
    # that is mostly zero): that value gets a bin of its own, so that it decodes to itself.
    distinct, counts = np.unique(cuts.astype(np.float32), return_counts=True)
    atoms = distinct[counts > 1]
    edges = np.unique(np.concatenate([distinct, _next(atoms)]))
    return edges, _midpoints(edges)


def _bins_of_values(values: Float32s) -> tuple[Float32s, Float32s]:
    """A bin for each of a few distinct values, which decodes to it; what lies between goes to the nearest."""
    low, high = values[:-1], values[1:]
    middle = _middle(low, high)
    inner = np.where(middle > low, middle, high)
    return np.concatenate([values[:1], inner, _next(values[-1:])]), values


def _next(values: Any) -> Any:
    return np.nextafter(values, np.float32(np.inf), dtype=np.float32)


def _middle(low: Float32s, high: Float32s) -> Float32s:
    return (low.astype(np.float64) / 2 + high.astype(np.float64) / 2).astype(np.float32)


def _midpoints(edges: Float32s) -> Float32s:
    """Midpoints of adjacent edges; a bin with no float32 number between its edges takes its lower edge."""
    low, high = edges[:-1], edges[1:]
    middle = _middle(low, high)
    return np.where(middle < high, middle, low)
