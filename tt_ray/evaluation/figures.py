"""Figures of returns: of policies beside each other, and of a data set; and of a training's curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_ray.data.episodes import best_tenth
from tt_ray.evaluation.figure_parts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SMALL,
    open_figure,
    say_nothing,
    tidy,
)
from tt_ray.evaluation.scores import Interval
from tt_ray.texts import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 20
"""Returns of fewer episodes are dots alone; of more, their distribution lies above the dots."""
MOST_DOTS = 300

Points = tuple[Sequence[int], Sequence[float]]
"""Training steps and a metric's values there."""
KINDS = ("observation", "action", "reward", "value")


def return_figure(rows: Sequence[tuple[str, Sequence[float], Interval]], path: Path) -> None:
    """Every episode's return as a dot, mean and interval as a bar; a row is (label, returns, interval).

    Policies that have a model are drawn in a colour of their own: those whose label starts with `planner`.
    """
    with open_figure(path, 7.5, 0.9 + 0.62 * len(rows)) as figure:
        axes = figure.add_subplot()
        jitter = np.random.default_rng(0)
        ends = [value for _, returns, _ in rows for value in (min(returns), max(returns))]
        grid = np.linspace(min(ends), max(ends), 300) if max(ends) > min(ends) else None
        for place, (label, returns, interval) in enumerate(reversed(rows)):
            _return_row(axes, place, label, np.asarray(returns, dtype=np.float64), interval, jitter, grid)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
        axes.set_ylim(-0.5, len(rows) - 0.35)
        axes.set_xlabel("return of an episode (dots and their density), mean and its interval (diamond)")
        tidy(axes)
        axes.grid(visible=False, axis="y")


def _return_row(
    axes: Axes,
    place: int,
    label: str,
    returns: NDArray[np.float64],
    interval: Interval,
    jitter: np.random.Generator,
    grid: NDArray[np.float64] | None,
) -> None:
    """A row's dots below its line, their distribution above it, the mean on it."""
    color = RED if label.startswith("planner") else BLUE
    shown = returns if len(returns) <= MOST_DOTS else jitter.choice(returns, MOST_DOTS, replace=False)
    heights = place - 0.17 + jitter.uniform(-0.11, 0.11, len(shown))
    axes.plot(shown, heights, "o", color=color, markersize=3, alpha=0.5, markeredgewidth=0)
    if grid is not None and len(returns) > FEW:
        middle = float(np.subtract(*np.quantile(returns, [0.75, 0.25]))) / 1.34
        spread = min(float(returns.std()), middle or np.inf)  # Silverman's rule
        width = max(0.9 * spread * len(returns) ** -0.2, (grid[-1] - grid[0]) / 150)
        inside = grid[(grid >= returns.min() - width) & (grid <= returns.max() + width)]
        density = np.exp(-0.5 * ((inside[:, None] - shown) / width) ** 2).sum(axis=1)
        axes.fill_between(
            inside, place, place + 0.4 * density / density.max(), color=color, alpha=0.25, linewidth=0
        )
    bar = [[interval.value - interval.low], [interval.high - interval.value]]
    axes.errorbar(
        interval.value, place, xerr=bar, fmt="D", color="black", markersize=4.5, capsize=4, linewidth=1.6
    )


def data_figure(returns: ArrayLike, lengths: ArrayLike, path: Path, title: str) -> None:
    """How a data set's episodes are spread: returns [E], their mean and best tenth marked; lengths [E]."""
    returns, lengths = np.asarray(returns, dtype=np.float64), np.asarray(lengths)
    best = float(best_tenth(returns).mean())
    marks = (("mean", float(returns.mean()), "-"), ("best tenth, mean", best, "--"))
    with open_figure(path, 8.5, 3.0) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        left.hist(returns, bins=min(60, max(10, len(returns) // 5)), color=BLUE, alpha=0.75)
        for label, value, style in marks:
            text = f"{label} {number_text(value)}"
            left.axvline(value, color="black", linestyle=style, linewidth=1.4, label=text)
        right.hist(lengths, bins=min(60, max(10, len(returns) // 5)), color=GREY, alpha=0.75)
        left.set(xlabel="return of an episode", ylabel="episodes")
        right.set(xlabel="steps of an episode")
        left.legend(fontsize=SMALL, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for axes in (left, right):
            tidy(axes)
        figure.suptitle(title)


def training_figure(points: Mapping[str, Points], path: Path, title: str) -> None:
    """Curves of a training: loss in all and by kind, training and held-out; learning rate, gradient norm.

    `points` by metric, as a training's journal names them: train/loss, val/loss_reward and so on.
    """
    with open_figure(path, 10.0, 4.9) as figure:
        if not points:
            say_nothing(figure, "no curves")
            return
        grid = figure.add_gridspec(2, 4)
        whole = figure.add_subplot(grid[0, :2])
        _loss_panel(whole, points, "loss", "loss, weighted mean")
        whole.legend(fontsize=SMALL)
        for place, (name, color) in enumerate((("learning_rate", GREEN), ("gradient_norm", PINK))):
            axes = figure.add_subplot(grid[0, 2 + place])
            if curve := points.get(f"train/{name}"):
                axes.plot(*curve, color=color, linewidth=0.9)
            _label(axes, name.replace("_", " "))
        for place, kind in enumerate(KINDS):
            _loss_panel(figure.add_subplot(grid[1, place]), points, f"loss_{kind}", f"{kind} tokens")
        figure.suptitle(title)
        figure.supxlabel("training step", fontsize=SMALL + 1)


def _loss_panel(axes: Axes, points: Mapping[str, Points], name: str, title: str) -> None:
    styles: dict[str, dict[str, Any]] = {
        "train": {"color": BLUE, "linewidth": 0.9, "alpha": 0.8},
        "val": {"color": ORANGE, "linewidth": 2.0, "marker": "o", "markersize": 3},
    }
    for part, text in (("train", "training"), ("val", "held-out episodes")):
        if curve := points.get(f"{part}/{name}"):
            axes.plot(*curve, label=text, **styles[part])
    _label(axes, title)


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=SMALL + 1, loc="left")
    axes.tick_params(labelsize=SMALL - 1)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.02)
    tidy(axes)
