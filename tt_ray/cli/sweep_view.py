"""What a person sees of a sweep: what is to be done, how far it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tt_ray.cli.view import console, duration, empty_table, interval, number, plain_table

if TYPE_CHECKING:
    import pandas as pd

    from tt_ray.distributed.sweeps.board import Board
    from tt_ray.distributed.sweeps.study import Study
    from tt_ray.search import SearchConfig

ROWS = 60  # trials in a table on the screen; all are in results.md
BEST = 5  # trials shown while the sweep runs


def sweep_table(frame: pd.DataFrame, search: SearchConfig, confidence: float) -> RenderableType:
    """The trials, best first within each case, the winners in bold; then what failed and why."""
    from tt_ray.distributed.sweeps.table import ranking, winners

    ranked = ranking(frame, search)
    best = set(winners(frame, search)["fingerprint"])
    table = empty_table("Trials")
    table.add_column("trial", overflow="fold", min_width=16)
    for title in (
        "seeds x episodes",
        _title(search, confidence),
        "fresh seeds",
        "return",
        "val loss",
        "time",
    ):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("reused", overflow="fold")
    for _, row in ranked.head(ROWS).iterrows():
        style = "bold" if row["fingerprint"] in best else "dim" if row["status"] != "finished" else None
        table.add_row(*map(escape, _cells(row, search)), style=style)
    parts: list[RenderableType] = [table]
    if len(ranked) > ROWS:
        parts.append(Text(f"{len(ranked) - ROWS} more trials are in results.md", style="dim"))
    failed = frame[frame["status"] == "failed"]
    if len(failed):
        parts.append(
            plain_table(["failed trial", "cause"], failed[["trial", "cause"]].values.tolist(), "Failed")
        )
    return Group(*parts)


def forecast_table(study: Study) -> RenderableType:
    """Every trial, and what of it is in the store."""
    rows, saved = [], 0.0
    models: set[str | None] = set()
    to_train: set[str | None] = set()
    for trial in study.trials:
        forecast, config = study.forecast(trial), trial.config
        seeds, episodes = len(config.seeds), len(config.seeds) * config.evaluation.episodes
        done = seeds - len(study.to_do(trial)) - sum(r.status == "failed" for r in study.records(trial))
        saved += forecast.saved
        keys = {study.model_key(config, seed) for seed in config.seeds}
        models |= keys
        to_train |= {key for key in keys if key is None or study.store.find("models", key) is None}
        trained = f"{forecast.models}/{seeds}" if forecast.models is not None else "unknown"
        trained += f" (and {forecast.steps} steps)" if forecast.steps else ""
        played = f"{forecast.episodes}/{episodes}" if forecast.episodes is not None else "unknown"
        tokens = {True: "yes", False: "no", None: "unknown"}[forecast.tokens]
        rows.append([trial.name, f"{done}/{seeds}", tokens, trained, played])
    table = plain_table(["trial", "finished", "tokens", "models", "episodes"], rows, "What is there already")
    return Group(table, Text(), *map(Text, _forecast_lines(study, len(rows), models, to_train, saved)))


def _forecast_lines(
    study: Study, trials: int, models: set[str | None], to_train: set[str | None], saved: float
) -> list[str]:
    search = study.sweep.search
    if study.by_optuna:
        return [f"optuna proposes up to {search.count} trials; {trials} of them have been begun"]
    if None in models:
        return [f"{trials} trials; their data is not here yet, so what they share is unknown"]
    counted = f"{len(models)} models for {trials} trials, {len(to_train)} of them to be trained"
    return [counted, f"what is in the store took {duration(saved)} and is not computed again"]


class LiveBoard:
    """The state of a running sweep: redrawn on a terminal, elsewhere a line for each trial that ends."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._search = board.study.sweep.search
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=2, transient=True
            )
        self._told: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        else:
            self._told = {key: row["status"] for key, row in self._board.rows.items()}
            console.print(self._headline(), highlight=False)
            self._board.on_change = self._tell
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._board.on_change = None

    def _headline(self) -> str:
        counts = self._board.counts()
        order = ("finished", "stopped", "failed", "running", "waiting")
        parts = [f"{counts[status]} {status}" for status in order if counts.get(status)]
        return f"{', '.join(parts)}; {duration(time.monotonic() - self._board.began)}"

    def _tell(self) -> None:
        for key, row in self._board.rows.items():
            status = row["status"]
            if status != self._told.get(key) and status in ("finished", "stopped", "failed"):
                value = row.get(self._search.metric.name, np.nan)
                what = row["cause"] or f"{self._search.metric.name} {number(value)}"
                console.print(
                    f"{row['trial']}: {status}, {what} ({self._headline()})", highlight=False, markup=False
                )
            self._told[key] = status

    def _render(self) -> RenderableType:
        running = [[name, text] for name, text in self._board.progress()]
        parts: list[RenderableType] = [Text(self._headline())]
        if running:
            parts.append(plain_table(["running", ""], running))
        frame = self._board.frame()
        seen = frame[np.isfinite(frame[self._search.metric.name].astype(float))]
        if len(seen):
            table = plain_table(["best so far", self._search.metric.name, ""], self._best(seen))
            parts.append(table)
        return Group(*parts)

    def _best(self, frame: pd.DataFrame) -> Sequence[Sequence[str]]:
        from tt_ray.distributed.sweeps.table import ranking

        rows = ranking(frame, self._search, by_case=False).head(BEST)
        return [[row["trial"], _metric(row, self._search), row["status"]] for _, row in rows.iterrows()]


def _title(search: SearchConfig, confidence: float) -> str:
    from tt_ray.distributed.sweeps.table import interval_names

    name = search.metric.name
    return f"{name} [{100 * confidence:.0f} %]" if interval_names(name) else name


def _metric(row: pd.Series, search: SearchConfig) -> str:
    from tt_ray.distributed.sweeps.table import interval_names

    value, ends = row[search.metric.name], interval_names(search.metric.name)
    if ends is None or not all(end in row for end in ends):
        return number(value)
    return interval(value, row[ends[0]], row[ends[1]])


def _cells(row: pd.Series, search: SearchConfig) -> list[str]:
    seeds = int(row["seeds"])
    counted = f"{seeds} x {int(row['episodes']) // seeds}" if seeds else ""
    status = "" if row["status"] == "finished" else f" ({row['status']})"
    fresh = interval(row["confirmed/mean"], row["confirmed/ci_low"], row["confirmed/ci_high"])
    numbers: list[Any] = [row.get("return/mean", np.nan), row.get("val/loss", np.nan)]
    reused = row["reused"] if isinstance(row["reused"], str) else ""
    times = duration(float(row["seconds"])) if row["seconds"] else ""
    return [
        f"{row['trial']}{status}",
        counted,
        _metric(row, search),
        fresh,
        *map(number, numbers),
        times,
        reused,
    ]
