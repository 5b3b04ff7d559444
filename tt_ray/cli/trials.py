"""Tables of what MLflow has: a sweep with its trials, what they reused, what failed, and who won."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tt_ray.cli.view import console, duration, empty_table, plain_table, runs_table
from tt_ray.search import interval_names
from tt_ray.texts import interval_text, number_text

if TYPE_CHECKING:
    import pandas as pd

WINNERS = ("score/mean", "return/mean", "val/loss")
"""Metrics of a winner that are shown, beside the one by which it was chosen."""
NARROW = 100  # columns of a terminal below which a trial takes several lines
LAST = 3  # failures that are named while a sweep runs
STATUSES = ("finished", "stopped", "failed", "interrupted", "running", "waiting")
_MLFLOW_WORDS = {"killed": "interrupted", "scheduled": "waiting"}


def results_view(frame: pd.DataFrame, name: str) -> Group:
    """Everything in a `results_table`: the runs that are no sweep's, then each sweep with its trials."""
    from tt_ray.tracking.results import further_columns

    found = list(families(frame))
    parts: list[RenderableType] = [sweep_view(family) for family in found if is_sweep(family)]
    others = [run_id for family in found if not is_sweep(family) for run_id in family.index]
    if others or not parts:
        rest = frame.loc[others]
        if parts:  # params may differ among the sweeps alone
            params = further_columns(frame)
            rest = rest.drop(columns=[column for column in params if rest[column].nunique() < 2])
        parts = [Group(runs_table(rest, name), *failures(rest)), *parts]
    if any(map(is_sweep, found)):
        advice = f"run ids, settings and all other columns: tt-ray results {shlex.quote(name)} --csv FILE"
        parts.append(Text(f"\n{advice}", style="dim"))
    return Group(*parts)


