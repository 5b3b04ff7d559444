"""What `tt-ray play` shows of an episode under way: a panel on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tt_ray.cli.view import console
from tt_ray.texts import number_text

if TYPE_CHECKING:
    from tt_ray.evaluation.replay import Recorder

BARS = "▁▂▃▄▅▆▇█"
PAST = 24
"""Steps of the past that are shown before a plan."""
DIMENSIONS = 6
"""Observation dimensions that are shown, spread over all."""
LINES_EVERY = 50
"""Steps between two lines where there is no terminal."""
REFRESH = 8.0  # times a second


class LivePlay:
    """A display of one episode; `show` is for `record_episode`'s `watch`."""

    def __init__(self, title: str, limit: int | None) -> None:
        self._title, self._limit = title, limit
        self._recorder: Recorder | None = None
        self._live = Live(
            console=console, get_renderable=self._panel, refresh_per_second=REFRESH, transient=False
        )

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live.start()
        else:
            console.print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.is_terminal:
            self._live.stop()

    def show(self, recorder: Recorder) -> None:
        """The episode has come a step further."""
        self._recorder = recorder
        steps = len(recorder.rewards)
        if not console.is_terminal and (steps == 1 or steps % LINES_EVERY == 0):
            line = ", ".join(f"{name} {text}" for name, text in self._facts(recorder))
            console.print(line)

    def _facts(self, recorder: Recorder) -> list[tuple[str, str]]:
        steps, rewards = len(recorder.rewards), recorder.rewards
        of = f"/{self._limit}" if self._limit else ""
        facts = [
            ("step", f"{steps}{of}"),
            ("return", number_text(sum(rewards))),
            ("reward", number_text(rewards[-1])),
        ]
        if recorder.plans:
            facts.append(("value predicted", number_text(float(recorder.plans[-1][1][0, -1]))))
        milliseconds = 1000 * recorder.latency[-1]
        return [*facts, ("decision", f"{milliseconds:.0f} ms")]

    def _panel(self) -> Panel:
        recorder, title = self._recorder, Text(self._title)
        if recorder is None:
            return Panel("…", title=title, title_align="left")
        facts = Table.grid(padding=(0, 3))
        columns = self._facts(recorder)
        facts.add_row(*(Text(name, style="dim") for name, _ in columns))
        facts.add_row(*(Text(text, style="bold") for _, text in columns))
        note = Text("past in grey, the present plan in colour; Ctrl-C ends the episode", style="dim")
        return Panel(Group(facts, Text(), _lines(recorder), note), title=title, title_align="left")


def _lines(recorder: Recorder) -> Table:
    """The reward and some observation dimensions: what was, and what is planned."""
    table = Table.grid(padding=(0, 2))
    step, plan = recorder.plans[-1] if recorder.plans else (len(recorder.rewards), np.zeros((0, 0)))
    observations = np.stack(recorder.observations[: step + 1])
    ahead = [float(value) for value in plan[:, -2]] if plan.size else []
    table.add_row("reward", *_spark(recorder.rewards[:step], ahead))
    count = observations.shape[1]
    for n in np.unique(np.linspace(0, count - 1, min(count, DIMENSIONS)).round().astype(int)):
        # A plan begins with the present observation, which is the last of the past.
        ahead = [float(value) for value in plan[1:, n]] if plan.size else []
        table.add_row(f"obs. {n}", *_spark(observations[:, n].tolist(), ahead))
    return table


def _spark(past: Sequence[float], ahead: Sequence[float]) -> tuple[Text, Text]:
    """The last of the past and the plan on one scale; and from where to where the plan goes."""
    past = past[-PAST:]
    known = [value for value in (*past, *ahead) if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    text = Text(" " * (PAST - len(past)))
    text.append(sparkline(past, low, high), style="grey50")
    text.append(sparkline(ahead, low, high), style="bold dark_orange3")
    ends = [value for value in ahead if math.isfinite(value)][-1:]
    now = number_text(past[-1]) if past else ""
    return text, Text(f"{now} → {number_text(ends[0])}" if ends else now, style="dim")


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """A bar for each value from `low` to `high`; a gap for what is not finite."""
    span, most = high - low, len(BARS) - 1
    places = [
        None if not math.isfinite(value) else round(most * (value - low) / span) if span else most // 2
        for value in values
    ]
    return "".join(" " if place is None else BARS[min(most, max(0, place))] for place in places)
