"""What a sweep found: python analysis/sweep_report.py SWEEP

The best trial of each case, what each parameter explains, score against cost, what failed, and what reuse
saved; the tables as parquet and the figures as PNG and SVG beside it.

What a parameter explains is its main effect: the share of the metric's variance over the trials that lies
between the parameter's values (eta squared), cases set to the same mean first. The importance of a fitted
model, a random forest's say, depends on choices of its own and reads the noise of a few dozen trials as
importance; this share is plain arithmetic on the table, and what chance alone would give stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from study import (
    Study,
    learning_curves,
    load_study,
    markdown_table,
    run_script,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import value_text
from tt_ray.evaluation.sweep_figures import (
    curves_figure,
    frontier,
    frontier_figure,
    parallel_figure,
    parameter_figure,
)
from tt_ray.search import interval_names
from tt_ray.texts import interval_text, number_text

FEW_VALUES = 6
"""A parameter with more values is cut into this many ranges less two, each with as many trials."""
LATENCY = "speed/latency_p50_ms"
COUNTS = ("seeds", "episodes", "reused")
MODEL_SECTIONS = ("dataset", "discretizer", "model", "training", "critic")


def usable(study: Study) -> pd.DataFrame:
    """Trials that count: finished, with a number."""
    return study.trials[study.trials["status"].eq("finished") & np.isfinite(study.trials[study.metric])]


def metric_text(study: Study, trial: pd.Series) -> str:
    """A trial's metric with its interval, where the table has one."""
    low, high = (trial.get(name, np.nan) for name in interval_names(study.metric) or ("", ""))
    return interval_text(trial[study.metric], low, high)


def cell_text(trial: pd.Series, column: str) -> str:
    """A cell as a person writes it; empty where there is none."""
    value = trial.get(column)
    return "" if value is None or value != value else value_text(value)


def best_section(study: Study) -> str:
    """The winner of each case: its selected number, and the one on fresh episodes."""
    winners = study.winners()
    if winners.empty:
        return "## Best\n\nNo trial has finished with a number.\n"
    rows = []
    for _, trial in winners.iterrows():
        confirmed = [trial.get(f"confirmed/{part}", np.nan) for part in ("mean", "ci_low", "ci_high")]
        counts = [cell_text(trial, name) for name in ("seeds", "episodes")]
        rows.append([trial["trial"], metric_text(study, trial), interval_text(*confirmed), *counts])
    titles = ["trial", f"{study.metric} (selected)", "confirmed", "seeds", "episodes"]
    return (
        f"## Best\n\n{markdown_table(titles, rows)}\n\n"
        "The selected number is the best of several and so too good on average; the confirmed one is the "
        "mean score of the same trial on fresh episode seeds.\n"
    )


