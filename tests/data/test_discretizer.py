from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tt_ray.data.discretizer import Discretizer, token_dtype

STRATEGIES = ("uniform", "quantile")
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def fit_column(column: object, strategy: str, num_bins: int, reserved: float | None = None) -> Discretizer:
    values = np.asarray(column, dtype=np.float32)[:, None]
    special = None if reserved is None else {0: reserved}
    return Discretizer.fit(values, strategy=strategy, num_bins=num_bins, reserved=special)


def round_trip(discretizer: Discretizer, values: object) -> NDArray[np.float32]:
    return discretizer.decode(discretizer.encode(np.asarray(values, dtype=np.float32)[:, None]))[:, 0]


@st.composite
def columns(draw: st.DrawFn) -> NDArray[np.float32]:
    """Plain numbers, many ties, or neighbours a few units of float32 resolution apart."""
    base = draw(FINITE)
    few = st.sampled_from(draw(st.lists(FINITE, min_size=1, max_size=4)))
    steps = st.integers(0, 6).map(lambda k: float(np.float32(base) + k * np.spacing(np.float32(base))))
    return np.array(draw(st.lists(st.one_of(FINITE, few, steps), min_size=1, max_size=150)), dtype=np.float32)


@settings(max_examples=250, deadline=None)
@given(
    column=columns(),
    strategy=st.sampled_from(STRATEGIES),
    num_bins=st.sampled_from((4, 5, 17, 100, 255, 256)),
    reserved=st.none() | FINITE,
)
def test_bins_are_well_defined(
    column: NDArray[np.float32], strategy: str, num_bins: int, reserved: float | None
) -> None:
    discretizer = fit_column(column, strategy, num_bins, reserved)
    used = int(discretizer.bins_in_use[0])
    assert 1 <= used <= num_bins
    edges = discretizer.edges[0, : used + 1]
    assert (np.diff(edges.astype(np.float64)) > 0).all()
    bins = np.arange(used)
    inside = discretizer.decode(bins[:, None])[:, 0]
    assert (discretizer.encode(inside[:, None])[:, 0] == bins).all()
    assert ((edges[:-1] <= inside) & (inside < edges[1:])).all()
    tokens = discretizer.encode(column[:, None])[:, 0].astype(np.int64)
    assert (tokens < used).all()
    assert (edges[tokens] <= column).all()
    assert ((column < edges[tokens + 1]) | (tokens == used - 1)).all()
    outside = discretizer.encode(np.array([[-3e38], [3e38]], dtype=np.float32))
    assert outside[:, 0].tolist() == [0, used - 1]
    if reserved is not None:
        assert round_trip(discretizer, [reserved])[0] == np.float32(reserved)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=20), num_bins=st.sampled_from((20, 100)))
def test_a_column_of_few_values_decodes_to_itself(values: list[float], num_bins: int) -> None:
    column = np.array(values, dtype=np.float32)
    discretizer = fit_column(column, "quantile", num_bins)
    assert discretizer.bins_in_use[0] == len(np.unique(column))
    np.testing.assert_array_equal(round_trip(discretizer, column), column)


def test_uniform_bins_have_equal_width() -> None:
    column = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    edges = fit_column(column, "uniform", 100).edges[0].astype(np.float64)
    assert edges[0] == column.min()
    assert edges[-1] == column.max()
    np.testing.assert_allclose(np.diff(edges), (edges[-1] - edges[0]) / 100, rtol=1e-4)


@pytest.mark.parametrize("rows", [1_050, 10_000])
def test_quantile_bins_have_equal_mass(rows: int) -> None:
    column = np.random.default_rng(0).normal(size=rows).astype(np.float32)
    counts = np.bincount(fit_column(column, "quantile", 100).encode(column[:, None])[:, 0], minlength=100)
    assert counts.min() >= rows // 100
    assert counts.max() <= rows // 100 + 2


def test_decode_is_the_middle_of_the_bin() -> None:
    assert fit_column([0.0, 1.0, 3.0, 4.0], "uniform", 4).representatives[0].tolist() == [0.5, 1.5, 2.5, 3.5]
    column = np.arange(11, dtype=np.float32)
    assert fit_column(column, "quantile", 2).edges[0].tolist() == [0.0, 5.0, 10.0]
    assert fit_column(column, "quantile", 2).representatives[0].tolist() == [2.5, 7.5]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 2, 3, 150, 1_050])
def test_small_data_sets(strategy: str, rows: int) -> None:
    column = np.random.default_rng(rows).normal(size=rows).astype(np.float32)
    discretizer = fit_column(column, strategy, 100)
    widest = np.diff(discretizer.edges[0, : discretizer.bins_in_use[0] + 1]).max()
    assert np.abs(round_trip(discretizer, column) - column).max() <= widest
    if strategy == "quantile" and rows <= 100:
        np.testing.assert_array_equal(round_trip(discretizer, column), column)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, -7.25, 1e30])
def test_a_constant_column_has_one_bin(strategy: str, value: float) -> None:
    discretizer = fit_column([value] * 500, strategy, 100)
    assert discretizer.bins_in_use.tolist() == [1]
    assert (round_trip(discretizer, [value, value - 1, value + 1]) == np.float32(value)).all()


def test_a_rare_reward_decodes_to_itself() -> None:
    reward = np.zeros(10_000, dtype=np.float32)
    reward[[17, 4_000]] = 1.0
    np.testing.assert_array_equal(round_trip(fit_column(reward, "quantile", 100), reward), reward)


