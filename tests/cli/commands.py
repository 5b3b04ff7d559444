"""The command line as a user has it: in this process (quick), or as the installed `tt-ray` (real)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from rich.console import Console

from tt_ray.config import ExperimentConfig
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.data.token_store import TokenSet
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.training.job import make_job
from tt_ray.training.loop import TrainingJob, fit

TT_RAY = str(Path(sys.executable).parent / "tt-ray")
DATASET = "tiny/pendulum-v0"


def text_of(console: Console) -> str:
    """What a console of the fixture `screen` shows."""
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@dataclass(frozen=True)
class Outcome:
    """What a command left on the screen."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
"""Runs a command line of tt-ray."""
Refused = Callable[..., str]
"""Runs one that must end with code 2 and one line, and gives that line."""


def as_refusal(outcome: Outcome, *parts: str) -> str:
    """The one line of an outcome that must be a refusal, and must hold `parts`."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("tt-ray: error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for part in parts:
        assert part in outcome.err
    return outcome.err


def files_below(folder: Path) -> set[str]:
    """Every file and folder below `folder`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what a user may have set for this program, and `variables`."""
    ours = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "MINARI_DATASETS_PATH", "COLUMNS", "TT_RAY_D4RL_URL")
    return {**{key: value for key, value in os.environ.items() if key not in ours}, **variables}


def tt_ray(folder: Path, *arguments: str, **variables: str) -> Outcome:
    """Run the installed command in `folder`, whose data sets are in `data`."""
    found = subprocess.run(
        [TT_RAY, *arguments],
        cwd=folder,
        env=environment(**{"MINARI_DATASETS_PATH": str(folder / "data"), **variables}),
        capture_output=True,
        text=True,
    )
    return Outcome(found.returncode, found.stdout, found.stderr)


def settings(**sections: Any) -> dict[str, Any]:
    """A tiny experiment as plain data, with keys of its sections replaced."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "dataset": {"id": DATASET},
        "discretizer": {"num_bins": 20},
        "model": {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "context_transitions": 4},
        "training": {
            "steps": 20,
            "batch_size": 16,
            "warmup_steps": 2,
            "log_every": 5,
            "validate_every": 10,
            "validation_windows": 32,
        },
        "planner": {"horizon": 2, "beam_width": 2, "max_context_transitions": 2},
        "evaluation": {"episodes": 4, "max_steps": 30},
        "resources": {"workers": 1, "evaluation_actors": 2, "episodes_per_actor": 2},
        "tracking": {"films": 0},
    }
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section} if isinstance(section, dict) else section
    return plain


def write_file(folder: Path, **sections: Any) -> Path:
    """`settings` as an experiment file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(**sections), sort_keys=False))
    return path


def recorded(length: int, seed: int = 0, **changes: Any) -> RecordedEpisode:
    """An episode with Pendulum's shapes and arbitrary numbers."""
    random = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        "observations": random.normal(size=(length + 1, 3)).astype(np.float32),
        "actions": random.uniform(-2, 2, (length, 1)).astype(np.float32),
        "rewards": random.normal(size=length).astype(np.float32),
        "terminations": np.zeros(length, bool),
        "truncations": np.arange(length) == length - 1,
        "behavior_policy": "random numbers",
        **changes,
    }
    return RecordedEpisode(**fields)


def write_data(episodes: list[RecordedEpisode] | None = None, **changes: Any) -> Path:
    """A small data set for Pendulum-v1; its folder."""
    arguments: dict[str, Any] = {
        "environment": "Pendulum-v1",
        "observation_space": gym.spaces.Box(-8, 8, (3,), np.float32),
        "action_space": gym.spaces.Box(-2, 2, (1,), np.float32),
        **changes,
    }
    return write_dataset(DATASET, episodes or [recorded(8 + i % 3, i) for i in range(12)], **arguments)


def training_job(**sections: Any) -> TrainingJob:
    """One training step on the data set that `write_data` has written."""
    config: ExperimentConfig = experiment_from_dict(settings(**{"training": {"steps": 1}, **sections}))
    tokens = TokenSet.build(load_episodes(DATASET), config.dataset, config.discretizer)
    return make_job(config, tokens, seed=0)


def train_here(job: TrainingJob, folder: Path) -> Path:
    """Train without Ray; the checkpoint."""
    fit(job, folder, lambda metrics, step: None)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    return checkpoint
