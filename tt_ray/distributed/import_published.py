"""Published checkpoints as ours: a run's folder of the released research code, or of the faster port."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tt_ray.config import DatasetConfig, to_dict
from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS, parse_d4rl_name, reference_scores, resolve_id
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.published_bins import authors_bins
from tt_ray.data.tokens import token_columns
from tt_ray.distributed.published_run import Run, read_run
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import check_compatible, make_environment
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.fingerprints import fingerprint
from tt_ray.model.checkpoint import Checkpoint, save_checkpoint
from tt_ray.model.folders import sha256
from tt_ray.model.transformer import TrajectoryTransformer

CROPPED = re.compile(r"(ant|kitchen)-.*")
"""Data sets of which the released code keeps only an observation's first dimensions."""
WINDOWS = 64
"""Windows of the data that the imported model's loss is taken on."""


@dataclass(frozen=True)
class Imported:
    """What an import has made."""

    checkpoint: Checkpoint
    run: Run
    loss: float | None
    """Mean cross-entropy of a token of the data set, in nats; None without one."""

    @property
    def fits(self) -> bool:
        """Whether the model says more about the data set than that all bins are alike."""
        return self.loss is None or self.loss < math.log(self.checkpoint.model.layout.num_bins)


def import_published(
    folder: Path, target: Path, *, data: str | None, environment: str | None, epoch: int | None
) -> Imported:
    """Write the checkpoint folder `target` from a published run's `folder`.

    `data` is the data set's id, `environment` that of the environment; both None for those that the run
    names. `epoch` is that of the weights, None for the latest.

    Raises:
        UserError: what is wrong with the folder, or what is missing.
    """
    run = read_run(folder, epoch)
    layout = run.model.layout
    wanted = data or run.dataset.id
    episodes = None
    if data is not None or run.bins is None:
        crop = layout.observation_dim if CROPPED.fullmatch(run.name) else None
        try:
            episodes = load_episodes(wanted, observation_dims=crop)
        except UserError as error:
            advice = "; or name another id for it with --data" if data is None else ""
            raise UserError(f"{error}{advice}") from None
        run = replace(run, dataset=replace(run.dataset, id=episodes.spec.dataset_id, observation_dims=crop))
    spec = _spec(run, episodes, environment)
    bins = run.bins
    if bins is None:
        assert episodes is not None
        try:
            bins = authors_bins(episodes, run.dataset, layout.num_bins)
        except ValueError as error:
            raise UserError(f"data set {wanted}: no bins can be rebuilt from it: {error}") from None
    loss = None if episodes is None else token_loss(run.model, bins, episodes, run.dataset)
    checkpoint = Checkpoint(run.model, bins, spec, _experiment(run, bins), 0, {}, _origin(run, spec, loss))
    save_checkpoint(target, checkpoint)
    return Imported(checkpoint, run, loss)


def _spec(run: Run, episodes: Episodes | None, environment: str | None) -> DataSpec:
    """What the model must know of its data, its shapes checked against data and environment."""
    if episodes is None:
        spec = _spec_without_data(run, environment)
    elif environment is None:
        spec = episodes.spec
    else:
        spec = replace(episodes.spec, environment={"id": environment})
    layout = run.model.layout
    theirs, ours = (layout.observation_dim, layout.action_dim), (spec.observation_dim, spec.action_dim)
    if theirs != ours:
        place = spec.environment["id"] if episodes is None else f"data set {spec.dataset_id}"
        raise UserError(
            f"{run.files[0]}: a model of {theirs[0]} observation and {theirs[1]} action dimensions, but "
            f"{place} has {ours[0]} and {ours[1]}"
        )
    if not spec.environment["id"]:
        raise UserError(f"data set {spec.dataset_id} names no environment: name one with --env")
    env = make_environment(
        spec.environment,
        observation_keys=spec.observation_keys,
        observation_dim=spec.observation_dim if spec.cropped else None,
    )
    try:
        check_compatible(spec, env)
    finally:
        env.close()
    return spec


def _spec_without_data(run: Run, environment: str | None) -> DataSpec:
    """A spec from the environment alone, for a run that brings its bins."""
    parts = parse_d4rl_name(run.dataset.id)
    if environment is not None:
        description: dict[str, Any] = {"id": environment}
    elif parts is not None:
        description = D4RL_ENVIRONMENTS[parts[0]].description()
    else:
        raise UserError(
            f"{run.files[-1]}: names the data set {run.dataset.id}, whose environment is not known: name "
            "it with --env, or a data set with --data"
        )
    env = make_environment(description)
    try:
        low, high = reference_scores(description["id"])
        return DataSpec(
            dataset_id=resolve_id(run.dataset.id),
            environment=description,
            observation_keys=(),
            observation_dim=math.prod(env.observation_space.shape or ()),
            action_dim=math.prod(env.action_space.shape or ()),
            action_low=tuple(map(float, env.action_space.low.ravel())),
            action_high=tuple(map(float, env.action_space.high.ravel())),
            ref_min_score=low,
            ref_max_score=high,
            fingerprint=fingerprint("imported", [sha256(file) for file in run.files]),
        )
    finally:
        env.close()


def token_loss(
    model: TrajectoryTransformer, bins: Discretizer, episodes: Episodes, dataset: DatasetConfig
) -> float | None:
    """Mean cross-entropy in nats of the tokens in some whole windows of the data; None if none fits.

    A model whose bins, slots or data are not what it was trained with shows it here.
    """
    window = model.config.context_transitions
    bounds = itertools.pairwise(episodes.offsets.tolist())
    rows = np.concatenate([np.arange(begin, end - window + 1) for begin, end in bounds])
    if not len(rows):
        return None
    chosen = np.random.default_rng(0).choice(rows, min(WINDOWS, len(rows)), replace=False)
    values = token_columns(episodes, dataset)[chosen[:, None] + np.arange(window)]
    tokens = torch.from_numpy(bins.encode(values).astype(np.int64)).flatten(1)
    with torch.inference_mode():
        return float(F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]))


def _experiment(run: Run, bins: Discretizer) -> dict[str, Any]:
    """Settings for the evaluation; what they say of the training is not known and left as it is here."""
    plain = {
        "name": f"imported-{run.name}",
        "question": f"How does a model of the {run.source} score here?",
        "dataset": to_dict(run.dataset),
        "discretizer": {"strategy": bins.strategy, "num_bins": bins.num_bins},
        "model": to_dict(run.model.config),
        "planner": dict(run.planner),
    }
    return {**to_dict(experiment_from_dict(plain, source=str(run.files[0].parent))), "seed": 0}


def _origin(run: Run, spec: DataSpec, loss: float | None) -> dict[str, Any]:
    """Where the checkpoint comes from, as its config.json keeps it."""
    rebuilt = f"rebuilt from {spec.dataset_id} (fingerprint {spec.fingerprint})"
    return {
        "source": run.source,
        "folder": str(run.files[0].parent.resolve()),
        "files": {file.name: sha256(file) for file in run.files},
        "settings": run.settings,
        "bins": "as saved with the model" if run.bins else rebuilt,
        "loss_on_data": loss,
    }
