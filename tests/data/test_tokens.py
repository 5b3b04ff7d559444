from __future__ import annotations

import numpy as np
import pytest
from toy_spec import toy_spec

from tt_ray.config import MAX_BINS, DatasetConfig, DiscretizerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import (
    Episodes,
    apply_terminal_penalty,
    delay_rewards,
    discounted_values,
    treat_rewards,
)
from tt_ray.data.tokens import Kind, TokenLayout, fit_tokens

SPEC = toy_spec(2, 1)


def make_episodes(rewards: list[list[float]], terminated: list[bool]) -> Episodes:
    lengths = [len(episode) for episode in rewards]
    offsets = np.cumsum([0, *lengths])
    rows = int(offsets[-1])
    ends = np.zeros((2, rows), dtype=bool)
    ends[0, offsets[1:] - 1] = terminated
    ends[1, offsets[1:] - 1] = np.logical_not(terminated)
    rng = np.random.default_rng(0)
    return Episodes(
        observations=rng.normal(size=(rows, 2)).astype(np.float32),
        actions=rng.normal(size=(rows, 1)).astype(np.float32),
        rewards=np.concatenate(rewards).astype(np.float32),
        terminated=ends[0],
        truncated=ends[1],
        offsets=offsets,
        spec=SPEC,
    )


def test_layout_of_a_transition() -> None:
    layout = TokenLayout(observation_dim=11, action_dim=3, num_bins=100)
    assert (layout.slots, layout.reward_slot, layout.value_slot, layout.stop_token) == (16, 14, 15, 100)
    assert layout.kinds == (Kind.OBSERVATION,) * 11 + (Kind.ACTION,) * 3 + (Kind.REWARD, Kind.VALUE)


def test_values_exclude_the_present_reward() -> None:
    episodes = make_episodes([[1.0, 2.0, 4.0], [8.0], [16.0, 32.0]], [True, False, False])
    values = discounted_values(episodes, episodes.rewards, 0.5)
    assert values.tolist() == [2.0 + 0.5 * 4.0, 4.0, 0.0, 0.0, 32.0, 0.0]


@pytest.mark.parametrize("discount", [0.9, 0.99, 1.0])
def test_values_equal_the_sum_written_out(discount: float) -> None:
    rng = np.random.default_rng(1)
    rewards = [rng.normal(size=n).tolist() for n in (1, 5, 30, 2)]
    episodes = make_episodes(rewards, [False] * 4)
    written_out = [
        sum(discount**k * episode[t + 1 + k] for k in range(len(episode) - t - 1))
        for episode in rewards
        for t in range(len(episode))
    ]
    values = discounted_values(episodes, episodes.rewards, discount)
    np.testing.assert_allclose(values, written_out, rtol=1e-5, atol=1e-5)


def test_the_penalty_replaces_the_last_reward_of_real_terminations_only() -> None:
    episodes = make_episodes([[1.0, 2.0], [3.0, 4.0], [5.0]], [True, False, True])
    assert apply_terminal_penalty(episodes, -100.0).tolist() == [1.0, -100.0, 3.0, 4.0, -100.0]
    assert apply_terminal_penalty(episodes, None).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert episodes.rewards.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("penalty", [None, -100.0])
def test_tokens_decode_to_the_transitions(penalty: float | None) -> None:
    """With fewer rows than quantile bins every value has its own bin: decoding shows what was encoded."""
    episodes = make_episodes([[1.0, 2.0, 3.0], [5.0, 7.0]], [True, False])
    dataset = DatasetConfig(id="toy", discount=0.5, terminal_penalty=penalty)
    tokens, bins, layout = fit_tokens(episodes, dataset, DiscretizerConfig(num_bins=20))
    assert (layout.observation_dim, layout.action_dim, layout.num_bins) == (2, 1, 20)
    assert tokens.dtype == np.uint8
    last = 3.0 if penalty is None else penalty
    decoded = bins.decode(tokens)
    np.testing.assert_array_equal(decoded[:, :2], episodes.observations)
    np.testing.assert_array_equal(decoded[:, 2:3], episodes.actions)
    assert decoded[:, layout.reward_slot].tolist() == [1.0, 2.0, last, 5.0, 7.0]
    assert decoded[:, layout.value_slot].tolist() == [2.0 + 0.5 * last, last, 0.0, 7.0, 0.0]


