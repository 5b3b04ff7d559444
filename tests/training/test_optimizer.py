from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tt_ray.config import ModelConfig, TrainingConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.training.optimizer import (
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
)

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)
TRAINING = TrainingConfig(steps=110, warmup_steps=10, learning_rate=1e-2)


def make_model() -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=3, dropout=0.0)
    return TrajectoryTransformer(config, LAYOUT)


def update(model: TrajectoryTransformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 6, (4, 14), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad(set_to_none=False)
    model(tokens).square().mean().backward()
    optimizer.step()


def test_one_warm_up_and_one_cosine() -> None:
    rates = [learning_rate(TRAINING, step) for step in range(111)]
    assert rates[:10] == pytest.approx([1e-3 * k for k in range(1, 11)])
    assert rates[10] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx(1e-2 * (0.1 + 0.9 / 2))  # the middle of the cosine
    assert rates[110] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert learning_rate(TRAINING, 500) == pytest.approx(1e-3)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_without_warm_up(fraction: float) -> None:
    training = TrainingConfig(
        steps=100, warmup_steps=0, learning_rate=1e-2, final_learning_rate_fraction=fraction
    )
    assert learning_rate(training, 0) == pytest.approx(1e-2)
    assert learning_rate(training, 100) == pytest.approx(1e-2 * fraction)


@pytest.mark.parametrize("warmup", [5, 10])
def test_warm_up_longer_than_the_run(warmup: int) -> None:
    training = TrainingConfig(steps=5, warmup_steps=warmup, learning_rate=1.0)
    expected = [(step + 1) / warmup for step in range(5)]
    assert [learning_rate(training, step) for step in range(5)] == pytest.approx(expected)


def test_matrices_decay_and_nothing_else_does() -> None:
    model = make_model()
    optimizer = build_optimizer(model, TRAINING)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(decays) == set(names.values())
    matrices = ("qkv.weight", "proj.weight", "mlp.0.weight", "mlp.2.weight")
    for name, decay in decays.items():
        assert decay == (0.1 if name == "head" or name.endswith(matrices) else 0.0), name
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_restored_state_gives_equal_updates() -> None:
    model = make_model()
    optimizer = build_optimizer(model, TRAINING)
    for seed in range(3):
        update(model, optimizer, seed)
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert len(state) == 3 * len(list(model.parameters()))

    other = make_model()
    other.load_state_dict(model.state_dict())
    fresh = build_optimizer(other, TRAINING)
    restore_optimizer(other, fresh, state)
    for seed in range(3, 6):
        update(model, optimizer, seed)
        update(other, fresh, seed)
    for expected, restored in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, restored)

    forgetful = make_model()
    forgetful.load_state_dict(model.state_dict())
    update(forgetful, build_optimizer(forgetful, TRAINING), 6)
    update(model, optimizer, 6)
    assert not torch.equal(model.head, forgetful.head)
