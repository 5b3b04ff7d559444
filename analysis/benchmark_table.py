"""The published tables beside a sweep's own results: python analysis/benchmark_table.py SWEEP

A row for each task, found by the case's name or the data set's id; a column for each published method and
for each setting of the searched keys. docs/analysis.md says how the numbers come about.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from published import Group, read_published, task_name
from study import (
    Study,
    error_text,
    load_study,
    markdown_table,
    run_script,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.data.d4rl_names import resolve_id
from tt_ray.evaluation.figure_parts import COLORS, SMALL, open_figure, tidy
from tt_ray.evaluation.scores import aggregate_interval, iqm
from tt_ray.texts import interval_text

PAPER_EPISODES = 3
"""Episodes of each trained model in the paper's protocol."""
MOST_COLUMNS = 6
"""Settings that a table can show."""
OTHER = "Other tasks"
OURS = "ours"
METHODS = """\
Ours is the mean of the training seeds' means ± the standard error over training seeds (none for a single
one). The interquartile mean (IQM) is over all episodes, with a 95 % bootstrap interval that resamples
episodes within each training seed. The last column is the paper's protocol: the first 3 episodes of each
seed, mean ± standard error over all these runs at once, as its released code has it (population deviation
over the root of their number). That takes episodes of one model for independent, and so its errors are mostly
too small. The error of an average takes its tasks for independent, which they are."""


