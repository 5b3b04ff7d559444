"""Figures as files; one style for all, readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tt_ray.evaluation.scores import Interval

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def return_figure(rows: Sequence[tuple[str, Sequence[float], Interval]], path: Path) -> None:
    """Every episode's return as a dot, mean and interval as a bar; a row is (label, returns, interval)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.8 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    jitter = np.random.default_rng(0)
    for place, (label, returns, interval) in enumerate(reversed(rows)):
        color = "#D55E00" if label.startswith("planner") else COLORS[0]
        shown = (
            np.asarray(returns)
            if len(returns) <= 300
            else jitter.choice(np.asarray(returns), 300, replace=False)
        )
        heights = place + jitter.uniform(-0.16, 0.16, len(shown))
        axes.plot(shown, heights, "o", color=color, markersize=3, alpha=0.3, markeredgewidth=0)
        axes.errorbar(
            interval.value,
            place,
            xerr=[[interval.value - interval.low], [interval.high - interval.value]],
            fmt="D",
            color="black",
            markersize=5,
            capsize=5,
            linewidth=2,
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.set_xlabel("return of an episode (dots), mean and its interval (diamonds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
