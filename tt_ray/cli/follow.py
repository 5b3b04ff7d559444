"""Showing runs while they run: a table redrawn on a terminal; in a log, a line for each change."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from tt_ray.cli.trials import count_by_status, families, is_sweep, status_word, sweep_view
from tt_ray.cli.view import console, duration, runs_table
from tt_ray.texts import interval_text

if TYPE_CHECKING:
    import pandas as pd

SHARE = 0.2  # of the time that may go into reading, which keeps a machine busy that has other things to do
STILL = 60.0  # seconds without anything new after which it is said that the driver may be gone

Read = Callable[[], "pd.DataFrame"]


class Display(Protocol):
    """Where a family of runs is shown."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, family: pd.DataFrame, still: str) -> None:
        """Show the family as it is now; `still` says so where nothing is new for long, and is empty else."""

    def wait(self, problem: str) -> None:
        """Say that MLflow does not answer."""


def followed(frame: pd.DataFrame, read: Read, every: float) -> pd.DataFrame:
    """Show the newest family of runs every `every` seconds until none of them runs; the table as it is then.

    With an MLflow that is away it waits; `read` raises `MlflowAwayError` then. Of a driver that was killed
    MLflow does not know, so that after STILL seconds without news it says what to do, and waits on.
    """
    first = _newest(frame)
    if first is None:
        return frame
    run_id, took, shown, still = first.index[0], 0.0, first, 0.0
    with Screen() if console.is_terminal else Log() as display:
        while True:
            family = _family_of(run_id, frame)
            if family is None:
                return frame
            still = still if family.equals(shown) else 0.0
            display.update(family, _stillness(family, still) if still >= STILL else "")
            if not (family["status"] == "RUNNING").any():
                return frame
            shown, pause = family, max(every, took / SHARE)
            time.sleep(pause)
            frame, took = _read_again(read, display, every)
            still += pause + took


def _stillness(family: pd.DataFrame, seconds: float) -> str:
    """That nothing has changed for so long, and what to do about it."""
    again = "`tt-ray sweep FILE --resume`" if is_sweep(family) else "the same command with --resume"
    return f"nothing new for {duration(seconds)}; is its driver gone? {again} goes on"


def _newest(frame: pd.DataFrame) -> pd.DataFrame | None:
    """The newest family in which something runs, or else the newest."""
    found = list(families(frame))
    running = [family for family in found if (family["status"] == "RUNNING").any()]
    return (running or found)[-1] if found else None


def _family_of(run_id: str, frame: pd.DataFrame) -> pd.DataFrame | None:
    """The family of a run; the newest, where that run is gone."""
    found = (family for family in families(frame) if family.index[0] == run_id)
    return next(found, None) if run_id in frame.index else _newest(frame)


def _read_again(read: Read, display: Display, every: float) -> tuple[pd.DataFrame, float]:
    """The table once MLflow gives it, and the seconds that reading it took."""
    from tt_ray.tracking.results import MlflowAwayError

    while True:
        started = time.perf_counter()
        try:
            return read(), time.perf_counter() - started
        except MlflowAwayError as error:
            display.wait(str(error))
            time.sleep(every)


class Screen:
    """On a terminal: a table that fits on it, redrawn in place, and gone at the end."""

    def __init__(self) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._shown: RenderableType = Text("")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, family: pd.DataFrame, still: str) -> None:
        """As `Display.update`."""
        self._shown = self._fitting(family)
        self._draw(f"at {_clock()}{f': {still}' if still else '; Ctrl-C leaves, what runs goes on'}")

    def wait(self, problem: str) -> None:
        """As `Display.wait`."""
        self._draw(f"at {_clock()}: {problem}; waiting for it")

    def _draw(self, remark: str) -> None:
        self._live.update(Group(self._shown, Text(f"\n{remark}", style="dim")), refresh=True)

    def _fitting(self, family: pd.DataFrame) -> RenderableType:
        """As many trials as there is room for."""
        if not is_sweep(family):
            return runs_table(family, family["run"].iloc[0])
        room = console.height - 4

        def height(rows: int) -> int:
            return len(console.render_lines(sweep_view(family, rows)))

        rows = bisect_right(range(1, min(len(family) - 1, room) + 1), room, key=height)
        return sweep_view(family, max(rows, 1))


class Log:
    """Elsewhere: a line for each run that has begun, ended or got its score."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, bool]] = {}
        self._begun = self._away = self._still = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, family: pd.DataFrame, still: str) -> None:
        """As `Display.update`."""
        if still and not self._still:
            self._say(still)
        self._still = bool(still)
        if self._away:
            self._say("MLflow is back")
        elif not self._begun:
            self._say(f"{family['run'].iloc[0]}: {count_by_status(family.iloc[1:]) or 'no trials'}")
        for run_id, run in family.iterrows():
            now = (run["status"], run["score/mean"] == run["score/mean"])
            if self._begun and self._known.get(str(run_id)) != now:
                score = interval_text(run["score/mean"], run["score/ci_low"], run["score/ci_high"])
                self._say(f"{run['run']}: {status_word(run['status'])}{f', score {score}' if score else ''}")
            self._known[str(run_id)] = now
        self._begun, self._away = True, False

    def wait(self, problem: str) -> None:
        """As `Display.wait`."""
        if not self._away:
            self._say(f"{problem}; waiting for it")
        self._away = True

    def _say(self, message: str) -> None:
        console.print(f"{_clock()} {message}", soft_wrap=True)


def _clock() -> str:
    return time.strftime("%H:%M:%S")
