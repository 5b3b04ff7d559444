"""The results of an experiment as one table."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tt_ray.errors import UserError
from tt_ray.tracking.connection import one_line, prepare_environment

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("score/mean", "score/ci_low", "score/ci_high", "return/mean", "val/loss")
SWEEP_COLUMNS = ("kind", "metric", "trial", "fingerprint", "case", "reused", "seconds", "saved", "cause")
COLUMNS = ("run", "parent", "status", "seed", *METRICS, *SWEEP_COLUMNS, "updated")
OF_SWEEP = ("best/", "confirmed/", "data/")
"""How a sweep's own metrics begin: the winner's score, its score on fresh episodes, and the data set's."""
NO_WORK = ("seconds/saved", "seconds/waiting")


class MlflowAwayError(UserError):
    """MLflow does not answer at the moment."""


def results_table(experiment_name: str, uri: str) -> pd.DataFrame:
    """One row for each run of the experiment, children below their parent, indexed by MLflow's run id.

    Columns: run, parent (its name), status (as MLflow has it, and STOPPED for a trial that its scheduler has
    ended), seed, the METRICS; kind (`sweep`, `trial` or empty), metric (by which a sweep chooses), trial (its
    name), fingerprint (of a trial, whatever its name), case, reused (stages, in words), seconds (of
    computing), saved (seconds, by reuse), cause (of a failure); updated (time of the last point, UTC); a
    sweep's metrics `best/...`, `confirmed/...` and `data/...`; then the params in which the runs without
    children differ. What a run does not have is None, NaN or empty.

    Raises:
        UserError: there is no such experiment; `MlflowAwayError` if MLflow does not answer.
    """
    import pandas as pd

    runs = _in_family_order(_all_runs(experiment_name, uri))
    names = {run.info.run_id: run.info.run_name for run in runs}
    own = sorted({name for run in runs for name in run.data.metrics if name.startswith(OF_SWEEP)})
    differing = _differing_params(runs)
    rows = []
    for run in runs:
        params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
        row: dict[str, Any] = {
            "run": run.info.run_name,
            "parent": names.get(tags.get("mlflow.parentRunId", ""), ""),
            "status": _status(run),
            "seed": tags.get("seed", params.get("seed")),
        }
        row |= {name: metrics.get(name, float("nan")) for name in (*METRICS, *own)} | _of_sweep(run)
        row["updated"] = pd.Timestamp(_last_point(run), unit="ms", tz="UTC")
        rows.append(row | {name: params.get(name) for name in differing})
    index = pd.Index([run.info.run_id for run in runs], name="run_id", dtype=object)
    return pd.DataFrame(rows, index=index, columns=[*COLUMNS, *own, *differing])


def further_columns(frame: pd.DataFrame) -> list[str]:
    """The params of a `results_table`: all columns that only some experiments have, but not the metrics."""
    return [name for name in frame.columns if name not in COLUMNS and not name.startswith(OF_SWEEP)]


def _status(run: Any) -> str:
    status, said = run.info.status, run.data.tags.get("trial.status")
    if status != "RUNNING" and said == "stopped":
        return "STOPPED"
    return "FAILED" if status == "FINISHED" and said == "failed" else status


def _of_sweep(run: Any) -> dict[str, Any]:
    """The SWEEP_COLUMNS of a run."""
    tags, metrics = run.data.tags, run.data.metrics
    spent = [metrics[name] for name in metrics if name.startswith("seconds/") and name not in NO_WORK]
    return {
        "kind": tags.get("kind", ""),
        "metric": tags.get("search.metric", ""),
        "trial": tags.get("trial.name", ""),
        "fingerprint": tags.get("trial", ""),
        "case": tags.get("trial.case", ""),
        "reused": tags.get("reused", ""),
        "seconds": sum(spent) if spent else float("nan"),
        "saved": metrics.get("seconds/saved", float("nan")),
        "cause": tags.get("error", "") if _status(run) == "FAILED" else "",
    }


def _last_point(run: Any) -> int:
    """When the run began, ended or got its last point of a curve, in milliseconds."""
    points = (metric.timestamp for metric in run.data.to_proto().metrics)
    return max(run.info.start_time, run.info.end_time or 0, *points)


def download_checkpoint(run_id: str, uri: str, folder: Path) -> Path:
    """An MLflow run's checkpoint folder: where it was written if that is here, else its artifact.

    The artifact is downloaded to `folder`/RUN_ID, once. `UserError` when there is no such run, or it has no
    checkpoint.
    """
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        written = Path(client.get_run(run_id).data.tags.get("checkpoint", ""))
        if written.name and written.is_dir():
            return written
        kept = folder / run_id
        if not kept.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
                client.download_artifacts(run_id, "checkpoint", temporary)
                os.replace(Path(temporary) / "checkpoint", kept)
        return kept
    except (MlflowException, OSError) as error:
        raise UserError(
            f"no checkpoint for MLflow run {run_id!r} at {uri} ({one_line(error)}): "
            "`tt-ray results NAME` lists run ids; a folder can be given as well"
        ) from error


def _all_runs(experiment_name: str, uri: str) -> list[Any]:
    """Every run, oldest first."""
    prepare_environment()
    from mlflow.exceptions import MlflowException

    try:
        return _read_runs(experiment_name, uri)
    except (MlflowException, OSError) as error:
        raise MlflowAwayError(f"MLflow at {uri} does not answer ({one_line(error)})") from error


def _read_runs(experiment_name: str, uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        known = [e.name for e in client.search_experiments() if e.name != "Default"]
        near = difflib.get_close_matches(experiment_name, known, n=3, cutoff=0.4) or known[:5]
        hint = f"did you mean {' or '.join(near)}?" if near else "it holds none yet"
        raise UserError(f"no experiment {experiment_name!r} in MLflow at {uri}: {hint}")
    runs, token = [], None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _in_family_order(runs: list[Any]) -> list[Any]:
    """Each parent, oldest first, then its children: trials in the order of the sweep, others by name."""
    ids = {run.info.run_id for run in runs}
    children: dict[str, list[Any]] = {}
    tops = []
    for run in runs:
        parent = run.data.tags.get("mlflow.parentRunId", "")
        children.setdefault(parent, []).append(run) if parent in ids else tops.append(run)
    ordered: list[Any] = []

    def add(run: Any) -> None:
        ordered.append(run)
        for child in _in_trial_order(children.get(run.info.run_id, [])):
            add(child)

    for top in tops:
        add(top)
    return ordered


def _in_trial_order(runs: list[Any]) -> list[Any]:
    """By the trials' numbers, each trial's seeds together; then what is no trial, by name.

    The fingerprint says what belongs together: numbers change as a sweep's file does, and the runs of a trial
    that was taken out keep one that another has now.
    """
    numbers: dict[str, float] = {}
    for run in runs:
        trial, index = run.data.tags.get("trial", ""), run.data.tags.get("trial.index", "")
        number = int(index) if index.isdecimal() else float("inf")
        numbers[trial] = min(number, numbers.get(trial, number))

    def place(run: Any) -> tuple[float, str, int, str]:
        trial, seed = run.data.tags.get("trial", ""), run.data.tags.get("seed", "")
        return numbers[trial], trial, int(seed) if trial and seed.isdecimal() else 0, run.info.run_name

    return sorted(runs, key=place)


def _differing_params(runs: list[Any]) -> list[str]:
    """Params with more than one value among the runs that have no children."""
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    leaves = [run.data.params for run in runs if run.info.run_id not in parents]
    names = sorted({name for params in leaves for name in params} - {"seed"})
    return [name for name in names if len({params.get(name) for params in leaves}) > 1]
