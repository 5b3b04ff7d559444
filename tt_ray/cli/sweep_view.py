"""What a person sees of a sweep: what is to be done, how far it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from tt_ray.cli.view import console, duration, empty_table, plain_table
from tt_ray.texts import interval_text, number_text

if TYPE_CHECKING:
    import pandas as pd

    from tt_ray.distributed.sweeps.board import Board
    from tt_ray.distributed.sweeps.study import Study
    from tt_ray.search import SearchConfig

ROWS = 60  # trials in a table on the screen; all are in results.md
LONGEST = 32  # characters of a setting that are kept on one line
WIDE = 115  # columns of a terminal that has room for everything
NARROW = 100  # columns of one in which what was reused stands under the trial's name
BEST = 5  # trials shown while the sweep runs


def sweep_table(
    frame: pd.DataFrame, baselines: pd.DataFrame, search: SearchConfig, confidence: float
) -> RenderableType:
    """The trials, best first within each case, the winners in bold; the baselines; what failed and why."""
    from tt_ray.distributed.sweeps.table import ranking, winners

    ranked = ranking(frame, search)
    best = set(winners(frame, search)["fingerprint"])
    rows = [row for _, row in ranked.head(ROWS).iterrows()]
    rows += [row for _, row in ranked.iloc[ROWS:].iterrows() if row["fingerprint"] in best]
    cells = [_cells(row, search, confidence) for row in rows]
    table = empty_table("Trials")
    words = [len(word) for row in rows for word in str(row["trial"]).split()]
    table.add_column("trial", overflow="fold", min_width=min(LONGEST, max(words, default=0)))
    titles = _titles(frame, search, confidence)
    for title in titles:
        table.add_column(title, justify="left" if title == "reused" else "right", overflow="fold")
    for row, cell in zip(rows, cells, strict=True):
        style = "bold" if row["fingerprint"] in best else "dim" if row["status"] != "finished" else None
        name = cell["trial"]
        if "reused" not in titles and cell["reused"]:
            name = f"{name}\n  reused: {cell['reused']}"
        table.add_row(name, *(cell[title] for title in titles), style=style)
    table.add_section()
    for cell in (_cells(row, search, confidence) for _, row in baselines.iterrows()):
        table.add_row(cell["trial"], *(cell[title] for title in titles))
    parts: list[RenderableType] = [table]
    if len(ranked) > len(rows):
        parts.append(Text(f"{len(ranked) - len(rows)} more trials are in results.md", style="dim"))
    failed = frame[frame["status"] == "failed"]
    if len(failed):
        causes = failed[["trial", "cause"]].values.tolist()
        parts.append(
            plain_table(["failed trial", "cause"], causes, "Failed (--retry-failed runs them again)")
        )
    return Group(*parts)


def _titles(frame: pd.DataFrame, search: SearchConfig, confidence: float) -> list[str]:
    """Columns after the trial's name: those that all have something to say, and fit."""
    measured = [_title(search, confidence), "on fresh seeds", "return", "val loss"]
    titles = ["episodes", *measured, "time", "reused"]
    if console.width < WIDE:
        titles = [title for title in titles if title not in ("return", "val loss")]
    if console.width < NARROW:
        titles.remove("reused")
    if frame["confirmed/mean"].isna().all():
        titles.remove("on fresh seeds")
    return titles


def forecast_table(study: Study) -> RenderableType:
    """Every trial, and what of it is in the store."""
    rows, seconds = [], dict[str, float]()
    models: set[str | None] = set()
    to_train: set[str | None] = set()
    for trial in study.trials:
        forecast, config = study.forecast(trial), trial.config
        seconds |= forecast.seconds
        seeds, episodes = len(config.seeds), len(config.seeds) * config.evaluation.episodes
        done = seeds - len(study.to_do(trial)) - sum(r.status == "failed" for r in study.records(trial))
        keys = {study.model_key(config, seed) for seed in config.seeds}
        models |= keys
        to_train |= {key for key in keys if key is None or study.store.find("models", key) is None}
        trained = f"{forecast.models}/{seeds}" if forecast.models is not None else "unknown"
        trained += f" (and {forecast.steps} steps)" if forecast.steps else ""
        played = f"{forecast.episodes}/{episodes}" if forecast.episodes is not None else "unknown"
        tokens = {True: "yes", False: "no", None: "unknown"}[forecast.tokens]
        rows.append([trial.name, f"{done}/{seeds}", tokens, trained, played])
    table = plain_table(["trial", "finished", "tokens", "models", "episodes"], rows, "What is there already")
    return Group(
        table, Text(), *map(Text, _forecast_lines(study, len(rows), models, to_train, sum(seconds.values())))
    )


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
            console.print(self._headline())
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
                what = row["cause"] or f"{self._search.metric.name} {number_text(value)}"
                console.print(f"{row['trial']}: {status}, {what} ({self._headline()})")
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
    from tt_ray.search import interval_names

    name = search.metric.name
    return f"{name} [{100 * confidence:.0f} %]" if interval_names(name) else name


def _metric(row: pd.Series, search: SearchConfig) -> str:
    from tt_ray.search import interval_names

    value, ends = row[search.metric.name], interval_names(search.metric.name)
    if ends is None or not all(end in row for end in ends):
        return number_text(value)
    return interval_text(value, row[ends[0]], row[ends[1]])


def _cells(row: pd.Series, search: SearchConfig, confidence: float) -> dict[str, str]:
    """A trial's cells by their columns' titles."""
    seeds, episodes = int(row["seeds"]), int(row["episodes"])
    status = "" if row["status"] in ("finished", "baseline") else f" ({row['status']})"
    return {
        "trial": f"{row['trial']}{status}",
        "episodes": f"{seeds} x {episodes // seeds}" if seeds > 1 else str(episodes),
        _title(search, confidence): _metric(row, search),
        "on fresh seeds": interval_text(
            row["confirmed/mean"], row["confirmed/ci_low"], row["confirmed/ci_high"]
        ),
        "return": number_text(row.get("return/mean", np.nan)),
        "val loss": number_text(row.get("val/loss", np.nan)),
        "time": duration(float(row["seconds"])) if row["seconds"] else "",
        "reused": row["reused"] if isinstance(row["reused"], str) else "",
    }
