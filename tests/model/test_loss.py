from __future__ import annotations

import math

import pytest
import torch

from tt_ray.config import TrainingConfig
from tt_ray.data.tokens import Kind, TokenLayout
from tt_ray.model.loss import LossSums, kind_weights, loss_sums, target_kinds

LAYOUT = TokenLayout(observation_dim=1, action_dim=1, num_bins=3)  # D = 4
TRAINING = TrainingConfig(observation_weight=2.0, action_weight=5.0, reward_weight=0.5, value_weight=0.0)


def random_case(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, LAYOUT.num_bins + 1, generator=generator)
    targets = torch.randint(0, LAYOUT.num_bins + 1, (batch, length), generator=generator)
    return logits, targets, torch.rand(batch, length, generator=generator) < 0.7


def sums_of(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> LossSums:
    kinds = target_kinds(LAYOUT, targets.shape[1])
    return loss_sums(logits, targets, mask, kinds, kind_weights(TRAINING))


def test_kinds_are_those_of_the_next_slot() -> None:
    o, a, r, v = Kind.OBSERVATION, Kind.ACTION, Kind.REWARD, Kind.VALUE
    assert target_kinds(LAYOUT, 7).tolist() == [a, r, v, o, a, r, v]
    assert kind_weights(TRAINING).tolist() == [2.0, 5.0, 0.5, 0.0]


def test_by_hand() -> None:
    """Action, reward, value, observation and a masked action, of probability 1/2, 1/4, 1/8, 1/2 and 1/2."""
    probabilities = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 2, 1 / 2])
    rest = ((1 - probabilities) / 3)[:, None].expand(-1, 4)
    targets = torch.tensor([[0, 3, 1, 2, 0]])
    logits = rest.scatter(1, targets.T, probabilities[:, None]).log()[None]
    mask = torch.tensor([[True, True, True, True, False]])
    sums = sums_of(logits, targets, mask)
    bit = math.log(2.0)
    assert sums.counts.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(sums.by_kind, torch.tensor([bit, bit, 2 * bit, 3 * bit]))
    torch.testing.assert_close(sums.weighted, torch.tensor(2 * bit + 5 * bit + 0.5 * 2 * bit))
    metrics = sums.metrics()
    assert metrics["loss"] == pytest.approx(8 * bit / 4)
    assert metrics["loss_observation"] == pytest.approx(bit)
    assert metrics["loss_action"] == pytest.approx(bit)
    assert metrics["loss_reward"] == pytest.approx(2 * bit)
    assert metrics["loss_value"] == pytest.approx(3 * bit)


def test_equals_the_sum_written_out() -> None:
    logits, targets, mask = random_case(3, 7)
    kinds = target_kinds(LAYOUT, 7)
    by_kind = [0.0] * 4
    for b in range(3):
        for t in range(7):
            if mask[b, t]:
                by_kind[kinds[t]] -= float(logits[b, t].log_softmax(0)[targets[b, t]])
    sums = sums_of(logits, targets, mask)
    torch.testing.assert_close(sums.by_kind, torch.tensor(by_kind))
    assert int(sums.counts.sum()) == int(mask.sum())


def test_masked_targets_have_no_gradient() -> None:
    logits, targets, mask = random_case(2, 7)
    logits.requires_grad_()
    sums_of(logits, targets, mask).weighted.backward()
    assert logits.grad is not None
    value = target_kinds(LAYOUT, 7) == Kind.VALUE  # of weight 0
    silent = ~mask | value
    assert (logits.grad[silent] == 0).all()
    assert (logits.grad[~silent].abs().sum(-1) > 0).all()


def test_shards_add_up() -> None:
    logits, targets, mask = random_case(5, 7)
    whole = sums_of(logits, targets, mask)
    shards = [sums_of(logits[part], targets[part], mask[part]) for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(shard.weighted for shard in shards), whole.weighted)
    torch.testing.assert_close(sum(shard.by_kind for shard in shards), whole.by_kind)
    assert torch.equal(shards[0].counts + shards[1].counts, whole.counts)


def test_nothing_counts() -> None:
    logits, targets, mask = random_case(2, 7)
    metrics = sums_of(logits, targets, torch.zeros_like(mask)).metrics()
    assert set(metrics.values()) == {0.0}
