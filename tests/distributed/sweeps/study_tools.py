"""A tiny sweep, run in this process as its driver would have it run, and what it leaves on disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tt_ray.distributed import line
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.capacity import Capacity
from tt_ray.distributed.sweeps.cells import Record
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.schedule import Making
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.trial import Report, Task, run_trial
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.sweep_file import Sweep, load_sweep

DATASET = "faults/pendulum-v0"  # that of tests/faults/tiny.py
STEPS, EVERY = 60, 20
MEASURED = ("speed/", "seconds", "saved", "reused", "system/")
"""Columns and metrics that no two runs have in common."""
HORIZONS = {"parameters": {"planner.horizon": {"values": [1, 2, 3]}}}
RATES = {"parameters": {"training.learning_rate": {"values": [1e-2, 1e-3]}}}
BY_LOSS = {"metric": {"name": "val/loss", "goal": "minimize"}}
LOG = "trainings.txt"
ALONE = Capacity(allocation=Allocation(), bundle={"CPU": 1.0}, concurrent=1)


def make_sweep(folder: Path, search: Mapping[str, Any] | None = HORIZONS, **sections: Any) -> Sweep:
    """A sweep with its file and storage in `folder`; `sections` are laid over those of the file."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "question": "Which is best?",
        "dataset": {"id": DATASET, "validation_fraction": 0.1},
        "discretizer": {"num_bins": 20},
        "model": {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "context_transitions": 5, "dropout": 0.0},
        "training": {
            "steps": STEPS,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "log_every": 10,
            "validate_every": EVERY,
            "validation_windows": 32,
        },
        "planner": {"horizon": 2, "beam_width": 4, "max_context_transitions": 2},
        "evaluation": {"episodes": 4, "max_steps": 10, "bootstrap_samples": 200},
        "resources": {"episodes_per_actor": 4, "storage": str(folder / "runs")},
        "tracking": {"films": 0},
        "seeds": [0],
    }
    for key, value in sections.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    if search is not None:
        plain["search"] = dict(search)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return load_sweep(path)


class Deaf:
    """In place of a courier: only notes what it is given."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Path, str | None]] = []
        self.killed: list[tuple[Path, str]] = []

    def add(self, name: str, folder: Path, parent: str | None = None) -> None:
        self.added.append((name, folder, parent))

    def end(self, folder: Path, status: str) -> None:
        self.killed.append((folder, status))


class Quiet:
    """A `Progress` that shows nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        yield lambda done, message: None

    def note(self, message: str) -> None:
        pass


def nothing(count: float, value: float) -> None:
    """A `report` that nobody listens to."""


def tasks(study: Study) -> list[Task]:
    """The tasks of all trials, without Ray."""
    make = Making(study.sweep, study.folder, study.data, ALONE, study.facts)
    return [make(trial.settings, trial.case, trial.index) for trial in study.trials]


def board_of(study: Study) -> Board:
    """A board that sends nothing."""
    return Board(study, Deaf(), "parent")  # type: ignore[arg-type]


def launch(
    sweep: Sweep, flags: Flags = Flags(), reporting: Callable[[Task], Report] = lambda task: nothing
) -> Board:
    """All that is to do of a grid or a random search, a trial at a time, in this process.

    A report that raises `SystemExit` is a scheduler that stops its trial.
    """
    study = check_sweep(sweep, flags)
    board = board_of(study)
    to_do = {trial.fingerprint: study.to_do(trial, only_failed=flags.only_failed) for trial in study.trials}
    by_fingerprint = {task.trial.fingerprint: task for task in tasks(study)}
    pending = [trial for trial in study.trials if to_do[trial.fingerprint]]
    for trial in pending:
        study.reopen(trial, to_do[trial.fingerprint])
    for trial in study.in_order(pending):
        task = by_fingerprint[trial.fingerprint]
        board.started(task)
        with contextlib.suppress(SystemExit):
            run_trial(task, reporting(task))
        board.ended(task, "")
    return board


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of trials without what was measured with a clock."""
    return frame.drop(columns=[name for name in frame.columns if name.startswith(MEASURED)])


def essence(record: Record) -> tuple[Any, ...]:
    """What of a record must not depend on what happened while it was made."""
    metrics = {name: value for name, value in record.metrics.items() if not name.startswith(MEASURED)}
    episodes = [EpisodeResult.from_json(episode) for episode in record.episodes]
    identity = (record.trial, record.seed, record.status, record.cause, Path(record.checkpoint).name)
    return identity, metrics, episodes, record.reports


def points(folder: Path) -> dict[tuple[str, int], float]:
    """Every (metric, step) in a journal, which has each once; without what was measured with a clock."""
    found: dict[tuple[str, int], float] = {}
    for text in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(text)
        for name, value in entry.get("metrics", {}).items():
            assert (name, entry["step"]) not in found
            found[name, entry["step"]] = value
    return {key: value for key, value in found.items() if not key[0].startswith(MEASURED)}


def tags(folder: Path) -> dict[str, str]:
    """A journal's tags, as they are in the end."""
    entries = [json.loads(text) for text in (folder / "journal.jsonl").read_text().splitlines()]
    return {key: value for entry in entries for key, value in entry.get("tags", {}).items()}


def cells(study: Study) -> dict[str, tuple[int, bytes]]:
    """Time and content of every cell's record, and its journal."""
    files = sorted((study.folder / "cells").glob("*/*.json*"))
    kept = [file for file in files if file.name in ("result.json", "journal.jsonl")]
    return {f"{f.parent.name}/{f.name}": (f.stat().st_mtime_ns, f.read_bytes()) for f in kept}


def played(storage: Path) -> Counter[tuple[str, int]]:
    """How often each episode was played: a line each, under its evaluation and seed."""
    files = storage.glob("evaluations/*/episodes.jsonl")
    return Counter(
        (file.parent.name, json.loads(text)["seed"])
        for file in files
        for text in file.read_text().splitlines()
    )


class Counting:
    """`train_model` that writes the model's key into a log beside the storage, which processes share."""

    def __init__(self, train: Callable[..., None]) -> None:
        self.train = train

    def __call__(self, config: Any, tokens: Path, folder: Path, *rest: Any) -> None:
        with (folder.parents[2] / LOG).open("ab", buffering=0) as file:
            file.write(os.fsencode(f"{folder.name}\n"))
        self.train(config, tokens, folder, *rest)


def count_trainings() -> None:
    """Write down every training of this process from now on, whoever asks for it."""
    if not isinstance(line.train_model, Counting):
        line.train_model = Counting(line.train_model)  # type: ignore[assignment]


def trainings(storage: Path) -> list[str]:
    """Keys of the models that were really trained in the storage, once each time."""
    log = storage.parent / LOG
    return log.read_text().splitlines() if log.exists() else []


class CountingMaking(Making):
    """A `Making` whose trials write down what they train, in whatever process."""

    def __call__(self, settings: Mapping[str, Any], case: str | None, index: int) -> Task:
        count_trainings()
        return super().__call__(settings, case, index)
