"""Long-horizon prediction from end to end: the models, their rollouts, and MLflow's account of them.

All of it are stages of the store: the full Transformer, the Markovian one (the same experiment with a context
of two transitions, so that the dynamics see one), the ensemble, and the rollouts of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tt_ray.config import ExperimentConfig, PlannerConfig, require, to_dict
from tt_ray.data.token_store import TokenSet
from tt_ray.data.windows import split_episodes
from tt_ray.distributed.experiment import start_parent, start_trial
from tt_ray.distributed.following import Update, following, replay
from tt_ray.distributed.line import Line, Progress
from tt_ray.distributed.prediction_report import PredictionOutcome, report
from tt_ray.distributed.scoring import checkpoint_identity, made_by
from tt_ray.errors import UserError
from tt_ray.evaluation.prediction import (
    Draw,
    HeldOut,
    Prediction,
    Rollouts,
    Scorer,
    choose_starts,
    feedforward_rollouts,
    hidden_observations,
    transformer_rollouts,
)
from tt_ray.evaluation.prediction_figures import ENSEMBLE, FULL, LABELS, MARKOVIAN, ORACLE, RECORDED
from tt_ray.files import whole_file
from tt_ray.fingerprints import dynamics_fingerprint, fingerprint
from tt_ray.model.checkpoint import best_checkpoint, load_checkpoint
from tt_ray.model.dynamics import load_ensemble
from tt_ray.tracking import Journal, Run, Tracker
from tt_ray.training.dynamics import EnsembleJob, PairSet, fit_ensemble

MARKOVIAN_CONTEXT = 2
"""Transitions that the Markovian Transformer is trained on and sees: the present and the one before."""


def markovian(config: ExperimentConfig) -> ExperimentConfig:
    """The same experiment for a model whose dynamics see one transition."""
    return replace(
        config,
        name=f"{config.name} Markovian",
        model=replace(config.model, context_transitions=MARKOVIAN_CONTEXT),
        planner=PlannerConfig(max_context_transitions=MARKOVIAN_CONTEXT),  # no part of the model
    )


def check_prediction(line: Line, resume: bool) -> None:
    """`UserError` for what cannot be predicted, and for trainings that were interrupted without `resume`."""
    config = line.config
    require(config.goal is None, "goal", "a model with goals cannot be rolled out: nobody tells it one")
    require(
        config.prediction.context <= config.model.context_transitions,
        "prediction.context",
        f"{config.prediction.context} transitions are more than model.context_transitions = "
        f"{config.model.context_transitions}",
    )
    if line.models:  # the data set is here
        _starts(line)
        _sibling(line, markovian(config), MARKOVIAN).check_resume(resume)


def predict(line: Line, tracker: Tracker, resume: bool, given: Path | None = None) -> PredictionOutcome:
    """Train what is missing, roll it out, and report; `given` is a checkpoint to take as the Transformer."""
    line.prepare_data()
    if given is None:
        line.check_resume(resume)
    check_prediction(line, resume)
    with start_parent(line, tracker) as parent:
        study = PredictionStudy(line)
        checkpoints = {FULL: given or _trained(line, tracker, parent)}
        if line.config.model.context_transitions > MARKOVIAN_CONTEXT:
            other = _sibling(line, markovian(line.config), MARKOVIAN)
            checkpoints[MARKOVIAN] = _trained(other, tracker, parent)
        ensemble_line = _sibling(line, replace(line.config, name=f"{line.config.name} ensemble"), ENSEMBLE)
        with start_trial(ensemble_line, tracker, line.config.seeds[0], parent) as trial:
            checkpoints[ENSEMBLE] = train_ensemble(line, study.tokens, trial)
        predictions = study.predictions(checkpoints)
        return report(line, study.held_out, predictions, checkpoints, parent)


def train_ensemble(line: Line, tokens: TokenSet, run: Run) -> Path:
    """The ensemble's best checkpoint, trained unless it is there; its curves go to `run`."""
    config, seed = line.config, line.config.seeds[0]
    folder = line.store.path("dynamics", dynamics_fingerprint(config, line.tokens.name, seed))
    inputs = [("tokens", line.tokens.name)]
    with line.stage("dynamics", folder.name, "ensemble", work="training", inputs=inputs) as stage:
        if not stage.held:
            replay(folder / "journal.jsonl", run)
        else:
            job = _ensemble_job(line, tokens, seed)
            with (
                line.progress.stage(f"{LABELS[ENSEMBLE]}: training", config.ensemble.steps) as update,
                following(folder / "journal.jsonl", run, update),
            ):
                fit_ensemble(job, folder, Journal(folder).append, _device(line))
            stage.publish({"experiment": config.name, "dataset": config.dataset.id, "seed": seed})
    checkpoint = best_checkpoint(folder)
    assert checkpoint is not None
    run.set_tags({"checkpoint": str(checkpoint), "stage.dynamics": folder.name})
    return checkpoint


