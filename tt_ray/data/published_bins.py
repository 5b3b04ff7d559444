"""The bins of published models: those of the released code rebuilt from its data, those of the port as saved.

Both encode to the very tokens that the model was trained with; unlike ours, edges may repeat.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import Episodes
from tt_ray.data.tokens import token_columns

Doubles = NDArray[np.float64]


def without_last_row(episodes: Episodes) -> Episodes:
    """The same data without its very last row, which the released code's reader never takes.

    `ValueError` where nothing would be left.
    """
    count = len(episodes.rewards) - 1
    if count < 1:
        raise ValueError("one row is no data")
    return replace(
        episodes,
        observations=episodes.observations[:count],
        actions=episodes.actions[:count],
        rewards=episodes.rewards[:count],
        terminated=episodes.terminated[:count],
        truncated=episodes.truncated[:count],
        offsets=np.unique(np.minimum(episodes.offsets, count)),
    )


def authors_bins(episodes: Episodes, dataset: DatasetConfig, num_bins: int) -> Discretizer:
    """The released code's quantile bins of `episodes`, with rewards and values treated as `dataset` says.

    The edges are every n-th of a column's sorted values, n the number of rows for each bin, rounded up, and
    the largest. Where rows are so few that this gives too few edges: evenly spaced ranks, rounded down, as in
    earlier versions of that code.
    """
    columns = np.sort(token_columns(without_last_row(episodes), dataset), axis=0)
    rows = len(columns)
    ranks = np.append(np.arange(0, rows, -(-rows // num_bins)), rows - 1)
    if len(ranks) != num_bins + 1:
        ranks = np.linspace(0, rows - 1, num_bins + 1, dtype=int)
    edges = columns[ranks].T.astype(np.float64)
    return _bins("quantile", edges, (edges[:, 1:] + edges[:, :-1]) / 2)


def port_bins(edges: Doubles, centers: Doubles, strategy: str) -> Discretizer:
    """The port's bins, as it saves them: edges [D, V + 1], and what they decode to, [D, V].

    `ValueError` where they are none.
    """
    if edges.ndim != 2 or centers.shape != (edges.shape[0], edges.shape[1] - 1):
        raise ValueError("its edges and centers do not fit together")
    largest = np.finfo(np.float32).max / 2
    if not ((np.abs(edges) < largest).all() and (np.abs(centers) < largest).all()):
        raise ValueError("they are not finite")
    # The port compares x + 1e-8 + 1e-5 |x| with its edges: the same as comparing x with edges moved down.
    lower = edges - 1e-8
    return _bins(strategy, np.where(lower > 0, lower / (1 + 1e-5), lower / (1 - 1e-5)), centers)


def _bins(strategy: str, edges: Doubles, decoded: Doubles) -> Discretizer:
    """Bins that a float32 value is in from its edge on, and that decode to `decoded`."""
    rounded = edges.astype(np.float32)
    # A float32 number is at least an edge exactly if it is at least the first float32 number from there on.
    above = np.where(rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded)
    arrays = {"edges": above, "representatives": decoded.astype(np.float32)}
    return Discretizer.from_arrays(strategy, arrays)
