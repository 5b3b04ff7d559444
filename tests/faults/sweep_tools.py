"""A tiny sweep run as a user runs it, when to kill it, and what must be true of everything at its end."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import tiny
import yaml
from command import AGENTS, Command, run
from command import start_until as start_command_until
from processes import Growth, descendants

Moment = Callable[[Path], bool]
"""Given the folder that a sweep runs in, whether the time has come."""
Value = tuple[str, str, int, float]  # run, metric, step, value

FRESH = 1_000_000  # the winner's episode seeds begin here
STEPS = 100
COLLECTED = {"environment": "Pendulum-v1", "steps": 12_000, "max_steps": 40, "final_episodes": 2}
MEASURED = ("speed/", "seconds", "saved", "reused", "system/")
"""Columns of the table and metrics that no two sweeps have in common."""
TIMED = ("seconds", "latency", "idle")  # within the names of an episode's fields
ELSEWHERE = ("mlflow.", "version.", "git.", "host", "reused", "checkpoint", "tt_ray.")
"""Tags that depend on where and when a sweep ran."""

BY_RETURN = {"metric": {"name": "return/mean"}}
BY_LOSS = {"metric": {"name": "val/loss", "goal": "minimize"}}
GRID = {
    **BY_RETURN,
    "parameters": {
        "discretizer.strategy": {"values": ["uniform", "quantile"]},
        "planner.horizon": {"values": [1, 2]},
    },
}
RANDOM = {
    **BY_RETURN,
    "method": "random",
    "num_trials": 3,
    "seed": 3,
    "parameters": {
        "training.learning_rate": {"min": 1.0e-4, "max": 1.0e-2, "distribution": "log_uniform"},
        "planner.horizon": {"values": [1, 2, 3]},
    },
}
ASHA = {
    **RANDOM,
    **BY_LOSS,
    "num_trials": 6,
    "scheduler": {"type": "asha", "rung": "training_steps", "grace": 20, "reduction": 2},
}
OPTUNA = {**RANDOM, **BY_LOSS, "method": "optuna", "num_trials": 5}


def write_file(folder: Path, search: Mapping[str, Any], *, name: str = "study", **sections: Any) -> Path:
    """A sweep's file in `folder`, below which it writes; `sections` go over its own, None to have none."""
    plain: dict[str, Any] = {
        "name": name,
        "question": "Does it survive?",
        "dataset": {"id": "faults/collected-v0", "validation_fraction": 0.1},
        "collect": COLLECTED,
        "discretizer": {"num_bins": 20},
        "model": {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "context_transitions": 5, "dropout": 0.1},
        "training": {
            "steps": STEPS,
            "batch_size": 16,
            "learning_rate": 0.001,
            "warmup_steps": 5,
            "log_every": 1,
            "validate_every": 20,
            "validation_windows": 32,
        },
        "planner": {"horizon": 2, "beam_width": 8, "max_context_transitions": 2},
        "evaluation": {"episodes": 6, "max_steps": 30, "bootstrap_samples": 200},
        "resources": {"episodes_per_actor": 2, "storage": str(folder / "runs")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "films": 0},
        "seeds": [0],
        "search": dict(search),
    }
    for section, values in sections.items():
        old = plain.get(section)
        plain[section] = {**old, **values} if isinstance(old, dict) and values is not None else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in plain.items() if value is not None}))
    return path


@dataclass(frozen=True)
class Outcome:
    """All that a sweep has to show, without what no two sweeps have in common."""

    table: pd.DataFrame
    episodes: pd.DataFrame
    points: list[Value]
    figures: dict[str, float]
    """The parent's metrics, as they were last."""
    statuses: dict[str, str]
    tags: dict[str, dict[str, str]]
    params: dict[str, dict[str, str]]
    artifacts: dict[str, list[str]]
    """Without checkpoints: which of the cells that share a model trains it is a matter of chance."""
    trained: int
    """Cells that have trained a model, which then is among their artifacts."""


def outcome(folder: Path, name: str = "study") -> Outcome:
    """What the sweep of that name has left in `folder` and in MLflow, which holds every point once."""
    table = pd.read_parquet(folder / "runs" / "sweeps" / name / "trials.parquet")
    episodes = pd.read_parquet(folder / "runs" / "sweeps" / name / "episodes.parquet")
    order = ["fresh", "trial_index", "training_seed", "seed"]
    records = (folder / "runs" / "sweeps" / name / "cells").glob("*/result.json")
    with sqlite3.connect(folder / "mlflow.db") as database:
        return Outcome(
            table=table.drop(columns=[column for column in table if column.startswith(MEASURED)]),
            episodes=episodes.drop(columns=[c for c in episodes if any(word in c for word in TIMED)])
            .sort_values(order)
            .reset_index(drop=True),
            trained=sum(json.loads(record.read_text())["trained"] for record in records),
            **_in_mlflow(database, folder, name),
        )


def _in_mlflow(database: sqlite3.Connection, folder: Path, name: str) -> dict[str, Any]:
    of_sweep = """from runs r join experiments e using (experiment_id) where e.name = ?
                  and r.lifecycle_stage = 'active'"""
    runs = {
        identity: (run, status)
        for identity, run, status in database.execute(f"select run_uuid, r.name, status {of_sweep}", (name,))
    }
    assert len({run for run, _ in runs.values()}) == len(runs)  # each run once
    points = [
        (runs[identity][0], key, step, value)
        for identity, key, step, value in database.execute("select run_uuid, key, step, value from metrics")
        if identity in runs and not key.startswith(MEASURED)
    ]
    assert max(Counter(point[:3] for point in points).values()) == 1  # and in it each point
    parents = sorted((step, key, value) for run, key, step, value in points if run == name)
    pairs: dict[str, dict[str, dict[str, str]]] = {"tags": {}, "params": {}}
    for kind, found in pairs.items():
        for identity, key, value in database.execute(f"select run_uuid, key, value from {kind}"):
            if identity in runs and value and not key.startswith(ELSEWHERE):
                found.setdefault(runs[identity][0], {})[key] = value
    return {
        "points": sorted(point for point in points if point[0] != name),
        "figures": {key: value for _, key, value in parents},
        "statuses": dict(runs.values()),
        "artifacts": {run: _artifacts(folder, identity) for identity, (run, _) in runs.items()},
        **pairs,
    }


