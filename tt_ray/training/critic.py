"""Implicit Q-learning (Kostrikov et al. 2021): V by expectile regression, Q towards r + discount * V(next).

If asked for, also its policy, by advantage-weighted regression (`policy_loss`). No action outside the data is
ever asked for. Batches follow from (seed, step) alone, so that a run that is taken up at a checkpoint takes
the steps that the uninterrupted run would have taken.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tt_ray.config import CriticConfig, to_dict
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.windows import batch_of_step
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import last_checkpoint, load_training_state, prune_checkpoints, step_folder
from tt_ray.model.critic import Critic, CriticCheckpoint, load_critic, save_critic
from tt_ray.training.optimizer import optimizer_tensors, restore_optimizer

Log = Callable[[Mapping[str, float], int], None]

MAX_WEIGHT = 100.0
"""Of a transition in the policy's regression, as in the code that its authors have published."""
TARGET = "target."
"""What the names of the target networks' tensors begin with in a checkpoint."""
PACE = ("steps", "log_every", "checkpoint_every")
"""Settings that may change between interruption and resumption: they alter no update."""


@dataclass(frozen=True)
class Transitions:
    """Rows of episodes whose successor is known: all but the last of an episode that did not terminate.

    Episodes do not keep the observation after an episode's last action. Where the environment terminated none
    is needed, as nothing follows; where a time limit or the record's end did, there is nothing to bootstrap
    from, and the row is left out of both regressions (as D4RL's own Q-learning reader does).
    """

    observations: Tensor  # [T, N]
    actions: Tensor  # [T, M]
    rewards: Tensor  # [T]
    terminated: Tensor  # [T]
    rows: Tensor  # [K] the rows to learn from

    @classmethod
    def of(cls, episodes: Episodes, chosen: NDArray[np.int64] | None = None) -> Transitions:
        """Transitions of the episodes numbered `chosen`, or of all; `UserError` where none is left."""
        offsets = episodes.offsets
        last = offsets[1:] - 1
        known = np.ones(len(episodes.rewards), dtype=bool)
        known[last] = episodes.terminated[last]
        numbers = np.arange(len(episodes)) if chosen is None else chosen
        mine = np.zeros(len(known), dtype=bool)
        for e in numbers:
            mine[offsets[e] : offsets[e + 1]] = True
        rows = np.flatnonzero(mine & known)
        if len(rows) == 0:
            raise UserError(
                f"{episodes.spec.dataset_id}: no transition with a known successor among {len(numbers)} "
                "episodes, so a critic has nothing to learn from; give it longer episodes"
            )
        names = ("observations", "actions", "rewards", "terminated")
        arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(episodes, name))) for name in names}
        return cls(rows=torch.from_numpy(rows), **arrays)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Transitions:
        """The same transitions with their arrays resident on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})

    def gather(self, indices: Tensor) -> Batch:
        """The transitions numbered `indices` [b]."""
        rows = self.rows[indices]
        # Only a terminated row may be the last of all; what is read as its successor is never used.
        following = (rows + 1).clamp(max=len(self.rewards) - 1)
        return Batch(
            self.observations[rows],
            self.actions[rows],
            self.rewards[rows],
            self.terminated[rows],
            self.observations[following],
        )


@dataclass(frozen=True)
class Batch:
    """b transitions; where `terminated`, the next observation means nothing."""

    observations: Tensor  # [b, N]
    actions: Tensor  # [b, M]
    rewards: Tensor  # [b]
    terminated: Tensor  # [b]
    next_observations: Tensor  # [b, N]


@dataclass(frozen=True)
class CriticJob:
    """What is trained on what."""

    config: CriticConfig
    transitions: Transitions
    spec: DataSpec
    seed: int
    policy: bool = False
    """Whether a policy is extracted along the way; Q and V are the same with it and without."""

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration and seed as plain data, as a checkpoint keeps them."""
        settings = {**to_dict(self.config), "seed": self.seed}
        if self.policy:
            return {**settings, "policy": True}
        del settings["inverse_temperature"]
        return settings


