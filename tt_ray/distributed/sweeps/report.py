"""What a sweep leaves behind: tables, figures and the best configuration, as files and in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tt_ray.distributed.sweeps.baselines import baseline_frame
from tt_ray.distributed.sweeps.cells import Record, episode_frame
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import CONFIRMED, ranking, storable, winners
from tt_ray.evaluation.figure_parts import value_text
from tt_ray.evaluation.sweep_figures import curves_figure, frontier_figure, parallel_figure, parameter_figure
from tt_ray.files import whole_file
from tt_ray.search import interval_names, safe_name
from tt_ray.sweep_file import Trial, dump_trial
from tt_ray.texts import interval_text, number_text
from tt_ray.tracking import Run, read

LATENCY = "speed/latency_p50_ms"
KINDS = (".png", ".svg")
"""Of files with figures: for the eye, and for print and descriptions."""


def write_tables(study: Study, frame: pd.DataFrame) -> list[Path]:
    """`trials.parquet`, `baselines.parquet` and `results.md`, each whole or not at all."""
    baselines = baseline_frame(study, frame)
    files = []
    for name, table in (("trials", frame), ("baselines", baselines)):
        if len(table):
            files.append(study.folder / f"{name}.parquet")
            with whole_file(files[-1]) as path:
                storable(table).to_parquet(path)
    files.append(study.folder / "results.md")
    with whole_file(files[-1]) as path:
        path.write_text(markdown_table(study, frame, baselines))
    return files


def report(
    study: Study, frame: pd.DataFrame, confirmed: Sequence[tuple[Trial, list[Record]]], parent: Run, step: int
) -> list[Path]:
    """Everything that the finished, or cancelled, sweep has to show, as the parent's artifacts.

    Returned are the figures, as PNG files; an SVG file lies beside each.
    """
    files = write_tables(study, frame)
    records = [record for trial in study.trials for record in study.records(trial)]
    fresh = [record for _, found in confirmed for record in found]
    if played := [record for record in records if record.episodes]:
        episodes = study.folder / "episodes.parquet"
        parts = [episode_frame(played), *([episode_frame(fresh, fresh=True)] if fresh else [])]
        with whole_file(episodes) as path:
            pd.concat(parts, ignore_index=True).to_parquet(path)
        files.append(episodes)
    files += _best_files(study, frame)
    for path in files:
        parent.artifact(path)
    figures = _figures(study, frame, records)
    for path in (figure.with_suffix(kind) for figure in figures for kind in KINDS):
        parent.artifact(path, "figures")
    parent.log(_parent_metrics(study, frame), step)
    return figures


def markdown_table(study: Study, frame: pd.DataFrame, baselines: pd.DataFrame) -> str:
    """The sweep's question and its trials, best first within each case; then what they are compared with."""
    base = study.sweep.base
    table = "\n".join(table_lines(study, ranking(frame, study.sweep.search), baselines))
    failed = [f"- {row['trial']}: {row['cause']}" for _, row in frame.iterrows() if row["cause"]]
    causes = "\n\nFailed:\n\n" + "\n".join(failed) if failed else ""
    data = "\n".join(f"- data set {facts}" for facts in study.facts.values())
    return f"# {base.name}\n\n{base.question}\n\n{table}{causes}\n\n{data}\n"


