"""What a finer or better placed bin is worth: python analysis/discretisation.py SWEEP BINS.parquet [...]

Each trial of a sweep over discretizer.strategy and discretizer.num_bins beside what its bins lose of held-out
data. The tables of losses are those of `tt-ray data bins`, one for each data set of the sweep.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from study import (
    Study,
    load_study,
    markdown_table,
    run_script,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import COLORS, open_figure, say_nothing, tidy
from tt_ray.search import interval_names
from tt_ray.texts import interval_text, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ERRORS = ("rmse", "median_error", "max_error")
JOIN = ["dataset", "strategy", "num_bins"]
STYLES = {"uniform": ("o", COLORS[5]), "quantile": ("s", COLORS[0])}


def joined(study: Study, losses: pd.DataFrame) -> pd.DataFrame:
    """The finished trials with their bins, and the mean over the dimensions of each column of `losses`.

    Raises:
        UserError: the losses of a trial's bins are not in the tables.
    """
    trials = study.trials[study.trials["status"].eq("finished") & study.trials[study.metric].notna()].copy()
    for name, param in zip(JOIN, ("dataset.id", "discretizer.strategy", "discretizer.num_bins"), strict=True):
        trials[name] = _setting(study, trials, param)
    trials["num_bins"] = pd.to_numeric(trials["num_bins"]).astype(int)
    means = losses.groupby(JOIN, as_index=False)[[*ERRORS, "in_use", "entropy"]].mean()
    table = trials.merge(means, on=JOIN, how="left", validate="many_to_one")
    missing = table[table["rmse"].isna()]
    if len(missing):
        first = missing.iloc[0]
        counts = sorted(missing.loc[missing["dataset"] == first["dataset"], "num_bins"].unique())
        asked = f"tt-ray data bins {shlex.quote(first['dataset'])} --bins {','.join(map(str, counts))}"
        raise UserError(
            f"the tables have no {first['strategy']} bins, {first['num_bins']} a dimension, of "
            f"{first['dataset']}, which trial {first['trial']!r} has: make one with `{asked}`"
        )
    return table


def _setting(study: Study, trials: pd.DataFrame, key: str) -> pd.Series:
    """A setting of each trial: searched, or else as its runs have it."""
    if key in trials:
        return trials[key]
    column = study.cells.get(f"params.{key}", pd.Series(dtype=object))
    found = dict(zip(study.cells.get("tags.trial", []), column, strict=False))
    values = trials["fingerprint"].map(found)
    if values.isna().any():
        raise UserError(f"sweep {study.name!r}: no run of trial {trials['trial'].iloc[0]!r} says its {key}")
    return values


def error_figure(table: pd.DataFrame, metric: str, error: str, path: Path) -> None:
    """The metric against the mean error, a panel for each data set; a line joins the bins of a strategy."""
    cases = list(dict.fromkeys(zip(table["case"], table["dataset"], strict=True)))
    with open_figure(path, 5.6 * max(1, len(cases)), 4.2) as figure:
        if table.empty:
            say_nothing(figure)
            return
        for place, (case, dataset) in enumerate(cases, start=1):
            axes = figure.add_subplot(1, len(cases), place)
            mine = table[(table["case"] == case) & (table["dataset"] == dataset)]
            for strategy, group in mine.groupby("strategy", sort=False):
                _line(axes, group.sort_values(error), metric, error, str(strategy))
            axes.set_xscale("log")
            axes.set_xlabel(f"{error} of held-out data, mean over dimensions, standard deviations")
            axes.set_ylabel(metric)
            axes.set_title(case or dataset)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
            axes.legend(title="bins of a dimension as numbers", fontsize=8, title_fontsize=8)
            tidy(axes)


def _line(axes: Axes, group: pd.DataFrame, metric: str, error: str, strategy: str) -> None:
    marker, color = STYLES.get(strategy, ("D", "#555555"))
    low, high = interval_names(metric) or ("", "")
    axes.plot(group[error], group[metric], f"{marker}-", color=color, label=strategy, markersize=5)
    if low in group and high in group:
        axes.vlines(group[error], group[low], group[high], color=color, alpha=0.4)
    for x, y, bins in zip(group[error], group[metric], group["num_bins"], strict=True):
        axes.annotate(str(bins), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=color)


def rank_text(table: pd.DataFrame, metric: str, error: str) -> str:
    """How the metric goes with the error over the trials of each data set: Spearman's rank correlation."""
    rows = []
    for (case, dataset), group in table.groupby(["case", "dataset"], sort=False):
        value = spearmanr(group[error], group[metric])[0] if len(group) > 2 else np.nan
        rows.append([case or dataset, str(len(group)), number_text(float(value))])
    return markdown_table(["data", "trials", f"rank correlation of {error} and {metric}"], rows)


def report(study: Study, table: pd.DataFrame, error: str, figure: str) -> str:
    """The page: the question, the figure, every trial with its bins."""
    rows = []
    low, high = interval_names(study.metric) or ("", "")
    for _, row in table.sort_values(["case", "dataset", error]).iterrows():
        score = interval_text(row[study.metric], row.get(low, np.nan), row.get(high, np.nan))
        errors = [number_text(row[name]) for name in (*ERRORS, "entropy")]
        rows.append([row["case"] or row["dataset"], row["strategy"], str(row["num_bins"]), *errors, score])
    titles = ["data", "strategy", "bins", *ERRORS, "entropy", study.metric]
    sections = [
        f"# {study.name}: bins and {study.metric}",
        study.tags.get("question", ""),
        figure,
        markdown_table(titles, rows),
        "Errors are means over the dimensions, in their standard deviations, on episodes that the bins were "
        "not fitted to; entropy in bits a token. Bars are the table's intervals of the metric.",
        rank_text(table, study.metric, error),
        "A correlation near -1: the less the bins lose, the larger the metric. It is over as many trials as "
        "stand beside it, which share their data and differ in little else.",
        study.gone_text,
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="discretisation.py", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("name", metavar="SWEEP", help="name of a sweep in MLflow, or its run id")
    parser.add_argument("tables", metavar="BINS", nargs="+", type=Path, help="tables of `tt-ray data bins`")
    parser.add_argument("--error", choices=ERRORS, default=ERRORS[0], help="error that the figure shows")
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    losses = pd.concat([_losses(path) for path in options.tables], ignore_index=True)
    losses = losses.drop_duplicates([*JOIN, "dimension"], keep="last")
    study = load_study(options.name, uri)
    table = joined(study, losses)
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(error_figure, table, study.metric, options.error)
    figure = write_figure(draw, folder, "discretisation")
    write_table(table, folder / "discretisation.parquet")
    write_report(report(study, table, options.error, figure), folder / "discretisation.md")


def _losses(path: Path) -> pd.DataFrame:
    """A table of `tt-ray data bins`; `UserError` where it is none."""
    try:
        table = pd.read_parquet(path)
        return table[[*JOIN, "dimension", *ERRORS, "in_use", "entropy"]]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no table of `tt-ray data bins` that can be read ({reason})") from error


if __name__ == "__main__":
    sys.exit(main())
