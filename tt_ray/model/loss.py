"""Weighted cross-entropy over the tokens that count, and its parts by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_ray.config import TrainingConfig
from tt_ray.data.tokens import Kind, TokenLayout


def target_kinds(layout: TokenLayout, length: int, device: torch.device | None = None) -> Tensor:
    """Kind [T] of the target at each of `length` positions after the goal; at t it has slot (t + 1) mod D."""
    kinds = torch.tensor(layout.kinds, device=device)
    return kinds[(torch.arange(length, device=device) + 1) % layout.slots]


def kind_weights(training: TrainingConfig, device: torch.device | None = None) -> Tensor:
    """Weight of each kind's targets, [4] in the order of `Kind`."""
    by_kind = {
        Kind.OBSERVATION: training.observation_weight,
        Kind.ACTION: training.action_weight,
        Kind.REWARD: training.reward_weight,
        Kind.VALUE: training.value_weight,
    }
    return torch.tensor([by_kind[kind] for kind in Kind], device=device)


@dataclass(frozen=True)
class LossSums:
    """Cross-entropy in nats, summed over targets and not averaged, so that a batch's shards add up."""

    weighted: Tensor
    """Sum of weight * cross-entropy; the training objective is this over the number of targets."""
    by_kind: Tensor
    """[4] unweighted sums by `Kind`."""
    counts: Tensor
    """[4] targets of each kind."""

    @classmethod
    def total(cls, parts: Sequence[LossSums]) -> LossSums:
        """Sums over all of a batch's parts, without gradients."""
        columns = zip(*((part.weighted, part.by_kind, part.counts) for part in parts), strict=True)
        return cls(*(torch.stack(column).detach().sum(0) for column in columns))

    def metrics(self) -> dict[str, float]:
        """Mean loss in all and by kind, per target."""
        counts, sums = self.counts.tolist(), self.by_kind.detach().tolist()
        result = {"loss": float(self.weighted.detach()) / max(sum(counts), 1)}
        for kind in Kind:
            result[f"loss_{kind.name.lower()}"] = sums[kind] / max(counts[kind], 1)
        return result


def loss_sums(logits: Tensor, targets: Tensor, mask: Tensor, kinds: Tensor, weights: Tensor) -> LossSums:
    """Loss of logits [b, T, V + 1] against targets [b, T], over the positions where `mask` [b, T] holds.

    `kinds` [T] are the targets' kinds, `weights` [4] the weight of each.
    """
    # A hidden observation is one past what can be predicted; the mask leaves it out.
    known = targets.clamp(max=logits.shape[-1] - 1).flatten()
    nats = F.cross_entropy(logits.float().flatten(0, 1), known, reduction="none").view_as(targets)
    nats = nats * mask
    per_position, counted = nats.sum(0), mask.sum(0)
    by_kind = torch.zeros(len(Kind), device=logits.device).index_add(0, kinds, per_position)
    counts = torch.zeros(len(Kind), device=logits.device).index_add(0, kinds, counted.float())
    return LossSums((weights * by_kind).sum(), by_kind, counts)
