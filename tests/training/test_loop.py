from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_training import LAYOUT, MODEL, Curve, Curves, toy_job, train_distributed

from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import (
    best_checkpoint,
    checkpoint_folders,
    last_checkpoint,
    load_checkpoint,
)
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.training.loop import Trainer, TrainingJob, Workers, fit


def train(job: TrainingJob, folder: Path) -> Curves:
    curve = Curve()
    fit(job, folder, curve)
    return curve.points


@torch.no_grad()
def logits_of(folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    return trained_model(folder)(inputs)


def trained_model(folder: Path) -> TrajectoryTransformer:
    last = last_checkpoint(folder)
    assert last is not None
    return load_checkpoint(last).model


def test_learns_what_can_be_learnt(tmp_path: Path) -> None:
    job = toy_job(steps=80, batch_size=32, learning_rate=1e-2, dropout=0.0, validate_every=40)
    points = train(job, tmp_path)
    assert points[1]["train/loss"] > 2.0
    assert points[80]["train/loss"] < 0.05
    assert points[80]["val/loss"] < points[40]["val/loss"] < 0.1
    inputs, targets, _ = job.train.gather(torch.arange(len(job.train)))
    assert torch.equal(trained_model(tmp_path)(inputs).argmax(-1), targets)


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    assert train(toy_job(), tmp_path / "a") == train(toy_job(), tmp_path / "b")
    assert torch.equal(trained_model(tmp_path / "a").head, trained_model(tmp_path / "b").head)
    other = train(toy_job(seed=1), tmp_path / "c")
    assert not torch.equal(trained_model(tmp_path / "a").head, trained_model(tmp_path / "c").head)
    assert sorted(other) == list(range(1, 13))


def test_what_is_logged(tmp_path: Path) -> None:
    calls: list[tuple[int, dict[str, float]]] = []

    def log(metrics: Mapping[str, float], step: int) -> None:
        calls.append((step, dict(metrics)))

    fit(toy_job(log_every=5, validate_every=8), tmp_path, log)
    parts = {"loss", "loss_observation", "loss_action", "loss_reward", "loss_value"}
    curves = {f"train/{part}" for part in parts} | {"train/learning_rate", "train/gradient_norm"}
    training = [(step, metrics) for step, metrics in calls if "train/loss" in metrics]
    assert [step for step, _ in training] == [5, 10, 12]
    assert all(set(metrics) == curves | {"speed/tokens_per_second"} for _, metrics in training)
    assert all(metrics["speed/tokens_per_second"] > 0 for _, metrics in training)
    validations = [(step, metrics) for step, metrics in calls if "val/loss" in metrics]
    assert [step for step, _ in validations] == [8, 12]
    assert all(set(metrics) == {f"val/{part}" for part in parts} for _, metrics in validations)
    assert training[-1][1]["train/learning_rate"] == pytest.approx(3e-3 * (0.1 + 0.9 * _cosine(8 / 9)))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def test_validation_is_the_mean_over_the_held_out_windows(tmp_path: Path) -> None:
    points = train(job := toy_job(), tmp_path)
    windows = job.validation
    inputs, targets, mask = windows.gather(torch.arange(len(windows)))
    nats = F.cross_entropy(logits_of(tmp_path, inputs).flatten(0, 1), targets.flatten(), reduction="none")
    actions = (torch.arange(1, inputs.shape[1] + 1) % 4 == 1).expand_as(mask)
    assert points[12]["val/loss_action"] == pytest.approx(float(nats[actions.flatten()].mean()), rel=1e-5)
    weights = torch.where(actions, 5.0, 1.0).flatten()
    assert mask.all()
    assert points[12]["val/loss"] == pytest.approx(float((nats * weights).mean()), rel=1e-5)


def test_validation_looks_at_so_many_windows_at_most(tmp_path: Path) -> None:
    job = toy_job(validation_windows=2)
    points = train(job, tmp_path)
    inputs, targets, _ = job.validation.gather(torch.tensor([0, len(job.validation) - 1]))
    logits = logits_of(tmp_path, inputs)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    assert points[12]["val/loss_action"] == pytest.approx(float(nats[:, 0::4].mean()), rel=1e-5)


@pytest.mark.parametrize("warmup", [12, 50])
def test_warm_up_as_long_as_the_run(tmp_path: Path, warmup: int) -> None:
    points = train(toy_job(warmup_steps=warmup), tmp_path)
    assert points[12]["train/learning_rate"] == pytest.approx(3e-3 * 12 / warmup)
    assert points[12]["train/loss"] < points[1]["train/loss"]


def test_without_validation_windows_the_last_checkpoint_is_the_best(tmp_path: Path) -> None:
    points = train(toy_job(validation=False), tmp_path)
    assert all("val/loss" not in metrics for metrics in points.values())
    assert best_checkpoint(tmp_path) == last_checkpoint(tmp_path)
    assert [load_checkpoint(path).step for path in checkpoint_folders(tmp_path)] == [12]


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    job = toy_job(learning_rate=3.0, warmup_steps=10, final_learning_rate_fraction=1.0)  # diverges
    points = train(job, tmp_path)
    losses = {step: points[step]["val/loss"] for step in (4, 8, 12)}
    assert min(losses, key=lambda step: losses[step]) == 4
    assert [load_checkpoint(path).step for path in checkpoint_folders(tmp_path)] == [4, 12]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert load_checkpoint(best).metrics["val/loss"] == losses[4]


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(toy_job(), tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert train(toy_job(), tmp_path) == {}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_damaged_last_checkpoint_is_named(tmp_path: Path) -> None:
    train(toy_job(), tmp_path)
    last = last_checkpoint(tmp_path)
    assert last is not None
    (last / "training_state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"training_state\.safetensors: damaged"):
        fit(toy_job(steps=20), tmp_path, Curve())


def test_a_batch_too_small_for_the_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 2 .* resources\.workers = 3"):
        fit(toy_job(batch_size=2), tmp_path, Curve(), Workers(0, 3, lambda tensor: None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "size"), [(8, 1), (8, 2), (8, 3), (3, 3), (2, 5), (0, 2)])
def test_shards_cover_the_batch_once(count: int, size: int) -> None:
    items = list(range(count))
    shards = [items[Workers(rank, size).shard(count)] for rank in range(size)]
    assert [item for shard in shards for item in shard] == items
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_only_the_first_worker_writes_and_logs(tmp_path: Path) -> None:
    curve = Curve()
    fit(toy_job(), tmp_path, curve, Workers(1, 2, lambda tensor: None))
    assert curve.points == {}
    assert list(tmp_path.iterdir()) == []


def losses_of_two_steps(folder: Path, rank: int, dropout: float) -> list[float]:
    """Losses of the same weights on copies of one window, so that only the dropout masks can differ."""
    job = toy_job(dropout=dropout, learning_rate=1e-30)
    one = {name: getattr(job.train, name)[:1] for name in ("starts", "ends", "terminated")}
    job = replace(job, train=replace(job.train, **one))
    trainer = Trainer(job, folder, Curve(), Workers(rank, 2, lambda tensor: None), torch.device("cpu"))
    return [float(trainer.update(step)[0].weighted) for step in range(2)]


def test_dropout_masks_differ_between_ranks_and_steps_but_not_between_runs(tmp_path: Path) -> None:
    first, second = (losses_of_two_steps(tmp_path, rank, 0.3) for rank in (0, 1))
    assert len({*first, *second}) == 4
    assert losses_of_two_steps(tmp_path, 0, 0.3) == first
    assert losses_of_two_steps(tmp_path, 1, 0.3) == second
    without = [*losses_of_two_steps(tmp_path, 0, 0.0), *losses_of_two_steps(tmp_path, 1, 0.0)]
    assert without == pytest.approx([without[0]] * 4, rel=1e-5)


WITH_GOAL = replace(LAYOUT, goal_slots=(0,))


@pytest.mark.parametrize(
    ("size", "batch_size", "layout"), [(2, 8, LAYOUT), (3, 10, LAYOUT), (3, 10, WITH_GOAL)]
)
def test_several_workers_are_as_one(tmp_path: Path, size: int, batch_size: int, layout: TokenLayout) -> None:
    alone = train(toy_job(dropout=0.0, batch_size=batch_size, layout=layout), tmp_path / "alone")
    folder = tmp_path / "together"
    folder.mkdir()
    arguments = (size, str(folder), 12, batch_size, 0.0, layout)
    torch.multiprocessing.spawn(train_distributed, arguments, nprocs=size)
    together = {int(step): point for step, point in json.loads((folder / "curve.json").read_text()).items()}
    assert together.keys() == alone.keys()
    for step, point in alone.items():
        assert together[step] == pytest.approx(point, rel=1e-5, abs=1e-7)
    expected, model = trained_model(tmp_path / "alone"), trained_model(folder)
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv.bias"):  # a key's bias has no effect, so its gradient is rounding alone
            torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-3, atol=1e-4)


def outcomes(layout: TokenLayout) -> WindowSet:
    """Episodes of two transitions: from 0 every action is as usual as another, and leads to its own place."""
    tokens = np.array([[[0, a, 1, 2], [a, 3, 4, 5]] for a in range(6)], dtype=np.uint8).reshape(12, 4)
    offsets = np.arange(0, 13, 2)
    over = np.zeros(12, dtype=bool)
    return WindowSet.build(tokens, offsets, over, np.arange(6), MODEL.context_transitions, layout)


def test_a_goal_tells_what_will_be_done(tmp_path: Path) -> None:
    losses = {}
    for layout in (LAYOUT, WITH_GOAL):
        windows = outcomes(layout)
        job = toy_job(layout=layout, steps=80, batch_size=24, learning_rate=1e-2, dropout=0.0)
        folder = tmp_path / str(layout.goal_dim)
        losses[layout.goal_dim] = train(replace(job, train=windows, validation=windows), folder)[80]
    # Of the three actions in an episode's two windows, one is open without a goal.
    assert losses[0]["val/loss_action"] > 0.95 * math.log(6) / 3
    assert losses[1]["val/loss_action"] < 0.2