def test_an_atom_among_continuous_values_decodes_to_itself() -> None:
    rng = np.random.default_rng(0)
    force = np.where(rng.random(10_000) < 0.9, 0.0, rng.normal(3.0, 1.0, 10_000)).astype(np.float32)
    discretizer = fit_column(force, "quantile", 100)
    back = round_trip(discretizer, force)
    assert (back[force == 0.0] == 0.0).all()
    assert (back[force != 0.0] != 0.0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_range_of_a_few_float32_numbers(strategy: str) -> None:
    values = np.float32(1_000.0) + np.arange(5, dtype=np.float32) * np.spacing(np.float32(1_000.0))
    assert len(np.unique(values)) == 5
    column = np.repeat(values, 60)
    np.testing.assert_array_equal(round_trip(fit_column(column, strategy, 100), column), column)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("with_penalties", [True, False])
def test_a_penalty_has_its_own_bin_and_leaves_the_others_alone(strategy: str, with_penalties: bool) -> None:
    rewards = np.random.default_rng(0).normal(2.0, 0.3, 5_000).astype(np.float32)
    mixed = np.concatenate([rewards, np.full(40 * with_penalties, -100.0, dtype=np.float32)])
    discretizer = fit_column(mixed, strategy, 100, reserved=-100.0)
    assert round_trip(discretizer, [-100.0]).tolist() == [-100.0]
    plain = fit_column(rewards, strategy, 98)
    np.testing.assert_array_equal(round_trip(discretizer, rewards), round_trip(plain, rewards))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_penalty_inside_the_range_splits_one_bin_only(strategy: str) -> None:
    rewards = np.random.default_rng(0).uniform(0.0, 4.0, 5_000).astype(np.float32)
    discretizer = fit_column(np.append(rewards, np.float32(2.01)), strategy, 100, reserved=2.01)
    assert round_trip(discretizer, [2.01])[0] == np.float32(2.01)
    plain = fit_column(rewards, strategy, 98)
    split = plain.encode(np.array([[2.01]]))
    others = rewards[plain.encode(rewards[:, None])[:, 0] != split[0, 0]]
    np.testing.assert_array_equal(round_trip(discretizer, others), round_trip(plain, others))
    assert discretizer.bins_in_use[0] <= 100


def test_only_penalties() -> None:
    discretizer = fit_column([-5.0, -5.0], "quantile", 4, reserved=-5.0)
    assert discretizer.bins_in_use.tolist() == [1]
    assert round_trip(discretizer, [-5.0, 3.0]).tolist() == [-5.0, -5.0]


def test_token_type_leaves_room_for_the_stop_token() -> None:
    assert token_dtype(255) is np.uint8
    assert token_dtype(256) is np.int16
    column = np.arange(1_000, dtype=np.float32)
    tokens = fit_column(column, "uniform", 300).encode(column[:, None])
    assert tokens.dtype == np.int16
    assert tokens.max() == 299
    assert fit_column(column, "uniform", 255).encode(column[:, None]).dtype == np.uint8


def test_dimensions_from_the_middle() -> None:
    values = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32) * [1, 10, 100, 1_000]
    discretizer = Discretizer.fit(values.astype(np.float32), strategy="quantile", num_bins=10)
    tokens = discretizer.encode(values)
    np.testing.assert_array_equal(discretizer.encode(values[:, 2:], first=2), tokens[:, 2:])
    np.testing.assert_array_equal(discretizer.encode(values[7, 1:3], first=1), tokens[7, 1:3])
    whole = discretizer.decode(tokens)
    np.testing.assert_array_equal(discretizer.decode(tokens[:, 1:3], first=1), whole[:, 1:3])
    batched = tokens.reshape(20, 10, 4)
    np.testing.assert_array_equal(discretizer.decode(batched).reshape(200, 4), whole)


def test_expectation_counts_the_stop_token_as_zero() -> None:
    discretizer = fit_column([0.0, 1.0, 3.0, 4.0], "uniform", 4)
    probabilities = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.0, 0.0]])
    by_hand = [0.05 + 0.3 + 0.75 + 1.4, 0.125 + 0.375]
    np.testing.assert_allclose(discretizer.expectation(probabilities, 0), by_hand)
    with_stop = np.concatenate([probabilities, [[0.0], [0.5]]], axis=1)
    np.testing.assert_allclose(discretizer.expectation(with_stop, 0), by_hand)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_and_loaded(strategy: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    values[:, 1] = 2.0
    discretizer = Discretizer.fit(values, strategy=strategy, num_bins=20)
    save_file(discretizer.to_arrays(), tmp_path / "bins.safetensors")
    loaded = Discretizer.from_arrays(strategy, load_file(tmp_path / "bins.safetensors"))
    assert (loaded.strategy, loaded.num_bins, loaded.dims) == (strategy, 20, 3)
    np.testing.assert_array_equal(loaded.bins_in_use, discretizer.bins_in_use)
    np.testing.assert_array_equal(loaded.encode(values), discretizer.encode(values))
    np.testing.assert_array_equal(
        loaded.decode(loaded.encode(values)), discretizer.decode(loaded.encode(values))
    )


@pytest.mark.parametrize("penalty", [-100.0, 100.0])
@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_values_just_outside_the_ordinary_ones_do_not_decode_towards_a_far_penalty(
    penalty: float, strategy: str
) -> None:
    ordinary = np.linspace(-1, 1, 500, dtype=np.float32)
    column = np.append(ordinary, np.float32(penalty))[:, None]
    bins = Discretizer.fit(column, strategy=strategy, num_bins=20, reserved={0: penalty})
    outside = np.array([[np.sign(penalty) * 1.2]], dtype=np.float32)
    assert abs(bins.decode(bins.encode(outside))[0, 0]) < 1.001
    assert bins.decode(bins.encode(np.array([[penalty]])))[0, 0] == penalty
