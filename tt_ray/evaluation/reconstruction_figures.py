"""A figure of what bins lose: by kind and number of bins, and of each dimension."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tt_ray.evaluation.figure_parts import COLORS, open_figure, round_numbers, tidy
from tt_ray.evaluation.reconstruction import KINDS, STRATEGIES
from tt_ray.texts import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SMALL = 8  # points
MOST_NUMBERS = 40
"""A map with more dimensions has no room for numbers."""
FLOOR = 1e-6
"""Errors below this, which float32 makes, are drawn as this."""
STYLES = dict(zip(STRATEGIES, (("o", COLORS[5]), ("s", COLORS[0])), strict=True))


def reconstruction_figure(table: pd.DataFrame, path: Path) -> None:
    """`reconstruction_table` as a picture.

    Above: rmse of each kind against the number of bins (the mean, and pale each dimension), and the entropy
    of the tokens; below: rmse of each dimension with each choice of bins.
    """
    choices = table.drop_duplicates(["strategy", "num_bins"])
    dimensions = int(table["dimension"].nunique())
    width = max(13.0, 0.46 * dimensions + 2.5)
    with open_figure(path, width, 4.6 + 0.32 * len(choices) + 0.9) as figure:
        heights = [3.6, 0.32 * len(choices) + 1.9]
        (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        _curves(upper, table)
        _map(lower.add_subplot(), lower, table, dimensions)
        figure.suptitle(f"{table['dataset'].iloc[0]}: what bins lose of held-out episodes", fontsize=11)


def _curves(figure: SubFigure, table: pd.DataFrame) -> None:
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[len(KINDS), 1.25])[0]
    panels, last = left.subplots(1, len(KINDS), squeeze=False, sharey=True)[0], right.add_subplot()
    for panel, kind in zip(panels, KINDS, strict=True):
        for strategy, group in table[table["kind"] == kind].groupby("strategy", sort=False):
            marker, color = STYLES[str(strategy)]
            for _, dimension in group.groupby("dimension"):
                panel.plot(
                    dimension["num_bins"],
                    dimension["rmse"].clip(lower=FLOOR),
                    color=color,
                    alpha=0.25,
                    linewidth=0.7,
                )
            means = group.groupby("num_bins")["rmse"].mean().clip(lower=FLOOR)
            panel.plot(means.index, means, marker, linestyle="-", color=color, label=strategy, markersize=5)
        panel.set(xscale="log", yscale="log", title=kind)
    for strategy, group in table.groupby("strategy", sort=False):
        marker, color = STYLES[str(strategy)]
        means = group.groupby("num_bins")["entropy"].mean()
        last.plot(means.index, means, marker, linestyle="-", color=color, label=strategy, markersize=5)
    counts = np.unique(table["num_bins"])
    last.plot(counts, np.log2(counts), "--", color="#777777", linewidth=1, label="most there can be")
    last.set(xscale="log", title="entropy, mean")
    last.set_ylabel("bits a token", fontsize=SMALL)
    panels[0].set_ylabel("rmse, standard deviations", fontsize=SMALL)
    panels[0].set_yticks(*_ticks(*panels[0].get_ylim()))
    panels[0].set_yticks([], minor=True)
    for panel in (*panels, last):
        panel.set_xticks(counts, [str(count) for count in counts], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("bins", fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
        panel.title.set_fontsize(SMALL + 2)
        tidy(panel)
    last.legend(fontsize=SMALL, loc="lower right")


def _map(axes: Axes, figure: SubFigure, table: pd.DataFrame, dimensions: int) -> None:
    """rmse of each dimension (columns) with each choice of bins (rows), darker where more is lost."""
    from matplotlib.colors import LogNorm

    rows = table.drop_duplicates(["strategy", "num_bins"])
    errors = table["rmse"].to_numpy(np.float64).reshape(len(rows), dimensions)
    shown = np.maximum(errors, FLOOR)
    low = max(FLOOR, float(np.quantile(shown, 0.02)))
    norm = LogNorm(low, max(float(shown.max()), 2 * low), clip=True)
    image = axes.imshow(shown, cmap="magma_r", norm=norm, aspect="auto", interpolation="nearest")
    if dimensions <= MOST_NUMBERS:
        for (row, column), error in np.ndenumerate(errors):
            color = "white" if norm(shown[row, column]) > 0.55 else "black"
            text = number_text(error) if error >= 0.001 else f"{error:.0e}".replace("e-0", "e-")
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    texts = [f"{strategy}, {bins}" for strategy, bins in zip(rows["strategy"], rows["num_bins"], strict=True)]
    axes.set_yticks(range(len(rows)), texts, fontsize=SMALL)
    names = table["name"].iloc[:dimensions]
    axes.set_xticks(range(dimensions), names, fontsize=SMALL, rotation=90)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("rmse, standard deviations", fontsize=SMALL)
    bar.minorticks_off()
    places, texts = _ticks(float(norm.vmin or low), float(norm.vmax or low))
    bar.set_ticks(places, labels=texts, fontsize=SMALL)


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis as plain numbers."""
    places = round_numbers(low, high, log=True)
    return places, [f"{place:g}" for place in places]
