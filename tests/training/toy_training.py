"""A learnable toy data set, and the training scripts that tests run in other processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy_spec import toy_spec

from tt_ray.config import ModelConfig, TrainingConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet
from tt_ray.training.loop import TrainingJob, Workers, fit

BINS = 6
LAYOUT = TokenLayout(observation_dim=1, action_dim=1, num_bins=BINS)
MODEL = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, context_transitions=3, dropout=0.1)
TRAINING = TrainingConfig(
    steps=12, batch_size=8, learning_rate=3e-3, warmup_steps=3, log_every=1, validate_every=4
)
SPEC = toy_spec(1, 1)
Curves = dict[int, dict[str, float]]


def toy_windows(count: int, window: int, layout: TokenLayout = LAYOUT) -> WindowSet:
    """Episodes that count up from 0, 1, ... to the last bin and terminate: every next token is certain."""
    transitions = [[x, (x + 1) % BINS, (2 * x) % BINS, (x + 3) % BINS] for x in range(BINS)]
    episodes = [transitions[first:] for first in range(BINS)]
    offsets = np.cumsum([0, *(len(episode) for episode in episodes)])
    terminated = np.zeros(offsets[-1], dtype=bool)
    terminated[offsets[1:] - 1] = True
    tokens = np.concatenate(episodes).astype(np.uint8)
    return WindowSet.build(tokens, offsets, terminated, np.arange(count), window, layout, "future")


def toy_job(
    *,
    dropout: float = 0.1,
    seed: int = 0,
    validation: bool = True,
    layout: TokenLayout = LAYOUT,
    **training: Any,
) -> TrainingJob:
    """A job that takes a few milliseconds a step; `training` overrides TrainingConfig's fields."""
    values = np.tile(np.arange(BINS, dtype=np.float32)[:, None], LAYOUT.slots)
    return TrainingJob(
        model=replace(MODEL, dropout=dropout),
        training=replace(TRAINING, **training),
        layout=layout,
        discretizer=Discretizer.fit(values, strategy="quantile", num_bins=BINS),
        spec=SPEC,
        train=toy_windows(BINS, MODEL.context_transitions, layout),
        validation=toy_windows(BINS if validation else 0, MODEL.context_transitions, layout),
        experiment={"name": "toy", "seed": seed},
        seed=seed,
    )


class Curve:
    """A log that merges what is logged at a step and insists that steps done again give the same numbers."""

    def __init__(self) -> None:
        self.points: Curves = {}

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        merge(self.points, metrics, step)


def merge(points: Curves, metrics: Mapping[str, float], step: int) -> None:
    """Add metrics to a step's, speeds aside."""
    known = points.setdefault(step, {})
    for name, value in metrics.items():
        if not name.startswith("speed/"):
            assert known.setdefault(name, value) == value, (step, name)


def train_distributed(
    rank: int, size: int, folder: str, steps: int, batch_size: int, dropout: float, layout: TokenLayout
) -> None:
    """One of `size` processes that train together; rank 0 writes its curve to curve.json."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    curve = Curve()
    workers = Workers(rank, size, torch.distributed.all_reduce)
    job = toy_job(dropout=dropout, steps=steps, batch_size=batch_size, layout=layout)
    fit(job, Path(folder), curve, workers)
    torch.distributed.destroy_process_group()
    if rank == 0:
        (Path(folder) / "curve.json").write_text(json.dumps(curve.points))


def append_lines(file: Path, pause: float) -> Callable[[Mapping[str, float], int], None]:
    """A log that appends to a file, slow enough for someone to kill the process in between."""

    def log(metrics: Mapping[str, float], step: int) -> None:
        with file.open("a") as stream:
            stream.write(json.dumps([step, dict(metrics)]) + "\n")
        time.sleep(pause)

    return log


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    fit(toy_job(**json.loads(sys.argv[2])), target, append_lines(target / "log.jsonl", 0.003))
