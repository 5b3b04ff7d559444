"""Training the probabilistic ensemble: each member by maximum likelihood on a bootstrap of its own.

Batches follow from (seed, step) alone, so that a run that is taken up at a checkpoint takes the steps that
the uninterrupted run would have taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.config import EnsembleConfig, to_dict
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.windows import batch_of_step
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import last_checkpoint, load_training_state, prune_checkpoints, step_folder
from tt_ray.model.dynamics import (
    BOUND_WEIGHT,
    MIN_STD,
    Ensemble,
    EnsembleCheckpoint,
    Pairs,
    load_ensemble,
    save_ensemble,
)
from tt_ray.training.critic import require_same_job
from tt_ray.training.optimizer import optimizer_tensors, restore_optimizer

Log = Callable[[Mapping[str, float], int], None]

VALIDATION_PAIRS = 4_096
"""Held-out pairs that a validation looks at, at most."""
_BOOTSTRAP = 1  # which of a seed's streams draws the bootstraps


@dataclass(frozen=True)
class PairSet:
    """Rows of episodes that have a next row in the same episode, whose observation is to be predicted.

    Episodes do not keep the observation after an episode's last action, so their last rows are no pairs.
    """

    observations: Tensor  # [T, N]
    actions: Tensor  # [T, M]
    hidden: Tensor | None  # [T, N] which observations are not seen
    rows: Tensor  # [n] the rows to learn from

    @classmethod
    def of(
        cls, episodes: Episodes, chosen: NDArray[np.int64], hidden: NDArray[np.bool_] | None = None
    ) -> PairSet:
        """Pairs of the episodes numbered `chosen`; `hidden` [T, N] says which observations are not seen."""
        offsets = episodes.offsets
        rows = [np.arange(offsets[e], offsets[e + 1] - 1) for e in chosen]
        joined = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        observations, actions = torch.from_numpy(episodes.observations), torch.from_numpy(episodes.actions)
        mask = None if hidden is None else torch.from_numpy(hidden)
        return cls(observations, actions, mask, torch.from_numpy(joined))

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PairSet:
        """The same pairs with their arrays resident on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def gather(self, indices: Tensor) -> Pairs:
        """The pairs numbered `indices` [...]."""
        rows = self.rows[indices]
        hidden = (None, None) if self.hidden is None else (self.hidden[rows], self.hidden[rows + 1])
        return Pairs(self.observations[rows], self.actions[rows], self.observations[rows + 1], *hidden)


@dataclass(frozen=True)
class EnsembleJob:
    """What is trained on what."""

    config: EnsembleConfig
    train: PairSet
    validation: PairSet
    spec: DataSpec
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration and seed as plain data, as a checkpoint keeps them."""
        return {**to_dict(self.config), "seed": self.seed, "partial": self.train.hidden is not None}


def fit_ensemble(job: EnsembleJob, folder: Path, log: Log, device: str = "cpu") -> None:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Keeps the best (by held-out likelihood) and the last checkpoint in `folder`, and calls
    `log(metrics, step)`, where step counts updates done. `UserError` where there are no pairs, or the
    checkpoint there is damaged or of another job.
    """
    if len(job.train) == 0:
        raise UserError(
            f"{job.spec.dataset_id}: no two rows follow each other in the training episodes, so an ensemble "
            "has nothing to learn from; give it longer episodes"
        )
    EnsembleTrainer(job, folder, log, torch.device(device)).run()


