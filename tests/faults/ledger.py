"""The table of faults: what was struck when, what came out, and the seconds that it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

KINDS = {
    "training worker": "SIGKILL to a process of Ray Train",
    "evaluation actor": "SIGKILL to a process of the pool",
    "trial": "SIGKILL to the process of a sweep's trial",
    "driver": "SIGKILL to the command",
    "raylet": "SIGKILL to the raylet of the command's own Ray",
    "control service": "SIGKILL to the gcs_server of the command's own Ray",
    "node": "SIGKILL to all of Ray on one host of a cluster",
    "head": "SIGKILL to all of Ray on a cluster's head",
    "stage holder": "SIGKILL to a process that computes what others wait for",
    "tracking server": "MLflow's server stopped, and started again later",
    "full disk": "no room left where results are kept",
    "cut checkpoint": "a file of the last checkpoint made shorter",
    "Ctrl-C": "SIGINT to the command's process group",
}
"""Every kind of fault that is tried."""

UNDISTURBED: dict[str, float] = {}
"""Seconds that undisturbed runs took, by the name of the fixture that made them."""


@dataclass(frozen=True)
class Row:
    """One fault."""

    kind: str
    when: str
    out: str
    lost: float | None
    """Seconds more than the undisturbed run, everything that was run again and Ray's starts included."""


ROWS: list[Row] = []


@contextmanager
def undisturbed(name: str) -> Iterator[None]:
    """Measure what faults are compared with."""
    began = time.monotonic()
    yield
    UNDISTURBED[name] = time.monotonic() - began


def note(item: pytest.Item, report: pytest.TestReport) -> None:
    """Keep the row of a test that is marked `fault(kind, when, out, against)`."""
    mark = item.get_closest_marker("fault")
    if mark is None or (report.when != "call" and not report.skipped):
        return
    kind, when, out, *against = mark.args
    assert kind in KINDS, kind
    case = getattr(getattr(item, "callspec", None), "id", "")
    said = dict(item.user_properties).get("when", when.format(case=case))
    base = UNDISTURBED.get(*against) if against else None
    lost = report.duration - base if base is not None and report.passed else None
    result = out if report.passed else "skipped" if report.skipped else "FAILED"
    ROWS.append(Row(kind, str(said), result, lost))


def table(rows: list[Row]) -> str:
    """The rows as Markdown, by kind."""
    order = list(KINDS)
    lines = ["| what | when | what came out | seconds lost |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: order.index(row.kind)):
        lost = "" if row.lost is None else f"{max(0, row.lost):.0f}"
        lines.append(f"| {row.kind} | {row.when} | {row.out} | {lost} |")
    return "\n".join(lines)
