from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tt_ray.bench.limit import measure_limit
from tt_ray.bench.memory import peak_mebibytes, reset_peak
from tt_ray.bench.planning import CASES, Case, measure_engine, measure_reference, vary
from tt_ray.bench.report import GROWTH, Growth, growth, plan_rows
from tt_ray.config import ModelConfig

CPU = torch.device("cpu")
SMALL = Case(
    "small", 5, 3, horizon=3, beam_width=4, model=ModelConfig(num_layers=1, num_heads=2, embed_dim=32)
)


def test_the_limit_is_the_best_library_s() -> None:
    limit = measure_limit(ModelConfig(embed_dim=32), CPU, size=64, repeats=1)
    assert limit.gflops == max(limit.square, limit.shapes) > 0
    assert limit.others
    assert all(0 < rate <= limit.gflops for rate in limit.others.values())


def test_memory_counts_from_the_reset() -> None:
    reset_peak(CPU)
    before = peak_mebibytes(CPU)
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert 60 < peak_mebibytes(CPU) - before < 100
    del block


@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_rows_of_a_small_case(decoder: str) -> None:
    limit = measure_limit(SMALL.model, CPU, size=64, repeats=1)
    rows = list(plan_rows(SMALL, (1, 3), limit, CPU, 0.0, decoder))
    assert [row.episodes for row in rows] == [1, 3]
    for row in rows:
        assert (row.how, row.window, row.keep) == (decoder, 10, 4)
        assert row.ratio > 0
        assert math.isfinite(row.share)


def test_the_reference_costs_what_its_parts_cost() -> None:
    whole, part = measure_reference(SMALL, CPU, 10.0), measure_reference(SMALL, CPU, 0.0)
    assert 0.1 < whole / part < 10  # scaled up from one pass of many


def test_a_longer_search_is_more_work() -> None:
    short = measure_engine(SMALL, 1, 0.0, CPU)
    longer = measure_engine(replace(SMALL, horizon=6), 1, 0.0, CPU)
    assert longer.gflop > 2 * short.gflop
    assert len(short.seconds) >= 2


def test_exponents_are_slopes_of_logarithms() -> None:
    assert Growth("x", [1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]).exponent == pytest.approx(2.0)


def test_growth_measures_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "halfcheetah", SMALL)
    for what, values in GROWTH.items():
        ticks: list[int] = []
        curve = growth(what, CPU, 0.0, "native", lambda seen=ticks: seen.append(1))
        assert (curve.what, len(ticks), len(curve.seconds)) == (what, len(values), len(values))


def test_a_window_is_the_models() -> None:
    case = vary(CASES["halfcheetah"], window=20)
    assert case.planner.resolve_window(case.model.context_transitions) == (20, 9)
