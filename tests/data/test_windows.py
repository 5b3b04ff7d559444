from __future__ import annotations

import numpy as np
import pytest
import torch

from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet, batch_of_step, split_episodes

LAYOUT = TokenLayout(observation_dim=1, action_dim=1, num_bins=200)  # D = 4
STOP = LAYOUT.stop_token


def make_windows(lengths: list[int], terminated: list[bool], window: int, episodes: list[int]) -> WindowSet:
    """Windows over tokens 0, 1, 2, ... in reading order: token 4 * row + slot."""
    offsets = np.cumsum([0, *lengths])
    rows = int(offsets[-1])
    tokens = np.arange(rows * 4, dtype=np.uint8).reshape(rows, 4)
    ends = np.zeros(rows, dtype=bool)
    ends[offsets[1:] - 1] = terminated
    return WindowSet.build(tokens, offsets, ends, np.array(episodes, dtype=np.int64), window, LAYOUT)


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
