"""How numbers are written."""

import numpy as np
import pytest

from tt_ray.texts import interval_text, number_text

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1.005, "-1.00"),
        (12.34, "12.3"),
        (123456.7, "123457"),
        (1234.5, "1234"),
        (-0.01234, "-0.0123"),
        (0, "0"),
        (np.int64(7), "7.00"),
        (np.float32(0.5), "0.500"),
        (0.0001, "0.000100"),
        (1e-9, "1e-09"),
        (float("inf"), "inf"),
        (NAN, ""),
        (None, ""),
        ("x", ""),
    ],
)
def test_numbers(value: object, text: str) -> None:
    assert number_text(value) == text


def test_intervals() -> None:
    assert interval_text(44.04, 41.22, 101.0) == "44.0 [41.2, 101]"
    assert interval_text(44.04, NAN, 46.0) == "44.0"
    assert interval_text(44.04, -float("inf"), 46.0) == "44.0"
    assert interval_text(NAN, NAN, NAN) == ""
