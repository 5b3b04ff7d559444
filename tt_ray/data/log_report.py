"""What was found in somebody's log, before a data set is made of it; kept with the data set afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tt_ray.data.log_checks import (
    DROP_HINT,
    Finding,
    Target,
    columns_of,
    faults,
    misfits,
    remarks,
    repeated_rows,
)
from tt_ray.data.log_layout import OPTIONS
from tt_ray.data.log_rows import Cut, Log, cut
from tt_ray.plain import build


@dataclass(frozen=True)
class ColumnReport:
    """One dimension over all transitions."""

    name: str
    minimum: float
    maximum: float
    mean: float
    std: float
    missing: int
    """Rows in which it is no finite number."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `tt-ray data import` shows before it writes."""

    files: tuple[str, ...]
    rows: int
    episodes: int
    steps: int
    terminated: int
    truncated: int
    lengths: dict[str, float]
    """min, mean, max steps of an episode."""
    returns: dict[str, float]
    """min, mean, max undiscounted return of an episode."""
    roles: dict[str, list[str]]
    """The columns of every role that has some."""
    guessed: tuple[str, ...]
    """Roles whose columns were told by their names."""
    columns: tuple[ColumnReport, ...]
    findings: tuple[Finding, ...]

    def of_level(self, level: str) -> list[str]:
        """The lines of its findings of one level."""
        return [finding.text for finding in self.findings if finding.level == level]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`: numbers that are none are None, and files have no folders."""
        plain: dict[str, Any] = _plain(asdict(self))
        for file in self.files:
            for finding in plain["findings"]:
                finding["text"] = finding["text"].replace(file, Path(file).name)
        return {**plain, "files": [Path(file).name for file in self.files]}


def stored_findings(metadata: Mapping[str, Any]) -> tuple[Finding, ...]:
    """What was found in the files that a data set was imported from; empty where that is not known."""
    report = metadata.get("report")
    try:
        findings = tuple(build(Finding, item) for item in report["findings"]) if report else ()
    except (KeyError, TypeError, ValueError):
        return ()
    return findings


def examine(log: Log, target: Target, drop_incomplete: bool) -> tuple[Cut, Report]:
    """The log's episodes and all there is to say of them.

    With `drop_incomplete`, episodes that have faults are left out, and the report tells how many; without,
    each kind of fault is an error. Rows that repeat the one before, time and all, are always left out.
    """
    whole = cut(log)
    findings = list(misfits(log, target))
    repeated = repeated_rows(log, whole)
    if repeated.any():
        place = log.place(whole.rows[int(np.flatnonzero(repeated)[0])])
        text = f"rows left out that repeat another, time and all: {int(repeated.sum())}; the first: {place}"
        findings.append(Finding("warning", "duplicate-rows", text))
        whole = whole.keeping(~repeated)
    bad: dict[str, dict[int, str]] = {}
    for kind, episode, line in faults(log, whole):
        bad.setdefault(kind, {}).setdefault(episode, line)
    found = whole
    for kind, lines in bad.items():
        first = next(iter(lines.values()))
        if drop_incomplete:
            text = f"episodes left out: {len(lines)}; the first: {first}"
            findings.append(Finding("warning", "left-out", text))
        else:
            more = f" ({len(lines)} episodes have such)" if len(lines) > 1 else ""
            findings.append(Finding("error", kind, f"{first}{more}; {DROP_HINT}"))
    if drop_incomplete and bad:
        out = [episode for lines in bad.values() for episode in lines]
        found = whole.keeping(~np.isin(whole.episode_of, out))
    if len(found) == 0:
        findings.append(Finding("error", "missing", f"{log.files[0]}: no episode is left"))
    else:
        findings += remarks(log, found, target)
    order = {"error": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.level])
    return found, _report(log, found, findings)


def _report(log: Log, found: Cut, findings: Sequence[Finding]) -> Report:
    starts = found.offsets[:-1]
    rewards = np.nan_to_num(log.rewards[found.rows].astype(np.float64), posinf=0.0, neginf=0.0)
    returns = np.add.reduceat(rewards, starts) if len(found) else np.zeros(0)
    last = found.rows[found.offsets[1:] - 1]
    finals = np.where(found.finals >= 0, found.finals, last)
    terminated = int((log.terminated[last] | log.terminated[finals]).sum())
    roles = {role: list(log.layout.columns_of(role)) for role in OPTIONS}
    return Report(
        files=tuple(str(path) for path in log.files),
        rows=len(log.rewards),
        episodes=len(found),
        steps=len(found.rows),
        terminated=terminated,
        truncated=len(found) - terminated,
        lengths=_summary(np.diff(found.offsets)),
        returns=_summary(returns),
        roles={role: columns for role, columns in roles.items() if columns},
        guessed=log.layout.guessed,
        columns=tuple(_columns(log, found)),
        findings=tuple(findings),
    )


def _columns(log: Log, found: Cut) -> list[ColumnReport]:
    columns = []
    for name, values in columns_of(log, found):
        finite = values[np.isfinite(values)].astype(np.float64)
        low, high, mean, std = (
            float(f(finite)) if len(finite) else np.nan for f in (np.min, np.max, np.mean, np.std)
        )
        columns.append(ColumnReport(name, low, high, mean, std, len(values) - len(finite)))
    return columns


def _summary(values: Any) -> dict[str, float]:
    if len(values) == 0:
        return {}
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
