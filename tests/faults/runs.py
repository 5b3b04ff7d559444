"""What `tt-ray run` on the tiny experiment leaves, and what must be true of it whatever happened."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import tiny

POLICIES = ("random policy", "greedy decoding", "planner")
"""Whose episodes are played, in this order."""
EPISODES = 12
"""Of each."""
ONE_WORKER = "resources.workers=1"


def lines(folder: Path) -> dict[str, list[str]]:
    """Finished episodes on disk, by policy."""
    files = (folder / "runs" / "evaluations").glob("*/episodes.jsonl")
    return {file.parent.name: file.read_text().splitlines() for file in files}


def count(folder: Path) -> int:
    """Finished episodes on disk."""
    return sum(len(found) for found in lines(folder).values())


def moment(seed: int) -> int:
    """Episodes after which something happens, in the middle of those of one policy: 0, 1 or 2."""
    return EPISODES * (seed % len(POLICIES)) + random.Random(seed).randrange(1, EPISODES)


def played(folder: Path, episodes: int) -> Callable[[], bool]:
    """Whether so many episodes are finished."""
    return lambda: count(folder) >= episodes


def table(folder: Path) -> tuple[list[str], pd.DataFrame]:
    """What the experiment reports, times left out."""
    (report,) = (folder / "runs" / "experiments").glob("*/results.md")
    episodes = pd.read_parquet(report.parent / "episodes.parquet")
    timed = [name for name in episodes.columns if "seconds" in name or "latency" in name]
    rows = [line.rpartition(" | ")[0] for line in report.read_text().splitlines()]  # without decisions/s
    return rows, episodes.drop(columns=timed)


def assert_same(folder: Path, undisturbed: Path) -> None:
    """Tables, episodes and metrics are those of an undisturbed run, each once; nothing temporary is left."""
    for file in (folder / "runs" / "evaluations").glob("*/episodes.jsonl"):
        seeds = [json.loads(line)["seed"] for line in file.read_text().splitlines()]
        assert sorted(seeds) == list(range(min(seeds), min(seeds) + EPISODES)), file
    assert len(lines(folder)) == len(POLICIES)
    (rows, episodes), (expected_rows, expected) = table(folder), table(undisturbed)
    assert rows == expected_rows
    pd.testing.assert_frame_equal(episodes, expected)
    for name in ("faults", "faults seed 0"):
        assert tiny.mlflow_curves(folder, name) == tiny.mlflow_curves(undisturbed, name)
    assert tiny.mlflow_runs(folder) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]
    assert tiny.leftovers(folder) == []
