from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import (
    WindowSet,
    batch_of_step,
    goals_of_step,
    goals_of_windows,
    split_episodes,
)

LAYOUT = TokenLayout(observation_dim=1, action_dim=1, num_bins=200)  # D = 4
STOP = LAYOUT.stop_token
WITH_GOAL = TokenLayout(observation_dim=2, action_dim=0, num_bins=200, goal_slots=(1, 0))  # D = 4 again


def make_windows(
    lengths: list[int],
    terminated: list[bool],
    window: int,
    episodes: list[int],
    layout: TokenLayout = LAYOUT,
    relabel: Literal["last", "future"] = "last",
) -> WindowSet:
    """Windows over tokens 0, 1, 2, ... in reading order: token 4 * row + slot."""
    offsets = np.cumsum([0, *lengths])
    rows = int(offsets[-1])
    tokens = np.arange(rows * 4, dtype=np.uint8).reshape(rows, 4)
    ends = np.zeros(rows, dtype=bool)
    ends[offsets[1:] - 1] = terminated
    chosen = np.array(episodes, dtype=np.int64)
    return WindowSet.build(tokens, offsets, ends, chosen, window, layout, relabel)


def test_windows_by_hand() -> None:
    windows = make_windows([3, 1, 2], [True, False, False], 2, [0, 1, 2])
    assert len(windows) == 6
    inputs, targets, mask = windows.gather(torch.arange(6))
    s = STOP
    whole = [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9, 10, 11],
        [8, 9, 10, 11, s, s, s, s],  # the end of a terminated episode: the stop tokens count
        [12, 13, 14, 15, s, s, s, s],  # a one-step episode cut by a time limit: they do not
        [16, 17, 18, 19, 20, 21, 22, 23],
        [20, 21, 22, 23, s, s, s, s],
    ]
    assert inputs.tolist() == [row[:-1] for row in whole]
    assert targets.tolist() == [row[1:] for row in whole]
    counts = [[True] * 7, [True] * 7, [True] * 7, [True] * 3 + [False] * 4, [True] * 7]
    assert mask.tolist() == [*counts, [True] * 3 + [False] * 4]


def test_only_the_chosen_episodes() -> None:
    windows = make_windows([3, 1, 2], [True, True, True], 2, [1, 2])
    inputs, _, _ = windows.gather(torch.arange(len(windows)))
    assert inputs[:, 0].tolist() == [12, 16, 20]
    assert len(make_windows([3, 1], [True, True], 2, [])) == 0


def test_a_window_never_shows_another_episode() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, size=12).tolist()
    episode_of_row = np.repeat(np.arange(12), lengths)
    windows = make_windows(lengths, (rng.random(12) < 0.5).tolist(), 4, list(range(12)))
    inputs, _, _ = windows.gather(torch.arange(len(windows)))
    for row, tokens in enumerate(inputs.numpy()):
        real = tokens[tokens != STOP]
        assert (episode_of_row[real // 4] == episode_of_row[row]).all()
        remaining = int((episode_of_row[row:] == episode_of_row[row]).sum())
        assert len(real) == min(remaining * 4, 4 * 4 - 1)


def test_count_targets_is_the_sum_of_the_mask() -> None:
    rng = np.random.default_rng(1)
    for window in (1, 2, 5, 9):
        lengths = rng.integers(1, 9, size=9).tolist()
        windows = make_windows(lengths, (rng.random(9) < 0.5).tolist(), window, list(range(9)))
        for chosen in (torch.arange(len(windows)), torch.tensor([3, 3, 0]), torch.tensor([1])):
            assert int(windows.count_targets(chosen)) == int(windows.gather(chosen)[2].sum())


def test_sixteen_bit_tokens() -> None:
    layout = TokenLayout(observation_dim=1, action_dim=1, num_bins=1_000)
    tokens = np.array([[999, 1, 2, 3]], dtype=np.int16)
    ends = np.array([True])
    windows = WindowSet.build(tokens, np.array([0, 1]), ends, np.array([0]), 2, layout)
    assert windows.gather(torch.tensor([0]))[0].tolist() == [[999, 1, 2, 3, 1_000, 1_000, 1_000]]


def test_to_keeps_everything() -> None:
    windows = make_windows([3, 2], [True, False], 3, [0, 1])
    moved = windows.to(torch.device("cpu"))
    for before, after in zip(windows.gather(torch.arange(5)), moved.gather(torch.arange(5)), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 10), (10, 10), (7, 3), (1, 5), (64, 1)])