class PredictionStudy:
    """The held-out starts of an experiment, and what each model makes of them."""

    def __init__(self, line: Line) -> None:
        self.line, self.config = line, line.config.prediction
        self.tokens = tokens = TokenSet.load(line.tokens)
        rows = _starts(line)
        if len(rows) < self.config.starts:
            line.progress.note(f"the held-out episodes have room for {len(rows)} starts only")
        self.held_out = HeldOut(
            line.episodes, tokens.tokens, tokens.discretizer, tokens.layout, rows, self.config.horizon
        )
        self.scorer = Scorer.of(self.held_out, self.config.floor)

    def predictions(self, checkpoints: Mapping[str, Path]) -> dict[str, Prediction]:
        """Of every model, in the order of the figures."""
        found: dict[str, Prediction] = {}
        for model, path in checkpoints.items():
            if model == ENSEMBLE:
                for name in (ENSEMBLE, RECORDED):
                    found[name] = self._predicted(name, path, self._feedforward(path, name == RECORDED))
            else:
                found[model] = self._predicted(model, path, self._transformer(path))
        return {**found, ORACLE: self.scorer.oracle()}

    def _transformer(self, path: Path) -> Callable[[], Draw]:
        resources = self.line.config.resources

        def make() -> Draw:
            checkpoint = load_checkpoint(path, _device(self.line))
            return transformer_rollouts(checkpoint, self.held_out, self.config, resources.decoder)

        return make

    def _feedforward(self, path: Path, recorded: bool) -> Callable[[], Draw]:
        def make() -> Draw:
            ensemble = load_ensemble(path, _device(self.line), self.line.spec).ensemble
            return feedforward_rollouts(ensemble, self.held_out, self.config, recorded)

        return make

    def _predicted(self, model: str, path: Path, make: Callable[[], Draw]) -> Prediction:
        """One model's rollouts scored; from the store where they are there."""
        line, starts = self.line, self.held_out.rows
        identity = (checkpoint_identity(path), line.tokens.name, to_dict(self.config), starts.tolist())
        key = fingerprint("prediction", model, *identity, line.config.resources.decoder)
        folder, name = line.store.path("evaluations", key), f"rollouts ({LABELS[model]})"
        file = folder / "prediction.safetensors"
        with line.stage("evaluations", key, name, work="rollouts", inputs=made_by(line, path)) as stage:
            if stage.held:
                with line.progress.stage(f"{LABELS[model]}: starts", len(starts)) as update:
                    prediction = self.scorer.score(_counted(make(), len(starts), update))
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as temporary:
                    save_file(prediction.to_arrays(), temporary)
                stage.publish({"prediction": LABELS[model], "starts": len(starts)})
        return _read(file)


def _read(file: Path) -> Prediction:
    try:
        return Prediction(**load_file(file))
    except (OSError, TypeError, SafetensorError) as error:
        advice = f"remove {file.parent}, and it is made again"
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())}); {advice}") from error


def _counted(draw: Draw, starts: int, update: Update) -> Iterator[Rollouts]:
    for start in range(starts):
        yield draw(start)
        update(start + 1, "")


def _device(line: Line) -> str:
    return "cuda" if line.allocation.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"


def _trained(line: Line, tracker: Tracker, parent: Run) -> Path:
    seed = line.config.seeds[0]
    with start_trial(line, tracker, seed, parent) as trial:
        return line.train(seed, trial)


class _Titled:
    """Progress whose bars say which model they are of."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title, self.note = progress, title, progress.note

    def stage(self, title: str, total: int) -> AbstractContextManager[Update]:
        """See `Progress`."""
        return self.progress.stage(f"{self.title}: {title}", total)


def _sibling(line: Line, config: ExperimentConfig, model: str) -> Line:
    """A line over the same data, store and resources for another model."""
    other = copy.copy(line)
    other.config, other.models = config, {}
    other.progress = _Titled(line.progress, LABELS[model])
    other.locate(line.spec.fingerprint)
    return other


def _split(line: Line) -> tuple[Any, Any]:
    data = line.config.dataset
    return split_episodes(len(line.episodes), data.validation_fraction, data.split_seed, data.fraction)


def _starts(line: Line) -> Any:
    return choose_starts(line.episodes, _split(line)[1], line.config.prediction)


def _ensemble_job(line: Line, tokens: TokenSet, seed: int) -> EnsembleJob:
    layout = tokens.layout
    hidden = hidden_observations(tokens.tokens, layout) if layout.partial else None
    train, validation = (PairSet.of(line.episodes, chosen, hidden) for chosen in _split(line))
    return EnsembleJob(line.config.ensemble, train, validation, tokens.spec, seed)


def require_same_data(line: Line, checkpoint: Path) -> None:
    """`UserError` unless the data set that is here is the one that the checkpoint was trained on."""
    loaded = load_checkpoint(checkpoint)
    if loaded.origin:
        raise UserError(
            f"{checkpoint}: was imported, so nobody knows which episodes it was not trained on, and "
            "predictions are compared with those"
        )
    theirs = loaded.spec
    if theirs.fingerprint != line.spec.fingerprint:
        raise UserError(
            f"{checkpoint}: was trained on another {theirs.dataset_id} than the one that is here "
            f"({theirs.fingerprint}, not {line.spec.fingerprint})"
        )
