"""How a number is written, on the screen, in tables and in figures."""

from __future__ import annotations

import math
from numbers import Real


def number_text(value: object) -> str:
    """Three figures, or all before the point: `0.123`, `12.3`, `1234`; nothing for NaN and for no number."""
    if not isinstance(value, Real) or math.isnan(value):
        return ""
    number = float(value)
    if math.isinf(number):
        return str(number)
    decimals = 2 - math.floor(math.log10(abs(number))) if number else 0
    return f"{number:.{max(0, decimals)}f}" if decimals <= 6 else f"{number:.3g}"


def interval_text(value: float, low: float, high: float) -> str:
    """Such as `95.3 [93.1, 97.2]`, the bounds where there are any; nothing where there is no number."""
    bounds = (
        f" [{number_text(low)}, {number_text(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    )
    return f"{number_text(value)}{bounds}" if value == value else ""