def test_every_window_once_an_epoch(batch_size: int, count: int) -> None:
    steps = -(-3 * count // batch_size)
    batches = [batch_of_step(5, step, batch_size, count) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = np.concatenate(batches)[: 3 * count].reshape(3, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in stream.tolist())


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    forwards = [batch_of_step(3, step, 6, 20).tolist() for step in range(10)]
    backwards = [batch_of_step(3, step, 6, 20).tolist() for step in reversed(range(10))]
    assert forwards == backwards[::-1]
    first = batch_of_step(3, 0, 6, 20)
    first[:] = -1  # a caller that writes into a batch changes no later one
    assert batch_of_step(3, 0, 6, 20).tolist() == forwards[0]
    assert forwards != [batch_of_step(4, step, 6, 20).tolist() for step in range(10)]
    epochs = np.concatenate([batch_of_step(3, step, 20, 20) for step in range(2)]).reshape(2, 20)
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(100, 0.05, 5), (100, 0.0, 0), (10, 0.01, 1), (1, 0.5, 0), (2, 0.99, 1)],
)
def test_split_by_episode(count: int, fraction: float, held_out: int) -> None:
    train, validation = split_episodes(count, fraction, seed=0)
    assert len(validation) == held_out
    assert sorted([*train, *validation]) == list(range(count))
    assert train.tolist() == sorted(train)
    again = split_episodes(count, fraction, seed=0)
    assert train.tolist() == again[0].tolist()


def test_the_split_depends_on_its_seed() -> None:
    splits = {tuple(split_episodes(100, 0.1, seed)[1].tolist()) for seed in range(5)}
    assert len(splits) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 20, 101])
@pytest.mark.parametrize("held_out", [0.0, 0.05, 0.5])
def test_a_smaller_share_of_the_training_episodes_is_part_of_a_larger_one(
    count: int, held_out: float
) -> None:
    whole, validation = split_episodes(count, held_out, seed=3)
    larger: set[int] = set()
    for fraction in (1e-6, 0.01, 0.03, 0.1, 1 / 3, 0.5, 0.999, 1.0):
        train, same = split_episodes(count, held_out, 3, fraction)
        assert same.tolist() == validation.tolist()
        assert train.tolist() == sorted(train)
        assert len(train) == max(1, round(len(whole) * fraction))
        assert larger <= set(train.tolist()) <= set(whole.tolist())
        larger = set(train.tolist())
    assert train.tolist() == whole.tolist()


