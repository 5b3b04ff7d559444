from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tt_ray.config import ModelConfig, TrainingConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model import checkpoint as module
from tt_ray.model import folders
from tt_ray.model.checkpoint import (
    Checkpoint,
    best_checkpoint,
    checkpoint_folders,
    last_checkpoint,
    load_checkpoint,
    load_training_state,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
    verify_checkpoint,
)
from tt_ray.model.folders import sha256
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.training.optimizer import build_optimizer, optimizer_tensors

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)
FILES = (
    "checksums.json",
    "config.json",
    "discretizer.safetensors",
    "metrics.json",
    "model.safetensors",
    "training_state.safetensors",
)
SPEC = DataSpec(
    dataset_id="toy/toy-v0",
    environment={"id": "Toy-v0", "kwargs": {"size": 3}},
    observation_keys=("achieved_goal", "observation"),
    observation_dim=2,
    action_dim=1,
    action_low=(-1.0,),
    action_high=(0.5,),
    ref_min_score=None,
    ref_max_score=3.5,
    fingerprint="abc",
)


def make_checkpoint(step: int = 7, loss: float | None = 1.5) -> Checkpoint:
    torch.manual_seed(step)
    config = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, context_transitions=3)
    values = np.random.default_rng(0).normal(size=(50, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    metrics = {} if loss is None else {"val/loss": loss}
    model = TrajectoryTransformer(config, LAYOUT)
    return Checkpoint(model, bins, SPEC, {"name": "toy", "seed": 3}, step, metrics)


def optimizer_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    optimizer = build_optimizer(checkpoint.model, TrainingConfig())
    checkpoint.model(torch.zeros(1, 5, dtype=torch.int64)).sum().backward()
    optimizer.step()
    return optimizer_tensors(checkpoint.model, optimizer)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint, folder = make_checkpoint(), tmp_path / "checkpoint"
    save_checkpoint(folder, checkpoint, optimizer_state(checkpoint))
    return folder


def test_round_trip_in_another_folder(saved: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    state = optimizer_state(checkpoint)
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(saved, moved)
    verify_checkpoint(moved)
    loaded = load_checkpoint(moved)
    assert not loaded.model.training
    assert (loaded.model.config, loaded.model.layout) == (checkpoint.model.config, LAYOUT)
    weights = checkpoint.model.state_dict()
    assert loaded.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.discretizer.strategy == "quantile"
    np.testing.assert_array_equal(loaded.discretizer.edges, checkpoint.discretizer.edges)
    np.testing.assert_array_equal(loaded.discretizer.representatives, checkpoint.discretizer.representatives)
    assert loaded.spec == SPEC
    assert (loaded.experiment, loaded.step, loaded.metrics) == (
        {"name": "toy", "seed": 3},
        7,
        {"val/loss": 1.5},
    )
    restored = load_training_state(moved)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_the_files_are_json_and_safetensors_only(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == list(FILES)
    for file in saved.iterdir():
        head = file.read_bytes()
        text = head if file.suffix == ".json" else head[8 : 8 + int.from_bytes(head[:8], "little")]
        assert isinstance(json.loads(text), dict)
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGES = [(name, damage) for name in FILES for damage in (cut, flip, Path.unlink)]
DAMAGES.remove(("checksums.json", flip))  # then another file seems damaged, and is named


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_in_one_line(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(saved / name)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved)
    assert name in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"config.json"', ""])
def test_nonsense_for_checksums(saved: Path, content: str) -> None:
    (saved / "checksums.json").write_text(content)
    with pytest.raises(UserError, match=r"checksums\.json"):
        verify_checkpoint(saved)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("experiment"),
        lambda config: config.pop("data"),
        lambda config: config["model"].update(embed_dim=0),
        lambda config: config["model"].update(embed_dim=16),
        lambda config: config["model"].update(colour="blue"),
        lambda config: config["layout"].pop("num_bins"),
        lambda config: config["data"].update(more=1),
        lambda config: config.clear(),
    ],
)
def test_a_configuration_of_another_version(
    saved: Path, change: Callable[[dict[str, object]], object]
) -> None:
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    checksums = {file: folders.sha256(saved / file) for file in FILES if file != "checksums.json"}
    (saved / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(UserError, match="not a checkpoint that this version can read") as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_training_state_missing_or_damaged(tmp_path: Path, saved: Path) -> None:
    save_checkpoint(tmp_path / "exported", make_checkpoint())
    assert load_checkpoint(tmp_path / "exported").step == 7
    with pytest.raises(UserError, match=r"training_state\.safetensors: missing"):
        load_training_state(tmp_path / "exported")
    cut(saved / "training_state.safetensors")
    with pytest.raises(UserError, match=r"training_state\.safetensors: damaged"):
        load_training_state(saved)


@pytest.mark.parametrize("failing", ["save_file", "save_numpy", "sha256"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool
) -> None:
    folder = step_folder(tmp_path, 7)
    if existing:
        save_checkpoint(folder, make_checkpoint())

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folders if failing == "sha256" else module, failing, full)
    with pytest.raises(UserError, match="no space left"):
        save_checkpoint(folder, replace(make_checkpoint(), step=8))
    monkeypatch.undo()
    left = [path.name for path in folder.parent.iterdir()]
    assert left == ([folder.name] if existing else [])
    if existing:
        assert load_checkpoint(folder).step == 7


def test_saving_again_replaces(saved: Path) -> None:
    save_checkpoint(saved, make_checkpoint(step=8))
    assert load_checkpoint(saved).step == 8
    assert not (saved / "training_state.safetensors").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(step_folder(tmp_path, 10), make_checkpoint(10))
    leftover = tmp_path / "checkpoints" / ".step-00000020.tmp"
    shutil.copytree(step_folder(tmp_path, 10), leftover)
    (leftover / "metrics.json").unlink()
    assert checkpoint_folders(tmp_path) == [step_folder(tmp_path, 10)]
    assert last_checkpoint(tmp_path) == best_checkpoint(tmp_path) == step_folder(tmp_path, 10)
    save_checkpoint(step_folder(tmp_path, 20), make_checkpoint(20))
    assert load_checkpoint(step_folder(tmp_path, 20)).step == 20


def save_steps(folder: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        save_checkpoint(step_folder(folder, step), make_checkpoint(step, loss))


def kept(folder: Path) -> list[int]:
    return [load_checkpoint(path).step for path in checkpoint_folders(folder)]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({100: 3.0, 200: 1.0, 300: 2.0}, 200),
        ({9: 2.0, 10: 1.0, 100: 0.5}, 100),
        ({1: 1.0, 2: 1.0}, 2),
        ({1: None, 2: None, 3: None}, 3),
        ({1: 2.0, 2: 1.0, 3: float("nan")}, 2),
        ({1: float("nan"), 2: 5.0, 3: float("inf")}, 2),
    ],
)
def test_best_last_and_pruning(tmp_path: Path, losses: dict[int, float | None], best: int) -> None:
    save_steps(tmp_path, losses)
    last = max(losses)
    assert kept(tmp_path) == sorted(losses)
    prune_checkpoints(tmp_path)
    assert kept(tmp_path) == sorted({best, last})
    assert best_checkpoint(tmp_path) == step_folder(tmp_path, best)
    assert last_checkpoint(tmp_path) == step_folder(tmp_path, last)


def test_no_checkpoints_yet(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None
    prune_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pruning_that_is_killed_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, {1: 3.0, 2: 2.0, 3: 1.0})

    def killed(folder: Path, **options: object) -> None:
        if folder.exists():
            (folder / "metrics.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path)
    monkeypatch.undo()
    assert kept(tmp_path) == [2, 3]
    prune_checkpoints(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("content", ["", "[]", '{"val/loss": "low"}'])
def test_unreadable_metrics_are_named(tmp_path: Path, content: str) -> None:
    save_steps(tmp_path, {1: 3.0, 2: 2.0})
    (step_folder(tmp_path, 1) / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"step-00000001/metrics\.json"):
        best_checkpoint(tmp_path)


def test_a_layout_with_a_goal_and_hidden_tokens(tmp_path: Path) -> None:
    layout = replace(LAYOUT, goal_slots=(1, 0), partial=True)
    before = make_checkpoint()
    model = TrajectoryTransformer(before.model.config, layout).eval()
    save_checkpoint(tmp_path / "c", replace(before, model=model))
    after = load_checkpoint(tmp_path / "c").model
    assert after.layout == layout
    assert hash(after.layout) == hash(layout)
    tokens = torch.tensor([[layout.hidden_token, 0, 3, layout.stop_token, 2]])
    assert torch.equal(after(tokens), model(tokens))


def test_a_layout_written_before_there_were_goals(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make_checkpoint())
    file = tmp_path / "c" / "config.json"
    config = json.loads(file.read_text())
    del config["layout"]["goal_slots"], config["layout"]["partial"]
    file.write_text(json.dumps(config))
    checksums = json.loads((tmp_path / "c" / "checksums.json").read_text())
    checksums["config.json"] = sha256(file)
    (tmp_path / "c" / "checksums.json").write_text(json.dumps(checksums))
    assert load_checkpoint(tmp_path / "c").model.layout == LAYOUT
