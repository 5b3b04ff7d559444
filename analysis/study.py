"""What the scripts beside this file share: reading a sweep from MLflow, writing tables and figures."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where tt-ray is not installed

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import value_text
from tt_ray.files import whole_file
from tt_ray.search import default_goal, safe_name
from tt_ray.texts import number_text
from tt_ray.tracking import connect

Curves = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Study:
    """One sweep: its parent run, its tables, its cells (a trial with one training seed)."""

    name: str
    run_id: str
    tags: Mapping[str, str]
    trials: pd.DataFrame
    """A row for each trial: index, trial (name), fingerprint, case, status, cause, keys, metrics, ..."""
    cells: pd.DataFrame
    """Those of `trials`, as `mlflow.search_runs` gives them: run_id, params.*, metrics.*, tags.*."""
    gone: int = 0
    """Cells that the sweep has beside these."""

    @property
    def keys(self) -> list[str]:
        """The searched parameters, such as planner.horizon."""
        return [column for column in self.trials if "." in column and "/" not in column]

    @property
    def metric(self) -> str:
        """What the sweep's trials are compared by."""
        return self.tags.get("search.metric") or "score/mean"

    @property
    def goal(self) -> str:
        """`maximize` or `minimize`."""
        return self.tags.get("search.goal") or default_goal(self.metric)

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """A row for each episode: fingerprint (of its trial), case, training_seed, seed, score, fresh, ..."""
        frame = read_artifact(self.run_id, "episodes.parquet", f"sweep {self.name!r}")
        frame = frame[frame["fingerprint"].isin(self.trials["fingerprint"])].copy()
        for name in ("score", "episode_return"):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
        frame["fresh"] = frame["fresh"].fillna(False).astype(bool) if "fresh" in frame else False
        return frame

    @property
    def gone_text(self) -> str:
        """That there are cells of trials that the table does not have; empty where there are none."""
        why = "are not in its table (taken out of the file, or just begun)"
        return f"{self.gone} runs of sweep {self.name!r} {why} and are left out." if self.gone else ""

    def episodes_of(self, trials: pd.DataFrame) -> pd.DataFrame:
        """The episodes of some of the trials."""
        return self.episodes[self.episodes["fingerprint"].isin(trials["fingerprint"])]

    def winners(self) -> pd.DataFrame:
        """The best trial of each case; those that failed or were stopped early do not count."""
        fine = self.trials[self.trials["status"].eq("finished") & self.trials[self.metric].notna()]
        ranked = fine.sort_values(self.metric, ascending=self.goal == "minimize", kind="stable")
        return ranked.drop_duplicates("case").sort_index()

    def settings_text(self, trial: Mapping[str, Any], keys: Sequence[str] | None = None) -> str:
        """`horizon=5, strategy=uniform`: sections are left out where the rest is clear."""
        keys = self.keys if keys is None else keys
        short = [key.rpartition(".")[2] for key in keys]
        names = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
        return ", ".join(f"{name}={value_text(trial[key])}" for key, name in zip(keys, names, strict=True))


def load_study(name: str, uri: str) -> Study:
    """The sweep of that name, or in the MLflow experiment of that name, or with that run id.

    Raises:
        UserError: there is none, there are several, or it has no table yet.
    """
    import mlflow

    sweeps = mlflow.search_runs(search_all_experiments=True, filter_string="tags.kind = 'sweep'")
    names = sweeps["tags.sweep"] if "tags.sweep" in sweeps else pd.Series("", sweeps.index)
    found = sweeps[(names == name) | (sweeps["run_id"] == name)] if len(sweeps) else sweeps
    experiment = mlflow.get_experiment_by_name(name)
    if found.empty and experiment is not None and len(sweeps):
        found = sweeps[sweeps["experiment_id"] == experiment.experiment_id]
    if found.empty:
        known = sorted(set(names.dropna()) - {""})
        near = get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
        hint = f"did you mean {' or '.join(near)}?" if near else "it holds none yet"
        raise UserError(f"no sweep {name!r} in MLflow at {uri}: {hint}")
    if len(found) > 1:
        listed = ", ".join(f"{run['run_id']} ({names[i]})" for i, run in found.iterrows())
        raise UserError(f"{len(found)} sweeps go by {name!r}: give the run id of one of them: {listed}")
    parent = found.iloc[0]
    run_id, title = str(parent["run_id"]), str(parent.get("tags.sweep") or name)
    children = f"tags.`mlflow.parentRunId` = '{run_id}'"
    cells = mlflow.search_runs([parent["experiment_id"]], children, order_by=["attributes.start_time ASC"])
    trials = read_artifact(run_id, "trials.parquet", f"sweep {title!r}")
    trials["case"] = trials["case"].fillna("") if "case" in trials else ""
    known = cells_of(cells, trials)
    study = Study(title, run_id, tags_of(parent), trials, known, gone=len(cells) - len(known))
    trials[study.metric] = trials.get(study.metric, math.nan)
    return study