def table_lines(study: Study, *tables: pd.DataFrame, brief: bool = False) -> list[str]:
    """A Markdown table of these trials (and baselines) in this order, the first two lines its head.

    `brief` leaves out what a trial's name says already, and what is found with its run.
    """
    keys, metric = list(study.sweep.search.parameters), study.sweep.search.metric.name
    columns = ["trial", "status", *keys, "seeds", "episodes", metric, "interval", "fresh seeds"]
    columns += ["return", "val loss", "seconds", "reused"]
    if brief:
        columns = list(dict.fromkeys(["trial", metric, "interval", "fresh seeds", "return", "episodes"]))
    found = [_cells(row, keys, metric) for table in tables for _, row in table.iterrows()]
    lines = [columns, ["---"] * len(columns), *([cells[name] for name in columns] for cells in found)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def interval_of(row: pd.Series, metric: str) -> str:
    """`[low, high]` of a metric that has an interval, else nothing."""
    low, high = (row.get(name, np.nan) for name in interval_names(metric) or ("", ""))
    return f"[{number_text(low)}, {number_text(high)}]" if low == low else ""


def _cells(row: pd.Series, keys: Sequence[str], metric: str) -> dict[str, str]:
    """The text of each column of a trial's or a baseline's row."""
    return {
        "trial": row["trial"],
        "status": row["status"],
        **{key: value_text(row[key]) if row["status"] != "baseline" else "" for key in keys},
        "seeds": str(row["seeds"] or ""),
        "episodes": str(row["episodes"]),
        metric: number_text(row[metric]),
        "interval": interval_of(row, metric),
        "fresh seeds": interval_text(*(row[name] for name in CONFIRMED)),
        "return": number_text(row.get("return/mean", np.nan)),
        "val loss": number_text(row.get("val/loss", np.nan)),
        "seconds": number_text(row["seconds"]),
        "reused": str(row["reused"]),
    }


def _best_files(study: Study, frame: pd.DataFrame) -> list[Path]:
    """`best.yaml`, or one for each case: the winner's configuration, ready to run."""
    by_fingerprint = {trial.fingerprint: trial for trial in study.trials}
    files = list[Path]()
    for _, row in winners(frame, study.sweep.search).iterrows():
        name = f"best-{safe_name(row['case'])}.yaml" if row["case"] else "best.yaml"
        path = study.folder / name
        with whole_file(path) as temporary:
            temporary.write_text(dump_trial(by_fingerprint[row["fingerprint"]]))
        files.append(path)
    for stale in set(study.folder.glob("best*.yaml")) - set(files):
        stale.unlink()  # of a case that the file has no more
    return files


def _figures(study: Study, frame: pd.DataFrame, records: Sequence[Record]) -> list[Path]:
    folder = study.folder / "figures"
    folder.mkdir(exist_ok=True)
    search = study.sweep.search
    keys, metric, goal = list(search.parameters), search.metric.name, search.metric.goal
    draw: dict[str, Callable[[Path], None]] = {}
    if keys:
        draw["parameters"] = lambda path: parameter_figure(frame, keys, metric, path)
        draw["parallel"] = lambda path: parallel_figure(frame, keys, metric, goal, path)
    if curves := _curves(records):
        draw["learning-curves"] = lambda path: curves_figure(curves, path, "validation loss")
    if LATENCY in frame and metric != LATENCY and len(frame) > 1:
        draw["frontier"] = lambda path: frontier_figure(frame, LATENCY, metric, goal, path)
    for name, make in draw.items():
        for kind in KINDS:
            make(folder / f"{name}{kind}")
    return [folder / f"{name}.png" for name in draw]


def _curves(records: Sequence[Record]) -> dict[str, tuple[list[int], list[float]]]:
    """Validation loss by step of every model, under the name of the first cell that used it."""
    curves, seen = {}, set[Path]()
    for record in records:
        model = Path(record.checkpoint).parent.parent
        if not record.checkpoint or model in seen:
            continue
        seen.add(model)
        points = [
            (entry["step"], entry["metrics"]["val/loss"])
            for entry, _ in read(model / "journal.jsonl")
            if "val/loss" in entry.get("metrics", {})
        ]
        if points:
            curves[f"{record.name}, seed {record.seed}"] = ([s for s, _ in points], [v for _, v in points])
    return curves


def _baseline_metrics(baselines: pd.DataFrame) -> dict[str, float]:
    """`greedy/score/mean` and the like, of each baseline that has one row; the data has its own names."""
    figures = dict[str, float]()
    for name, rows in baselines.groupby("baseline") if len(baselines) else ():
        if len(rows) == 1 and name != "data":
            measured = [key for key in map(str, rows) if key.startswith(("score/", "return/"))]
            figures |= {f"{name}/{key}": float(rows.iloc[0][key]) for key in measured}
    return {key: value for key, value in figures.items() if np.isfinite(value)}


def _parent_metrics(study: Study, frame: pd.DataFrame) -> dict[str, float]:
    """How the sweep ended; with one case also its winner's figures."""
    counts = frame["status"].value_counts()
    figures = {
        f"trials/{status}": float(counts.get(status, 0)) for status in ("finished", "stopped", "failed")
    }
    figures["seconds/saved"] = float(frame["saved"].sum())
    figures["seconds/computing"] = float(frame["seconds"].sum())
    best = winners(frame, study.sweep.search)
    figures |= _baseline_metrics(baseline_frame(study, frame))
    if len(study.facts) == 1:
        (facts,) = study.facts.values()
        figures["data/return/mean"] = facts.mean
        if facts.scores is not None:
            figures["data/score/mean"] = facts.scores[0]
    if len(best) == 1:
        row = best.iloc[0]
        named = [name for name in frame.columns if str(name).startswith(("score/", "return/", "val/"))]
        named += [study.sweep.search.metric.name] if study.sweep.search.metric.name not in named else []
        figures |= {f"best/{name}": float(row[name]) for name in named if np.isfinite(row[name])}
        stem = "score" if "best/score/mean" in figures else "return"
        fresh = {name.replace("confirmed", f"confirmed/{stem}"): float(row[name]) for name in CONFIRMED}
        figures |= {name: value for name, value in fresh.items() if np.isfinite(value)}
    return figures
