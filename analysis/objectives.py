"""Objectives side by side on the same episodes: python analysis/objectives.py SWEEP [--against N]

A table for each data set of the sweep, whose trials play in the same environment from the same starts:
returns, their share of what the data returns, and the differences from one of the trials.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from compare_runs import Side, differences
from published import Group, read_published, task_name
from study import (
    Study,
    load_study,
    markdown_table,
    run_script,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.data.d4rl_names import resolve_id
from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import COLORS, open_figure, say_nothing, tidy
from tt_ray.evaluation.scores import aggregate_interval
from tt_ray.texts import interval_text, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRIAL, DATA, PUBLISHED = "trial", "data", "published"
GREEDY = "greedy decoding"
ALONE = {"planner.beam_width": "1", "planner.n_expand": "1", "planner.k_act": "1"}
FACTS = re.compile(r"- data set (\S+): (\d+) episodes, mean return (\S+?)(?: \(score (\S+)\))?,")
"""A line of a sweep's results.md, which `DataFacts` writes."""
COLUMNS = {  # of the table, and what of a row each of them shows
    "trial": "trial",
    "objective": "objective",
    "horizon": "horizon",
    "beam width": "beam_width",
    "episodes": "episodes",
    "return [95 %]": "return",
    "score": "score",
    "% of the data": "of_data",
    "% rewarded": "rewarded",
    "difference [95 %]": "difference",
    "s.e. over seeds": "seed_error",
}
METHODS = """\
Intervals are 95 % bootstraps: of a return over episodes, resampled within each training seed; of a difference
of returns over pairs of episodes that began alike, each a mean over training seeds. They say how sure the
episodes make us of these models. The standard error of the difference over training seeds says what other
models might have done; one training seed has none. Rewarded: per cent of the episodes with a return above 0,
where every return is a count."""


@dataclass(frozen=True)
class Facts:
    """What a sweep says of a data set."""

    episodes: int
    mean_return: float
    score: float
    """NaN where the data set has no reference scores."""


def data_facts(study: Study) -> dict[str, Facts]:
    """The sweep's data sets by id, as its results.md has them; empty where it has none in MLflow."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = MlflowClient().download_artifacts(study.run_id, "results.md", folder)
            text = Path(path).read_text(encoding="utf-8")
        except (MlflowException, OSError):
            return {}
    return {
        name: Facts(int(count), float(mean), float(score or "nan"))
        for name, count, mean, score in FACTS.findall(text)
    }


def compared(study: Study, against: int | None = None) -> pd.DataFrame:
    """A row for each finished trial, then each data set's own mean and what was published for its task.

    Columns: task (id of the data set), kind (trial, data or published), trial (or the published method),
    index, objective, horizon, beam_width, episodes, return, low, high, score; of_data and rewarded (per
    cent); reference (the trial that the others of its task are compared with, by its name), pairs,
    difference, difference_low, difference_high, seed_error. What a row does not have is None or NaN.

    Raises:
        UserError: no trial has finished, or none of them has the number `against`.
    """
    trials = study.trials[study.trials["status"].eq("finished")]
    if trials.empty:
        raise UserError(f"sweep {study.name!r} has no finished trials to compare")
    if against is not None and against not in set(trials["index"]):
        raise UserError(f"--against {against}: sweep {study.name!r} has no finished trial of that number")
    settings, facts, groups = settings_of(study), data_facts(study), read_published()
    data = trials["fingerprint"].map(lambda trial: settings.get(trial, {}).get("dataset.id", study.name))
    rows: list[dict[str, Any]] = []
    for name, mine in trials.groupby(data, sort=False):
        known = facts.get(resolve_id(name))
        own = _trial_rows(study, mine, settings, against)
        for row in own:
            row["of_data"] = _per_cent(row["return"], math.nan if known is None else known.mean_return)
        further = [*_data_rows(known), *_published_rows(task_name(name, groups), groups)]
        rows += [{"task": name, **row} for row in [*own, *further]]
    return pd.DataFrame(rows, columns=["task", *_NAMES])


_NAMES = (
    *("kind", "trial", "index", "objective", "horizon", "beam_width", "episodes", "return", "low", "high"),
    *("score", "of_data", "rewarded", "reference", "pairs"),
    *("difference", "difference_low", "difference_high", "seed_error"),
)


def settings_of(study: Study) -> dict[str, dict[str, str]]:
    """All settings of each trial, not only the searched ones, as MLflow has them; by its fingerprint."""
    found: dict[str, dict[str, str]] = {}
    for _, cell in study.cells.iterrows():
        given = {str(key): value for key, value in cell.items() if isinstance(value, str)}
        params = {key.removeprefix("params."): given[key] for key in given if key.startswith("params.")}
        found.setdefault(given["tags.trial"], params)
    return found


def objective_of(settings: Mapping[str, str]) -> str:
    """What a trial's search maximises, by its settings; greedy decoding, where nothing is searched."""
    alone = all(settings.get(key) == value for key, value in ALONE.items())
    return GREEDY if alone else settings.get("planner.objective", "return")


