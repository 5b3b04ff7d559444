"""The checkpoint folder: all that planning or resuming needs, in safe formats, written whole or not at all.

config.json                 experiment, model size, layout, data spec, step; an imported model's origin
metrics.json                validation losses at that step
model.safetensors           weights
discretizer.safetensors     bin edges and representatives
training_state.safetensors  optimizer moments (random streams and schedule follow from seed and step)
checksums.json              SHA-256 of each of the above
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.folders import (
    CHECKSUMS,
    DAMAGED,
    read_metrics,
    read_network,
    remove_folder,
    sha256,
    write_folder,
)
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.plain import MALFORMED, build, convert, read_json

STEP_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A model with what it needs to read and write trajectories."""

    model: TrajectoryTransformer
    discretizer: Discretizer
    spec: DataSpec
    experiment: Mapping[str, Any]
    """The experiment's configuration as plain data, with the training seed under `seed`."""
    step: int
    metrics: Mapping[str, float]
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where an imported model comes from, and how it was converted; empty for one that was trained here."""


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, training_state: Mapping[str, Tensor] | None = None
) -> None:
    """Write `folder` whole or not at all; `UserError` where the disk is full or cannot be written."""
    write_folder(folder, "checkpoint", lambda place: _write_files(place, checkpoint, training_state))


def _write_files(
    temporary: Path, checkpoint: Checkpoint, training_state: Mapping[str, Tensor] | None
) -> None:
    model = checkpoint.model
    config = {
        "experiment": dict(checkpoint.experiment),
        "model": asdict(model.config),
        "layout": asdict(model.layout),
        "data": checkpoint.spec.to_json(),
        "strategy": checkpoint.discretizer.strategy,
        "step": checkpoint.step,
        **({"port": True} if model.port else {}),
        **({"origin": dict(checkpoint.origin)} if checkpoint.origin else {}),
    }
    (temporary / "config.json").write_text(json.dumps(config, indent=1))
    (temporary / "metrics.json").write_text(json.dumps(dict(checkpoint.metrics), indent=1))
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    save_numpy(checkpoint.discretizer.to_arrays(), temporary / "discretizer.safetensors")
    if training_state is not None:
        state = {name: value.detach().cpu().contiguous() for name, value in training_state.items()}
        save_file(state, temporary / "training_state.safetensors")


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum; `UserError` names the first that is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    if not (folder / CHECKSUMS).is_file():
        raise UserError(f"{folder}: not a checkpoint folder ({CHECKSUMS} is missing)")
    try:
        expected = convert(dict[str, str], read_json(folder / CHECKSUMS))
        if any(Path(name).name != name for name in expected):
            raise ValueError("it names files elsewhere")
    except MALFORMED as error:
        raise UserError(f"{folder / CHECKSUMS}: damaged ({error}); restore it or train again") from error
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint; restore it or train again")
        if sha256(file) != digest:
            raise UserError(f"{file}: damaged or truncated (checksum differs); restore it or train again")


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Verify and read a checkpoint folder, the model in evaluation mode; `UserError` if it is unusable."""
    verify_checkpoint(folder)
    try:
        config = read_json(folder / "config.json")
        layout, sizes = TokenLayout.from_json(config["layout"]), build(ModelConfig, config["model"])
        discretizer = _read_bins(folder, config["strategy"], layout)
        origin = convert(dict[str, Any], config.get("origin", {}))
        make = partial(TrajectoryTransformer, sizes, layout, port=convert(bool, config.get("port", False)))
        model = read_network(folder, make, sizes.num_layers)
        spec = DataSpec.from_json(config["data"])
        if (spec.observation_dim, spec.action_dim) != (layout.observation_dim, layout.action_dim):
            raise ValueError("the data's dimensions are not the model's")
        metrics = read_metrics(folder)
        step, experiment = convert(int, config["step"]), convert(dict[str, Any], config["experiment"])
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{folder}: not a checkpoint that this version can read ({reason})") from error
    return Checkpoint(model.to(device).eval(), discretizer, spec, experiment, step, metrics, origin)


def _read_bins(folder: Path, strategy: Any, layout: TokenLayout) -> Discretizer:
    bins = load_numpy(folder / "discretizer.safetensors")
    discretizer = Discretizer.from_arrays(convert(str, strategy), bins)
    if (discretizer.dims, discretizer.num_bins) != (layout.slots, layout.num_bins):
        raise ValueError("the bins are not the model's")
    return discretizer


def load_training_state(folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors as `save_checkpoint` was given them; `UserError` where they cannot be read."""
    file = folder / "training_state.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: missing, so training cannot go on from this checkpoint; train again")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged or truncated ({error}); restore it or train again") from error


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies in a model's folder."""
    return folder / "checkpoints" / f"{STEP_PREFIX}{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints of a model's folder, oldest first."""
    return sorted((folder / "checkpoints").glob(f"{STEP_PREFIX}*"))


def checkpoint_metrics(folder: Path) -> dict[str, float]:
    """What the validation at a checkpoint found; `UserError` where its file is damaged."""
    file = folder / "metrics.json"
    try:
        return read_metrics(folder)
    except MALFORMED as error:
        raise UserError(f"{file}: damaged or missing ({error}); restore it or train again") from error


def last_checkpoint(folder: Path) -> Path | None:
    """Checkpoint of the most updates, or None."""
    return next(reversed(checkpoint_folders(folder)), None)


def best_checkpoint(folder: Path) -> Path | None:
    """Checkpoint of the lowest validation loss (the last one where there is none), or None."""
    losses = [(_validation_loss(path), path) for path in reversed(checkpoint_folders(folder))]
    return min(losses, key=lambda entry: entry[0])[1] if losses else None


def damaged_checkpoints(folder: Path) -> dict[Path, str]:
    """What is wrong with those of a model's checkpoints that are not as they were written."""
    damaged = {}
    for path in checkpoint_folders(folder):
        try:
            verify_checkpoint(path)
        except UserError as error:
            damaged[path] = str(error)
    return damaged


def prune_checkpoints(folder: Path) -> None:
    """Keep the best and the last checkpoint, remove the others and what a killed process has left behind."""
    kept = {best_checkpoint(folder), last_checkpoint(folder)}
    for path in checkpoint_folders(folder):
        if path not in kept:
            remove_folder(path)
    for leftover in (folder / "checkpoints").glob(f".{STEP_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _validation_loss(folder: Path) -> float:
    loss = checkpoint_metrics(folder).get("val/loss", math.inf)
    return math.inf if math.isnan(loss) else loss  # a run that has diverged is never the best
