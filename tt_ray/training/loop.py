"""The training loop: the same on one process or as one of several workers, and exact across interruptions.

Everything random is a function of (seed, step, rank) and every worker knows the whole batch, so a run that is
taken up at a checkpoint takes the steps that the uninterrupted run would have taken.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tt_ray.config import ModelConfig, TrainingConfig, require
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet, batch_of_step, goals_of_step, goals_of_windows
from tt_ray.model.checkpoint import (
    Checkpoint,
    last_checkpoint,
    load_checkpoint,
    load_training_state,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
)
from tt_ray.model.loss import LossSums, kind_weights, loss_sums, target_kinds
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.training.cpu import keep_freed_memory, training_logits
from tt_ray.training.optimizer import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer
from tt_ray.training.smoothing import BinSmoothing

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, float], int], None]

CPU_CHUNK = 64
"""Windows that a CPU treats at once: 0.2 GB for the default model, and enough for many cores."""


@dataclass(frozen=True)
class Workers:
    """This process among those that share each batch; `add_up` sums a tensor over them in place."""

    rank: int = 0
    size: int = 1
    add_up: Callable[[Tensor], None] | None = None

    def shard(self, count: int) -> slice:
        """This worker's part of `count` items: contiguous, sizes differing by one at most."""
        bounds = np.linspace(0, count, self.size + 1).astype(int)
        return slice(bounds[self.rank], bounds[self.rank + 1])


@dataclass(frozen=True)
class TrainingJob:
    """What is trained on what; `experiment` is kept in the checkpoints for the record."""

    model: ModelConfig
    training: TrainingConfig
    layout: TokenLayout
    discretizer: Discretizer
    spec: DataSpec
    train: WindowSet
    validation: WindowSet
    experiment: Mapping[str, Any]
    seed: int


