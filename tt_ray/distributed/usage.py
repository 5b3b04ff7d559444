"""What a line of stages has cost, and what it has saved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Usage:
    """Seconds by kind of work, and the stages that were found in the store."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each kind of work; `waiting` is for what another process computed."""
    reused: list[str] = field(default_factory=list)
    """Stages that were there already, in words."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many of each kind of stage that was; of evaluations, their episodes."""
    saved_by: dict[str, float] = field(default_factory=dict)
    """Seconds that the reused stages of each kind took whoever computed them."""
    _running: dict[str, float] = field(default_factory=dict)

    @property
    def saved(self) -> float:
        """All of that."""
        return float(sum(self.saved_by.values()))

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the time of a block to `work`."""
        self._running[work] = time.perf_counter()
        try:
            yield
        finally:
            self.add(work, time.perf_counter() - self._running.pop(work))

    def add(self, work: str, seconds: float) -> None:
        """Add `seconds` to `work`."""
        self.seconds[work] = self.seconds.get(work, 0.0) + seconds

    def so_far(self) -> dict[str, float]:
        """Seconds by kind of work, with the blocks that are under way."""
        now, seconds = time.perf_counter(), dict(self.seconds)
        for work, began in self._running.items():
            seconds[work] = seconds.get(work, 0.0) + now - began
        return seconds

    def reuse(self, kind: str, name: str, seconds: float, count: int = 1) -> None:
        """Note that (a part of) a stage did not have to be computed, which would have taken `seconds`."""
        self.reused.append(name)
        self.counts[kind] += count
        self.saved_by[kind] = self.saved_by.get(kind, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """`seconds/...` under their MLflow names."""
        return usage_metrics(self.seconds, self.saved)


def usage_metrics(seconds: Mapping[str, float], saved: float) -> dict[str, float]:
    """Seconds by kind of work, and those saved, under their MLflow names."""
    return {f"seconds/{work}": value for work, value in seconds.items()} | {"seconds/saved": saved}
