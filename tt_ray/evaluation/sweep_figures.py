"""Figures of a sweep: what each parameter does, all trials at once, learning curves, score against cost.

Each takes the sweep's table, one row for each trial (columns: the searched keys, metrics, and where there
are any `trial`, its name, `case` and `status`), and writes a PNG or an SVG, as the path's suffix says. Trials
that failed or have no number are left out; where none is left, the picture says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tt_ray.evaluation.figure_parts import (
    CHARACTER,
    COLORS,
    SMALL,
    WRAP,
    Floats,
    Scale,
    apart,
    case_styles,
    open_figure,
    round_numbers,
    say_nothing,
    spans_far,
    thinned,
    tidy,
    value_text,
)
from tt_ray.search import default_goal, interval_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_TRIALS = 30  # more lines than this are thin and pale
FEW_CURVES = 12
FEW_POINTS = 10


def parameter_figure(trials: pd.DataFrame, keys: Sequence[str], metric: str, path: Path) -> None:
    """The metric against each searched key, a panel each: every trial, its interval, the mean of each value.

    Intervals come from `interval_names`, where the table has them. The best trial of each case is starred;
    cases differ in colour and marker. Best is the largest, but the smallest of a loss or a latency.
    """
    shown, keys = _usable(trials, metric), list(keys) or ["case"]
    columns = min(3, len(keys)) if len(shown) else 1
    rows = math.ceil(len(keys) / columns) if len(shown) else 1
    legend = [*(text for text in shown["case"].unique() if text and keys != ["case"]), "mean", "best trial"]
    width = max(4.5, 3.3 * columns)
    across = max(1, int(width / (0.5 + CHARACTER * max(map(len, legend)))))
    slanted = max((min(WRAP, Scale.of(shown[key]).longest) for key in keys if len(shown)), default=0)
    height = (3.2 + 0.5 * CHARACTER * slanted) * rows + 0.4 + 0.2 * math.ceil(len(legend) / across)
    with open_figure(path, width, height) as figure:
        if shown.empty:
            say_nothing(figure)
            return
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(keys) :]:
            axes.set_visible(False)
        for place, (key, axes) in enumerate(zip(keys, grid.flat, strict=False)):
            _parameter_panel(axes, shown, key, metric)
            axes.set_ylabel(metric if place % columns == 0 else "")
        styles = {case: style for case, style in case_styles(shown["case"]).items() if case in legend}
        styles["mean"] = {"color": "black", "marker": "_", "markersize": 14, "markeredgewidth": 2.5}
        styles["best trial"] = {"color": "black", "marker": "*", "markersize": 12}
        for text, style in styles.items():
            grid[0, 0].plot([], [], linestyle="", label=text, **style)
        figure.legend(loc="outside lower center", ncols=across, frameon=False, fontsize=SMALL)


def _parameter_panel(axes: Axes, trials: pd.DataFrame, key: str, metric: str) -> None:
    scale, styles = Scale.of(trials[key]), case_styles(trials["case"])
    beside = 1 if key == "case" else len(styles)
    width = 0.6 * scale.gap / beside if scale.discrete else 0.0
    pale = 0.6 if len(trials) <= FEW_TRIALS else 0.35
    for number, (case, style) in enumerate(styles.items()):
        mine = (trials["case"] == case).to_numpy()
        places = scale.places[mine] + width * (number % beside + 0.5 - beside / 2)
        values, at = trials.loc[mine, metric].to_numpy(dtype=float), places + apart(places, 0.7 * width)
        bars = _bars(trials[mine], metric)
        axes.errorbar(at, values, bars, fmt="none", ecolor=style["color"], elinewidth=0.8, alpha=pale)
        axes.plot(at, values, linestyle="", markersize=4.5, markeredgewidth=0, alpha=pale, **style)
        middle = _means(places, values, scale.discrete)
        line = {"color": style["color"], "linewidth": 1.8, "marker": "_", "markersize": 14}
        axes.plot(middle.index, middle, markeredgewidth=2.5, **line)
        best = int(np.argmin(values) if _less_is_better(metric) else np.argmax(values))
        star = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "color": style["color"]}
        axes.plot(at[best], values[best], linestyle="", zorder=5, **star)
    if scale.discrete:
        axes.set_xlim(scale.places.min() - 0.6 * scale.gap, scale.places.max() + 0.6 * scale.gap)
    tidy(axes)
    scale.mark(axes, key)


def _means(places: Floats, values: Floats, discrete: bool) -> pd.Series:
    """Mean value of each place; of continuous places, of five equally full ranges."""
    if discrete:
        return pd.Series(values).groupby(places).mean()
    parts = np.array_split(np.argsort(places, kind="stable"), min(5, len(places)))
    return pd.Series([values[part].mean() for part in parts], [places[part].mean() for part in parts])


def _bars(trials: pd.DataFrame, metric: str) -> Floats | None:
    """[2, n] lengths below and above; None without intervals."""
    names = interval_names(metric)
    if names is None or not set(names) <= set(trials):
        return None
    low, high = names
    values = trials[metric].to_numpy(dtype=float)
    ends = [values - trials[low].to_numpy(dtype=float), trials[high].to_numpy(dtype=float) - values]
    return np.clip(np.nan_to_num(np.stack(ends)), 0.0, None)


def parallel_figure(trials: pd.DataFrame, keys: Sequence[str], metric: str, goal: str, path: Path) -> None:
    """Parallel coordinates: one line for each trial through its settings to the metric.

    goal: maximize or minimize. The metric's better end is up; better trials are darker and drawn later.
    """
    shown = _usable(trials, metric)
    sign = -1.0 if goal == "minimize" else 1.0
    shown = shown.iloc[np.argsort(sign * shown[metric].to_numpy(dtype=float), kind="stable")]
    names = [*(["case"] if shown["case"].nunique() > 1 or not keys else []), *keys, metric]
    scales = [Scale.of(shown[name]) for name in names]
    longest = max(scale.longest for scale in scales)
    with open_figure(path, max(1.6, 0.6 + CHARACTER * longest) * len(names) + 0.4, 4.6) as figure:
        if shown.empty:
            say_nothing(figure)
            return
        axes = figure.add_subplot()
        columns = []
        for place, (name, scale) in enumerate(zip(names, scales, strict=True)):
            heights, ticks, room = scale.heights()
            if name == metric and sign < 0:
                heights, ticks = 1.0 - heights, [(1.0 - height, text) for height, text in ticks]
            _upright(axes, place, name, thinned(ticks, [0.05] * len(ticks)))
            columns.append(heights + apart(heights, 0.0 if name == metric else room))
        best = ~shown["case"].duplicated(keep="last").to_numpy()
        _draw_lines(axes, np.stack(columns, axis=1), best)
        axes.set(xlim=(-0.1, len(names) - 0.9), ylim=(-0.12, 1.2))
        axes.set_axis_off()
        note = "the best trial is thick" if best.sum() == 1 else "the best trial of each case is thick"
        axes.text(
            0.5,
            -0.02,
            f"the darker, the better; {note}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=SMALL,
        )


def _draw_lines(axes: Axes, heights: Floats, best: NDArray[np.bool_]) -> None:
    """Through `heights` [n, axes], the worst trial first; `best` [n] are thick. A dot at the end."""
    import matplotlib
    from matplotlib.collections import LineCollection

    few, last = len(heights) <= FEW_TRIALS, heights.shape[1] - 1
    colors = matplotlib.colormaps["viridis_r"](0.12 + 0.88 * heights[:, -1])
    colors[~best, 3] = 0.9 if few else 0.45
    t = np.linspace(0.0, 1.0, 25)
    across = np.concatenate([place + t for place in range(last)])
    rise = t * t * (3.0 - 2.0 * t)
    up = heights[:, :-1, None] + (heights[:, 1:] - heights[:, :-1])[:, :, None] * rise
    lines = [np.stack([across, line.ravel()], axis=1) for line in up]
    widths = np.where(best, 4.0, 1.6 if few else 1.0)
    axes.add_collection(LineCollection(lines, colors=colors, linewidths=widths, capstyle="round"))
    axes.scatter(np.full(len(lines), float(last)), heights[:, -1], c=colors, s=25, zorder=3)


def _upright(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    """One of the parallel axes; its texts stand to its left."""
    axes.plot([place, place], [-0.06, 1.06], color="black", linewidth=1.0, zorder=2.5)
    title = name.replace(".", ".\n")
    axes.text(place, 1.1, title, ha="center", va="bottom", fontweight="bold", fontsize=SMALL)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
    for height, text in ticks:
        axes.text(place - 0.04, height, text, ha="right", va="center", fontsize=SMALL, bbox=box, zorder=4)


def curves_figure(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, ylabel: str
) -> None:
    """Learning curves, (steps, values) under each model's label; points without a number are left out.

    With more than twelve, lines are muted and only the best and the worst have a label. Lower is better
    where `ylabel` names a loss.
    """
    kept: dict[str, tuple[NDArray[Any], Floats]] = {}
    for label, (steps, values) in curves.items():
        finite = np.isfinite(np.asarray(values, dtype=float))
        if finite.any():
            kept[label] = np.asarray(steps)[finite], np.asarray(values, dtype=float)[finite]
    sign = 1.0 if _less_is_better(ylabel) else -1.0
    order = sorted(kept, key=lambda label: float((sign * kept[label][1]).min()))
    many, texts = len(order) > FEW_CURVES, {label: label for label in kept}
    if many:
        texts = {order[0]: f"best of {len(order)}: {order[0]}", order[-1]: f"worst: {order[-1]}"}
    with open_figure(path, 7.0, 4.0 + 0.2 * len(texts)) as figure:
        if not kept:
            say_nothing(figure, "no learning curves")
            return
        axes = figure.add_subplot()
        for label in order if many else []:
            axes.plot(*kept[label], color="#8A8A8A", alpha=0.45, linewidth=0.8)
        for place, (label, text) in enumerate(texts.items()):
            style: dict[str, Any] = {"color": COLORS[place % len(COLORS)]}
            style |= {"linestyle": "-" if place < len(COLORS) else "--"}
            marker = "o" if len(kept[label][0]) < 3 else None
            axes.plot(*kept[label], label=text, marker=marker, linewidth=2.2 if many else 1.6, **style)
        axes.set(xlabel="training step", ylabel=ylabel)
        tidy(axes)
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=SMALL)


def frontier_figure(trials: pd.DataFrame, cost: str, metric: str, goal: str, path: Path) -> None:
    """The metric against what it costs (less is better), and each case's Pareto frontier.

    The frontier's trials are numbered, all trials where they are few; the key below names them.
    """
    shown = _usable(trials, metric)
    shown = shown[np.isfinite(shown[cost].to_numpy(dtype=float))] if cost in shown else shown[:0]
    if shown.empty:
        with open_figure(path, 7.0, 4.0) as figure:
            say_nothing(figure)
        return
    styles = case_styles(shown["case"])
    shown = shown.sort_values(cost, kind="stable")
    best = frontier(shown, cost, metric, goal)
    named = shown if len(shown) <= FEW_POINTS else shown[best]
    cases = max(map(len, styles))
    with open_figure(
        path, 7.0 + (0.5 + CHARACTER * cases if cases else 0.0), 4.0 + 0.21 * len(named)
    ) as figure:
        axes = figure.add_subplot()
        for case, style in styles.items():
            group = shown[shown["case"] == case]
            front = group[best[group.index]]
            axes.plot(group[cost], group[metric], linestyle="", markersize=5, alpha=0.45, **style)
            axes.step(front[cost], front[metric], where="post", color=style["color"], linewidth=1.5)
            axes.plot(front[cost], front[metric], linestyle="", markersize=8, label=case or None, **style)
        if cases:
            figure.legend(loc="outside right upper", frameon=False, fontsize=SMALL)
        _cost_axis(axes, shown[cost].to_numpy(dtype=float))
        axes.set(xlabel=f"{cost} (less is better)", ylabel=metric)
        tidy(axes)
        _number_points(axes, named[cost].to_numpy(dtype=float), named[metric].to_numpy(dtype=float))
        names = enumerate(named["trial"], start=1)
        keys = [axes.plot([], [], linestyle="", label=f"{number}:  {name}")[0] for number, name in names]
        figure.legend(handles=keys, loc="outside lower left", frameon=False, fontsize=SMALL, handlelength=0)


def _number_points(axes: Axes, across: Floats, up: Floats) -> None:
    """Numbers from 1 on beside the points; neighbours that lie too close share a text, such as 4-6."""
    from matplotlib.patheffects import withStroke

    to_unit = (axes.transData + axes.transAxes.inverted()).transform
    groups: list[list[int]] = []
    for i, place in enumerate(units := to_unit(np.stack([across, up], axis=1))):
        near = groups and np.all(np.abs(place - units[groups[-1][0]]) < (0.06, 0.045))
        groups[-1].append(i) if near else groups.append([i])
    for group in groups:
        text = f"{group[0] + 1}" if len(group) == 1 else f"{group[0] + 1}-{group[-1] + 1}"
        note = axes.annotate(text, (across[group[-1]], up[group[-1]]), (5, 4), textcoords="offset points")
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _cost_axis(axes: Axes, costs: Floats) -> None:
    if spans_far(costs):
        ticks = round_numbers(float(costs.min()), float(costs.max()), log=True)
        axes.set_xscale("log")
        axes.set_xticks(ticks, list(map(value_text, ticks)))
        axes.minorticks_off()


def frontier(trials: pd.DataFrame, cost: str, metric: str, goal: str) -> pd.Series:
    """Which trials no other one of their case beats: at least as cheap and better, or cheaper and as good.

    A bool for each row of `trials`, under its index; of two that are equal in both, the first.
    """
    sign = -1.0 if goal == "minimize" else 1.0
    table = pd.DataFrame({"cost": trials[cost].astype(float), "value": sign * trials[metric].astype(float)})
    table["case"] = trials.get("case", "")
    ranked = table.dropna().sort_values(["cost", "value"], ascending=[True, False], kind="stable")
    so_far = ranked.groupby("case")["value"].cummax().groupby(ranked["case"]).shift(fill_value=-np.inf)
    return (ranked["value"] > so_far).reindex(trials.index, fill_value=False)


def _less_is_better(metric: str) -> bool:
    return "loss" in metric or default_goal(metric) == "minimize"


def _usable(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Trials with a number that did not fail, under a fresh index; with `case` and `trial` in any case."""
    values = trials[metric] if metric in trials else pd.Series(np.nan, trials.index)
    status = trials["status"] if "status" in trials else pd.Series("", trials.index)
    fine = np.isfinite(pd.to_numeric(values, errors="coerce")) & (status != "failed")
    shown = trials.assign(**{metric: values})[fine].reset_index(drop=True)
    if "trial" not in shown:
        shown["trial"] = [f"trial {number}" for number in shown.index]
    shown["case"] = shown["case"].fillna("") if "case" in shown else ""
    return shown
