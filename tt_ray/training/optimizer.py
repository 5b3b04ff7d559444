"""AdamW with its parameter groups, and a learning rate of one warm-up and one cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tt_ray.config import TrainingConfig
from tt_ray.model.transformer import TrajectoryTransformer


def build_optimizer(model: TrajectoryTransformer, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays the linear layers' matrices and the head, not embeddings, norms or biases."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {id(matrix) for matrix in [*linear, model.head]}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), fused=True
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then one cosine down to the final fraction."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    span = max(1, training.steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = training.final_learning_rate_fraction
    return training.learning_rate * (floor + (1.0 - floor) * cosine)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a checkpoint."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
