"""Bins of published models: the tokens that their own code gives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.published_bins import authors_bins, port_bins, without_last_row
from tt_ray.data.tokens import token_columns

DATASET = DatasetConfig(id="toy/toy-v0", discount=0.9, terminal_penalty=-100.0)
BINS = 10


def make_episodes(lengths: tuple[int, ...] = (40, 1, 83, 30), seed: int = 0) -> Episodes:
    """Columns with ties: one that is constant, one that is mostly zero, actions at their bounds."""
    random, rows = np.random.default_rng(seed), sum(lengths)
    observations = random.normal(size=(rows, 3)).astype(np.float32)
    observations[:, 1] = 2.5
    observations[:, 2] *= random.random(rows) < 0.2
    offsets = np.cumsum([0, *lengths])
    last = np.isin(np.arange(rows), offsets[1:] - 1)
    ended = last & (np.arange(rows) < offsets[-2])
    spec = DataSpec(
        dataset_id="toy/toy-v0",
        environment={"id": "Toy-v0"},
        observation_keys=(),
        observation_dim=3,
        action_dim=1,
        action_low=(-1.0,),
        action_high=(1.0,),
        ref_min_score=None,
        ref_max_score=None,
        fingerprint="abc",
    )
    return Episodes(
        observations=observations,
        actions=np.clip(random.normal(size=(rows, 1)), -1, 1).astype(np.float32),
        rewards=random.normal(size=rows).astype(np.float32),
        terminated=ended,
        truncated=last & ~ended,
        offsets=offsets,
        spec=spec,
    )


def authors_columns(episodes: Episodes) -> NDArray[np.float64]:
    """What the released code bins, in double precision: all rows but the last, with rewards and values."""
    rows = len(episodes.rewards) - 1
    rewards = np.where(episodes.terminated, -100.0, episodes.rewards).astype(np.float64)[:rows]
    values = np.zeros(rows)
    for begin, end in zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True):
        for t in range(begin, min(end, rows)):
            ahead = rewards[t + 1 : min(end, rows)]
            values[t] = (ahead * 0.9 ** np.arange(len(ahead))).sum()
    parts = [episodes.observations[:rows], episodes.actions[:rows], rewards[:, None], values[:, None]]
    return np.concatenate(parts, axis=1, dtype=np.float64)


def authors_token(value: float, thresholds: NDArray[np.float64]) -> int:
    """The last threshold that is not above the value, within the bins."""
    reached = np.flatnonzero(value >= thresholds)
    return min(int(reached[-1]), BINS - 1) if len(reached) else 0


def tokens_of(bins: Discretizer, values: NDArray[np.float32]) -> NDArray[np.int64]:
    return bins.encode(values).astype(np.int64)


@pytest.mark.parametrize("lengths", [(40, 1, 83, 30), (500, 517), (9, 8, 1)])
def test_the_released_codes_bins(lengths: tuple[int, ...]) -> None:
    episodes = make_episodes(lengths)
    columns = authors_columns(episodes)
    rows, step = len(columns), -(-len(columns) // BINS)
    kept = np.sort(columns, axis=0)
    thresholds = np.concatenate([kept[::step], kept[-1:]])
    if len(thresholds) != BINS + 1:  # 17 rows: two for a bin, so nine edges only
        assert rows == 17
        thresholds = kept[np.linspace(0, rows - 1, BINS + 1, dtype=int)]
    bins = authors_bins(episodes, DATASET, BINS)
    np.testing.assert_allclose(bins.edges.T, thresholds, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        bins.representatives.T, (thresholds[1:] + thresholds[:-1]) / 2, rtol=1e-6, atol=1e-6
    )
    seen = token_columns(episodes, DATASET)[:, :5]  # values are never encoded while planning
    shifted = np.nextafter(seen, np.float32(np.inf))
    for values in (seen, shifted, seen - 1, seen * 3):
        expected = [[authors_token(value, thresholds[:, d]) for d, value in enumerate(row)] for row in values]
        found = tokens_of(bins, np.pad(values, ((0, 0), (0, 1))))[:, :5]
        np.testing.assert_array_equal(found, expected)


def port_token(value: float, edges: NDArray[np.float64]) -> int:
    nudged = value + 1e-8 + 1e-5 * abs(value)
    return int(np.clip(np.digitize(nudged, edges[1:]), 0, len(edges) - 2))


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_the_ports_bins(strategy: str) -> None:
    columns = authors_columns(make_episodes())
    if strategy == "uniform":
        edges = np.linspace(columns.min(0), columns.max(0), BINS + 1).T
    else:
        edges = np.percentile(columns, np.linspace(0, 100, BINS + 1), axis=0).T
    centers = (edges[:, 1:] + edges[:, :-1]) / 2
    bins = port_bins(edges, centers, strategy)
    np.testing.assert_array_equal(bins.representatives, centers.astype(np.float32))
    near = np.concatenate([columns, edges.T, edges.T * (1 - 1e-5), edges.T - 1e-8]).astype(np.float32)
    for values in (near, *(np.nextafter(near, np.float32(way)) for way in (-np.inf, np.inf)), near * 3):
        doubles = values.astype(np.float64)
        expected = [[port_token(value, edges[d]) for d, value in enumerate(row)] for row in doubles]
        np.testing.assert_array_equal(tokens_of(bins, values), expected)


@pytest.mark.parametrize(
    ("edges", "centers"),
    [
        (np.zeros((2, 4)), np.zeros((2, 4))),
        (np.zeros(4), np.zeros(3)),
        (np.array([[0.0, np.nan, 1.0]]), np.zeros((1, 2))),
        (np.array([[0.0, 1e300, 2e300]]), np.zeros((1, 2))),
        (np.array([[0.0, 2.0, 1.0]]), np.zeros((1, 2))),
    ],
)
def test_what_is_no_bins_of_a_port(edges: NDArray[np.float64], centers: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=r"fit together|finite|ascend"):
        port_bins(edges, centers, "uniform")


def test_the_last_row_may_be_an_episode() -> None:
    kept = without_last_row(make_episodes((3, 1)))
    assert (len(kept), kept.offsets.tolist(), kept.terminated.tolist()) == (1, [0, 3], [False, False, True])
    with pytest.raises(ValueError, match="no data"):
        without_last_row(make_episodes((1,)))
