"""What a person sees: progress bars, result tables, how long things took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tt_ray.errors import UserError
from tt_ray.texts import interval_text, number_text

if TYPE_CHECKING:
    import pandas as pd

    from tt_ray.distributed.evaluate import Row
    from tt_ray.distributed.line import Update

LOG_WIDTH = 120  # characters of a line where there is no terminal to ask
INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it, and typer too

# Names, ids and paths may hold brackets, which are no markup.
console = Console(markup=False, highlight=False)
errors = Console(markup=False, highlight=False, stderr=True)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = LOG_WIDTH


def waiting(what: str) -> Status:
    """A line that says so for the duration of a block."""
    return console.status(Text(what))


def show_line(title: str, text: object) -> None:
    """A line at a command's end: what it is, and where."""
    console.print(f"{title + ':':<20}{text}", soft_wrap=True)


def made_folder(folder: Path, option: str) -> Path:
    """The folder that an option names, made where it is not there; `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be made: {error.strerror}") from error
    return folder


class Bars:
    """Progress bars on a terminal; elsewhere, a line at every tenth of a stage."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """A bar of `total` steps for the duration of a block."""
        if not console.is_terminal:
            yield Lines(title, total).update
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", style="dim", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, message="")

            def update(done: int, message: str) -> None:
                shown = {"message": message} if message else {}
                progress.update(task, completed=min(done, total), **shown)  # type: ignore[arg-type]

            yield update

    def note(self, message: str) -> None:
        """Print a line."""
        console.print(message)


class Lines:
    """Progress where there is no terminal: a log should stay short."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.tenth, self.printed = title, total, -1, 0.0

    def update(self, done: int, message: str) -> None:
        """Print a line when another tenth is done, or after half a minute without one."""
        tenth = 10 * min(done, self.total) // self.total
        if tenth > self.tenth or time.monotonic() - self.printed > 30:
            self.tenth, self.printed = tenth, time.monotonic()
            console.print(f"{self.title}: {min(done, self.total)}/{self.total} {message}")


def result_table(rows: Sequence[Row], confidence: float) -> Table:
    """Returns and normalised scores with their intervals, a line for each policy (and training seed)."""
    from tt_ray.distributed.scoring import PLANNER

    table = empty_table("Results")
    several = len({row.seed for row in rows} - {None}) > 1
    rest = max(15, console.width - 65)  # the numbers seldom need more than 65
    table.add_column("policy", max_width=rest, overflow="fold")
    for title in ("episodes", *(f"{name} [{100 * confidence:.0f} %]" for name in ("return", "score"))):
        table.add_column(title, justify="right", overflow="fold")
    for title in ("length", "dec./s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        summary, speed = row.summary, row.speed().get("speed/decisions_per_second")
        score = summary.score
        cells = [
            f"{row.policy}, seed {row.seed}" if several and row.seed is not None else row.policy,
            str(summary.episodes),
            interval_text(summary.returns.value, summary.returns.low, summary.returns.high),
            interval_text(score.value, score.low, score.high) if score is not None else "-",
            f"{summary.length_mean:.0f}" if summary.length_mean else "-",
            f"{speed:.1f}" if speed else "-",
        ]
        table.add_row(*cells, style="bold" if row.policy == PLANNER else None)
    return table


def runs_table(frame: pd.DataFrame, title: str) -> Table:
    """An experiment's MLflow runs, as `tracking.results_table` gives them, children set in under parents."""
    from tt_ray.tracking.results import further_columns

    table = empty_table(title)
    table.add_column("run id", no_wrap=True)
    table.add_column("run", overflow="fold")
    for column in ("score [interval]", "return", "val loss"):
        table.add_column(column, justify="right", overflow="fold")
    further = further_columns(frame)
    for column in further:
        table.add_column(column, overflow="fold")
    for run_id, run in frame.iterrows():
        score = interval_text(run["score/mean"], run["score/ci_low"], run["score/ci_high"])
        numbers = [number_text(run["return/mean"]), number_text(run["val/loss"])]
        status = "" if run["status"] == "FINISHED" else f" ({run['status'].lower()})"
        name = f"{'  ' if run['parent'] else ''}{run['run']}{status}"
        params = [_text(run[column]) for column in further]
        table.add_row(str(run_id), name, score, *numbers, *params)
    return table


def empty_table(title: str | None) -> Table:
    """An empty table, narrow enough for a terminal of 80 columns; what does not fit is wrapped, never cut."""
    return Table(
        title=title and f"\n{title}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _text(cell: Any) -> str:
    """A cell as text; empty for None and NaN."""
    if cell is None or cell != cell:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it, such as `45 s`, `12 min` or `3.4 h`; nothing for NaN."""
    if seconds != seconds:
        return ""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "d" else 1) * length:
            value = seconds / length
            return f"{value:.{int(value < 10)}f} {unit}"
    return f"{seconds:.{int(seconds < 10)}f} s"


def times_table(seconds: Mapping[str, float]) -> Table:
    """How long each stage took."""
    table = empty_table("Time")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.1f}")
    table.add_section()
    table.add_row("total", f"{sum(seconds.values()):.1f}")
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A table of anything; numbers to the right."""
    table = empty_table(title)
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def confirmed(question: str) -> bool:
    """Whether the answer is yes; Ctrl-C and the end of the input are a no."""
    try:
        return typer.confirm(question, default=False)
    except typer.Abort:
        return False
