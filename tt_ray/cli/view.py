"""What a person sees: progress bars, result tables, how long things took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from tt_ray.distributed.evaluate import Row
    from tt_ray.distributed.line import Update

console = Console()
errors = Console(stderr=True)


class Bars:
    """Progress bars on a terminal; elsewhere, a line at every tenth of a stage."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """A bar of `total` steps for the duration of a block."""
        if not console.is_terminal:
            yield Lines(title, total).update
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", style="dim"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, message="")

            def update(done: int, message: str) -> None:
                shown = {"message": message} if message else {}
                progress.update(task, completed=min(done, total), **shown)  # type: ignore[arg-type]

            yield update


class Lines:
    """Progress where there is no terminal: a log should stay short."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.tenth = title, total, -1

    def update(self, done: int, message: str) -> None:
        """Print a line when another tenth is done."""
        tenth = 10 * min(done, self.total) // self.total
        if tenth > self.tenth:
            self.tenth = tenth
            console.print(f"{self.title}: {min(done, self.total)}/{self.total} {message}", highlight=False)


def result_table(rows: Sequence[Row], confidence: float) -> Table:
    """Returns and normalised scores with their intervals, a line for each policy."""
    percent = f"{100 * confidence:.0f} % interval"
    table = Table(title="Results")
    table.add_column("policy", no_wrap=True)
    for title in ("seed", "episodes", "return", percent, "score", percent, "length", "decisions/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(), style="bold" if row.policy == "planner" else None)
    return table


def times_table(seconds: Mapping[str, float], reused: Sequence[str]) -> Table:
    """How long each stage took, and what was there already."""
    table = Table(title="Time")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.1f}")
    table.add_section()
    table.add_row("total", f"{sum(seconds.values()):.1f}")
    if reused:
        table.caption = "reused: " + ", ".join(reused)
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A table of anything; numbers to the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return table