def gathered_without_goals(windows: WindowSet, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows as they were cut before goals and hidden tokens came."""
    rows = windows.starts[indices, None] + torch.arange(windows.window)
    inside = rows < windows.ends[indices, None]
    tokens = windows.tokens[rows.clamp(max=len(windows.tokens) - 1)].long()
    tokens = torch.where(inside[..., None], tokens, STOP).flatten(1)
    mask = (inside | windows.terminated[indices, None]).repeat_interleave(4, dim=1)
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


@pytest.mark.parametrize("relabel", ["last", "future"])
def test_a_goal_changes_nothing_after_it(relabel: Literal["last", "future"]) -> None:
    rng = np.random.default_rng(2)
    lengths, flags = rng.integers(1, 7, size=11).tolist(), (rng.random(11) < 0.5).tolist()
    plain = make_windows(lengths, flags, 4, list(range(11)))
    goals = make_windows(lengths, flags, 4, list(range(11)), WITH_GOAL, relabel)
    chosen, uniforms = torch.arange(len(plain)), torch.rand(len(plain))
    expected = gathered_without_goals(plain, chosen)
    for ours in (plain.gather(chosen), plain.gather(chosen, uniforms)):
        assert all(map(torch.equal, ours, expected))
    inputs, targets, mask = goals.gather(chosen, uniforms)
    assert inputs.shape == (len(plain), 2 + 4 * 4 - 1)
    assert all(map(torch.equal, (inputs[:, 2:], targets, mask), expected))


def test_goals_by_hand() -> None:
    """The second and the first token of the episodes' last rows: 2, 3 and 5."""
    windows = make_windows([3, 1, 2], [True, False, False], 2, [0, 1, 2], WITH_GOAL)
    goals = windows.gather(torch.tensor([0, 1, 2, 3, 4, 5]))[0][:, :2]
    assert goals.tolist() == [[9, 8], [9, 8], [9, 8], [13, 12], [21, 20], [21, 20]]


def test_a_goal_is_any_later_row_as_often_as_another() -> None:
    windows = make_windows([5, 2], [True, False], 2, [0, 1], WITH_GOAL, "future")

    def rows(window: int, uniforms: Tensor) -> list[int]:
        inputs, _, _ = windows.gather(torch.full((len(uniforms),), window), uniforms)
        assert torch.equal(inputs[:, 0], inputs[:, 1] + 1)
        return (inputs[:, 1] // 4).tolist()

    evenly = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    assert rows(0, evenly) == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert rows(1, evenly) == [2] * 4 + [3] * 4 + [4] * 4
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert rows(2, ends) == [3, 4]
    assert rows(3, ends) == [4, 4]
    assert rows(4, ends) == [4, 4]  # the last row itself: none is later
    assert rows(5, ends) == [6, 6]
    assert rows(6, ends) == [6, 6]
    with pytest.raises(ValueError, match="take numbers"):
        windows.gather(torch.tensor([0]))


def test_goals_follow_from_seed_and_step() -> None:
    first = goals_of_step(3, 5, 40)
    assert first.tolist() == goals_of_step(3, 5, 40).tolist()
    others = [goals_of_step(3, 6, 40), goals_of_step(4, 5, 40), goals_of_windows(40)]
    assert all(not set(first.tolist()) & set(other.tolist()) for other in others)
    many = np.concatenate([goals_of_step(0, step, 100) for step in range(100)])
    assert ((many >= 0) & (many < 1)).all()
    counts = np.histogram(many, 10, (0, 1))[0]
    assert abs(counts - 1_000).max() < 150  # five standard deviations
    # A window's number does not depend on how many there are.
    assert goals_of_windows(7).tolist() == goals_of_windows(30)[:7].tolist()


def test_hidden_tokens_are_no_targets() -> None:
    layout = replace(LAYOUT, partial=True)
    rng = np.random.default_rng(3)
    lengths, flags = rng.integers(1, 7, size=11).tolist(), (rng.random(11) < 0.5).tolist()
    plain = make_windows(lengths, flags, 4, list(range(11)))
    hidden = torch.from_numpy(rng.random(len(plain.tokens)) < 0.4)
    tokens = plain.tokens.clone()
    tokens[hidden, 0] = layout.hidden_token
    windows = replace(plain, tokens=tokens, layout=layout)
    chosen = torch.arange(len(plain))
    _, before, counted = plain.gather(chosen)
    inputs, targets, mask = windows.gather(chosen)
    assert (targets == layout.hidden_token).any()
    assert torch.equal(mask, counted & (targets != layout.hidden_token))
    assert torch.equal(targets[mask], before[mask])
    assert (inputs == layout.hidden_token).sum() > (targets == layout.hidden_token).sum()
    for some in (chosen, torch.tensor([3, 3, 0]), torch.tensor([1])):
        assert int(windows.count_targets(some)) == int(windows.gather(some)[2].sum())
