"""`tt-ray attention`: maps of a trained model's attention, and the heads that a score finds in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.arguments import Model, settings
from tt_ray.cli.figures import Figures, copy_figures, figures_folder
from tt_ray.cli.session import connect, find_checkpoint, show_places
from tt_ray.cli.view import Bars, console, plain_table, waiting
from tt_ray.config import ExperimentConfig, to_dict
from tt_ray.errors import UserError
from tt_ray.files import whole_file

if TYPE_CHECKING:
    from tt_ray.data.windows import WindowSet
    from tt_ray.evaluation.attention import AttentionStudy
    from tt_ray.model.checkpoint import Checkpoint
    from tt_ray.tracking import Run

SECTIONS = ("dataset", "discretizer", "goal", "model", "training")
"""The settings that a model's attention depends on."""


def attention(
    model: Model,
    overrides: Annotated[list[str] | None, settings("resources.storage=runs")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows to average over, at most.")] = 256,
    figures: Figures = None,
) -> None:
    """Where a trained model looks: every head's map, and how Markovian and how striated it is.

    Needs the data set that it was trained on, for windows that it was not trained on.
    """
    from tt_ray.distributed.checkpoints import load_for_evaluation
    from tt_ray.distributed.scoring import checkpoint_identity, writable
    from tt_ray.evaluation.attention import full_windows, study_attention
    from tt_ray.evaluation.attention_figures import heads_figure, maps_figure
    from tt_ray.fingerprints import fingerprint
    from tt_ray.model.checkpoint import load_checkpoint

    path = find_checkpoint(model, overrides or [])
    config, _, seed = load_for_evaluation(path, overrides or [])
    checkpoint = load_checkpoint(path)
    if checkpoint.origin:
        raise UserError(
            f"{path}: was imported, so nobody knows which episodes it was not trained on, and attention is "
            "looked at on those"
        )
    figures_folder(figures)
    uri = connect(config.tracking.uri)
    storage = writable(Path(config.resources.storage)).resolve()
    tokens = full_windows(_held_out(config, checkpoint, path, seed), windows)
    folder = storage / "attention" / fingerprint("attention", checkpoint_identity(path), windows)
    with waiting(f"attention on {len(tokens)} windows, and that of models with random weights"):
        study = study_attention(checkpoint.model, tokens)
    with _run(config, seed, path, folder, uri) as run:
        maps_figure(study, folder / "maps.png")
        heads_figure(study, folder / "heads.png")
        with whole_file(folder / "attention.json") as file:
            origin = {"checkpoint": str(path), "step": checkpoint.step, "dataset": config.dataset.id}
            file.write_text(json.dumps(origin | study.to_json(), indent=1))
        _log(study, run, checkpoint.step)
        for name in ("maps.png", "heads.png", "attention.json"):
            run.artifact(folder / name)
    _show(study)
    show_places([("checkpoint", str(path)), ("maps and scores", str(folder))], config)
    copy_figures(folder, figures)


def _held_out(config: ExperimentConfig, checkpoint: Checkpoint, path: Path, seed: int) -> WindowSet:
    """Windows of the episodes that the checkpoint was not trained on; `UserError` where they are not here."""
    from tt_ray.data.token_store import TokenSet
    from tt_ray.distributed.line import Line
    from tt_ray.training.job import make_job

    with waiting(f"reading {config.dataset.id}"):
        episodes = Line(config, Bars()).episodes
        if episodes.spec.fingerprint != checkpoint.spec.fingerprint:
            raise UserError(
                f"data set {config.dataset.id}: not the data that {path} was trained on, but other data of "
                "that name; attention is looked at on its held-out episodes"
            )
        tokens = TokenSet.build(episodes, config.dataset, config.discretizer, config.goal)
        return make_job(config, tokens, seed).validation


@contextmanager
def _run(config: ExperimentConfig, seed: int, path: Path, folder: Path, uri: str) -> Iterator[Run]:
    """The MLflow run that lives in `folder`, started or continued; `UserError` where another has it."""
    from tt_ray.locks import exclusive
    from tt_ray.tracking import MlflowTracker, provenance_tags

    tracker = MlflowTracker(uri, config.tracking.experiment or config.name)
    params = {key: value for key, value in to_dict(config).items() if key in SECTIONS} | {"seed": seed}
    tags = provenance_tags(seed) | {"checkpoint": str(path), "kind": "attention"}
    with (
        exclusive(folder, "another command is looking at this checkpoint's attention"),
        tracker.start(f"{config.name} seed {seed} attention", folder, params=params, tags=tags) as run,
    ):
        yield run


def _log(study: AttentionStudy, run: Run, step: int) -> None:
    """The largest scores, and what they have to beat, as metrics of the run."""
    from tt_ray.evaluation.attention import SCORES

    metrics = {"attention/windows": float(study.windows)}
    for name in SCORES:
        metrics[f"attention/{name}"] = float(study.scores[name].values.max())
        metrics[f"attention/{name}_control"] = study.line(name)
    run.log(metrics, step)


def _show(study: AttentionStudy) -> None:
    """A line for each head, and what the largest scores mean."""
    from tt_ray.evaluation.attention import SCORES

    best = {study.scores[name].best: name for name in reversed(SCORES)}
    both = study.scores["markovian"].best == study.scores["striated"].best
    rows = []
    for row in study.heads():
        name = best.get((int(row["layer"]) - 1, int(row["head"]) - 1))
        marks = "" if name is None else f"most {' and '.join(SCORES) if both else name}"
        rows.append([*row.values(), marks])
    columns = ["layer", "head", *SCORES, *(f"{name} mass" for name in SCORES), "beyond previous", ""]
    console.print(plain_table(columns, rows, f"Heads, mean over {study.windows} held-out windows"))
    console.print()
    for name in SCORES:
        score, line = float(study.scores[name].values.max()), study.line(name)
        verdict = "above" if score > line else "NOT above"
        text = f"{name}: {score:.3f} is {verdict} the controls' largest, {line:.3f}"
        console.print(f"{text} (random weights, all heads)", soft_wrap=True)