def test_a_penalty_does_not_move_the_bins_of_ordinary_rewards() -> None:
    rng = np.random.default_rng(2)
    episodes = make_episodes([rng.normal(2.0, 0.3, 300).tolist() for _ in range(10)], [True] * 10)
    config = DiscretizerConfig(strategy="uniform", num_bins=50)
    tokens, bins, layout = fit_tokens(episodes, DatasetConfig(id="toy", terminal_penalty=-100.0), config)
    decoded = bins.decode(tokens)[:, layout.reward_slot]
    assert (decoded[episodes.terminated] == -100.0).all()
    ordinary = episodes.rewards[~episodes.terminated]
    half_a_bin = (ordinary.max() - ordinary.min()) / 48 / 2
    assert np.abs(decoded[~episodes.terminated] - ordinary).max() <= half_a_bin * 1.001


def test_delayed_rewards_pay_each_return_at_the_end() -> None:
    episodes = make_episodes([[1.0, 2.0, 4.0], [8.0], [-1.0, 3.0]], [True, False, False])
    delayed = delay_rewards(episodes)
    assert delayed.rewards.tolist() == [0.0, 0.0, 7.0, 8.0, 0.0, 2.0]
    assert delayed.rewards.dtype == np.float32
    assert delayed.returns.tolist() == episodes.returns.tolist()
    assert episodes.rewards.tolist() == [1.0, 2.0, 4.0, 8.0, -1.0, 3.0]


def test_rewards_are_delayed_before_the_terminal_penalty_and_the_values() -> None:
    episodes = make_episodes([[1.0, 2.0], [3.0, 4.0]], [True, False])
    dataset = DatasetConfig(id="toy", discount=0.5, delayed_rewards=True, terminal_penalty=-9.0)
    assert treat_rewards(episodes, dataset).rewards.tolist() == [0.0, -9.0, 0.0, 7.0]
    tokens, bins, layout = fit_tokens(episodes, dataset, DiscretizerConfig(num_bins=20))
    decoded = bins.decode(tokens)
    assert decoded[:, layout.reward_slot].tolist() == [0.0, -9.0, 0.0, 7.0]
    assert decoded[:, layout.value_slot].tolist() == [-9.0, 0.0, 7.0, 0.0]
    plain = treat_rewards(episodes, DatasetConfig(id="toy"))
    assert plain.rewards.tolist() == episodes.rewards.tolist()


LONG = [np.ones(1000).tolist()] * 4


def hide(fraction: float, seed: int = 0, num_bins: int = 20) -> tuple[np.ndarray, Discretizer, TokenLayout]:
    dataset = DatasetConfig(id="toy", hidden_fraction=fraction, split_seed=seed)
    return fit_tokens(make_episodes(LONG, [True] * 4), dataset, DiscretizerConfig(num_bins=num_bins))


def test_observations_are_hidden_with_their_probability_and_nothing_else_is() -> None:
    whole, bins, seen = hide(0.0)
    tokens, fitted, layout = hide(0.3)
    assert (seen.partial, layout.partial) == (False, True)
    assert layout.hidden_token == 21
    hidden = tokens == layout.hidden_token
    assert not hidden[:, 2:].any()
    for column in hidden.T[:2]:
        assert abs(column.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(column))
    both = hidden[:, 0] & hidden[:, 1]
    assert abs(both.mean() - 0.09) < 4 * np.sqrt(0.09 * 0.91 / len(both))  # each on its own
    np.testing.assert_array_equal(tokens[~hidden], whole[~hidden])
    np.testing.assert_array_equal(fitted.edges, bins.edges)  # fitted to all values


def test_what_is_hidden_follows_from_the_seed_of_the_split() -> None:
    tokens, again, other = hide(0.5)[0], hide(0.5)[0], hide(0.5, seed=1)[0]
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != other).any()
    more = hide(0.7)[0]
    assert (more[tokens == 21] == 21).all()  # a larger share hides those too


@pytest.mark.parametrize(
    ("num_bins", "fraction", "dtype"),
    [
        (254, 0.5, np.uint8),
        (255, 0.5, np.int16),
        (255, 0.0, np.uint8),
        (MAX_BINS, 0.5, np.int16),
    ],
)
def test_the_hidden_token_fits_its_type(num_bins: int, fraction: float, dtype: type) -> None:
    tokens, _, layout = hide(fraction, num_bins=num_bins)
    assert tokens.dtype == dtype
    assert tokens.min() >= 0
    assert np.isclose((tokens[:, :2] == layout.hidden_token).mean(), fraction, atol=0.05)