def main_effects(trials: pd.DataFrame, keys: Sequence[str], metric: str, goal: str) -> pd.DataFrame:
    """A row for each key, the strongest first; a case with a single trial says nothing.

    share: of the metric's variance that lies between the key's values, cases centred; chance: what it would
    be on average if the key did nothing; best, worst: values (or ranges) with the best and the worst mean,
    and gain, by how much they differ.
    """
    trials = trials[trials.groupby("case")[metric].transform("size") > 1]  # else there is nothing to compare
    centred = trials[metric] - trials.groupby("case")[metric].transform("mean")
    total, freedom = float((centred**2).sum()), len(trials) - trials["case"].nunique()
    rows = []
    for key in keys if len(trials) else []:
        groups = centred.groupby(_levels(trials[key]), sort=False)
        means, counts = groups.mean(), groups.size()
        ordered = means.sort_values(ascending=goal == "minimize", kind="stable")
        between = float((counts * means**2).sum())
        rows.append(
            {
                "parameter": key,
                "values": len(means),
                "share": between / total if total > 0 else 0.0,
                "chance": min(1.0, (len(means) - 1) / freedom) if freedom > 0 else 1.0,
                "best": ordered.index[0],
                "worst": ordered.index[-1],
                "gain": abs(float(ordered.iloc[0] - ordered.iloc[-1])),
            }
        )
    columns = ["parameter", "values", "share", "chance", "best", "worst", "gain"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _levels(column: pd.Series) -> pd.Series:
    """Each row's value as text; numbers of many values as one of four ranges."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if not numeric or column.nunique() <= FEW_VALUES:
        return column.map(value_text)
    ranges = pd.qcut(column, FEW_VALUES - 2, duplicates="drop", labels=False)
    ends = column.groupby(ranges).agg(["min", "max"]).map(value_text)
    return ranges.map(ends["min"] + " to " + ends["max"])


def effects_section(study: Study, effects: pd.DataFrame) -> str:
    """The table of `main_effects`, and how to read it."""
    if effects.empty or effects["chance"].min() >= 1.0:
        return "## What each parameter explains\n\nToo few trials or parameters to tell.\n"
    rows = [
        [
            *(
                row["parameter"],
                str(row["values"]),
                f"{100 * row['share']:.0f} %",
                f"{100 * row['chance']:.0f} %",
            ),
            *(row["best"], row["worst"], number_text(row["gain"])),
        ]
        for _, row in effects.iterrows()
    ]
    titles = ["parameter", "values", "share of variance", "by chance", "best", "worst", "gain"]
    return (
        f"## What each parameter explains\n\n{markdown_table(titles, rows)}\n\n"
        f"Share of the variance of {study.metric} over the finished trials that lies between the "
        "parameter's values, cases set to the same mean. A share near the one by chance shows nothing. Those "
        "of a full grid add up to at most 100 %, and what is missing is interaction and noise; in a random "
        "search they overlap a little. Gain: by how much the means of the best and the worst value differ.\n"
    )


def frontier_section(study: Study, cost: str) -> str:
    """The trials that no other beats in both cost and metric."""
    trials = usable(study)
    if cost not in trials or not trials[cost].notna().any():
        return f"## {study.metric} against {cost}\n\nNo finished trial has {cost}.\n"
    front = trials[frontier(trials, cost, study.metric, study.goal)].sort_values(["case", cost])
    rows = [[t["trial"], number_text(t[cost]), metric_text(study, t)] for _, t in front.iterrows()]
    table = markdown_table(["trial", cost, study.metric], rows)
    return (
        f"## {study.metric} against {cost}\n\nNo other trial of the case is cheaper and as good.\n\n{table}\n"
    )


def trials_section(study: Study) -> str:
    """Every trial."""
    rows = []
    for _, t in study.trials.iterrows():
        rows.append(
            [t["trial"], t["status"], metric_text(study, t), *(cell_text(t, name) for name in COUNTS)]
        )
    return f"## Trials\n\n{markdown_table(['trial', 'status', study.metric, *COUNTS], rows)}\n"


def failures_section(study: Study) -> str:
    """Failed trials with their cause."""
    failed = study.trials[study.trials["status"] == "failed"]
    if failed.empty:
        return "## Failed\n\nNo trial failed.\n"
    rows = [[trial["trial"], cell_text(trial, "cause") or "unknown"] for _, trial in failed.iterrows()]
    return f"## Failed\n\n{markdown_table(['trial', 'cause'], rows)}\n"


def reuse_section(study: Study) -> str:
    """What was computed and what was not, in time."""
    spent, saved = (
        float(study.trials.get(name, pd.Series(dtype=float)).sum()) for name in ("seconds", "saved")
    )
    reused = study.trials.get("reused", pd.Series("", study.trials.index)).fillna("").ne("")
    share = f" ({100 * saved / (spent + saved):.0f} % of what it would have taken)" if saved > 0 else ""
    return (
        f"## Time\n\n{duration(spent)} of computing; reuse of stages saved {duration(saved)}{share}, "
        f"in {int(reused.sum())} of {len(study.trials)} trials.\n"
    )


def duration(seconds: float) -> str:
    """`3.2 h`, `12 min` or `45 s`."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{number_text(seconds / size)} {unit}"
    return f"{number_text(seconds)} s"


def model_label(study: Study) -> partial[str]:
    """What a learning curve is called: its case, the settings that a model depends on, and the seed."""
    keys = [key for key in study.keys if key.partition(".")[0] in MODEL_SECTIONS]
    return partial(_label, study, keys, study.trials.set_index("fingerprint"))


def _label(study: Study, keys: Sequence[str], trials: pd.DataFrame, cell: pd.Series) -> str:
    trial = trials.loc[cell["tags.trial"]]
    parts = [str(trial["case"]), study.settings_text(trial, keys)]
    return ", ".join([*filter(None, parts), f"seed {cell.get('tags.seed')}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="sweep_report.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("name", metavar="SWEEP", help="name of a sweep in MLflow, or its run id")
    parser.add_argument("--cost", default=LATENCY, help="what the frontier sets the metric against")
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    study, cost = load_study(options.name, uri), options.cost
    if cost not in study.trials and cost != LATENCY:
        known = ", ".join(sorted(name for name in study.trials if name.startswith("speed/")))
        raise UserError(
            f"sweep {study.name!r} has no column {cost!r} to set {study.metric} against; known: {known}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    trials, keys, metric, goal = study.trials, study.keys, study.metric, study.goal
    effects = main_effects(usable(study), keys, metric, goal)
    curves = learning_curves(study.cells, model_label(study))
    sections = [
        f"# {study.name}\n\n{headline(study)}\n",
        best_section(study),
        effects_section(study, effects),
        write_figure(partial(parameter_figure, trials, keys, metric), folder, "parameters") + "\n",
        write_figure(partial(parallel_figure, trials, keys, metric, goal), folder, "parallel") + "\n",
        frontier_section(study, cost),
        write_figure(partial(frontier_figure, trials, cost, metric, goal), folder, "frontier") + "\n",
        "## Learning curves\n\nA line for each model that was trained.\n",
        write_figure(partial(curves_figure, curves, ylabel="val/loss"), folder, "curves") + "\n",
        failures_section(study),
        reuse_section(study),
        trials_section(study),
    ]
    write_table(trials, folder / "trials.parquet")
    write_table(effects, folder / "parameters.parquet")
    write_report("\n".join(sections), folder / "report.md")


def headline(study: Study) -> str:
    """The question, and how many trials came to what end."""
    counts = study.trials["status"].value_counts(sort=False)
    ends = ", ".join(f"{count} {status}" for status, count in counts.items())
    method = study.tags.get("search.method", "")
    text = (
        f"{len(study.trials)} trials{f' ({method})' if method else ''}: {ends}. {study.goal} {study.metric}."
    )
    return "\n\n".join(filter(None, [study.tags.get("question"), text, study.gone_text]))


if __name__ == "__main__":
    sys.exit(main())
