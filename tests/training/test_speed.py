from __future__ import annotations

import pytest
import torch

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.training.speed import measure_plain_loop, measure_training, training_flops_per_token

CPU = torch.device("cpu")
SMALL = ModelConfig(num_layers=1, num_heads=1, embed_dim=2, context_transitions=2)
LAYOUT = TokenLayout(observation_dim=1, action_dim=1, num_bins=3)  # 7 tokens, of which the fourth is hidden


def test_flops_by_hand() -> None:
    seen = (1 + 2 + 3 + 3 + 4 + 5 + 6) / 7
    assert training_flops_per_token(SMALL, LAYOUT) == pytest.approx(6 * (12 * 4 + 4 * 2) + 12 * seen * 2)


def test_hopper_takes_five_megaflops() -> None:
    hopper = TokenLayout(observation_dim=11, action_dim=3, num_bins=100)
    assert training_flops_per_token(ModelConfig(), hopper) == pytest.approx(5.26e6, rel=1e-3)


@pytest.mark.parametrize("measure", [measure_training, measure_plain_loop])
@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout(1, 1, 1_000)])
def test_whole_updates_are_counted(measure: object, layout: TokenLayout) -> None:
    assert callable(measure)
    assert measure(SMALL, layout, 5, 0.0, CPU) > 0