class EnsembleTrainer:
    """Ensemble, optimizer and data of one run; `run` is the loop."""

    def __init__(self, job: EnsembleJob, folder: Path, log: Log, device: torch.device) -> None:
        self.job, self.folder, self.log, self.device = job, folder, log, device
        config, spec = job.config, job.spec
        torch.manual_seed(job.seed)
        partial = job.train.hidden is not None
        sizes = (config.members, spec.observation_dim, spec.action_dim, config.hidden, partial)
        self.ensemble = Ensemble(*sizes).to(device)
        self.train, self.validation = job.train.to(device), job.validation.to(device)
        _normalise(self.ensemble, self.train, spec)
        self.optimizer = torch.optim.AdamW(
            self.ensemble.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        stream = np.random.default_rng(np.random.SeedSequence(job.seed, spawn_key=(_BOOTSTRAP,)))
        drawn = stream.integers(len(job.train), size=(config.members, len(job.train)))
        self.bootstraps = torch.from_numpy(drawn).to(device)  # [K, n]
        self.first_step = self._restore()

    def run(self) -> None:
        """Updates from the first missing one to the last, with curves and checkpoints on the way."""
        config = self.job.config
        started, since = time.perf_counter(), self.first_step
        for step in range(self.first_step, config.steps):
            dynamics, behaviour = self.update(step)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                speed = (done - since) / (time.perf_counter() - started)
                metrics = _named("train", float(dynamics), float(behaviour))
                self.log({**metrics, "speed/steps_per_second": speed}, done)
                started, since = time.perf_counter(), done
            if done % config.checkpoint_every == 0 or done == config.steps:
                pause = time.perf_counter()
                self._checkpoint(done)
                started += time.perf_counter() - pause

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of all members, each on rows of its own; both parts of the loss before it, scalars."""
        job, config = self.job, self.job.config
        batch = torch.from_numpy(batch_of_step(job.seed, step, config.batch_size, len(job.train)))
        pairs = self.train.gather(self.bootstraps[:, batch.to(self.device)])
        dynamics, behaviour = self.ensemble.losses(pairs)
        bounds = self.ensemble.dynamics.bounds() + self.ensemble.behaviour.bounds()
        self.optimizer.zero_grad(set_to_none=True)
        # Losses are means over members, which share no weights: each is to learn as if it were alone.
        (config.members * (dynamics + behaviour) + BOUND_WEIGHT * bounds).backward()
        self.optimizer.step()
        return dynamics.detach(), behaviour.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over evenly spread held-out pairs and all members; empty without any."""
        count = min(VALIDATION_PAIRS, len(self.validation))
        if count == 0:
            return {}
        chosen = np.linspace(0, len(self.validation) - 1, count).astype(np.int64)
        indices = torch.from_numpy(chosen).to(self.device).expand(self.job.config.members, -1)
        dynamics, behaviour = self.ensemble.losses(self.validation.gather(indices))
        return _named("val", float(dynamics), float(behaviour))

    def _checkpoint(self, step: int) -> None:
        metrics = self.validate()
        self.log(metrics, step)  # before the checkpoint: a resumed run does not repeat this step
        checkpoint = EnsembleCheckpoint(self.ensemble, self.job.spec, self.job.settings, step, metrics)
        state = optimizer_tensors(self.ensemble, self.optimizer)
        save_ensemble(step_folder(self.folder, step), checkpoint, state)
        prune_checkpoints(self.folder)

    def _restore(self) -> int:
        """Updates done in the last checkpoint, with everything as it was then; 0 without one."""
        folder = last_checkpoint(self.folder)
        if folder is None:
            return 0
        checkpoint = load_ensemble(folder, self.device, self.job.spec)
        require_same_job(folder, checkpoint.settings, self.job.settings)
        self.ensemble.load_state_dict(checkpoint.ensemble.state_dict())
        restore_optimizer(self.ensemble, self.optimizer, load_training_state(folder))
        return checkpoint.step


def _named(prefix: str, dynamics: float, behaviour: float) -> dict[str, float]:
    parts = {"loss": dynamics + behaviour, "loss_dynamics": dynamics, "loss_behaviour": behaviour}
    return {f"{prefix}/{name}": value for name, value in parts.items()}


def _normalise(ensemble: Ensemble, pairs: PairSet, spec: DataSpec) -> None:
    """Take means, standard deviations and ranges from the pairs, hidden observations aside."""
    every = pairs.gather(torch.arange(len(pairs), device=pairs.rows.device))
    seen = None if every.hidden is None else ~every.hidden
    both = None if seen is None or every.following_hidden is None else seen & ~every.following_hidden
    changes = every.following - every.observations
    for name, values, shown in (
        ("observation", every.observations, seen),
        ("action", every.actions, None),
        ("change", changes, both),
    ):
        mean, std = _moments(values.double(), shown)
        getattr(ensemble, f"{name}_mean").copy_(mean)
        getattr(ensemble, f"{name}_std").copy_(torch.where(std < MIN_STD, 1.0, std))
    for name, extreme, fill in (("low", torch.amin, torch.inf), ("high", torch.amax, -torch.inf)):
        values = every.observations if seen is None else every.observations.masked_fill(~seen, fill)
        getattr(ensemble, f"observation_{name}").copy_(extreme(values, 0))
        getattr(ensemble, f"action_{name}").copy_(torch.tensor(getattr(spec, f"action_{name}")))


def _moments(values: Tensor, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [d] of values [n, d], where `shown`."""
    weights = torch.ones_like(values) if shown is None else shown.to(values.dtype)
    count = weights.sum(0).clamp(min=1.0)
    mean = (values * weights).sum(0) / count
    return mean, (((values - mean).square() * weights).sum(0) / count).sqrt()
