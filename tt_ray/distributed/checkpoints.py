"""From what a user names (a folder, a run) to a checkpoint and the settings to evaluate it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tt_ray.config import CriticConfig, ExperimentConfig, to_dict
from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.experiment_file import apply_overrides, experiment_from_dict
from tt_ray.model.checkpoint import CHECKSUMS, best_checkpoint, last_checkpoint, load_checkpoint
from tt_ray.model.critic import CriticCheckpoint, load_critic, require_same_data
from tt_ray.plain import convert

SECTIONS = ("planner", "evaluation", "resources", "tracking", "name")
"""What `evaluate` may change: the model and its data are as they were trained."""


def find_folder(target: str) -> Path | None:
    """The checkpoint folder that `target` means, itself or a model folder's best; None if it is no path."""
    path = Path(target)
    if (path / CHECKSUMS).is_file():
        return path.resolve()
    if path.is_dir():
        best = best_checkpoint(path)
        if best is None:
            raise UserError(f"{path}: no checkpoint folder ({CHECKSUMS} is missing), and no model's")
        return best.resolve()
    if path.exists():
        raise UserError(f"{path}: is a file, not a checkpoint folder")
    if "/" in target or target.startswith("."):
        raise UserError(f"{target}: no such folder")
    return None


def find_critic(path: Path) -> Path:
    """The critic's checkpoint that `path` means: itself, or the last one of a critic's folder."""
    if (path / CHECKSUMS).is_file():
        return path.resolve()
    last = last_checkpoint(path) if path.is_dir() else None
    if last is None:
        raise UserError(f"{path}: no critic's folder ({CHECKSUMS} is missing)")
    return last.resolve()


def load_for_evaluation(
    path: Path, overrides: Sequence[str], critic: Path | None = None
) -> tuple[ExperimentConfig, DataSpec, int]:
    """A verified checkpoint's experiment with `overrides`, its data spec and its training seed.

    A critic's checkpoint that the user has named brings its settings along.

    Where it was trained does not count: storage, workers and tracking store are this machine's. Only the
    episodes of an actor stay, since the batch's shape is part of the result.
    """
    checkpoint = load_checkpoint(path)
    settings = dict(checkpoint.experiment)
    try:
        seed = convert(int, settings.pop("seed", 0))
        resources, tracking = (
            convert(dict[str, Any], settings.get(name) or {}) for name in ("resources", "tracking")
        )
    except TypeError as error:
        raise UserError(f"{path / 'config.json'}: not an experiment's settings ({error})") from error
    slots = {key: value for key, value in resources.items() if key == "episodes_per_actor"}
    here = {"seeds": [seed], "resources": slots, "tracking": {**tracking, "uri": None}}
    if critic is not None:
        scorer = load_critic(critic)
        require_same_data(scorer, checkpoint.spec)
        settings["critic"] = to_dict(_settings(scorer, critic))
    config = experiment_from_dict({**settings, **here}, source=str(path / "config.json"))
    return apply_overrides(config, overrides, SECTIONS), checkpoint.spec, seed


def _settings(scorer: CriticCheckpoint, folder: Path) -> CriticConfig:
    try:
        return scorer.config
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not a critic's settings ({error})") from error
