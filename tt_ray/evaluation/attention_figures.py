"""Figures of attention: every head's map with the kinds of its tokens, and the heads that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tt_ray.data.tokens import Kind
from tt_ray.evaluation.attention import SCORES, AttentionStudy, token_kinds
from tt_ray.evaluation.figure_parts import COLORS, open_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch

KIND_COLORS: dict[Kind | None, str] = dict(zip((*Kind, None), (*COLORS[:4], "#444444"), strict=True))
"""None: a goal's tokens."""
MARKS = {"markovian": COLORS[5], "striated": "#7B3294"}
TITLES = {"markovian": "Markovian", "striated": "striated"}
SMALL = 8  # points
STRIP = 0.035
"""Width of the strips of kinds beside a map, as a share of its side."""


def maps_figure(study: AttentionStudy, path: Path) -> None:
    """Every head's mean map, a row for each layer; frames mark the most Markovian and the most striated."""
    layers, heads = study.maps.shape[:2]
    with open_figure(path, max(6.0, 2.5 * heads), 2.55 * layers + 1.0) as figure:
        norm = _norm(study)
        grid = figure.subplots(layers, heads, squeeze=False)
        for layer in range(layers):
            for head in range(heads):
                axes = grid[layer, head]
                image = _map(axes, study, layer, head, norm)
                axes.set_title(_caption(study, layer, head), fontsize=SMALL)
                _frame(axes, _marked(study, layer, head))
                if head == 0:
                    axes.set_ylabel(f"layer {layer + 1}\nquery, by transition", fontsize=SMALL)
                if layer == layers - 1:
                    axes.set_xlabel("key, by transition", fontsize=SMALL)
        bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.01)
        bar.set_label("attention, mean over the windows", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
        figure.legend(
            handles=_kind_legend(study), loc="outside lower center", ncols=5, fontsize=SMALL, frameon=False
        )
        heading = f"Attention of every head, mean over {study.windows} held-out windows\n{_verdicts(study)}"
        figure.suptitle(heading, fontsize=SMALL + 2)


def heads_figure(study: AttentionStudy, path: Path) -> None:
    """The most Markovian and the most striated head, large, and the scores of all beside the controls'."""
    with open_figure(path, 15.0, 5.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        norm = _norm(study)
        for axes, name in ((left, "markovian"), (middle, "striated")):
            layer, head = study.scores[name].best
            _map(axes, study, layer, head, norm)
            _frame(axes, [name])
            score, line = study.scores[name].values[layer, head], study.line(name)
            lines = [f"most {TITLES[name]}: layer {layer + 1}, head {head + 1}"]
            lines += [f"score {score:.2f}, controls up to {line:.3f}"]
            if name == "striated":
                lines[1] += f"; {100 * study.beyond[layer, head]:.0f} % beyond the previous transition"
            axes.set_title("\n".join(lines), fontsize=SMALL + 2)
            axes.set_xlabel("key, by transition")
            axes.set_ylabel("query, by transition")
        left.legend(handles=_kind_legend(study), loc="upper right", fontsize=SMALL, frameon=False)
        _score_panel(right, study)


def _score_panel(axes: Axes, study: AttentionStudy) -> None:
    """Both scores of every head, by layer; the controls', and the lines that a claim has to beat."""
    markovian, striated = (study.scores[name].values for name in SCORES)
    styles = {"fresh": ("x", "fresh weights"), "shuffled": ("+", "trained numbers, shuffled")}
    for kind, (marker, label) in styles.items():
        x, y = (study.control[name][kind].ravel() for name in SCORES)
        axes.plot(x, y, marker, color="#999999", markersize=5, label=f"control: {label}")
    for layer in range(len(markovian)):
        color = COLORS[layer % len(COLORS)]
        axes.plot(markovian[layer], striated[layer], "o", color=color, label=f"layer {layer + 1}")
    axes.axvline(study.line("markovian"), color=MARKS["markovian"], linestyle="--", linewidth=1)
    axes.axhline(study.line("striated"), color=MARKS["striated"], linestyle="--", linewidth=1)
    for name in SCORES:
        layer, head = study.scores[name].best
        place = (markovian[layer, head], striated[layer, head])
        axes.plot(*place, "o", markersize=13, markerfacecolor="none", markeredgecolor=MARKS[name])
    axes.set_xlabel("Markovian score")
    axes.set_ylabel("striated score")
    axes.set_title("all heads; dashed: the controls' largest", fontsize=SMALL + 2)
    axes.legend(fontsize=SMALL, loc="best")
    tidy(axes)


def _norm(study: AttentionStudy) -> Normalize:
    """One scale for all maps, in which small weights are still seen."""
    from matplotlib.colors import PowerNorm

    top = float(np.quantile(study.maps[..., study.visible], 0.998))
    return PowerNorm(0.4, vmin=0.0, vmax=top, clip=True)


def _map(axes: Axes, study: AttentionStudy, layer: int, head: int, norm: Normalize) -> AxesImage:
    """One head's map; keys that a query cannot see are grey, strips at both axes have the tokens' kinds."""
    from matplotlib import colormaps

    length, layout = len(study.visible), study.layout
    shown = np.ma.array(study.maps[layer, head], mask=~study.visible)
    colors = colormaps["magma_r"].with_extremes(bad="#EDEDED")
    extent = (0.0, float(length), float(length), 0.0)
    image = axes.imshow(shown, cmap=colors, norm=norm, extent=extent, interpolation="nearest")
    strip, gap = STRIP * length, 0.4 * STRIP * length
    kinds = _kind_pixels(study)
    low, high = length + gap, length + gap + strip
    axes.imshow(kinds[:, None], extent=(-gap - strip, -gap, length, 0.0), interpolation="nearest")
    axes.imshow(kinds[None, :], extent=(0.0, length, high, low), interpolation="nearest")
    axes.set(xlim=(-gap - strip, length), ylim=(high, 0.0))
    borders = np.arange(layout.goal_dim, length + 1, layout.slots)
    for border in borders[1 if layout.goal_dim == 0 else 0 :]:
        for line in (axes.axvline, axes.axhline):
            line(border, color="#8A8A8A", linewidth=0.4)
    middles = borders + layout.slots / 2
    texts = [str(i + 1) for i in range(len(borders))]
    places = [(x, text) for x, text in zip(middles, texts, strict=True) if x < length]
    if layout.goal_dim:
        places.insert(0, (layout.goal_dim / 2, "goal"))
    axes.set_xticks([x for x, _ in places], [text for _, text in places])
    axes.set_yticks([x for x, _ in places], [text for _, text in places])
    axes.tick_params(length=0, labelsize=SMALL - 1, pad=6)
    axes.set_aspect("equal")
    return image


def _kind_pixels(study: AttentionStudy) -> NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    kinds = token_kinds(study.layout, len(study.visible))
    return np.array([to_rgb(KIND_COLORS[kind]) for kind in kinds])


def _kind_legend(study: AttentionStudy) -> list[Patch]:
    from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(token_kinds(study.layout, len(study.visible))))
    return [
        Patch(color=KIND_COLORS[kind], label="goal" if kind is None else kind.name.lower()) for kind in kinds
    ]


def _marked(study: AttentionStudy, layer: int, head: int) -> list[str]:
    return [name for name in SCORES if study.scores[name].best == (layer, head)]


def _frame(axes: Axes, names: Sequence[str]) -> None:
    """A coloured frame around a map for each score by which it stands out, the second around the first."""
    from matplotlib.patches import Rectangle

    for i, name in enumerate(names):
        place, side = -0.009 - 0.018 * i, 1.018 + 0.036 * i
        frame = Rectangle((place, place), side, side, transform=axes.transAxes, fill=False, clip_on=False)
        frame.set(edgecolor=MARKS[name], linewidth=2.5, zorder=5)
        axes.add_patch(frame)


def _caption(study: AttentionStudy, layer: int, head: int) -> str:
    """A head's scores, and which of them is the largest of all."""
    values = {name: float(study.scores[name].values[layer, head]) for name in SCORES}
    lines = [f"head {head + 1}", ", ".join(f"{TITLES[name]} {values[name]:.2f}" for name in SCORES)]
    marks = _marked(study, layer, head)
    if marks:
        lines[0] += f": the most {' and '.join(TITLES[name] for name in marks)}"
    return "\n".join(lines)


def _verdicts(study: AttentionStudy) -> str:
    """The largest scores beside the controls' largest."""
    parts = []
    for name in SCORES:
        layer, head = study.scores[name].best
        score, line = float(study.scores[name].values[layer, head]), study.line(name)
        end = "above" if score > line else "not above"
        parts.append(
            f"most {TITLES[name]}: layer {layer + 1}, head {head + 1}, {score:.2f} ({end} control {line:.3f})"
        )
    return "; ".join(parts)
