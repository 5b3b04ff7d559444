"""How fast training steps are, on random tokens in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tt_ray.config import ModelConfig, TrainingConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet
from tt_ray.model.loss import kind_weights, target_kinds
from tt_ray.model.transformer import TrajectoryTransformer, visibility
from tt_ray.training.loop import Trainer, TrainingJob, Workers

EPISODES, LENGTH = 8, 500


def training_flops_per_token(config: ModelConfig, layout: TokenLayout) -> float:
    """Floating-point operations that one training token cannot do without, forwards and backwards.

    6 for each weight of the linear layers and of the one head that the token uses (a multiplication and an
    addition, in the forward pass and for two gradients), and 12 * embed_dim a layer for each key that a token
    sees, 75 of 159 on average in Hopper. Norms, embeddings, softmax and what the mask hides do not count.
    """
    width, tokens = config.embed_dim, layout.goal_dim + config.context_transitions * layout.slots - 1
    weights = 12 * width**2 * config.num_layers + (layout.num_bins + 1) * width
    seen = float(visibility(tokens, layout.slots, layout.goal_dim).sum()) / tokens
    return 6.0 * weights + 12.0 * seen * width * config.num_layers


def measure_training(
    config: ModelConfig, layout: TokenLayout, batch_size: int, seconds: float, device: torch.device
) -> float:
    """Tokens per second of `Trainer`'s updates in `seconds`, the first few updates apart."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(config, layout, batch_size, device, Path(folder))
        rate = _updates_per_second(trainer.update, seconds, device)
    return rate * batch_size * trainer.model.max_tokens


def measure_plain_loop(
    config: ModelConfig, layout: TokenLayout, batch_size: int, seconds: float, device: torch.device
) -> float:
    """Tokens per second of the loop that one would write first: eager float32, torch's own everything."""
    windows = _windows(config, layout).to(device)
    training = TrainingConfig(batch_size=batch_size)
    model = TrajectoryTransformer(config, layout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    weights = kind_weights(training, device)[target_kinds(layout, model.max_tokens - layout.goal_dim, device)]

    def update(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(windows), (batch_size,), generator=generator)
        inputs, targets, mask = windows.gather(chosen.to(device))
        nats = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        loss = (nats.view_as(targets) * mask * weights).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()

    return _updates_per_second(update, seconds, device) * batch_size * model.max_tokens


def _updates_per_second(update: Callable[[int], object], seconds: float, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for step in range(2):
        update(step)
    wait()
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        update(2 + done)
        done += 1
        if done % 4 == 0:  # a GPU's queue may otherwise grow without end
            wait()
    wait()
    return done / (time.perf_counter() - started)


def _windows(config: ModelConfig, layout: TokenLayout) -> WindowSet:
    rng = np.random.default_rng(0)
    rows = EPISODES * LENGTH
    tokens = rng.integers(layout.num_bins, size=(rows, layout.slots), dtype=np.int16)
    offsets, terminated = np.arange(0, rows + 1, LENGTH), np.zeros(rows, dtype=bool)
    return WindowSet.build(
        tokens, offsets, terminated, np.arange(EPISODES), config.context_transitions, layout
    )


def random_spec(layout: TokenLayout) -> DataSpec:
    """What a model of random numbers knows of its data: the sizes, and actions in [-1, 1]."""
    return DataSpec(
        dataset_id="random",
        environment={},
        observation_keys=(),
        observation_dim=layout.observation_dim,
        action_dim=layout.action_dim,
        action_low=(-1.0,) * layout.action_dim,
        action_high=(1.0,) * layout.action_dim,
        ref_min_score=None,
        ref_max_score=None,
        fingerprint="random",
    )


def _trainer(
    config: ModelConfig, layout: TokenLayout, batch_size: int, device: torch.device, folder: Path
) -> Trainer:
    values = np.tile(np.arange(layout.num_bins, dtype=np.float32)[:, None], layout.slots)
    windows = _windows(config, layout)
    job = TrainingJob(
        model=config,
        training=TrainingConfig(batch_size=batch_size),
        layout=layout,
        discretizer=Discretizer.fit(values, strategy="uniform", num_bins=layout.num_bins),
        spec=random_spec(layout),
        train=windows,
        validation=windows,
        experiment={},
        seed=0,
    )
    return Trainer(job, folder, lambda metrics, step: None, Workers(), device)