def fit_critic(job: CriticJob, folder: Path, log: Log, device: str = "cpu") -> Critic:
    """Train to the end, from the last checkpoint in `folder` if there is one; the critic in evaluation mode.

    Keeps the last checkpoint in `folder` and calls `log(metrics, step)`, where step counts updates done.
    `UserError` where the checkpoint there is damaged, or of another job.
    """
    trainer = CriticTrainer(job, folder, log, torch.device(device))
    trainer.run()
    return trainer.critic.eval()


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2 over u = target - prediction; a scalar."""
    weights = torch.where(difference < 0, 1 - expectile, expectile)
    return (weights * difference.square()).mean()


def policy_loss(advantage: Tensor, log_prob: Tensor, inverse_temperature: float) -> Tensor:
    """Mean of -min(exp(inverse_temperature * (Q - V)), MAX_WEIGHT) log pi(a|s) over [b]; a scalar.

    Advantage-weighted regression, equation 7 of Kostrikov et al. 2021 (Peng et al. 2019).
    """
    weights = (inverse_temperature * advantage).exp().clamp(max=MAX_WEIGHT)
    return -(weights * log_prob).mean()


class CriticTrainer:
    """Critic, targets, optimizer and data of one run; `run` is the loop."""

    def __init__(self, job: CriticJob, folder: Path, log: Log, device: torch.device) -> None:
        self.job, self.folder, self.log, self.device = job, folder, log, device
        torch.manual_seed(job.seed)
        self.critic = Critic(job.spec.observation_dim, job.spec.action_dim, job.config.hidden, job.policy)
        rows = job.transitions.rows
        self.critic.normalise_by(job.transitions.observations[rows], job.transitions.actions[rows])
        self.critic.to(device)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=job.config.learning_rate, fused=True)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self._approach = get_ema_multi_avg_fn(1 - job.config.target_rate)
        self.transitions = job.transitions.to(device)
        self.first_step = self._restore()

    def run(self) -> None:
        """Updates from the first missing one to the last, with curves and checkpoints on the way."""
        config = self.job.config
        started, since = time.perf_counter(), self.first_step
        for step in range(self.first_step, config.steps):
            curves, done = self.update(step), step + 1
            due = done % config.checkpoint_every == 0 or done == config.steps
            if due or done % config.log_every == 0:
                metrics = {name: float(value) for name, value in curves.items()}
                speed = (done - since) / (time.perf_counter() - started)
                self.log({**metrics, "speed/steps_per_second": speed}, done)
                if due:  # after the log: a resumed run does not repeat this step
                    self._checkpoint(done, metrics)
                started, since = time.perf_counter(), done

    def update(self, step: int) -> dict[str, Tensor]:
        """One step of all networks from their present values; what the curves show of its batch.

        Q, V and policy share no weights: the gradient of the sum of their losses is that of each.
        """
        job, config = self.job, self.job.config
        indices = batch_of_step(job.seed, step, config.batch_size, len(self.transitions))
        batch = self.transitions.gather(torch.from_numpy(indices).to(self.device))
        with torch.no_grad():
            target_q = self.target.q(batch.observations, batch.actions)
            goal = q_goal(batch, self.critic.v(batch.next_observations), config)
        v = self.critic.v(batch.observations)
        loss_v = expectile_loss(target_q - v, config.expectile)
        q = self.critic.q_values(batch.observations, batch.actions)
        loss_q = (q - goal).square().mean(dim=1).sum()
        losses = loss_v + loss_q
        if job.policy:
            log_prob = self.critic.action_log_prob(batch.observations, batch.actions)
            loss_policy = policy_loss(target_q - v.detach(), log_prob, config.inverse_temperature)
            losses = losses + loss_policy
        self.optimizer.zero_grad(set_to_none=True)
        losses.backward()
        self.optimizer.step()
        online = list(self.critic.q_networks.parameters())
        self._approach(list(self.target.q_networks.parameters()), online, step)
        return {
            "loss/v": loss_v.detach(),
            "loss/q": loss_q.detach() / len(q),
            "mean/v": v.detach().mean(),
            "mean/q": q.detach().amin(dim=0).mean(),
            "mean/advantage": (target_q - v.detach()).mean(),
            **({"loss/policy": loss_policy.detach()} if job.policy else {}),
        }

    def _checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        targets = self.target.q_networks.state_dict()
        state = optimizer_tensors(self.critic, self.optimizer)
        state |= {f"{TARGET}{name}": value for name, value in targets.items()}
        checkpoint = CriticCheckpoint(self.critic, self.job.spec, self.job.settings, step, metrics)
        save_critic(step_folder(self.folder, step), checkpoint, state)
        prune_checkpoints(self.folder)

    def _restore(self) -> int:
        """Updates done in the last checkpoint, with everything as it was then; 0 without one."""
        folder = last_checkpoint(self.folder)
        if folder is None:
            return 0
        checkpoint = load_critic(folder, self.device, self.job.spec)
        theirs = {"policy": False, **checkpoint.settings, "data": checkpoint.spec.fingerprint}
        ours = {"policy": self.job.policy, **self.job.settings, "data": self.job.spec.fingerprint}
        require_same_job(folder, theirs, ours)
        self.critic.load_state_dict(checkpoint.critic.state_dict())
        state = load_training_state(folder)
        restore_optimizer(self.critic, self.optimizer, state)
        targets = {
            name.removeprefix(TARGET): value for name, value in state.items() if name.startswith(TARGET)
        }
        self.target.q_networks.load_state_dict(targets)
        return checkpoint.step


def require_same_job(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """`UserError` naming a setting in which the checkpoint in `folder` is of another training than `ours`."""
    for name in ours:
        if name not in PACE and theirs.get(name) != ours[name]:
            raise UserError(
                f"{folder}: was trained with {name} = {theirs.get(name)}, not {ours[name]}; "
                "train in another folder, or remove this one"
            )


def q_goal(batch: Batch, next_values: Tensor, config: CriticConfig) -> Tensor:
    """What Q is regressed to, [b]: shifted reward plus discounted V(next) [b], unless nothing follows."""
    future = torch.where(batch.terminated, 0.0, next_values)
    return batch.rewards + config.reward_shift + config.discount * future