def cells_of(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The cells of these trials, by fingerprint: numbers change as the sweep's file does."""
    return cells[cells.get("tags.trial", pd.Series("", cells.index)).isin(trials["fingerprint"])]


def tags_of(run: pd.Series) -> dict[str, str]:
    """Tags of a row of `mlflow.search_runs`."""
    tags = {name.removeprefix("tags."): value for name, value in run.items() if str(name).startswith("tags.")}
    return {name: value for name, value in tags.items() if isinstance(value, str)}


def read_artifact(run_id: str, name: str, whose: str) -> pd.DataFrame:
    """A run's table; `UserError` where it has none or cannot be read."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            return pd.read_parquet(MlflowClient().download_artifacts(run_id, name, folder))
        except (MlflowException, OSError, ValueError) as error:
            raise UserError(
                f"{whose} has no table {name} in MLflow that can be read ({' '.join(str(error).split())}): "
                "a sweep writes its trials while it runs, and its episodes at the end"
            ) from error


def learning_curves(
    cells: pd.DataFrame, label: Callable[[pd.Series], str], metric: str = "val/loss"
) -> Curves:
    """The metric by training step, once for each model: cells that share one show the same curve."""
    from mlflow import MlflowClient

    client, curves, seen = MlflowClient(), Curves(), set[str]()
    for _, cell in cells.iterrows():
        tags = tags_of(cell)
        model = tags.get("stage.model") or str(cell["run_id"])
        history = [] if model in seen else client.get_metric_history(cell["run_id"], metric)
        if history:
            seen.add(model)
            points = sorted((point.step, point.timestamp, point.value) for point in history)
            name = label(cell)
            curves[name if name not in curves else f"{name} ({cell['run_id'][:8]})"] = (
                [step for step, _, _ in points],
                [value for _, _, value in points],
            )
    return curves


def error_text(value: float, error: float) -> str:
    """`44.0 ± 0.31`; the number alone where the error is not known."""
    if not math.isfinite(value) or not math.isfinite(error):
        return number_text(value)
    wanted = [(value, 2), (error, 1)]  # figures after the first
    decimals = max(more - math.floor(math.log10(abs(number))) if number else 1 for number, more in wanted)
    decimals = min(max(decimals, 0), 4)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up; those of numbers are set to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    lines: list[list[str]] = [[] for _ in range(len(cells) + 1)]
    for title, *texts in zip(*cells, strict=True):
        width = max(3, *map(len, (title, *texts)))
        numbers = all(re.match(r"-?\d|$", text) for text in texts)
        rule = "-" * (width - 1) + ":" if numbers else "-" * width
        for line, text in zip(lines, (title, rule, *texts), strict=True):
            line.append(text.rjust(width) if numbers else text.ljust(width))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """As parquet: whole, or not at all."""
    with whole_file(path) as file:
        frame.to_parquet(file)


def write_figure(draw: Callable[[Path], None], folder: Path, name: str) -> str:
    """PNG and SVG of a figure; the line of markdown that shows it."""
    for suffix in (".png", ".svg"):
        draw(folder / f"{name}{suffix}")
    return f"![{name}]({name}.png)"


def write_report(text: str, path: Path) -> None:
    """As markdown, and on the screen."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")
    print(text)
    print(f"Written to {path.parent}")


def run_script(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, str, Path], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse, connect, do `work(options, uri, folder)`; the exit code. A user's mistake is one line and 2."""
    parser.add_argument(
        "--uri", help="MLflow's tracking URI (default: MLFLOW_TRACKING_URI, or mlflow.db here)"
    )
    parser.add_argument("--out", type=Path, help="folder for tables and figures (default: analysis-out/NAME)")
    options = parser.parse_args(argv)
    names = options.name if isinstance(options.name, list) else [options.name]
    try:
        uri = connect(options.uri, must_exist=True)
        folder = options.out or Path("analysis-out") / safe_name(
            " vs ".join(names) if len(names) > 1 else names[0]
        )
        work(options, uri, folder)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
