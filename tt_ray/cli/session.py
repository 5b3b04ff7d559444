"""What every command that computes needs around it: MLflow checked, the storage writable, Ray up."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tt_ray.cli.view import console, show_line, waiting
from tt_ray.config import ExperimentConfig, ResourcesConfig
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from tt_ray.distributed.cluster import Allocation
    from tt_ray.tracking import MlflowTracker


@contextmanager
def session(config: ExperimentConfig, leftovers: Path | None) -> Iterator[tuple[MlflowTracker, Allocation]]:
    """MLflow and Ray for the duration of a block; first, runs below `leftovers` send what they could not."""
    from tt_ray.distributed import cluster
    from tt_ray.distributed.scoring import writable
    from tt_ray.tracking import MlflowTracker, send_leftovers

    uri = connect(config.tracking.uri)
    writable(Path(config.resources.storage))
    if leftovers is not None and (sent := send_leftovers(leftovers, uri)):
        console.print(f"sent what {sent} earlier runs had not been able to send to MLflow")
    status = waiting("starting Ray")
    status.start()
    try:
        with cluster.connect(config.resources) as allocation:
            status.stop()
            yield MlflowTracker(uri, _name(config)), allocation
    except OSError as error:
        if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Raised as a buffer was written out: Python does not say of which file.
        raise UserError(f"{error.strerror}, most likely below {config.resources.storage}") from error
    finally:
        status.stop()


def connect(uri: str | None, must_exist: bool = False) -> str:
    """The MLflow store in use; `UserError` where it does not answer."""
    from tt_ray import tracking

    return tracking.connect(uri, must_exist=must_exist)


def find_checkpoint(model: str, overrides: list[str]) -> Path:
    """The checkpoint folder that `model` means; that of an MLflow run is downloaded below the storage."""
    from tt_ray.distributed.checkpoints import find_folder
    from tt_ray.tracking import download_checkpoint

    path = find_folder(model)
    if path is not None:
        return path
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    storage = Path(given.get("resources.storage", ResourcesConfig().storage))
    return download_checkpoint(
        model, connect(given.get("tracking.uri"), must_exist=True), storage / "downloads"
    )


def show_places(places: list[tuple[str, str]], config: ExperimentConfig) -> None:
    """Where to look next, one line each; the last leads to what the configuration has logged."""
    for title, place in [*places, *_mlflow_ui(config)]:
        show_line(title, place)


def _name(config: ExperimentConfig) -> str:
    """Of the MLflow experiment."""
    return config.tracking.experiment or config.name


def _mlflow_ui(config: ExperimentConfig) -> list[tuple[str, str]]:
    """How to open the MLflow UI on the store that was used."""
    from tt_ray.tracking import experiment_page

    uri = os.environ["MLFLOW_TRACKING_URI"]  # as `connect` has left it; the server may be away by now
    page = experiment_page(uri, _name(config))
    if uri.startswith(("http://", "https://")):
        return [("MLflow UI", f"{uri.rstrip('/')}/{page}")]
    command = f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}"
    return [("MLflow UI", command), ("then open", f"http://127.0.0.1:5000/{page}")]
