"""The table of a sweep: a row for each trial, its training seeds and episodes brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tt_ray.config import ExperimentConfig
from tt_ray.distributed.sweeps.cells import Record, reuse_text, total_reuse
from tt_ray.evaluation.scores import aggregate_interval, iqm
from tt_ray.search import SearchConfig
from tt_ray.sweep_file import Trial

STATES = ("failed", "running", "stopped", "waiting", "finished")
"""A trial is the first of these that one of its cells is."""
LEADING = ("index", "trial", "fingerprint", "case", "status", "cause", "seeds", "episodes")
CONFIRMED = ("confirmed/mean", "confirmed/ci_low", "confirmed/ci_high")


def trial_metrics(records: Sequence[Record], config: ExperimentConfig) -> dict[str, float]:
    """A trial's figures over all training seeds and episodes, under their MLflow names.

    Means and interquartile means are over all episodes, their bootstrap intervals resample within each
    training seed; `seed_std` and `seed_error` say how far the training seeds lie apart. Losses and speeds are
    means over the training seeds.
    """
    played = [record.results for record in records if record.episodes]
    figures = _means([record.metrics for record in records], ("val/", "speed/"))
    if played:
        everything = [result for results in played for result in results]
        figures |= _aggregated("return", [[r.episode_return for r in results] for results in played], config)
        figures["return/std"] = float(
            np.std([r.episode_return for r in everything], ddof=len(everything) > 1)
        )
        figures["episodes/length"] = float(np.mean([r.length for r in everything]))
        figures["episodes/terminated"] = float(np.mean([r.terminated for r in everything]))
        if all(result.score is not None for result in everything):
            scores = [[float(result.score or 0.0) for result in results] for results in played]
            figures |= _aggregated("score", scores, config)
    return figures


def trial_row(trial: Trial, records: Sequence[Record], seeds: int) -> dict[str, Any]:
    """A trial's row: `records` of those of its `seeds` cells that have been begun."""
    states = {record.status for record in records} | ({"waiting"} if len(records) < seeds else set())
    status = next(state for state in STATES if state in states)
    if status == "waiting" and records:
        status = "running"
    return {
        "index": trial.index,
        "trial": trial.name,
        "fingerprint": trial.fingerprint,
        "case": trial.case or "",
        "status": status,
        "cause": next((record.cause for record in records if record.cause), ""),
        "seeds": sum(bool(record.episodes) for record in records),
        "episodes": sum(len(record.episodes) for record in records),
        **trial.settings,
        **trial_metrics(records, trial.config),
        "seconds": sum(sum(record.seconds.values()) for record in records),
        "saved": sum(record.saved for record in records),
        "reused": reuse_text(total_reuse(records)),
    }


def trials_frame(rows: Sequence[Mapping[str, Any]], search: SearchConfig) -> pd.DataFrame:
    """Rows of trials as a table in the order of their numbers; what no trial has is NaN."""
    keys = [key for key in search.parameters if key not in LEADING]
    frame = pd.DataFrame(list(rows))
    for column in (*LEADING, *keys, search.metric.name, *CONFIRMED, "seconds", "saved", "reused"):
        if column not in frame:
            frame[column] = np.nan
    last = ["seconds", "saved", "reused", *CONFIRMED]
    metrics = [name for name in frame.columns if name not in (*LEADING, *keys, *last)]
    return frame[[*LEADING, *keys, *metrics, *last]].sort_values("index", ignore_index=True)


def winners(frame: pd.DataFrame, search: SearchConfig) -> pd.DataFrame:
    """The best finished trial of each case, in the order of the cases; among equals the first."""
    finished = frame[(frame["status"] == "finished") & np.isfinite(frame[search.metric.name].astype(float))]
    ranked = ranking(finished, search)
    return ranked.drop_duplicates("case").sort_values("index", ignore_index=True)


def ranking(frame: pd.DataFrame, search: SearchConfig, *, by_case: bool = True) -> pd.DataFrame:
    """Best first, with `by_case` within each case in the file's order; what is not finished comes last.

    A trial that was stopped early was judged by fewer episodes, so that its figure is not to be compared.
    """
    order = {case: place for place, case in enumerate(dict.fromkeys(frame["case"]))}
    ascending = [search.metric.goal == "minimize", True]
    ranked = frame.sort_values([search.metric.name, "index"], ascending=ascending, na_position="last")
    ranked = ranked.sort_values("status", key=lambda status: status != "finished", kind="stable")
    if by_case:
        ranked = ranked.sort_values("case", key=lambda cases: cases.map(order), kind="stable")
    return ranked


def with_confirmed(frame: pd.DataFrame, confirmed: Sequence[tuple[Trial, list[Record]]]) -> pd.DataFrame:
    """The table with the winners' scores on fresh seeds: normalised, or returns where there are none."""
    frame = frame.copy()
    for trial, records in confirmed:
        figures = trial_metrics(records, trial.config)
        stem = "score" if "score/mean" in figures else "return"
        row = frame.index[frame["fingerprint"] == trial.fingerprint]
        for name in CONFIRMED:
            frame.loc[row, name] = figures[name.replace("confirmed", stem)]
    return frame


def storable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as Parquet can hold it: a column of values of several types as text."""

    def mixed(column: pd.Series) -> bool:
        return column.dtype == object and len({type(value) for value in column.dropna()}) > 1

    return frame.assign(**{name: frame[name].map(_text) for name in frame.columns if mixed(frame[name])})


def _text(value: Any) -> Any:
    return value if value is None or value != value else str(value)


def _aggregated(stem: str, groups: Sequence[Sequence[float]], config: ExperimentConfig) -> dict[str, float]:
    how = {"confidence": config.evaluation.confidence, "samples": config.evaluation.bootstrap_samples}
    mean = aggregate_interval(groups, **how)  # type: ignore[arg-type]
    middle = aggregate_interval(groups, iqm, **how)  # type: ignore[arg-type]
    figures = {
        f"{stem}/mean": mean.interval.value,
        f"{stem}/ci_low": mean.interval.low,
        f"{stem}/ci_high": mean.interval.high,
        f"{stem}/iqm": middle.interval.value,
        f"{stem}/iqm_ci_low": middle.interval.low,
        f"{stem}/iqm_ci_high": middle.interval.high,
    }
    if mean.seed_std is not None and mean.seed_error is not None:
        figures |= {f"{stem}/seed_std": mean.seed_std, f"{stem}/seed_error": mean.seed_error}
    return figures


def _means(metrics: Sequence[Mapping[str, float]], prefixes: tuple[str, ...]) -> dict[str, float]:
    names = {name for figures in metrics for name in figures if name.startswith(prefixes)}
    return {
        name: float(np.mean([figures[name] for figures in metrics if name in figures]))
        for name in sorted(names)
    }
