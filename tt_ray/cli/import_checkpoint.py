"""`tt-ray import-checkpoint`: models of the released research code and of the faster port, as ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.view import console, errors, waiting
from tt_ray.config import ResourcesConfig
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from tt_ray.distributed.import_published import Imported


def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="A run's folder, as the other project wrote it.")],
    data: Annotated[
        str | None, typer.Option(help="Id of the data set that it was trained on; default: the run's own.")
    ] = None,
    environment: Annotated[
        str | None, typer.Option("--env", help="Environment id or module:EnvId; default: the data set's.")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="Take the weights of this epoch; default: the latest.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default: runs/imported/NAME, NAME the folder's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder of that name.")] = False,
) -> None:
    """Turn a published Trajectory Transformer into a checkpoint folder; nothing in its files is executed."""
    from tt_ray.distributed.import_published import import_published
    from tt_ray.model.folders import CHECKSUMS

    target = output or Path(ResourcesConfig().storage) / "imported" / folder.resolve().name
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another --output, or replace it with --overwrite")
    if target.exists() and not (target / CHECKSUMS).is_file():
        raise UserError(f"{target}: is no checkpoint folder, so it is not replaced; choose another --output")
    with waiting(f"reading {folder}"):
        imported = import_published(folder, target.resolve(), data=data, environment=environment, epoch=epoch)
    _show(imported, target)


def _show(imported: Imported, target: Path) -> None:
    """What was found, what was rebuilt, and what to do next."""
    checkpoint, run = imported.checkpoint, imported.run
    model, spec, origin = checkpoint.model, checkpoint.spec, checkpoint.origin
    layout, sizes = model.layout, model.config
    lines = [
        ("from", f"{run.source}, {run.files[0]}"),
        (
            "model",
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, width {sizes.embed_dim}, windows of "
            f"{sizes.context_transitions} transitions, {model.num_parameters:,} parameters",
        ),
        (
            "transition",
            f"{layout.observation_dim} observation and {layout.action_dim} action dimensions, reward, value: "
            f"{layout.slots} tokens of {layout.num_bins} bins",
        ),
        ("bins", f"{checkpoint.discretizer.strategy}, {origin['bins']}"),
        ("environment", f"{spec.environment['id']}, which has these dimensions"),
    ]
    if imported.loss is not None:
        chance = math.log(layout.num_bins)
        lines.append(
            ("loss", f"{imported.loss:.2f} nats a token of {spec.dataset_id} (all bins alike: {chance:.2f})")
        )
    lines += [("checkpoint", str(target)), ("score it", f"tt-ray evaluate {target}")]
    for title, text in lines:
        console.print(f"{title + ':':<14}{text}", soft_wrap=True)
    if not imported.fits:
        errors.print(
            f"tt-ray: warning: the model knows nothing of {spec.dataset_id}: was it trained on that?",
            soft_wrap=True,
        )
