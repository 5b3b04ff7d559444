from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tt_ray.planning.sampling import EpisodeStream, filter_probabilities, sample

LARGEST = float(
    np.nextafter(np.float32(1), np.float32(0))
)  # 1 - 2^-24, the largest number that is ever drawn


def kept(probabilities: list[float], top_k: int | None = None, cdf: float | None = None) -> list[int]:
    filtered = filter_probabilities(torch.tensor(probabilities), top_k, cdf)
    places = filtered.nonzero()[:, 0].tolist()
    assert filtered[places].tolist() == torch.tensor(probabilities)[places].tolist()  # not normalised again
    return places


@pytest.mark.parametrize(
    ("probabilities", "cdf", "expected"),
    [
        ([0.05, 0.45, 0.10, 0.25, 0.15], 0.6, [1]),  # the others hold 0.55: less than 0.6
        ([0.05, 0.35, 0.10, 0.30, 0.20], 0.6, [1, 3]),  # 0.35 goes, 0.65 would be too much
        ([0.05, 0.35, 0.10, 0.30, 0.20], 0.3, [1, 3, 4]),
        ([0.05, 0.35, 0.10, 0.30, 0.20], 0.01, [0, 1, 2, 3, 4]),
        ([0.05, 0.35, 0.10, 0.30, 0.20], 0.0, [0, 1, 2, 3, 4]),
        ([0.01, 0.98, 0.01], 0.6, [1]),
        ([0.01, 0.98, 0.01], 0.999, [1]),
        ([0.25, 0.25, 0.25, 0.25], 0.6, [0, 1, 2, 3]),  # ties stay together
    ],
)
def test_mass_filter_by_hand(probabilities: list[float], cdf: float, expected: list[int]) -> None:
    assert kept(probabilities, cdf=cdf) == expected


def test_the_authors_filter_keeps_the_most_likely_two_fifths() -> None:
    probabilities = torch.rand(50, 100, generator=torch.Generator().manual_seed(0)).softmax(-1)
    filtered = filter_probabilities(probabilities, cdf=0.6)
    mass = filtered.sum(-1)
    assert (mass >= 0.4 - 1e-6).all()
    assert (mass <= 0.4 + probabilities.max()).all()
    dropped = torch.where(filtered == 0, probabilities, 0.0).amax(-1)
    assert (dropped <= torch.where(filtered > 0, filtered, 1.0).amin(-1)).all()


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [1]), (2, [1, 3]), (3, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k_by_hand(top_k: int, expected: list[int]) -> None:
    assert kept([0.15, 0.35, 0.05, 0.30, 0.15], top_k=top_k) == expected


def test_the_mass_filter_looks_at_what_top_k_left() -> None:
    """Of 0.35 + 0.30 + 0.20 the last two hold 0.50: less than 0.6 of it, but not less than 0.55."""
    probabilities = [0.05, 0.35, 0.10, 0.30, 0.20]
    assert kept(probabilities, top_k=3, cdf=0.6) == [1]
    assert kept(probabilities, top_k=3, cdf=0.55) == [1, 3]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    top_k=st.none() | st.integers(2, 45),
    cdf=st.none() | st.floats(0, 0.999),
    u=st.sampled_from([0.0, LARGEST]) | st.floats(0, LARGEST, width=32),
)
def test_no_filtered_token_is_ever_drawn(
    logits: list[float], top_k: int | None, cdf: float | None, u: float
) -> None:
    row = torch.tensor(logits)
    filtered = filter_probabilities(row.softmax(-1), top_k, cdf)
    assert filtered[int(row.argmax())] > 0
    token = int(sample(row, torch.tensor(u), top_k, cdf))
    assert filtered[token] > 0


def test_a_number_that_a_narrow_type_rounds_to_one_draws_no_filtered_token() -> None:
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()
    one = torch.full((200,), LARGEST).bfloat16()
    assert (one == 1).all()
    tokens = sample(logits, one, cdf=0.6)
    filtered = filter_probabilities(logits.softmax(-1), cdf=0.6)
    assert (filtered.gather(-1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize(("top_k", "cdf"), [(None, None), (None, 0.6), (4, None), (6, 0.3)])
def test_frequencies_are_those_of_the_filtered_distribution(top_k: int | None, cdf: float | None) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    count = 8_192
    uniforms = ((torch.arange(count) + 0.5) / count).expand(3, count)
    tokens = sample(logits[:, None].expand(-1, count, -1), uniforms, top_k, cdf)
    frequencies = torch.stack([(tokens == token).float().mean(-1) for token in range(12)], dim=-1)
    filtered = filter_probabilities(logits.softmax(-1), top_k, cdf)
    expected = filtered / filtered.sum(-1, keepdim=True)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=2 / count)


def test_greedy_without_numbers_or_with_one_candidate() -> None:
    logits = torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(5, 4)
    assert torch.equal(sample(logits, None), logits.argmax(-1))
    assert torch.equal(sample(logits, uniforms, top_k=1), logits.argmax(-1))
    assert sample(logits, uniforms, top_k=3, cdf=0.6).shape == (5, 4)


def test_a_stream_gives_the_same_numbers_whenever_asked() -> None:
    forwards = [EpisodeStream(5).uniforms(decision, (4, 3)) for decision in range(6)]
    stream = EpisodeStream(5)
    backwards = [stream.uniforms(decision, (4, 3)) for decision in reversed(range(6))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert forwards[0].dtype == np.float32


def test_streams_of_other_seeds_and_decisions_are_independent() -> None:
    rows = np.stack(
        [EpisodeStream(seed).uniforms(decision, (2_000,)) for seed in range(6) for decision in range(6)]
    )
    assert rows.min() >= 0.0
    assert rows.max() < 1.0
    assert len(np.unique(rows)) > 0.99 * rows.size
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / np.sqrt(2_000)
    assert np.abs(rows.mean(axis=1) - 0.5).max() < 5 * np.sqrt(1 / 12 / 2_000)


def test_large_seeds() -> None:
    assert not np.array_equal(EpisodeStream(0).uniforms(0, (8,)), EpisodeStream(2**64).uniforms(0, (8,)))