def _trial_rows(
    study: Study, trials: pd.DataFrame, settings: Mapping[str, Mapping[str, str]], against: int | None
) -> list[dict[str, Any]]:
    """Rows of one data set's trials; the first, or number `against` if it is one, is the reference."""
    sides = {}
    for index, (_, trial) in zip(trials["index"], trials.iterrows(), strict=True):
        mine = study.episodes[study.episodes["fingerprint"] == trial["fingerprint"]]
        mine = mine[~mine["fresh"]].assign(score_=mine["score"], score=math.nan)  # compared by returns
        sides[index] = Side(str(trial["trial"]), "", mine, pd.DataFrame())
    reference = sides[against if against in sides else next(iter(sides))]
    returns = np.concatenate([side.episodes["episode_return"].to_numpy() for side in sides.values()])
    counts = bool(np.all((returns >= 0) & (returns == np.round(returns))))
    rows = []
    for (_, trial), (index, side) in zip(trials.iterrows(), sides.items(), strict=True):
        chosen = settings.get(trial["fingerprint"], {})
        sizes = {name: chosen.get(f"planner.{name}") for name in ("horizon", "beam_width")}
        row = {"kind": TRIAL, "trial": side.label, "index": index, "objective": objective_of(chosen), **sizes}
        rows.append({**row, **_figures(side.episodes, counts), **_difference(reference, side)})
    return rows


def _figures(episodes: pd.DataFrame, counts: bool) -> dict[str, float]:
    """What a trial's episodes say; `counts`: a return says how often an episode was rewarded."""
    seeds = [seed["episode_return"].to_numpy(dtype=float) for _, seed in episodes.groupby("training_seed")]
    interval = aggregate_interval(seeds).interval
    return {
        "episodes": len(episodes),
        "return": interval.value,
        "low": interval.low,
        "high": interval.high,
        "score": float(episodes["score_"].mean()),
        "rewarded": 100 * float((episodes["episode_return"] > 0).mean()) if counts else math.nan,
    }


def _difference(reference: Side, side: Side) -> dict[str, Any]:
    """The side's differences from the reference; nothing of the reference itself."""
    if side is reference:
        return {"reference": side.label}
    found = differences(reference, side)
    if found.empty:  # no episode seed in common
        return {"reference": reference.label}
    row = found.iloc[0]
    names = {"pairs": "pairs", "difference": "difference", "low": "difference_low", "high": "difference_high"}
    figures = {ours: row[theirs] for theirs, ours in {**names, "seed_error": "seed_error"}.items()}
    return {"reference": reference.label, **figures}


def _data_rows(facts: Facts | None) -> list[dict[str, Any]]:
    if facts is None:
        return []
    whole = _per_cent(facts.mean_return, facts.mean_return)
    own = {"episodes": facts.episodes, "return": facts.mean_return, "score": facts.score, "of_data": whole}
    return [{"kind": DATA, "trial": "the data itself", **own}]


