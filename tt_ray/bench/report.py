"""The rows that `tt-ray bench` shows, and the file that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tt_ray.bench.limit import Limit
from tt_ray.bench.memory import peak_mebibytes, reset_peak
from tt_ray.bench.planning import CASES, Case, PlanSpeed, measure_engine, measure_reference, vary
from tt_ray.config import DecoderName
from tt_ray.files import whole_file
from tt_ray.training.speed import measure_plain_loop, measure_training, training_flops_per_token


@dataclass(frozen=True)
class SpeedRow:
    """One measurement. For planning `per_second` counts decisions, for training tokens; gflop is of one."""

    kind: Literal["plan", "train"]
    configuration: str
    episodes: int
    """At once; for training, windows a batch."""
    per_second: float
    p50_ms: float | None
    p95_ms: float | None
    gflop: float
    gflops: float
    """Achieved."""
    limit_gflops: float
    share: float
    """Of the limit."""
    ratio: float
    """To the reference: an uncached planner of one episode, or the plain training loop."""
    how: str
    """The decoder, or how the step runs."""
    window: int
    keep: int | None
    memory_mib: float


@dataclass(frozen=True)
class Growth:
    """Seconds a decision as one thing grows, and the exponent that fits them."""

    what: str
    values: list[int]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log value, by least squares."""
        return float(np.polyfit(np.log(self.values), np.log(self.seconds), 1)[0])


def plan_rows(
    case: Case,
    episodes: Sequence[int],
    limit: Limit,
    device: torch.device,
    seconds: float,
    decoder: DecoderName,
) -> Iterator[SpeedRow]:
    """The engine's rows for one case, against a reference measured first."""
    reference = measure_reference(case, device, seconds)
    window, keep = case.planner.resolve_window(case.model.context_transitions)
    for count in episodes:
        speed: PlanSpeed = measure_engine(case, count, seconds, device, decoder)
        achieved = speed.gflop * speed.per_second
        yield SpeedRow(
            kind="plan",
            configuration=case.name,
            episodes=count,
            per_second=speed.per_second,
            p50_ms=speed.latency(0.5),
            p95_ms=speed.latency(0.95),
            gflop=speed.gflop,
            gflops=achieved,
            limit_gflops=limit.gflops,
            share=achieved / limit.gflops,
            ratio=speed.per_second / reference,
            how=speed.decoder,
            window=window,
            keep=keep,
            memory_mib=speed.memory_mib,
        )


def train_row(case: Case, batch_size: int, limit: Limit, device: torch.device, seconds: float) -> SpeedRow:
    """Training on windows of random tokens, against the plain loop."""
    plain = measure_plain_loop(case.model, case.layout, batch_size, seconds / 2, device)
    reset_peak(device)
    rate = measure_training(case.model, case.layout, batch_size, seconds, device)
    gflop = training_flops_per_token(case.model, case.layout) / 1e9
    return SpeedRow(
        kind="train",
        configuration=case.name,
        episodes=batch_size,
        per_second=rate,
        p50_ms=None,
        p95_ms=None,
        gflop=gflop,
        gflops=gflop * rate,
        limit_gflops=limit.gflops,
        share=gflop * rate / limit.gflops,
        ratio=rate / plain,
        how=f"dropout {case.model.dropout:g}",
        window=case.model.context_transitions,
        keep=None,
        memory_mib=peak_mebibytes(device),
    )


GROWTH = {
    "slots": (16, 25, 37, 71),
    "horizon": (3, 5, 10, 15),
    "beam_width": (8, 32, 128),
    "window": (4, 10, 20),
    "episodes": (1, 4, 16),
}


def growth(
    what: str, device: torch.device, seconds: float, decoder: DecoderName, tick: Callable[[], None]
) -> Growth:
    """How a decision's time grows with one of GROWTH, from HalfCheetah's case; `tick` after each value.

    With episodes, the time of a round.
    """
    base, times = CASES["halfcheetah"], []
    for value in GROWTH[what]:
        count = value if what == "episodes" else 1
        case = base if what == "episodes" else vary(base, **{what: value})
        times.append(float(np.median(measure_engine(case, count, seconds, device, decoder).seconds)))
        tick()
    return Growth(what, list(GROWTH[what]), times)


def write_json(path: Path, rows: Sequence[SpeedRow]) -> None:
    """Write the rows as a JSON list, at once or not at all."""
    with whole_file(path) as file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
