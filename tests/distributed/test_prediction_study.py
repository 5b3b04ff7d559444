"""The whole study on tiny data, in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest

from tt_ray.config import ExperimentConfig
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.following import Update
from tt_ray.distributed.line import Line
from tt_ray.distributed.prediction import check_prediction, predict, require_same_data
from tt_ray.distributed.prediction_report import PredictionOutcome
from tt_ray.errors import UserError
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.model.checkpoint import load_checkpoint, step_folder
from tt_ray.tracking import MemoryTracker

DATASET = "tiny/pendulum-v0"
MODELS = ["transformer", "markovian", "ensemble", "ensemble_recorded_actions", "oracle"]
FILES = {
    "prediction.parquet",
    "prediction_ahead.parquet",
    "prediction_errors.parquet",
    "prediction.json",
    "config.yaml",
    "log_likelihood.png",
    "errors.png",
    "states.png",
}


class Quiet:
    """Progress that nobody sees; `bars` has the titles."""

    def __init__(self) -> None:
        self.bars: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        self.bars.append(title)
        yield lambda done, message: None

    def note(self, message: str) -> None:
        self.notes.append(message)


def recorded(length: int, seed: int) -> RecordedEpisode:
    random = np.random.default_rng(seed)
    walk = np.cumsum(random.normal(size=(length + 1, 3)), axis=0)
    return RecordedEpisode(
        observations=walk.astype(np.float32),
        actions=random.uniform(-2, 2, (length, 1)).astype(np.float32),
        rewards=random.normal(size=length).astype(np.float32),
        terminations=np.zeros(length, bool),
        truncations=np.arange(length) == length - 1,
        behavior_policy="random numbers",
    )


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A small data set of random walks with Pendulum's shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("data")))
        write_dataset(
            DATASET,
            [recorded(12, seed) for seed in range(12)],
            environment="Pendulum-v1",
            observation_space=gym.spaces.Box(-99, 99, (3,), np.float32),
            action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
        )
        yield


def config_of(storage: Path, **sections: Any) -> ExperimentConfig:
    plain: dict[str, Any] = {
        "name": "tiny",
        "dataset": {"id": DATASET, "validation_fraction": 0.2},
        "discretizer": {"num_bins": 10, "strategy": "uniform"},
        "model": {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "context_transitions": 4},
        "training": {"steps": 4, "batch_size": 8, "warmup_steps": 1, "log_every": 2, "validate_every": 2},
        "planner": {"horizon": 2, "beam_width": 2, "max_context_transitions": 2},
        "ensemble": {"members": 2, "hidden": [8], "steps": 6, "log_every": 2, "checkpoint_every": 3},
        "prediction": {"rollouts": 6, "horizon": 3, "starts": 2, "context": 3},
        "evaluation": {"bootstrap_samples": 50},
        "resources": {"workers": 1, "storage": str(storage)},
    }
    for name, section in sections.items():
        plain[name] = {**plain[name], **section}
    return experiment_from_dict(plain)


def studied(
    config: ExperimentConfig, given: Path | None = None
) -> tuple[PredictionOutcome, Line, MemoryTracker]:
    line, tracker = Line(config, Quiet()), MemoryTracker()
    line.allocation = Allocation()
    line.check(False)
    check_prediction(line, False)
    return predict(line, tracker, False, given), line, tracker


def test_a_study_from_training_to_figures_and_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    outcome, line, tracker = studied(config)
    assert list(outcome.likelihood["model"].unique()) == MODELS
    assert {path.name for path in outcome.folder.iterdir()} >= FILES
    assert outcome.likelihood["step"].max() == 3
    oracle = outcome.likelihood.query("model == 'oracle'")["log_likelihood"].to_numpy()
    for _, rows in outcome.likelihood.groupby("model"):
        assert (rows["log_likelihood"].to_numpy() <= oracle + 1e-9).all()
    summary = json.loads((outcome.folder / "prediction.json").read_text())
    assert len(summary["starts"]) == 2
    assert all(start["step"] >= 2 for start in summary["starts"])
    assert [stage.kind for stage in line.store.stages()] == [
        "tokens", "models", "models", "dynamics", *["evaluations"] * 4
    ]  # fmt: skip
    names = [run.state.name for run in tracker.runs if run.state is not None]
    assert names == ["tiny", "tiny seed 0", "tiny Markovian seed 0", "tiny ensemble seed 0"]
    steps = [
        r["step"] for r in tracker.runs[0].journal.records if "log-likelihood/oracle" in r.get("metrics", {})
    ]
    assert steps == [1, 2, 3]
    curves = [r["metrics"] for r in tracker.runs[3].journal.records if "metrics" in r]
    assert any("val/loss_dynamics" in metrics for metrics in curves)

    again, line, _ = studied(config)
    pd.testing.assert_frame_equal(again.likelihood, outcome.likelihood)
    assert line.progress.bars == []  # type: ignore[attr-defined]
    assert len(line.usage.reused) == 8

    other = replace(config, prediction=replace(config.prediction, seed=1))
    third, line, _ = studied(other)
    assert len(line.usage.reused) == 4  # the models, not the rollouts
    assert not third.likelihood["log_likelihood"].equals(outcome.likelihood["log_likelihood"])


def test_a_checkpoint_as_the_full_model_and_partial_observation(tmp_path: Path) -> None:
    config = config_of(tmp_path, dataset={"hidden_fraction": 0.5})
    outcome, _, _ = studied(config)
    assert load_checkpoint(outcome.checkpoints["transformer"]).model.layout.partial
    step = step_folder(outcome.checkpoints["transformer"].parents[1], 4)
    given, line, _ = studied(replace(config, name="given"), step)
    assert given.checkpoints["transformer"] == step
    assert given.folder != outcome.folder
    require_same_data(line, step)
    line.spec = replace(line.spec, fingerprint="other")
    with pytest.raises(UserError, match=r"was trained on another tiny/pendulum-v0 than the one that is here"):
        require_same_data(line, step)


def test_a_model_of_two_transitions_is_the_markovian_one(tmp_path: Path) -> None:
    config = config_of(tmp_path, model={"context_transitions": 2}, prediction={"context": 2})
    outcome, _, _ = studied(config)
    assert [model for model in MODELS if model != "markovian"] == list(outcome.likelihood["model"].unique())


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"prediction": {"context": 5}},
            r"^prediction\.context: 5 transitions are more than model\.context_tr",
        ),
        ({"prediction": {"horizon": 30}}, r"none of its 2 held-out episodes has the 33 rows"),
        ({"dataset": {"validation_fraction": 0.0}}, r"none of its 0 held-out episodes"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_written(
    tmp_path: Path, sections: dict[str, Any], text: str
) -> None:
    line = Line(config_of(tmp_path, **sections), Quiet())
    line.check(False)
    with pytest.raises(UserError, match=text):
        check_prediction(line, False)
    assert list(tmp_path.iterdir()) == []


def test_few_places_to_start_from_are_said(tmp_path: Path) -> None:
    _, line, _ = studied(config_of(tmp_path, prediction={"starts": 99, "rollouts": 2}))
    assert line.progress.notes == ["the held-out episodes have room for 14 starts only"]  # type: ignore[attr-defined]
