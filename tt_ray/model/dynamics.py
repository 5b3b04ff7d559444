"""A probabilistic feed-forward ensemble (PETS, Chua et al. 2018), and the folder that holds a trained one.

Each member has two networks with Gaussian outputs: the next observation given observation and action, and the
behaviour's action given the observation, so that it can be rolled out by itself like the Transformer.

config.json                 sizes, settings, data spec, step
metrics.json                validation at that step
model.safetensors           weights, normalisation, ranges
training_state.safetensors  optimizer moments
checksums.json              SHA-256 of each of the above

Shape letters: K members, b rows of a batch, N observation, M action.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import verify_checkpoint
from tt_ray.model.folders import DAMAGED, read_metrics, read_network, write_folder
from tt_ray.plain import build, convert, read_json

MIN_STD = 1e-4
"""Dimensions that vary less count as constant, and are only centred."""
BOUND_WEIGHT = 0.01
"""Of the distance between the bounds of the log-variances in the loss, as in PETS."""


class GaussianNetworks(nn.Module):
    """K networks of the same size side by side: inputs [K, b, i] -> mean and log-variance [K, b, o]."""

    def __init__(self, members: int, inputs: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [inputs, *hidden, 2 * outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in itertools.pairwise(sizes):
            weight = torch.empty(members, i, o)
            self.weights.append(nn.init.trunc_normal_(weight, std=0.5 / math.sqrt(i)))
            self.biases.append(torch.zeros(members, 1, o))
        # Soft bounds, in units of the normalised output: a variance cannot run away where there is no data.
        self.max_log_variance = nn.Parameter(torch.full((outputs,), 0.5))
        self.min_log_variance = nn.Parameter(torch.full((outputs,), -10.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [K, b, o] of inputs [K, b, i]."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = F.silu(x)
        mean, log_variance = x.chunk(2, dim=-1)
        log_variance = self.max_log_variance - F.softplus(self.max_log_variance - log_variance)
        return mean, self.min_log_variance + F.softplus(log_variance - self.min_log_variance)

    def bounds(self) -> Tensor:
        """How far the bounds of the log-variances lie apart; a scalar, for the loss."""
        return (self.max_log_variance - self.min_log_variance).sum()


class Ensemble(nn.Module):
    """K members on raw observations and actions; the module normalises them itself.

    With `partial`, observations may be hidden: a hidden one is 0 after normalisation, and an indicator for
    each dimension says which are. What follows a hidden one is predicted as such, not as a difference.
    """

    observation_mean: Tensor  # [N], as observation_std, _low and _high
    observation_std: Tensor
    observation_low: Tensor
    observation_high: Tensor
    action_mean: Tensor  # [M], as action_std, _low and _high
    action_std: Tensor
    action_low: Tensor
    action_high: Tensor
    change_mean: Tensor  # [N] of the next observation's difference, as change_std
    change_std: Tensor

    def __init__(
        self,
        members: int,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.members, self.hidden, self.partial = members, tuple(hidden), partial
        self.observation_dim, self.action_dim = observation_dim, action_dim
        seen = observation_dim * (1 + partial)
        self.dynamics = GaussianNetworks(members, seen + action_dim, observation_dim, self.hidden)
        self.behaviour = GaussianNetworks(members, seen, action_dim, self.hidden)
        for name, size in (("observation", observation_dim), ("action", action_dim)):
            for part, value in (("mean", 0.0), ("std", 1.0), ("low", -math.inf), ("high", math.inf)):
                self.register_buffer(f"{name}_{part}", torch.full((size,), value))
        self.register_buffer("change_mean", torch.zeros(observation_dim))
        self.register_buffer("change_std", torch.ones(observation_dim))

    def sizes(self) -> dict[str, Any]:
        """What `__init__` takes."""
        names = ("members", "observation_dim", "action_dim", "hidden", "partial")
        return {name: getattr(self, name) for name in names}

    def next_observation(
        self, observations: Tensor, actions: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K, b, N] after observations [K, b, N] and actions [K, b, M].

        `hidden` [K, b, N] is True where an observation is not seen.
        """
        mean, log_variance = self.dynamics(self._dynamics_input(observations, actions, hidden))
        base, scale = self._frame(observations, hidden)
        return base + scale * mean, scale * (0.5 * log_variance).exp()

    def next_action(self, observations: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K, b, M] of the behaviour's action in observations [K, b, N]."""
        mean, log_variance = self.behaviour(self._seen(observations, hidden))
        return self.action_mean + self.action_std * mean, self.action_std * (0.5 * log_variance).exp()

    def losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods of pairs [K, b] in normalised units, summed over dimensions, as means.

        Of the next observation, hidden ones left out, and of the action; scalars.
        """
        mean, log_variance = self.dynamics(
            self._dynamics_input(pairs.observations, pairs.actions, pairs.hidden)
        )
        base, scale = self._frame(pairs.observations, pairs.hidden)
        loss = _gaussian_loss(mean, log_variance, (pairs.following - base) / scale)
        if pairs.following_hidden is not None:
            loss = loss.masked_fill(pairs.following_hidden, 0.0)
        mean, log_variance = self.behaviour(self._seen(pairs.observations, pairs.hidden))
        actions = (pairs.actions - self.action_mean) / self.action_std
        return loss.sum(-1).mean(), _gaussian_loss(mean, log_variance, actions).sum(-1).mean()

    def _seen(self, observations: Tensor, hidden: Tensor | None) -> Tensor:
        normal = (observations - self.observation_mean) / self.observation_std
        if not self.partial:
            return normal
        hidden = torch.zeros_like(normal, dtype=torch.bool) if hidden is None else hidden
        return torch.cat([normal.masked_fill(hidden, 0.0), hidden.to(normal.dtype)], dim=-1)

    def _dynamics_input(self, observations: Tensor, actions: Tensor, hidden: Tensor | None) -> Tensor:
        normal = (actions - self.action_mean) / self.action_std
        return torch.cat([self._seen(observations, hidden), normal], dim=-1)

    def _frame(self, observations: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a normalised output is an offset from, and the size of its unit."""
        base = observations + self.change_mean
        if hidden is None:
            return base, self.change_std
        base = torch.where(hidden, self.observation_mean, base)
        return base, torch.where(hidden, self.observation_std, self.change_std)