def _artifacts(folder: Path, run: str) -> list[str]:
    (root,) = folder.glob(f"mlruns/*/{run}/artifacts")
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return [path for path in found if not path.startswith("checkpoint/")]


def assert_same(folder: Path, undisturbed: Outcome, name: str = "study") -> None:
    """A sweep that was disturbed has ended like one that was not, and nothing temporary is left."""
    found = outcome(folder, name)
    pd.testing.assert_frame_equal(found.table, undisturbed.table)
    pd.testing.assert_frame_equal(found.episodes, undisturbed.episodes)
    assert found.points == undisturbed.points
    assert found.figures == undisturbed.figures
    assert found.statuses == undisturbed.statuses
    assert set(found.statuses.values()) == {"FINISHED"}
    assert (found.tags, found.params) == (undisturbed.tags, undisturbed.params)
    assert (found.artifacts, found.trained) == (undisturbed.artifacts, undisturbed.trained)
    assert tiny.leftovers(folder / "runs") == []


def unmarked(path: Path, content: bytes) -> list[dict[str, Any]]:
    """A JSON file, or the lines of a journal, without what says that its trial is the best."""
    parts = content.splitlines() if path.suffix == ".jsonl" else [content]
    lines = [{**json.loads(part), "best": None} for part in parts]
    return [
        line
        for line in lines
        if "best" not in line.get("tags", ()) and "checkpoint" not in line.get("artifact", ())
    ]


class Kept:
    """What a sweep had done at one moment, and must not do again."""

    def __init__(self, folder: Path) -> None:
        runs = folder / "runs"
        records = runs.glob("sweeps/*/cells/*/result.json")
        finished = [record.parent for record in records if _status(record) in ("finished", "stopped")]
        self.whole = {
            path: path.read_bytes()
            for path in [
                *(cell / name for cell in finished for name in ("journal.jsonl", "result.json")),
                *runs.glob("tokens/*/stage.json"),
                *runs.glob("models/*/stage.json"),
            ]
        }
        self.growing = {path: path.read_bytes() for path in runs.glob("evaluations/*/episodes.jsonl")}
        self.finished = len(finished)

    def check(self) -> None:
        """All of it is as it was, but for the mark of the best; episodes may have come on top."""
        for path, content in self.whole.items():
            assert unmarked(path, path.read_bytes()) == unmarked(path, content), path
        for path, content in self.growing.items():
            whole = content[: content.rfind(b"\n") + 1]
            assert path.read_bytes().startswith(whole), path


def _status(record: Path) -> str:
    return str(json.loads(record.read_text())["status"])


def ended(folder: Path) -> int:
    """Cells that have ended."""
    records = folder.glob("runs/sweeps/*/cells/*/result.json")
    return sum(_status(record) != "running" for record in records)


def when_there(pattern: str) -> Moment:
    """When a file or folder of that name exists."""
    return lambda folder: any(folder.glob(pattern))


def when_ended(cells: int) -> Moment:
    """When so many cells have ended."""
    return lambda folder: ended(folder) >= cells


def at_step(step: int) -> Moment:
    """When some model has been trained for so many steps."""
    growths: dict[Path, Growth] = {}

    def come(folder: Path) -> bool:
        models = folder.glob("runs/models/*")
        return any(growths.setdefault(model, Growth(model / "journal.jsonl"))() >= step for model in models)

    return come


def when_played(episodes: int, first_seed: int = 0) -> Moment:
    """When so many episodes of seeds from `first_seed` on are on disk."""

    def come(folder: Path) -> bool:
        files = folder.glob("runs/evaluations/*/episodes.jsonl")
        lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
        seeds = [json.loads(line)["seed"] for line in lines if line.endswith("\n")]
        return sum(seed >= first_seed for seed in seeds) >= episodes

    return come


def start_until(folder: Path, moment: Moment, *arguments: str | Path) -> Command:
    """`tt-ray sweep` in `folder`, still under way as the moment comes."""
    return start_command_until(folder, lambda: moment(folder), "sweep", *arguments)


def resume(folder: Path, file: Path, *more: str) -> str:
    """The same command to its end."""
    return run(folder, "sweep", file, "--resume", *more)


def ray_process(command: Command, name: str) -> psutil.Process:
    """The one process of that name that a command has started: `raylet`, `gcs_server`."""
    (found,) = (process for process in descendants(command.process.pid) if process.name() == name)
    return found


def without_agents(command: Command) -> set[psutil.Process]:
    """All that a command has started, but for what lives on for a minute without harm."""
    agents = {agent for name in AGENTS for agent in descendants(command.process.pid, name)}
    return set(descendants(command.process.pid)) - agents


def run_whole(folder: Path, search: Mapping[str, Any], **sections: Any) -> Outcome:
    """The outcome of a sweep that nobody disturbs."""
    run(folder, "sweep", write_file(folder, search, **sections))
    return outcome(folder)


def one_line(text: str) -> str:
    """The last line of what a command printed, in which no traceback is."""
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]
