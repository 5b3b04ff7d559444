"""The record of a cell, a trial of a sweep with one training seed: what came of it, on disk.

    <storage>/sweeps/<name>/cells/<trial>-<seed>/journal.jsonl   what MLflow is told of it
    <storage>/sweeps/<name>/cells/<trial>-<seed>/result.json     the record, rewritten as it goes

A cell has ended once its record says so: that is all a later command needs in order not to run it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.files import whole_file
from tt_ray.plain import MALFORMED, build, read_json
from tt_ray.sweep_file import Trial

Status = Literal["running", "finished", "stopped", "failed"]
RESULT = "result.json"
_NOUNS = {"models": "model", "critics": "critic", "evaluations": "episode"}


@dataclass(kw_only=True)
class Record:
    """What is known of a cell; times in seconds."""

    trial: str
    """The trial's fingerprint."""
    name: str
    index: int
    case: str
    """Empty without cases."""
    seed: int
    settings: dict[str, Any]
    """Value of each searched key."""
    data: str = ""
    """Fingerprint of the data set."""
    status: Status = "running"
    cause: str = ""
    """Why it failed, in one line."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of this cell alone, under their MLflow names."""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    """`EpisodeResult.to_json` of each evaluated episode."""
    reports: list[list[float]] = field(default_factory=list)
    """[rung's count, metric] of the whole trial, as the scheduler was told."""
    seconds: dict[str, float] = field(default_factory=dict)
    saved: float = 0.0
    reused: dict[str, int] = field(default_factory=dict)
    """How many of each kind of stage were taken from the store; of evaluations, their episodes."""
    checkpoint: str = ""
    trained: bool = False
    """The cell's own process has trained the model."""
    best: bool = False
    """MLflow has been told that this is a winner."""

    @classmethod
    def of(cls, trial: Trial, seed: int) -> Record:
        """A cell that has just begun."""
        return cls(
            trial=trial.fingerprint,
            name=trial.name,
            index=trial.index,
            case=trial.case or "",
            seed=seed,
            settings=dict(trial.settings),
        )

    def renamed(self, trial: Trial) -> Record:
        """The same cell under the name and number that its trial has now."""
        settings = dict(trial.settings)
        return replace(self, name=trial.name, index=trial.index, case=trial.case or "", settings=settings)

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be done, for better or worse."""
        return self.status != "running"

    @property
    def has_model(self) -> bool:
        """Whether the checkpoint that was played with is still there."""
        return bool(self.checkpoint) and Path(self.checkpoint).is_dir()

    @property
    def results(self) -> list[EpisodeResult]:
        """The evaluated episodes."""
        return [EpisodeResult.from_json(episode) for episode in self.episodes]

    def save(self, folder: Path) -> None:
        """Write the record whole or not at all."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / RESULT) as file:
                file.write_text(json.dumps(asdict(self)))
        except OSError as error:
            raise UserError(f"{folder}: cannot write there: {error.strerror}") from error


_FIELDS = {item.name for item in fields(Record)}


def cell_folder(sweep: Path, trial: Trial, seed: int) -> Path:
    """Where a cell's files lie in the folder of a sweep."""
    return sweep / "cells" / f"{trial.fingerprint}-{seed}"


def cell_name(trial: Trial, seed: int, best: bool = False) -> str:
    """A cell's name in MLflow; that of a winner has a star, so that it is seen in any list."""
    return f"{'★ ' if best else ''}{trial.name} seed {seed}"


def read_record(folder: Path) -> Record | None:
    """The record in a cell's folder, None where there is none; `UserError` for a damaged one."""
    file = folder / RESULT
    try:
        data = read_json(file)
        record = build(Record, {key: value for key, value in data.items() if key in _FIELDS})
        _ = record.results, [(int(count), value) for count, value in record.reports]
        return record
    except FileNotFoundError:
        return None
    except MALFORMED as error:
        raise UserError(f"{file}: damaged ({error}); remove it, and the cell is done again") from error


def reuse_text(reused: Mapping[str, int]) -> str:
    """`tokens, model, 20 episodes`: what was taken from the store."""
    parts = []
    for kind, noun in (("tokens", "tokens"), *_NOUNS.items()):
        count = reused.get(kind, 0)
        if count:
            several = count > 1 and kind != "tokens"
            parts.append(f"{count} {noun}s" if several else noun)
    return ", ".join(parts)


def total_reuse(records: Sequence[Record]) -> dict[str, int]:
    """What several cells took from the store, in all."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.reused)
    return dict(total)


def episode_frame(records: Sequence[Record], *, fresh: bool = False) -> pd.DataFrame:
    """A row for each episode: trial_index, trial, fingerprint, case, training_seed, its fields, fresh."""
    rows = [
        {
            "trial_index": record.index,
            "trial": record.name,
            "fingerprint": record.trial,
            "case": record.case,
            "training_seed": record.seed,
            **asdict(result),
            "fresh": fresh,
        }
        for record in records
        for result in record.results
    ]
    return pd.DataFrame(rows)
