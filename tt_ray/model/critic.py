"""The critic of implicit Q-learning: two Q networks and V, a policy if asked for, and a trained one's folder.

config.json                 sizes, settings, data spec, step
metrics.json                the last point of the training curves
model.safetensors           weights and normalisation
training_state.safetensors  optimizer moments and target networks
checksums.json              SHA-256 of each of the above

Shape letters: N observation, M action, `...` any leading dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tt_ray.config import CriticConfig
from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import verify_checkpoint
from tt_ray.model.folders import DAMAGED, read_metrics, read_network, write_folder
from tt_ray.plain import build, convert, read_json

MIN_STD = 1e-3
"""Dimensions that vary less count as constant, and are only centred."""
LOG_STD_RANGE = (-5.0, 2.0)
"""Of the policy's normalised actions."""


class Critic(nn.Module):
    """Q(s, a), twice, and V(s) of raw observations and actions; the module normalises them itself.

    With `policy` also a Gaussian over actions: its mean a network of the observation, its deviation the same
    everywhere.
    """

    observation_mean: Tensor  # [N]
    observation_std: Tensor  # [N]
    action_mean: Tensor  # [M]
    action_std: Tensor  # [M]

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int], policy: bool = False
    ) -> None:
        super().__init__()
        self.observation_dim, self.action_dim, self.hidden = observation_dim, action_dim, tuple(hidden)
        self.q_networks = nn.ModuleList(_mlp(observation_dim + action_dim, self.hidden) for _ in range(2))
        self.v_network = _mlp(observation_dim, self.hidden)
        # After Q and V, which so begin from the same numbers with a policy and without one.
        self.policy = _mlp(observation_dim, self.hidden, action_dim) if policy else None
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if policy else None
        for name, size in (("observation", observation_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise_by(self, observations: Tensor, actions: Tensor) -> None:
        """Take mean and standard deviation from data: observations [T, N], actions [T, M]."""
        for name, values in (("observation", observations), ("action", actions)):
            std, mean = torch.std_mean(values.double(), dim=0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std < MIN_STD, 1.0, std))

    def q_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both networks' Q [2, ...] of observations [..., N] and actions [..., M]."""
        features = torch.cat([self._normalised(observations), self._normal(actions)], dim=-1)
        return torch.stack([network(features)[..., 0] for network in self.q_networks])

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q [...] of observations [..., N] and actions [..., M]."""
        return self.q_values(observations, actions).amin(dim=0)

    def v(self, observations: Tensor) -> Tensor:
        """V [...] of observations [..., N]."""
        return self.v_network(self._normalised(observations))[..., 0]

    def act(self, observations: Tensor) -> Tensor:
        """The policy's mean actions [..., M] in observations [..., N]; they may lie out of bounds."""
        assert self.policy is not None, "the critic has no policy"
        return self.policy(self._normalised(observations)) * self.action_std + self.action_mean

    def action_log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-density [...] of normalised actions [..., M] under the policy in observations [..., N]."""
        assert self.policy is not None, "the critic has no policy"
        assert self.log_std is not None
        std = self.log_std.clamp(*LOG_STD_RANGE).exp()
        policy = torch.distributions.Normal(self.policy(self._normalised(observations)), std)
        return policy.log_prob(self._normal(actions)).sum(dim=-1)

    def _normalised(self, observations: Tensor) -> Tensor:
        return (observations - self.observation_mean) / self.observation_std

    def _normal(self, actions: Tensor) -> Tensor:
        return (actions - self.action_mean) / self.action_std


def _mlp(inputs: int, hidden: Sequence[int], outputs: int = 1) -> nn.Sequential:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@dataclass(frozen=True)
class _Sizes:
    """What `Critic` takes."""

    observation_dim: int
    action_dim: int
    hidden: tuple[int, ...]
    policy: bool = False


@dataclass(frozen=True)
class CriticCheckpoint:
    """A critic with what it was trained on and how."""

    critic: Critic
    spec: DataSpec
    settings: Mapping[str, Any]
    """CriticConfig as plain data, and `seed`; with a policy, also `policy`."""
    step: int
    metrics: Mapping[str, float]

    @property
    def config(self) -> CriticConfig:
        """The settings that it was trained with."""
        settings = {"inverse_temperature": CriticConfig.inverse_temperature, **self.settings}  # or no policy
        settings = {item.name: settings[item.name] for item in fields(CriticConfig)}
        return CriticConfig(**{**settings, "hidden": tuple(settings["hidden"])})


def save_critic(folder: Path, checkpoint: CriticCheckpoint, training_state: Mapping[str, Tensor]) -> None:
    """Write `folder` whole or not at all; `UserError` where the disk is full or cannot be written."""
    write_folder(folder, "critic", lambda place: _write_files(place, checkpoint, training_state))


def _write_files(folder: Path, checkpoint: CriticCheckpoint, training_state: Mapping[str, Tensor]) -> None:
    critic = checkpoint.critic
    config = {
        "critic": {
            "observation_dim": critic.observation_dim,
            "action_dim": critic.action_dim,
            "hidden": critic.hidden,
            **({"policy": True} if critic.policy is not None else {}),
        },
        "settings": dict(checkpoint.settings),
        "data": checkpoint.spec.to_json(),
        "step": checkpoint.step,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "metrics.json").write_text(json.dumps(dict(checkpoint.metrics), indent=1))
    for name, tensors in (("model", critic.state_dict()), ("training_state", training_state)):
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(plain, folder / f"{name}.safetensors")


def load_critic(
    folder: Path, device: torch.device | str = "cpu", spec: DataSpec | None = None
) -> CriticCheckpoint:
    """Verify and read what `save_critic` wrote, the critic in evaluation mode.

    `UserError` where it is unusable, or is for other dimensions than the data `spec` describes.
    """
    verify_checkpoint(folder)
    try:
        config = read_json(folder / "config.json")
        sizes = build(_Sizes, config["critic"])
        critic = read_network(folder, lambda: Critic(**vars(sizes)), len(sizes.hidden))
        own_spec = DataSpec.from_json(config["data"])
        if (own_spec.observation_dim, own_spec.action_dim) != (sizes.observation_dim, sizes.action_dim):
            raise ValueError("the data's dimensions are not the critic's")
        metrics = read_metrics(folder)
        step, settings = convert(int, config["step"]), convert(dict[str, Any], config["settings"])
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{folder}: not a critic that this version can read ({reason})") from error
    if spec is not None:
        _require_dimensions(folder, critic, spec)
    return CriticCheckpoint(critic.to(device).eval(), own_spec, settings, step, metrics)


def require_same_data(critic: CriticCheckpoint, spec: DataSpec) -> None:
    """`UserError` unless the critic was trained on the data that `spec` describes."""
    theirs = critic.spec
    for name in ("fingerprint", "observation_keys", "observation_dim", "action_dim"):
        if getattr(theirs, name) != getattr(spec, name):
            raise UserError(
                f"the critic was trained on other data than the model: {theirs.dataset_id}, {name} "
                f"{getattr(theirs, name)}, where the model has {spec.dataset_id}, {getattr(spec, name)}"
            )


def _require_dimensions(folder: Path, critic: Critic, spec: DataSpec) -> None:
    if (critic.observation_dim, critic.action_dim) != (spec.observation_dim, spec.action_dim):
        raise UserError(
            f"{folder}: a critic for {critic.observation_dim} observation and {critic.action_dim} action "
            f"dimensions, where {spec.dataset_id} has {spec.observation_dim} and {spec.action_dim}; "
            "use one that was trained on this data"
        )