def ours(study: Study, groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each task and setting: seeds, episodes, mean, error, iqm, iqm_low, iqm_high, paper_*.

    Trials that a scheduler stopped are left out: they were stopped for their score.
    """
    trials = _placed_trials(study, groups)
    episodes = study.episodes[~study.episodes["fresh"]]
    rows = []
    for _, trial in trials[trials["status"] != "stopped"].iterrows():
        mine = episodes[episodes["fingerprint"] == trial["fingerprint"]]
        value = "score" if mine["score"].notna().any() else "episode_return"
        seeds = [
            seed.sort_values("seed")[value].to_numpy(dtype=float)
            for _, seed in mine[mine[value].notna()].groupby("training_seed")
        ]
        if seeds:
            place = {name: trial[name] for name in ("group", "task", "setting", "data", "trial", "index")}
            rows.append({**place, "value": value.removeprefix("episode_"), **_statistics(seeds)})
    return pd.DataFrame(rows)


def _placed_trials(study: Study, groups: Sequence[Group]) -> pd.DataFrame:
    """The trials with their data set, task, group and setting.

    Where several trials would share a cell of the table, each is a task of its own.
    """
    cells = study.cells
    found = dict(zip(cells.get("tags.trial", []), cells.get("params.dataset.id", []), strict=False))
    keys = [key for key in study.keys if key != "dataset.id"]
    trials = study.trials.copy()
    data = [found.get(fingerprint) for fingerprint in trials["fingerprint"]]
    trials["data"] = [text if isinstance(text, str) else "" for text in data]
    pairs = list(zip(trials["case"], trials["data"], strict=True))
    named = [task_name(case, groups) or task_name(text, groups) for case, text in pairs]
    trials["task"] = [
        task or case or text or study.name for task, (case, text) in zip(named, pairs, strict=True)
    ]
    trials["setting"] = [study.settings_text(trial, keys) for _, trial in trials.iterrows()]
    for other in ("case", "trial"):
        twins = trials.duplicated(["task", "setting"], keep=False) & trials[other].ne("")
        trials.loc[twins, "task"] = trials.loc[twins, other]
    of_task = {task: group.name for group in groups for task in group.tasks}
    trials["group"] = [of_task.get(task, OTHER) for task in trials["task"]]
    return trials


def _statistics(seeds: Sequence[np.ndarray]) -> dict[str, float]:
    """What one array of episodes for each training seed says, by our protocol and by the paper's."""
    means = aggregate_interval(seeds, samples=1)
    middle = aggregate_interval(seeds, iqm).interval
    runs = np.concatenate([seed[:PAPER_EPISODES] for seed in seeds])
    return {
        "seeds": len(seeds),
        "episodes": sum(map(len, seeds)),
        "fewest": min(map(len, seeds)),
        "most": max(map(len, seeds)),
        "mean": float(np.mean(means.seed_values)),
        "error": math.nan if means.seed_error is None else means.seed_error,
        "iqm": middle.value,
        "iqm_low": middle.low,
        "iqm_high": middle.high,
        "paper_runs": len(runs),
        "paper_mean": float(runs.mean()),
        "paper_error": float(runs.std() / math.sqrt(len(runs))) if len(runs) > 1 else math.nan,
    }


def chosen_settings(results: pd.DataFrame) -> list[str]:
    """Settings with a column, in the sweep's order: those with the most tasks, then the best mean."""
    if results.empty:
        return []
    ranked = results.groupby("setting", sort=False)["mean"].agg(["count", "mean"])
    kept = ranked.sort_values(["count", "mean"], ascending=False, kind="stable").index[:MOST_COLUMNS]
    return [setting for setting in ranked.index if setting in kept]


def values_of(group: Group, results: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Mean and error of each task (index) in each column (a method, or OURS and a setting)."""
    tasks = list(group.tasks) or list(dict.fromkeys(results["task"]))
    table: dict[tuple[str, str], list[float]] = {}
    for method in group.methods:
        cells = [group.published(task, method) for task in tasks]
        table[method, "mean"], table[method, "error"] = [c[0] for c in cells], [c[1] for c in cells]
    for setting in settings:
        mine = results[results["setting"] == setting].set_index("task") if len(results) else results
        for part in ("mean", "error"):
            table[column_name(setting), part] = [mine[part].get(task, math.nan) for task in tasks]
    return pd.DataFrame(table, index=pd.Index(tasks, name="task"), dtype=float)


def column_name(setting: str) -> str:
    """`ours, strategy=uniform`."""
    return f"{OURS}, {setting}" if setting else OURS


def average(values: pd.DataFrame) -> pd.Series:
    """Mean over the tasks of each column, and of ours its standard error; NaN where a task is missing."""
    means = values.xs("mean", axis=1, level=1).mean(skipna=False)
    errors = np.sqrt((values.xs("error", axis=1, level=1) ** 2).sum(skipna=False)) / len(values)
    errors[[not name.startswith(OURS) for name in errors.index]] = math.nan  # none was published
    return pd.concat({"mean": means, "error": errors}).swaplevel()


def group_section(group: Group, values: pd.DataFrame) -> str:
    """The group's table in markdown, with averages where they are complete."""
    tasks, columns = list(values.index), list(dict.fromkeys(values.columns.get_level_values(0)))
    own = [name for name in columns if name.startswith(OURS)]

    def cells(row: pd.Series) -> list[str]:
        return [_cell(row[name, "mean"], row[name, "error"], name not in own) for name in columns]

    rows = [[task, *cells(values.loc[task])] for task in tasks]
    if group.tasks:
        whole = average(values)
        there = values.xs("mean", axis=1, level=1).notna().sum()
        partial = {name for name in own if there[name] < len(tasks)}
        few = {name: f"{there[name]} of {len(tasks)} tasks" for name in partial}
        texts = dict(zip(columns, cells(whole), strict=True)) | few
        rows.append([f"average of {len(tasks)}", *texts.values()])
        started = [(name, "mean") for name in own if there[name]]
        common = [task for task in tasks if values.loc[task, started].notna().all()]
        if partial and started and len(common) > 1:
            rows.append([f"average of the {len(common)} with ours", *cells(average(values.loc[common]))])
    text = f"## {group.name}\n\n{markdown_table(['task', *columns], rows)}\n"
    if group.later:
        text += f"\nLater methods, average of the same {len(tasks)}: {_listed(group.later)}.\n"
    return text + (f"\n{group.source.strip()}\n" if group.source else "")


def _cell(value: float, error: float, published: bool) -> str:
    if not published or value != value:
        return error_text(value, error)
    return f"{value:.1f} ± {error:.1f}" if error == error else f"{value:.1f}"


def _listed(averages: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in averages.items())


def detail_section(results: pd.DataFrame, settings: Sequence[str]) -> str:
    """Seeds x episodes, both means and the IQM of everything of ours that is shown."""
    rows = []
    for _, row in results[results["setting"].isin(settings)].iterrows():
        each = f"{row['fewest']}" if row["fewest"] == row["most"] else f"{row['fewest']} to {row['most']}"
        unit = " (return)" if row["value"] == "return" else ""
        paper = error_text(row["paper_mean"], row["paper_error"])
        middle = interval_text(row["iqm"], row["iqm_low"], row["iqm_high"])
        numbers = [error_text(row["mean"], row["error"]), middle, paper]
        rows.append([f"{row['task']}{unit}", row["setting"] or "-", f"{row['seeds']} x {each}", *numbers])
    titles = ["task", "setting", "seeds x episodes", "mean ± s.e. over seeds", "IQM [95 %]"]
    return f"## Ours in detail\n\n{markdown_table([*titles, 'first 3 of each seed'], rows)}\n\n{METHODS}\n"


def notes(study: Study, results: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """What a reader must know before comparing: other data, left-out settings and trials."""
    lines = [study.gone_text] if study.gone else []
    if results.empty:
        return [*lines, "No trial has evaluated episodes yet, so that our cells are empty."]
    placed = results[results["group"] != OTHER].drop_duplicates(["task", "data"])
    others = placed[[not resolve_id(data).startswith("d4rl/") for data in placed["data"]]]
    if len(others):
        listed = ", ".join(
            f"{task} ({data or 'unknown'})" for task, data in zip(others["task"], others["data"], strict=True)
        )
        lines.append(f"Not D4RL v2's data, unlike the published numbers beside it: {listed}.")
    missing = results["setting"].nunique() - len(settings)
    if missing:
        lines.append(
            f"{missing} further settings are in benchmark.parquet: no table shows more than {MOST_COLUMNS}."
        )
    stopped = int((study.trials["status"] == "stopped").sum())
    if stopped:
        lines.append(f"{stopped} trials that the scheduler stopped early are left out.")
    failed = study.trials.loc[study.trials["status"] == "failed", "trial"]
    if len(failed):
        lines.append(f"Failed, with the episodes they had: {'; '.join(failed)}.")
    return lines


def tidy_table(groups: Sequence[Group], results: pd.DataFrame) -> pd.DataFrame:
    """A row for each number: group, task, column, published, mean, error, and of ours the details."""
    rows = [
        {
            "group": group.name,
            "task": task,
            "column": method,
            "published": True,
            "mean": value,
            "error": error,
        }
        for group in groups
        for task in group.tasks
        for method in group.methods
        for value, error in [group.published(task, method)]
    ]
    mine = results.assign(published=False, column=[column_name(x) for x in results.get("setting", [])])
    return pd.concat([pd.DataFrame(rows), mine], ignore_index=True)


def benchmark_figure(values: pd.DataFrame, xlabel: str, path: Path) -> None:
    """A line for each task: published means as hollow marks, ours filled, with standard errors."""
    columns = list(dict.fromkeys(values.columns.get_level_values(0)))
    with open_figure(path, 8.0, 1.2 + 0.45 * len(values) + 0.2 * len(columns)) as figure:
        axes = figure.add_subplot()
        rows = np.arange(len(values))[::-1]
        for place, name in enumerate(columns):
            at = rows + 0.3 - 0.6 * (place + 0.5) / len(columns)
            mine = name.startswith(OURS)
            color = COLORS[(len(columns) - 1 - place) % len(COLORS)] if mine else "#777777"
            axes.errorbar(
                values[name, "mean"],
                at,
                xerr=values[name, "error"].fillna(0.0),
                fmt="D" if mine else "osv^<>"[place % 6],
                color=color,
                markerfacecolor=color if mine else "white",
                markersize=7 if mine else 5,
                elinewidth=1.5,
                label=name,
            )
        axes.set_yticks(rows, values.index)
        for row in rows[:-1]:
            axes.axhline(row - 0.5, color="#DDDDDD", linewidth=0.8)
        axes.set_ylim(-0.6, len(values) - 0.4)
        axes.set_xlabel(xlabel)
        tidy(axes)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside right upper", frameon=False, fontsize=SMALL)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="benchmark_table.py", description=__doc__)
    parser.add_argument("name", metavar="SWEEP", help="name of a sweep in MLflow, or its run id")
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    study, groups = load_study(options.name, uri), read_published()
    results = ours(study, groups)
    settings = chosen_settings(results)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [f"# {study.name} beside published results\n"]
    sections.append("".join(f"- {line}\n" for line in notes(study, results, settings)))
    other = Group(OTHER, "", [], {}, {})
    for group in [*groups, other]:
        mine = results[results["group"] == group.name] if len(results) else results
        if mine.empty and group.name in (OTHER, "AntMaze"):
            continue
        values = values_of(group, mine, settings)
        sections.append(group_section(group, values))
        if len(mine):
            xlabel = "return" if mine["value"].eq("return").any() else "normalised score"
            name = f"benchmark-{group.name.split()[0].lower()}"
            sections.append(write_figure(partial(benchmark_figure, values, xlabel), folder, name) + "\n")
    if len(results):
        sections.append(detail_section(results, settings))
    write_table(tidy_table(groups, results), folder / "benchmark.parquet")
    write_report("\n".join(sections), folder / "benchmark.md")


if __name__ == "__main__":
    sys.exit(main())