def fit(job: TrainingJob, folder: Path, log: Log, workers: Workers = Workers(), device: str = "cpu") -> None:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Writes checkpoints (best and last are kept) into `folder` from rank 0, and calls `log(metrics, step)`
    there, where step counts updates done. `UserError` where the batch is too small to be shared out.
    """
    require(
        job.training.batch_size >= workers.size,
        "training.batch_size",
        f"{job.training.batch_size} windows cannot be shared by resources.workers = {workers.size}: "
        "raise the one or lower the other",
    )
    Trainer(job, folder, log, workers, torch.device(device)).run()


class Trainer:
    """Model, optimizer and data of one run; `run` is the loop."""

    def __init__(
        self, job: TrainingJob, folder: Path, log: Log, workers: Workers, device: torch.device
    ) -> None:
        self.job, self.folder, self.log, self.workers, self.device = job, folder, log, workers, device
        torch.manual_seed(job.seed)
        self.model = TrajectoryTransformer(job.model, job.layout).to(device)
        self.optimizer = build_optimizer(self.model, job.training)
        self.train, self.validation = job.train.to(device), job.validation.to(device)
        self.weights = kind_weights(job.training, device)
        self.kinds = target_kinds(job.layout, self.model.max_tokens - job.layout.goal_dim, device)
        width = job.training.bin_smoothing
        self.smooth = BinSmoothing(job.layout.num_bins, width, device) if width else None
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            keep_freed_memory()
        self.chunk = CPU_CHUNK if self.on_cpu else job.training.batch_size
        self._training_sums = self._eager_sums if self.on_cpu else self._compiled_sums()
        self.first_step = self._restore()

    def run(self) -> None:
        """Updates from the first missing one to the last, with curves and checkpoints on the way."""
        training = self.job.training
        started, since = time.perf_counter(), self.first_step
        for step in range(self.first_step, training.steps):
            sums, norm = self.update(step)
            done = step + 1
            if done % training.log_every == 0 or done == training.steps:
                self._log_training(sums, norm, step, (done - since) / (time.perf_counter() - started))
                started, since = time.perf_counter(), done
            if done % training.validate_every == 0 or done == training.steps:
                pause = time.perf_counter()
                self._checkpoint(done)
                started += time.perf_counter() - pause

    def update(self, step: int) -> tuple[LossSums, Tensor]:
        """One step on this worker's shard of the batch; the loss is a mean over the whole batch's targets."""
        job = self.job
        batch = batch_of_step(job.seed, step, job.training.batch_size, len(self.train))
        targets = self.train.count_targets(torch.from_numpy(batch).to(self.device))
        torch.manual_seed(_stream(job.seed, step, self.workers.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(job.training, step)
        self.optimizer.zero_grad(set_to_none=True)
        shard = self.workers.shard(len(batch))
        mine, goals = batch[shard], goals_of_step(job.seed, step, len(batch))[shard]
        parts = []
        for chunk in np.array_split(np.arange(len(mine)), math.ceil(len(mine) / self.chunk)):
            sums = self._training_sums(*self._gather(self.train, mine[chunk], goals[chunk]))
            (sums.weighted / targets).backward()
            parts.append(sums)
        sums = self._add_up(LossSums.total(parts))
        if self.smooth is not None:
            self.smooth(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), job.training.gradient_clip)
        self.optimizer.step()
        return sums, norm

    def _gather(
        self, windows: WindowSet, indices: np.ndarray, goals: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        return windows.gather(*(torch.from_numpy(array).to(self.device) for array in (indices, goals)))

    def _eager_sums(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> LossSums:
        """Loss of the model in its present mode."""
        if self.model.training and self.on_cpu:
            logits = training_logits(self.model, inputs)
        else:
            with self._autocast():
                logits = self.model(inputs)
        return loss_sums(logits, targets, mask, self.kinds, self.weights)

    def _compiled_sums(self) -> Callable[[Tensor, Tensor, Tensor], LossSums]:
        """`_eager_sums` compiled, or from the first call on as it is where that fails."""
        compiled = torch.compile(self._eager_sums, dynamic=False)

        def first(inputs: Tensor, targets: Tensor, mask: Tensor) -> LossSums:
            try:
                # A rehearsal, as the backward pass may fail too; it leaves the random streams as they were.
                with torch.random.fork_rng():
                    compiled(inputs, targets, mask).weighted.backward()
                self._training_sums = compiled
            except Exception as error:  # whatever a compiler on an unknown machine may raise
                cause = str(error).strip().partition("\n")[0]
                logger.warning("training steps are not compiled: %s: %s", type(error).__name__, cause)
                self._training_sums = self._eager_sums
            self.optimizer.zero_grad(set_to_none=True)
            return self._training_sums(inputs, targets, mask)

        return first

    def _add_up(self, sums: LossSums) -> LossSums:
        """Gradients and loss summed over the workers, in one exchange."""
        if self.workers.add_up is None:
            return sums
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parts = [*gradients, sums.weighted, sums.by_kind, sums.counts]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.workers.add_up(flat)
        pieces = flat.split([part.numel() for part in parts])
        for gradient, piece in zip(gradients, pieces, strict=False):
            gradient.copy_(piece.view_as(gradient))
        return LossSums(pieces[-3][0], pieces[-2], pieces[-1])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over evenly spread held-out windows, in all and by kind; empty without any."""
        count = min(self.job.training.validation_windows, len(self.validation))
        if count == 0:
            return {}
        chosen = np.linspace(0, len(self.validation) - 1, count).astype(np.int64)
        mine = chosen[self.workers.shard(count)]
        goals, totals = goals_of_windows(len(self.validation)), torch.zeros(9, device=self.device)
        self.model.eval()
        for chunk in np.array_split(mine, max(1, math.ceil(len(mine) / 64))):
            if len(chunk):
                sums = self._eager_sums(*self._gather(self.validation, chunk, goals[chunk]))
                totals += torch.cat([sums.weighted[None], sums.by_kind, sums.counts])
        self.model.train()
        if self.workers.add_up is not None:
            self.workers.add_up(totals)
        metrics = LossSums(totals[0], totals[1:5], totals[5:9]).metrics()
        return {f"val/{name}": value for name, value in metrics.items()}

    def _log_training(self, sums: LossSums, norm: Tensor, step: int, steps_per_second: float) -> None:
        if self.workers.rank != 0:
            return
        metrics = {f"train/{name}": value for name, value in sums.metrics().items()}
        metrics["train/learning_rate"] = learning_rate(self.job.training, step)
        metrics["train/gradient_norm"] = float(norm)
        tokens = self.job.training.batch_size * self.model.max_tokens
        metrics["speed/tokens_per_second"] = steps_per_second * tokens
        self.log(metrics, step + 1)

    def _checkpoint(self, step: int) -> None:
        """Validate and, on rank 0, log it and write the checkpoint of `step` updates."""
        metrics = self.validate()
        if self.workers.rank != 0:
            return
        self.log(metrics, step)  # before the checkpoint: a resumed run does not repeat this step
        job = self.job
        state = Checkpoint(self.model, job.discretizer, job.spec, job.experiment, step, metrics)
        save_checkpoint(step_folder(self.folder, step), state, optimizer_tensors(self.model, self.optimizer))
        prune_checkpoints(self.folder)

    def _restore(self) -> int:
        """Updates done in the last checkpoint, with model and optimizer as they were then; 0 without one."""
        folder = last_checkpoint(self.folder)
        if folder is None:
            return 0
        checkpoint = load_checkpoint(folder, self.device)
        self.model.load_state_dict(checkpoint.model.state_dict())
        restore_optimizer(self.model, self.optimizer, load_training_state(folder))
        return checkpoint.step

    def _autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on a GPU; what stays float32 there is exact, as torch's default leaves TF32 off."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def _stream(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout masks of one worker at one step."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
