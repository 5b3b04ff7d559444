"""What was planned beside what happened: an episode's plans over the steps that were really taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tt_ray.evaluation.figure_parts import BLUE, GREY, RED, SMALL, open_figure, tidy
from tt_ray.evaluation.replay import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIMENSIONS = 4
"""Observation dimensions shown."""
MOMENTS = 4
"""Decisions shown."""
BEFORE = AFTER = 5
"""Steps shown before a decision, and at least after it."""


def plan_figure(recording: Recording, path: Path, title: str) -> None:
    """Above: an episode's rewards. Below: plans made at some steps, and what the simulator did, by dimension.

    A column is a decision, a row an observation dimension (some, spread over all), the last
    row the reward. Without plans there is only what happened.
    """
    rows = list(_spread(recording.observations.shape[1], DIMENSIONS))
    moments = _moments(recording)
    panels = [*rows, None] if len(moments) else []
    with open_figure(path, 10.0, 2.0 + 1.25 * len(panels)) as figure:
        heights = [1.2, *([1.0] * len(panels))]
        grid = figure.add_gridspec(len(heights), max(1, len(moments)), height_ratios=heights)
        _whole(figure.add_subplot(grid[0, :]), recording, moments)
        for row, dimension in enumerate(panels, start=1):
            line = [figure.add_subplot(grid[row, 0])]
            line += [figure.add_subplot(grid[row, k], sharey=line[0]) for k in range(1, len(moments))]
            for axes, moment in zip(line, moments, strict=True):
                _panel(axes, recording, int(moment), dimension)
                axes.tick_params(
                    labelsize=SMALL - 1, labelleft=axes is line[0], labelbottom=dimension is None
                )
                if dimension is None:
                    axes.set_xlabel("step", fontsize=SMALL)
                if row == 1:
                    axes.set_title(f"plan of step {recording.planned_at[moment]}", fontsize=SMALL)
            line[0].set_ylabel("reward" if dimension is None else f"obs. {dimension}", fontsize=SMALL)
            if row == 1:
                looks = line[0].get_legend_handles_labels()
                figure.legend(*looks, loc="outside lower center", ncols=len(looks[0]), fontsize=SMALL)
        figure.suptitle(title)


def _spread(count: int, shown: int) -> NDArray[np.int64]:
    """Some of `count` numbers, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, shown)).round().astype(np.int64))


def _moments(recording: Recording) -> NDArray[np.int64]:
    """Plans, by number, spread over the episode; where there are such, those that it outlived."""
    if not len(recording.plans):
        return np.zeros(0, np.int64)
    ahead = recording.plans.shape[1]
    outlived = np.flatnonzero(recording.planned_at + ahead <= len(recording.rewards))
    usable = outlived if len(outlived) else np.arange(len(recording.planned_at))
    return usable[_spread(len(usable), MOMENTS)]


def _whole(axes: Axes, recording: Recording, moments: NDArray[np.int64]) -> None:
    axes.plot(np.arange(1, len(recording.rewards) + 1), recording.rewards, color="black", linewidth=1.0)
    for step in recording.planned_at[moments]:
        axes.axvline(step, color=RED, linewidth=1.0, linestyle="--")
    axes.set_title("reward of each step", fontsize=SMALL, loc="left")
    axes.tick_params(labelsize=SMALL - 1)
    axes.margins(x=0.01)
    tidy(axes)


def _panel(axes: Axes, recording: Recording, moment: int, dimension: int | None) -> None:
    """One dimension around one decision; None: the reward, which belongs to the step that it ends."""
    start, plan = int(recording.planned_at[moment]), recording.plans[moment]
    real = recording.rewards if dimension is None else recording.observations[:, dimension]
    planned = plan[:, -2] if dimension is None else plan[:, dimension]
    shown = max(len(plan), AFTER)
    first, last = max(0, start - BEFORE), min(len(real), start + shown + 1)
    axes.axvline(start, color=GREY, linewidth=0.8, linestyle="--")
    axes.plot(range(first, last), real[first:last], color="black", linewidth=1.5, label="what happened")
    steps = start + np.arange(len(plan))
    axes.plot(steps, planned, color=RED, linewidth=1.3, marker="o", markersize=3, label="as planned")
    if dimension is not None and start < len(real):
        axes.plot(start, real[start], "D", color=BLUE, markersize=4.5, label="known when planned", zorder=4)
    axes.set_xlim(start - BEFORE - 0.5, start + shown + 0.5)
    axes.locator_params(axis="x", nbins=4, integer=True)
    tidy(axes)
