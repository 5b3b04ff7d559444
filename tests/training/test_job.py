"""Which episodes a training job learns from, and which it is validated on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_training import LAYOUT, toy_job

from tt_ray.config import DatasetConfig, ExperimentConfig, ModelConfig, PlannerConfig
from tt_ray.data.token_store import TokenSet
from tt_ray.training.job import make_job
from tt_ray.training.loop import TrainingJob

EPISODES, LENGTH = 20, 4


def job(**dataset: Any) -> TrainingJob:
    """A job on 20 episodes of 4 transitions."""
    toy = toy_job()
    rows = EPISODES * LENGTH
    tokens = TokenSet(
        tokens=np.zeros((rows, LAYOUT.slots), dtype=np.uint8),
        offsets=np.arange(0, rows + 1, LENGTH),
        terminated=np.zeros(rows, dtype=bool),
        discretizer=toy.discretizer,
        layout=LAYOUT,
        spec=toy.spec,
    )
    config = ExperimentConfig(
        name="x",
        dataset=DatasetConfig(id="toy", **dataset),
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16, context_transitions=3),
        planner=PlannerConfig(max_context_transitions=3),
    )
    return make_job(config, tokens, seed=0)


def episodes(job: TrainingJob) -> tuple[set[int], set[int]]:
    """Numbers of the training and of the held-out episodes."""
    train, validation = (set((part.starts // LENGTH).tolist()) for part in (job.train, job.validation))
    return train, validation


@pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.1, 2), (0.5, 9), (0.99, 18), (1.0, 18)])
def test_a_share_of_the_training_episodes(fraction: float, count: int) -> None:
    whole, held_out = episodes(job(validation_fraction=0.1))
    some, same = episodes(job(validation_fraction=0.1, fraction=fraction))
    assert (len(whole), len(held_out), len(some)) == (18, 2, count)
    assert same == held_out
    assert some <= whole
    assert not whole & held_out


def test_the_whole_share_changes_nothing() -> None:
    before, after = job(), job(fraction=1.0)
    assert before.train.starts.tolist() == after.train.starts.tolist()
    assert before.train.ends.tolist() == after.train.ends.tolist()
    assert before.experiment == after.experiment
