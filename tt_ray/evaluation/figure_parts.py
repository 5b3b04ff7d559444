"""The style of all figures, and what they are made of: colours, fonts, files written whole, scales."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tt_ray.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ticks = list[tuple[float, str]]

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BLUE, ORANGE, GREEN, PINK, SKY, RED = COLORS
GREY = "#8A8A8A"
"""What is there for comparison."""
MARKERS = ("o", "s", "^", "D", "v", "P")
SMALL = 9  # points, of labels
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": SMALL + 2,
    "axes.labelsize": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # names may hold a dollar sign, which is no formula
    "svg.hashsalt": "tt-ray",  # equal tables give equal files
}
CHARACTER = 0.078  # inches, of a small label
WRAP = 30  # characters of a line of a category's text
FEW_VALUES = 8  # a parameter with more values is continuous
LOG_SPAN = 20.0  # a logarithmic axis, where the largest value is more than so many times the smallest


@contextmanager
def open_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, saved as PNG or SVG (the path's suffix) when the block ends.

    It grows where labels need more room, so that none is cut.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), whole_file(path) as file:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, dpi=150, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.1)


def value_text(value: Any) -> str:
    """A setting as a person writes it; none for None and NaN."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e6 else f"{number:.4g}"


@dataclass(frozen=True)
class Scale:
    """A column of a table on an axis: numbers, or categories in order."""

    places: Floats
    """Of each row; logarithms of numbers that lie far apart."""
    ticks: Ticks
    """Places and their texts; those of numbers lie within the numbers' range."""
    discrete: bool
    """Few values, each with a tick."""
    categories: bool = False

    @classmethod
    def of(cls, column: pd.Series) -> Scale:
        """Numbers as numbers; booleans, texts and whatever is mixed with None as categories."""
        numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if not numeric or column.isna().any():
            texts = [value_text(value) for value in column]
            order = sorted(set(texts), key=_category_order)
            places = np.array([order.index(text) for text in texts], dtype=np.float64)
            return cls(places, [(float(i), text) for i, text in enumerate(order)], True, True)
        values = column.to_numpy(dtype=np.float64)
        distinct = np.unique(values)
        log = spans_far(distinct)
        discrete = distinct.size <= FEW_VALUES
        marked = distinct if discrete else round_numbers(float(distinct[0]), float(distinct[-1]), log)
        place = np.log10 if log else np.asarray
        return cls(place(values), [(float(place(x)), value_text(float(x))) for x in marked], discrete)

    @property
    def longest(self) -> int:
        """Characters of the longest tick."""
        return max((len(text) for _, text in self.ticks), default=0)

    @property
    def gap(self) -> float:
        """The smallest distance of two places; 1 for a single one."""
        distinct = np.unique(self.places)
        return float(np.diff(distinct).min()) if len(distinct) > 1 else 1.0

    def heights(self) -> tuple[Floats, Ticks, float]:
        """Places and ticks from 0 to 1, and the room that rows of one place have to lie side by side."""
        low, high = float(self.places.min(initial=np.inf)), float(self.places.max(initial=-np.inf))
        if self.categories:
            low, high = -0.5, len(self.ticks) - 0.5
        if not high > low:
            return np.full(len(self.places), 0.5), [(0.5, text) for _, text in self.ticks], 0.6
        room = 0.6 if self.categories else min(0.6, 0.1 * (high - low) / self.gap) if self.discrete else 0.0
        ticks = [((place - low) / (high - low), text) for place, text in self.ticks]
        return (self.places - low) / (high - low), ticks, room * self.gap / (high - low)

    def mark(self, axes: Axes, name: str) -> None:
        """Ticks and name on the x axis; long texts are slanted, some left out where they lie too close."""
        width = sum(len(text) for _, text in self.ticks)
        slanted = width > 28 or self.longest > 12
        low, high = axes.get_xlim()
        needed = [0.07 if slanted else 0.03 * (len(text) + 1) for _, text in self.ticks]
        kept = thinned([((place - low) / (high - low), text) for place, text in self.ticks], needed)
        texts = [textwrap.fill(text, WRAP, break_on_hyphens=False) for _, text in kept]
        axes.set_xticks([low + (high - low) * place for place, _ in kept], texts)
        if slanted:
            axes.tick_params(axis="x", rotation=30)
            for label in axes.get_xticklabels():
                label.set(horizontalalignment="right", rotation_mode="anchor")
        axes.set_xlabel(name)


def _category_order(text: str) -> tuple[int, float, str]:
    try:
        return (1, float(text), text)
    except ValueError:
        return (0 if text == "none" else 2, 0.0, text)


def spans_far(values: Floats) -> bool:
    """Whether a logarithmic axis suits the values."""
    return values.size > 1 and bool(values.min() > 0) and float(values.max() / values.min()) > LOG_SPAN


def round_numbers(low: float, high: float, log: bool) -> list[float]:
    """Some round numbers from `low` to `high`, or the two themselves."""
    from matplotlib.ticker import MaxNLocator

    if log:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(tens) <= 4 else (1,)
        found = [step * 10.0**ten for ten in tens for step in steps]
    else:
        found = [float(tick) for tick in MaxNLocator(5).tick_values(low, high)]
    inside = [tick for tick in found if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def thinned(ticks: Ticks, needed: Sequence[float]) -> Ticks:
    """Ticks in order, without those whose text would run into the one before; `needed`: room of each text."""
    kept: Ticks = []
    end = -math.inf
    for (place, text), room in sorted(zip(ticks, needed, strict=True)):
        if place - room / 2 >= end:
            kept.append((place, text))
            end = place + room / 2
    return kept


def apart(places: Floats, room: float) -> Floats:
    """Shifts that set rows of the same place side by side, in the rows' order, within `room`."""
    shifts = np.zeros(len(places))
    for place in np.unique(places):
        same = np.flatnonzero(places == place)
        half = min(room, 0.1 * room * (len(same) - 1)) / 2
        shifts[same] = np.linspace(-half, half, len(same)) if len(same) > 1 else 0.0
    return shifts


def case_styles(cases: pd.Series) -> dict[str, dict[str, Any]]:
    """Colour and marker of each case, in the order of the table."""
    names = list(dict.fromkeys(cases))
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i // len(COLORS) % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def tidy(axes: Axes) -> None:
    """The house's style of axes."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def say_nothing(figure: Figure, text: str = "no finished trials") -> None:
    """A picture without data says why."""
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14, color="#555555")
    figure.add_subplot().set_axis_off()