@dataclass(frozen=True)
class Pairs:
    """Observations and actions with the observations that followed; `hidden` ones are not seen."""

    observations: Tensor  # [..., N]
    actions: Tensor  # [..., M]
    following: Tensor  # [..., N]
    hidden: Tensor | None = None  # [..., N]
    following_hidden: Tensor | None = None  # [..., N]


def _gaussian_loss(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (log_variance + (target - mean).square() * (-log_variance).exp() + math.log(2 * math.pi))


@dataclass(frozen=True)
class _Sizes:
    """What `Ensemble` takes."""

    members: int
    observation_dim: int
    action_dim: int
    hidden: tuple[int, ...]
    partial: bool = False


@dataclass(frozen=True)
class EnsembleCheckpoint:
    """An ensemble with what it was trained on and how."""

    ensemble: Ensemble
    spec: DataSpec
    settings: Mapping[str, Any]
    """EnsembleConfig as plain data, and `seed`."""
    step: int
    metrics: Mapping[str, float]


def save_ensemble(folder: Path, checkpoint: EnsembleCheckpoint, training_state: Mapping[str, Tensor]) -> None:
    """Write `folder` whole or not at all; `UserError` where the disk is full or cannot be written."""
    write_folder(folder, "ensemble", lambda place: _write_files(place, checkpoint, training_state))


def _write_files(folder: Path, checkpoint: EnsembleCheckpoint, training_state: Mapping[str, Tensor]) -> None:
    config = {
        "ensemble": checkpoint.ensemble.sizes(),
        "settings": dict(checkpoint.settings),
        "data": checkpoint.spec.to_json(),
        "step": checkpoint.step,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "metrics.json").write_text(json.dumps(dict(checkpoint.metrics), indent=1))
    tensors = {"model": checkpoint.ensemble.state_dict(), "training_state": training_state}
    for name, values in tensors.items():
        plain = {key: value.detach().cpu().contiguous() for key, value in values.items()}
        save_file(plain, folder / f"{name}.safetensors")


def load_ensemble(
    folder: Path, device: torch.device | str = "cpu", spec: DataSpec | None = None
) -> EnsembleCheckpoint:
    """Verify and read what `save_ensemble` wrote, the ensemble in evaluation mode.

    `UserError` where it is unusable, or is for other dimensions or other data than `spec` describes.
    """
    verify_checkpoint(folder)
    try:
        config = read_json(folder / "config.json")
        sizes = build(_Sizes, config["ensemble"])
        ensemble = read_network(folder, lambda: Ensemble(**vars(sizes)), len(sizes.hidden))
        own_spec = DataSpec.from_json(config["data"])
        if (own_spec.observation_dim, own_spec.action_dim) != (sizes.observation_dim, sizes.action_dim):
            raise ValueError("the data's dimensions are not the ensemble's")
        metrics = read_metrics(folder)
        step, settings = convert(int, config["step"]), convert(dict[str, Any], config["settings"])
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{folder}: not an ensemble that this version can read ({reason})") from error
    if spec is not None:
        _require_data(folder, ensemble, own_spec, spec)
    return EnsembleCheckpoint(ensemble.to(device).eval(), own_spec, settings, step, metrics)


def _require_data(folder: Path, ensemble: Ensemble, own: DataSpec, spec: DataSpec) -> None:
    if (ensemble.observation_dim, ensemble.action_dim) != (spec.observation_dim, spec.action_dim):
        raise UserError(
            f"{folder}: an ensemble for {ensemble.observation_dim} observation and {ensemble.action_dim} "
            f"action dimensions, where {spec.dataset_id} has {spec.observation_dim} and {spec.action_dim}; "
            "use one that was trained on this data"
        )
    if own.fingerprint != spec.fingerprint:
        raise UserError(
            f"{folder}: an ensemble of {own.dataset_id} ({own.fingerprint}), not of {spec.dataset_id} "
            f"({spec.fingerprint}); use one that was trained on this data"
        )
