"""A tiny experiment, and what must be true of everything that it leaves on disk."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from tt_ray.config import ExperimentConfig
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.data.token_store import TokenSet
from tt_ray.distributed.cluster import Allocation
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.fingerprints import model_fingerprint, tokens_fingerprint
from tt_ray.model.checkpoint import last_checkpoint, verify_checkpoint

MEASURED = ("speed/", "seconds/", "system/")
"""Metrics that no two runs have in common."""
TWO_WORKERS = Allocation(workers=2, evaluation_actors=2)
DATASET = "faults/pendulum-v0"
STEPS = 240
EVERY = 20


def write_data(episodes: int = 40) -> None:
    """Pendulum's spaces, arbitrary numbers; the folder is MINARI_DATASETS_PATH."""
    random = np.random.default_rng(0)
    write_dataset(
        DATASET,
        (episode(random, length=8 + i % 5) for i in range(episodes)),
        environment="Pendulum-v1",
        observation_space=gym.spaces.Box(-8, 8, (3,), np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
        ref_min_score=-500.0,
        ref_max_score=0.0,
    )


def episode(random: np.random.Generator, length: int) -> RecordedEpisode:
    """Numbers that an environment with Pendulum's spaces might have given."""
    return RecordedEpisode(
        observations=random.normal(size=(length + 1, 3)).astype(np.float32),
        actions=random.uniform(-2, 2, (length, 1)).astype(np.float32),
        rewards=random.normal(size=length).astype(np.float32),
        terminations=np.zeros(length, bool),
        truncations=np.arange(length) == length - 1,
        behavior_policy="random numbers",
    )


def settings(folder: Path, **training: Any) -> dict[str, Any]:
    """The experiment as plain data; it writes below `folder`."""
    return {
        "name": "faults",
        "dataset": {"id": DATASET, "validation_fraction": 0.1},
        "discretizer": {"num_bins": 20},
        "model": {"num_layers": 1, "num_heads": 2, "embed_dim": 32, "context_transitions": 5},
        "training": {
            "steps": STEPS,
            "batch_size": 64,
            "learning_rate": 0.001,
            "warmup_steps": 10,
            "log_every": 1,
            "validate_every": EVERY,
            "validation_windows": 32,
            **training,
        },
        "planner": {"horizon": 2, "beam_width": 4, "max_context_transitions": 2},
        "evaluation": {"episodes": 12, "max_steps": 40, "baselines": ["random", "data", "greedy"]},
        "resources": {
            "workers": 2,
            "evaluation_actors": 2,
            "episodes_per_actor": 2,
            "storage": str(folder / "runs"),
        },
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "films": 0},
    }


def write_file(folder: Path, **training: Any) -> Path:
    """The experiment as a file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **training)))
    return path


def prepare(config: ExperimentConfig) -> tuple[Path, Path]:
    """Tokens of `config`, written, and the folder that the model of seed 0 will have."""
    episodes = load_episodes(config.dataset.id)
    identity = tokens_fingerprint(config, episodes.spec.fingerprint)
    storage = Path(config.resources.storage)
    tokens = storage / "tokens" / identity
    TokenSet.build(episodes, config.dataset, config.discretizer).save(tokens)
    return tokens, storage / "models" / model_fingerprint(config, identity, 0)


def experiment(folder: Path, dropout: float = 0.1, **training: Any) -> ExperimentConfig:
    """`settings` validated."""
    plain = settings(folder, **training)
    return experiment_from_dict({**plain, "model": {**plain["model"], "dropout": dropout}})


def model_folder(folder: Path) -> Path:
    """The one model below an experiment's folder."""
    (found,) = (folder / "runs" / "models").glob("[!.]*")  # a killed command leaves its claim
    return found


def final_state(model: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments after the last step, from a checkpoint that is whole."""
    last = last_checkpoint(model)
    assert last is not None
    assert last.name == f"step-{steps:08d}"
    verify_checkpoint(last)
    return load_file(last / "model.safetensors") | load_file(last / "training_state.safetensors")


def curves(model: Path) -> dict[tuple[str, int], float]:
    """Every (metric, step) of a journal, each of which it holds once; times left out."""
    points: dict[tuple[str, int], float] = {}
    for line in (model / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record["metrics"].items():
            assert (name, record["step"]) not in points
            points[name, record["step"]] = value
    return {key: value for key, value in points.items() if not key[0].startswith(MEASURED)}


def assert_same(model: Path, other: Path, steps: int = STEPS) -> None:
    """Two trained models are equal bit for bit, and so are their curves."""
    state, expected = final_state(model, steps), final_state(other, steps)
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert curves(model) == curves(other)
    assert checkpoints(model) == checkpoints(other)


def checkpoints(model: Path) -> list[str]:
    """Names of everything in a model's folder of checkpoints."""
    return sorted(path.name for path in (model / "checkpoints").iterdir())


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders below `folder`."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if "/." in f"/{name}" or ".tmp" in name)


def mlflow_curves(folder: Path, run: str) -> dict[tuple[str, int], float]:
    """Every (metric, step) of the run in the MLflow database, which holds each once; times left out."""
    query = "select m.key, m.step, m.value from metrics m join runs r using (run_uuid) where r.name = ?"
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute(query, (run,)).fetchall()
    assert max(Counter((name, step) for name, step, _ in rows).values(), default=1) == 1
    return {(name, step): value for name, step, value in rows if not name.startswith(MEASURED)}


def mlflow_runs(folder: Path) -> list[tuple[str, str]]:
    """(name, status) of every run in the MLflow database."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        return sorted(database.execute("select name, status from runs"))