def _published_rows(task: str | None, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each method that was published for the task, its figure in the column of the same measure."""
    return [
        {"kind": PUBLISHED, "trial": f"published: {method}", group.measure: group.published(task, method)[0]}
        for group in groups
        if task is not None and task in group.tasks
        for method in group.methods
    ]


def _per_cent(value: float, whole: float) -> float:
    """NaN of what is not positive: a share of a negative return says nothing."""
    return 100 * value / whole if whole > 0 else math.nan


def task_table(rows: pd.DataFrame) -> str:
    """The rows of one data set in markdown, without the columns that none of them fills."""
    texts = [[_text(row, name) for name in COLUMNS.values()] for _, row in rows.iterrows()]
    kept = [place for place in range(len(COLUMNS)) if any(text[place] for text in texts)]
    titles = list(COLUMNS)
    return markdown_table([titles[i] for i in kept], [[text[i] for i in kept] for text in texts])


def _text(row: pd.Series, name: str) -> str:
    value = row[name]
    if name == "return":
        return interval_text(value, row["low"], row["high"])
    if name == "difference":
        text = interval_text(value, row["difference_low"], row["difference_high"])
        return "reference" if row["kind"] == TRIAL and row["trial"] == row["reference"] else text
    if name in ("of_data", "rewarded", "score"):
        return "" if pd.isna(value) else f"{value:.1f}"
    if name == "episodes":
        return "" if pd.isna(value) else f"{value:.0f}"
    return number_text(value) if isinstance(value, float) else str(value or "")


def returns_figure(table: pd.DataFrame, path: Path) -> None:
    """A panel for each data set: every trial's mean return and its interval; dashed, the data's mean."""
    tasks = list(dict.fromkeys(table["task"]))
    counts = [int(table[table["task"] == task]["kind"].eq(TRIAL).sum()) for task in tasks]
    heights = [1.0 + 0.35 * max(2, count) for count in counts]
    with open_figure(path, 7.0, max(1.5, sum(heights))) as figure:
        if table.empty:
            say_nothing(figure)
            return
        panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
        objectives = list(dict.fromkeys(table["objective"].dropna()))
        colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(objectives)}
        for axes, task in zip(panels, tasks, strict=True):
            _panel(axes, table[table["task"] == task], colors)
            axes.set_title(task)
        panels[-1].set_xlabel("mean return and its 95 % interval; dashed: the data's mean return")


def _panel(axes: Axes, rows: pd.DataFrame, colors: Mapping[str, str]) -> None:
    trials, data = rows[rows["kind"] == TRIAL], rows[rows["kind"] == DATA]
    places = np.arange(len(trials))[::-1]
    for place, (_, row) in zip(places, trials.iterrows(), strict=True):
        reach = [[row["return"] - row["low"]], [row["high"] - row["return"]]]
        axes.errorbar(row["return"], place, xerr=reach, fmt="D", color=colors[row["objective"]], capsize=4)
    for value in data["return"]:
        axes.axvline(value, color="black", linewidth=1.0, linestyle="--")
    axes.set_yticks(places, list(trials["trial"]))
    axes.set_ylim(-0.6, len(trials) - 0.4)
    tidy(axes)


def report(study: Study, table: pd.DataFrame, figure: str) -> str:
    """The page: the question, a table for each data set, the figure, how the figures come about."""
    sections = [f"# {study.name}: objectives side by side", study.tags.get("question", "")]
    groups = read_published()
    for task, rows in table.groupby("task", sort=False):
        known = task_name(str(task), groups)
        sources = [f"Published: {group.source}" for group in groups if known in group.tasks]
        against = f"Differences are from `{rows['reference'].dropna().iloc[0]}`."
        several = [against] if rows["kind"].eq(TRIAL).sum() > 1 else []
        sections += [f"## {task}", task_table(rows), *several, *sources]
    sections += [figure, METHODS, study.gone_text]
    return "\n\n".join(filter(None, sections)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    about = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog="objectives.py", description=about)
    parser.add_argument("name", metavar="SWEEP", help="name of a sweep in MLflow, or its run id")
    parser.add_argument(
        "--against",
        type=int,
        metavar="N",
        help="number of the trial that the others of its data are compared with (default: the first)",
    )
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    study = load_study(options.name, uri)
    table = compared(study, options.against)
    folder.mkdir(parents=True, exist_ok=True)
    figure = write_figure(partial(returns_figure, table), folder, "returns")
    write_table(table, folder / "objectives.parquet")
    write_report(report(study, table, figure), folder / "objectives.md")


if __name__ == "__main__":
    sys.exit(main())
