from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tt_ray.config import ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.evaluate import EpisodeFile, Planner, RandomBaseline, Row, Worker, evaluate
from tt_ray.evaluation.scores import summarize
from tt_ray.model.checkpoint import Checkpoint, save_checkpoint
from tt_ray.model.transformer import TrajectoryTransformer

SPEC = DataSpec(
    dataset_id="tiny/pendulum-v0",
    environment={"id": "Pendulum-v1"},
    observation_keys=(),
    observation_dim=3,
    action_dim=1,
    action_low=(-2.0,),
    action_high=(2.0,),
    ref_min_score=None,
    ref_max_score=None,
    fingerprint="0",
)
LAYOUT = TokenLayout(observation_dim=3, action_dim=1, num_bins=12)
SEEDS = [100, 101, 102, 103, 104]


def allocation(actors: int) -> Allocation:
    return Allocation(1, 0.0, actors, cpus_per_actor=1, gpus_per_actor=0)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, context_transitions=4)
    model = TrajectoryTransformer(config, LAYOUT).eval()
    values = np.random.default_rng(0).normal(size=(500, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(model, bins, SPEC, {}, 1, {}), {})
    settings = PlannerConfig(horizon=2, beam_width=3, max_context_transitions=2)
    return Planner(tmp_path / "checkpoint", settings, 0.99, slots=2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("policy", ["planner", "random"])
def test_episodes_are_the_same_here_and_on_actors(planner: Planner, policy: str, tmp_path: Path) -> None:
    worker = Worker(planner if policy == "planner" else RandomBaseline(SPEC), SPEC, max_steps=8)
    found = [
        evaluate(worker, SEEDS, tmp_path / str(actors), allocation(actors), slots=2)[0]
        for actors in (0, 1, 2)
    ]
    assert found[0] == found[1] == found[2]
    assert [result.seed for result in found[0]] == SEEDS
    assert len({result.episode_return for result in found[0]}) == len(SEEDS)


def test_finished_episodes_are_not_run_again(planner: Planner, tmp_path: Path) -> None:
    worker, folder = Worker(planner, SPEC, max_steps=8), tmp_path / "evaluation"
    first, reused = evaluate(worker, SEEDS[:2], folder, allocation(0))
    assert reused == 0
    seen, steps = [], []
    results, reused = evaluate(
        worker, SEEDS, folder, allocation(0), on_result=seen.append, on_steps=steps.append
    )
    assert (results[:2], reused) == (first, 2)
    assert sorted(result.seed for result in seen) == SEEDS[2:]
    assert steps[-1] == 3 * 8
    assert set(EpisodeFile(folder).results) == set(SEEDS)


def test_a_torn_line_is_run_again(planner: Planner, tmp_path: Path) -> None:
    worker, folder = Worker(planner, SPEC, max_steps=8), tmp_path / "evaluation"
    whole, _ = evaluate(worker, SEEDS[:3], folder, allocation(0))
    file = folder / "episodes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20])
    again, reused = evaluate(worker, SEEDS[:3], folder, allocation(0))
    assert (again, reused) == (whole, 2)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


def test_speed_says_how_idle_the_slots_were(planner: Planner, tmp_path: Path) -> None:
    results, _ = evaluate(Worker(planner, SPEC, max_steps=8), SEEDS, tmp_path / "evaluation", allocation(0))
    speed = Row("planner", 0, summarize(results, None, None, 0.95, 100), results).speed()
    assert 0 <= speed["speed/idle_slot_share"] < 0.5
    assert speed["speed/decisions_per_second"] > 0
