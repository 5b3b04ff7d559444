"""Data sets on the screen: what is there, what has been made, and what was found in files to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from tt_ray.cli.view import console, plain_table

if TYPE_CHECKING:
    from tt_ray.data.importing import Found
    from tt_ray.data.log_checks import Finding
    from tt_ray.data.minari_sets import DatasetInfo

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
MANY = 60
"""Columns of which a table shows each; of more, the first and the last ones."""


def sets_table(sets: Sequence[DatasetInfo], title: str) -> Table:
    """A line for each data set; in place of the environment, why one cannot be used."""
    columns = ["id", "environment", "episodes", "steps", "MB", "reference scores"]
    rows = [
        [
            info.id,
            info.environment if info.problem is None else info.problem,
            info.episodes,
            info.steps,
            round(info.size_mb, 1),
            "" if info.ref_min_score is None else f"{info.ref_min_score:.4g} to {info.ref_max_score:.5g}",
        ]
        for info in sets
    ]
    return plain_table(columns, rows, title)


def show_made(dataset: str) -> None:
    """The data set that a command has made, and how to look at it."""
    from tt_ray.data.minari_sets import list_datasets

    console.print(sets_table([info for info in list_datasets() if info.id == dataset], "Data set"))
    console.print(f"look at it with `tt-ray data show {dataset}`", soft_wrap=True)


def show_found(found: Found) -> None:
    """What is in the files: figures, columns, and then a line for all that is odd."""
    report = found.report
    console.print(plain_table(["", "value"], _facts(found), f"Found in {_files(report.files)}"))
    columns = ["column", "min", "max", "mean", "std", "missing"]
    rows = [[c.name, c.minimum, c.maximum, c.mean, c.std, c.missing or ""] for c in report.columns]
    if len(rows) > MANY:
        left = len(rows) - MANY
        rows = [*rows[: MANY // 2], [f"({left} more)", "", "", "", "", ""], *rows[-MANY // 2 :]]
    console.print(plain_table(columns, rows, "Columns"))
    console.print()
    show_findings(report.findings)


def show_findings(findings: Sequence[Finding]) -> None:
    """A line for each."""
    for finding in findings:
        line = f"{finding.level}: {finding.text}"
        console.print(line, style=STYLES[finding.level], soft_wrap=True)


def _facts(found: Found) -> list[tuple[str, str]]:
    report, (low, high) = found.report, found.references
    roles = [
        (role, f"{_named(columns)}{' (told by name)' if role in report.guessed else ''}")
        for role, columns in report.roles.items()
    ]
    environment = found.environment if isinstance(found.environment, str) else found.environment["id"]
    facts = [
        ("rows", str(report.rows)),
        (
            "episodes",
            f"{report.episodes}, {report.terminated} terminated, {report.truncated} truncated",
        ),
        ("transitions", str(report.steps)),
        ("length", _range(report.lengths, "{mean:.1f}, {min:.0f} to {max:.0f}")),
        ("return", _range(report.returns, "{mean:.4g}, {min:.4g} to {max:.4g}")),
        ("environment", environment or "none"),
        ("reference scores", "none" if low is None else f"{low:g} (0) and {high:g} (100)"),
    ]
    return [*facts, *roles]


def _range(numbers: dict[str, float], form: str) -> str:
    return f"mean {form.format(**numbers)}" if numbers else "none"


def _named(columns: Sequence[str], most: int = 12) -> str:
    more = f", ... {columns[-1]} ({len(columns)})" if len(columns) > most else ""
    return ", ".join(columns[:most]) + more


def _files(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
