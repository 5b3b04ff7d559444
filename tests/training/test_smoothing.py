"""Gradients spread over neighbouring bins: where they go, where not, and that they still descend."""

from __future__ import annotations

import math

import pytest
import torch

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.training.smoothing import OWN, WIDE, BinSmoothing

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=20, goal_slots=(0,))
CPU = torch.device("cpu")


def model() -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=1, num_heads=1, embed_dim=4, context_transitions=2)
    return TrajectoryTransformer(config, LAYOUT)


def test_a_bins_gradient_reaches_its_neighbours_in_its_own_slot_alone() -> None:
    network = model()
    weight = network.token_embedding.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[1 * 20 + 7, 2] = 3.0  # bin 7 of slot 1
    weight.grad[-1] = 5.0  # the stop token
    network.head.grad = torch.zeros_like(network.head)
    network.head.grad[1, 7, 2] = 3.0
    network.head.grad[1, 20, 2] = 5.0
    BinSmoothing(20, 0.1, CPU)(network)
    spread = weight.grad[: LAYOUT.slots * 20].view(LAYOUT.slots, 20, 4)
    for other in range(20):
        far = (other - 7) / 2  # deviations of two bins
        wanted = math.exp(-(far**2) / 2) + WIDE * math.exp(-((far / 3) ** 2) / 2) + OWN * (other == 7)
        assert float(spread[1, other, 2]) == pytest.approx(3.0 * wanted, rel=1e-5)
    assert spread[[0, 2, 3, 4]].abs().max() == 0
    assert spread[1][:, [0, 1, 3]].abs().max() == 0
    assert torch.equal(weight.grad[-1], torch.full((4,), 5.0))
    assert torch.equal(network.head.grad[:, :20], spread)
    assert network.head.grad[1, 20, 2] == 5.0


@pytest.mark.parametrize("width", [0.01, 0.05, 0.3])
def test_descending_along_the_spread_gradient_is_descending(width: float) -> None:
    assert torch.linalg.eigvalsh(BinSmoothing(40, width, CPU).kernel.double()).min() > OWN / 2


def test_unseen_bins_learn_from_seen_ones() -> None:
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = network.token_embedding.weight.detach().clone()
    tokens = torch.full((4, 1 + 2 * LAYOUT.slots - 1), 7)
    network(tokens).logsumexp(-1).sum().backward()
    assert network.token_embedding.weight.grad[8].abs().max() == 0
    BinSmoothing(20, 0.1, CPU)(network)
    optimizer.step()
    moved = (network.token_embedding.weight.detach() - before)[:20]
    assert torch.nn.functional.cosine_similarity(moved[7], moved[8], dim=0) > 0.999
    assert moved[8].norm() < moved[7].norm()