def families(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Each run without a parent together with those below it, oldest first."""
    number_of_family = (frame["parent"] == "").cumsum()
    for _, family in frame.groupby(number_of_family, sort=False):
        yield family


def is_sweep(family: pd.DataFrame) -> bool:
    """Whether the family's first run is a sweep's."""
    return family["kind"].iloc[0] == "sweep"


def sweep_view(family: pd.DataFrame, rows: int | None = None) -> Group:
    """A sweep with its trials and what there is to say of them; with `rows` in short, so many at most."""
    sweep, trials = family.iloc[0], family.iloc[1:]
    title = f"{sweep['run']} ({status_word(sweep['status'])})"
    shown = trials
    if rows is not None and rows < len(trials):
        running = trials[trials["status"] == "RUNNING"]
        ended = trials[trials["status"] != "RUNNING"]
        shown = trials.loc[[*running.index, *ended.index[::-1]][:rows]].sort_index(
            key=trials.index.get_indexer
        )
    parts: list[RenderableType] = [_trials_table(shown, title) if len(trials) else Text(f"\n{title}")]
    if hidden := len(trials) - len(shown):
        parts.append(Text(f"and {hidden} more", style="dim"))
    parts += [*failures(trials)[0 if rows is None else -LAST :], Text(f"\n{summary(trials)}")]
    if rows is None and (data := data_line(sweep)):
        parts.append(Text(data))
    if rows is None and (winner := winner_rows(sweep)):
        parts.append(plain_table(["metric", "best", "on fresh episodes"], winner, "Winner"))
    return Group(*parts)


def _trials_table(trials: pd.DataFrame, title: str) -> Table:
    """An entry for each trial and seed; on a narrow terminal, what it reused stands below its name."""
    narrow = console.width < NARROW
    table = empty_table(title)
    table.add_column("trial", overflow="fold", min_width=20)
    for column in ("status",) if narrow else ("seed", "status"):
        table.add_column(column, overflow="fold")
    scores = (
        ("score\n[interval]", "return", "val\nloss") if narrow else ("score [interval]", "return", "val loss")
    )
    for column in (*scores, "time"):
        table.add_column(column, justify="right", overflow="fold")
    if not narrow:
        table.add_column("reused", overflow="fold")
    for _, trial in trials.iterrows():
        name, seed, reused = trial["trial"] or trial["run"], str(trial["seed"] or ""), trial["reused"]
        score = interval_text(trial["score/mean"], trial["score/ci_low"], trial["score/ci_high"])
        numbers = [
            number_text(trial["return/mean"]),
            number_text(trial["val/loss"]),
            duration(trial["seconds"]),
        ]
        if narrow:
            below = f"\nreused: {reused}" if reused else ""
            cells = [
                f"{trial['run']}{below}",
                status_word(trial["status"]),
                score.replace(" ", "\n", 1),
                *numbers,
            ]
        else:
            cells = [name, seed, status_word(trial["status"]), score, *numbers, reused]
        table.add_row(*cells)
    return table


def status_word(status: str) -> str:
    """MLflow's word for a run's status, or STOPPED, as one of STATUSES."""
    return _MLFLOW_WORDS.get(status.lower(), status.lower())


def count_by_status(trials: pd.DataFrame) -> str:
    """Such as `9 finished, 1 failed, 2 running`."""
    counts = Counter(map(status_word, trials["status"]))
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def summary(trials: pd.DataFrame) -> str:
    """How many trials there are and how they do; what was reused, and the time that saved."""
    different, runs = trials["fingerprint"].nunique(), len(trials)
    if not runs:
        return "no trial has begun yet"
    several = f"{different} trial{'s' if different != 1 else ''}"
    lines = [
        f"{several}{f' in {runs} runs' if runs != different else ''}: {count_by_status(trials)}",
        f"{duration(trials['seconds'].sum())} of computing",
    ]
    if stages := reused_stages(trials["reused"]):
        each = ", ".join(f"{kind} {count}" for kind, count in stages.items())
        total, saved = sum(stages.values()), trials["saved"].sum()
        lines[1] += f"; {total} stage{'s' if total != 1 else ''} reused ({each})"
        lines[1] += f", which saved {duration(saved)}" if saved else ""
    return "\n".join(lines)


def reused_stages(texts: Iterable[str]) -> Mapping[str, int]:
    """How often each kind of stage was reused, from texts such as `tokens, 20 episodes (planner)`."""
    items = [item for text in texts for item in re.split(r",(?![^(]*\))", text)]
    kinds = (re.sub(r"\(.*\)|\b\d+\b", "", item).strip() for item in items)
    return Counter(kind for kind in kinds if kind)


def winner_rows(sweep: pd.Series) -> list[list[str]]:
    """Main metrics of a sweep's winner: as it was selected, and on fresh episodes."""

    def text(prefix: str, metric: str) -> str:
        names = (metric, *(interval_names(metric) or ("", "")))
        return interval_text(*(sweep.get(f"{prefix}/{name}", float("nan")) for name in names))

    metrics = dict.fromkeys(filter(None, (sweep["metric"], *WINNERS)))
    rows = [[metric, text("best", metric), text("confirmed", metric)] for metric in metrics]
    return [row for row in rows if any(row[1:])]


def data_line(sweep: pd.Series) -> str:
    """What the data set has by itself, where the sweep has a single one."""
    mean, score = (number_text(sweep.get(f"data/{name}/mean", float("nan"))) for name in ("return", "score"))
    return f"data set: mean return {mean}{f' (score {score})' if score else ''}" if mean else ""


def failures(runs: pd.DataFrame) -> list[Text]:
    """A line for each cause, with the runs that failed by it."""
    failed = runs[runs["cause"] != ""] if "cause" in runs else runs.iloc[:0]
    return [
        Text.assemble(
            "\n", ("failed: ", "bold red"), f"{', '.join(group['run'])}: {' '.join(str(cause).split())}"
        )
        for cause, group in failed.groupby("cause", sort=False)
    ]
