"""A whole sweep under Ray Tune, and what it has left on disk and in MLflow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from study_tools import Quiet, cells, make_sweep, trainings

from tt_ray.distributed.sweeps.cells import cell_folder
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.driver import SweepOutcome, run_sweep
from tt_ray.distributed.sweeps.study import Study
from tt_ray.tracking import MlflowTracker

NAME = "Größe a/b, beams"


@dataclass(frozen=True)
class Launched:
    """A sweep at its end."""

    study: Study
    outcome: SweepOutcome
    before: dict[str, Any]
    """Its cells at the beginning."""
    trained: list[str]
    """Keys of the models trained up to now."""
    client: Any

    @property
    def frame(self) -> pd.DataFrame:
        return self.outcome.frame

    def runs(self) -> tuple[Any, list[Any]]:
        """The parent's run in MLflow, and its children in the order of their cells."""
        experiment = self.client.get_experiment_by_name(NAME).experiment_id
        found = self.client.search_runs([experiment], max_results=500)
        (parent,) = (run for run in found if run.data.tags["kind"] == "sweep")
        children = [run for run in found if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        return parent, sorted(
            children, key=lambda run: (int(run.data.tags["trial.index"]), run.data.tags["seed"])
        )

    def cells(self) -> list[tuple[Any, int, Path]]:
        seeds = self.study.sweep.base.seeds
        pairs = itertools.product(self.study.trials, seeds)
        return [(trial, seed, cell_folder(self.study.folder, trial, seed)) for trial, seed in pairs]

    def artifacts(self, run: Any) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, ""))


def start(
    folder: Path, uri: str, search: dict[str, Any], flags: Flags = Flags(), **sections: Any
) -> Launched:
    from mlflow import MlflowClient

    sweep = make_sweep(folder, search, **{"name": NAME, **sections})
    study = check_sweep(sweep, flags)
    before = cells(study)
    outcome = run_sweep(study, MlflowTracker(uri, sweep.base.name, interval=0.2), flags, Quiet())
    return Launched(study, outcome, before, trainings(study.storage), MlflowClient(tracking_uri=uri))
