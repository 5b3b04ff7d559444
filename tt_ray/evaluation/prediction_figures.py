"""Figures of long-horizon prediction: log-likelihood by horizon, and error by dimension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tt_ray.evaluation.figure_parts import COLORS, SMALL, open_figure, tidy

FULL, MARKOVIAN, ENSEMBLE, RECORDED = "transformer", "markovian", "ensemble", "ensemble_recorded_actions"
ORACLE = "oracle"
LABELS = {
    FULL: "Transformer",
    MARKOVIAN: "Markovian Transformer",
    ENSEMBLE: "feed-forward ensemble",
    RECORDED: "ensemble, recorded actions",
    ORACLE: "discrete oracle",
}
"""The models as a reader knows them, in the order of the figures."""
STYLES = dict(zip(LABELS, ("-", "-", "-", "--", ":"), strict=True))
TINTS = dict(zip(LABELS, (COLORS[0], COLORS[1], COLORS[2], COLORS[2], "black"), strict=True))


def likelihood_figure(table: pd.DataFrame, path: Path, title: str) -> None:
    """Mean log-likelihood and its interval by horizon, of `prediction.likelihood_table`.

    Below, the share of rollouts that have not ended, where any has.
    """
    ended = bool((table["live"] < 1).any())
    with open_figure(path, 7.5, 6.0 if ended else 4.5) as figure:
        panels = figure.subplots(1 + ended, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + ended])
        upper = panels[0, 0]
        for model, rows in _by_model(table):
            style = {"color": TINTS[model], "linestyle": STYLES[model]}
            upper.plot(rows["step"], rows["log_likelihood"], label=LABELS[model], linewidth=2, **style)
            upper.fill_between(
                rows["step"], rows["ci_low"], rows["ci_high"], color=TINTS[model], alpha=0.12, linewidth=0
            )
            if ended:
                panels[1, 0].plot(rows["step"], rows["live"], linewidth=2, **style)
        upper.set_title(title, fontsize=SMALL + 1, loc="left")
        upper.set_ylabel("log-likelihood of the reference state")
        # Outside: lines fill the axes from corner to corner.
        upper.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if ended:
            panels[1, 0].set(ylabel="rollouts alive", ylim=(-0.03, 1.03))
        panels[-1, 0].set(xlabel="steps predicted", xlim=(1, max(2, table["step"].max())))
        panels[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        for axes in panels.flat:
            tidy(axes)


def error_figure(table: pd.DataFrame, path: Path, names: Sequence[str], column: str = "error_mean") -> None:
    """Error by dimension and horizon, one map for each model but the oracle, of `prediction.error_table`.

    `names` are the dimensions'. All maps share their colours: standard deviations of the dimension.
    """
    models = [(model, rows) for model, rows in _by_model(table) if model != ORACLE]
    top = float(np.nanquantile(table.loc[table["model"] != ORACLE, column], 0.99))
    height = 1.4 + 0.22 * len(names)
    with open_figure(path, 1.6 + 2.6 * len(models), height) as figure:
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (model, rows) in zip(panels, models, strict=True):
            grid = rows.pivot_table(index="dimension", columns="step", values=column, dropna=False)
            last = float(grid.columns.max())
            extent = (0.5, last + 0.5, len(names) - 0.5, -0.5)
            image = axes.imshow(
                grid, aspect="auto", cmap="viridis", vmin=0, vmax=max(top, 1e-9), extent=extent,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(LABELS[model], fontsize=SMALL + 1)
            axes.set_xlabel("steps predicted", fontsize=SMALL)
        panels[0].set_yticks(range(len(names)), list(names), fontsize=SMALL)
        bar = figure.colorbar(image, ax=list(panels), shrink=0.9, extend="max")
        bar.set_label("error in standard deviations", fontsize=SMALL)


def _by_model(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each model that is there, in the order of `LABELS`."""
    return [(model, table[table["model"] == model]) for model in LABELS if (table["model"] == model).any()]
