"""Damaged checkpoints of all three kinds of model: refused in one line, or as good as new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import count_of, damaged, fuzz, json_texts, odd_data, one_of, result_or_line
from hypothesis import strategies as st

from tt_ray.config import CriticConfig, ModelConfig, to_dict
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.distributed.checkpoints import load_for_evaluation
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.model.checkpoint import (
    Checkpoint,
    checkpoint_metrics,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from tt_ray.model.critic import Critic, CriticCheckpoint, load_critic, save_critic
from tt_ray.model.dynamics import Ensemble, EnsembleCheckpoint, load_ensemble, save_ensemble
from tt_ray.model.folders import CHECKSUMS, sha256
from tt_ray.model.transformer import TrajectoryTransformer

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)
SPEC = DataSpec(
    dataset_id="toy/toy-v0",
    environment={"id": "Toy-v0", "kwargs": {"size": 3}},
    observation_keys=(),
    observation_dim=2,
    action_dim=1,
    action_low=(-1.0,),
    action_high=(0.5,),
    ref_min_score=None,
    ref_max_score=3.5,
    fingerprint="abc",
)
STATE = {"moment": torch.ones(3)}


def save_transformer(folder: Path) -> None:
    sizes = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, context_transitions=3)
    values = np.random.default_rng(0).normal(size=(50, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    settings = to_dict(experiment_from_dict({"name": "toy", "dataset": {"id": "toy/toy-v0"}}))
    model = TrajectoryTransformer(sizes, LAYOUT)
    save_checkpoint(
        folder, Checkpoint(model, bins, SPEC, {**settings, "seed": 3}, 7, {"val/loss": 1.5}), STATE
    )


def use_transformer(folder: Path) -> None:
    result_or_line(lambda: load_for_evaluation(folder, []))
    result_or_line(lambda: checkpoint_metrics(folder))
    result_or_line(lambda: load_training_state(folder))
    found = result_or_line(lambda: load_checkpoint(folder))
    if found is not None:
        assert found.model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, LAYOUT.num_bins + 1)
        tokens = found.discretizer.encode(np.zeros((2, LAYOUT.slots), dtype=np.float32))
        assert np.isfinite(found.discretizer.decode(tokens)).all()


def save_critics(folder: Path) -> None:
    settings = {**to_dict(CriticConfig()), "seed": 3}
    save_critic(folder, CriticCheckpoint(Critic(2, 1, (4, 4)), SPEC, settings, 7, {"loss/v": 1.0}), STATE)


def use_critic(folder: Path) -> None:
    found = result_or_line(lambda: load_critic(folder, spec=SPEC))
    if found is not None:
        assert found.critic.q(torch.zeros(3, 2), torch.zeros(3, 1)).shape == (3,)


def save_ensembles(folder: Path) -> None:
    checkpoint = EnsembleCheckpoint(Ensemble(2, 2, 1, (4,)), SPEC, {"seed": 3}, 7, {"loss": 1.0})
    save_ensemble(folder, checkpoint, STATE)


def use_ensemble(folder: Path) -> None:
    found = result_or_line(lambda: load_ensemble(folder, spec=SPEC))
    if found is not None:
        assert found.ensemble.next_action(torch.zeros(2, 3, 2))[0].shape == (2, 3, 1)


def header_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header says odd things."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def packed(data: Any) -> bytes:
        text = json.dumps(data).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return odd_data(header).map(packed)


@pytest.mark.parametrize(
    ("save", "use"),
    [(save_transformer, use_transformer), (save_critics, use_critic), (save_ensembles, use_ensemble)],
    ids=["transformer", "critic", "ensemble"],
)
@pytest.mark.parametrize("checked", [False, True], ids=["as found", "with new checksums"])
@count_of(250, 4000)
def test_damaged_checkpoints(
    save: Callable[[Path], None], use: Callable[[Path], None], checked: bool, count: int, tmp_path: Path
) -> None:
    """`checked`: the damage has proper checksums, so that the readers behind them see it."""
    folder = tmp_path / "checkpoint"
    torch.manual_seed(0)
    save(folder)
    use(folder)
    sound = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    names = [name for name in sound if not (checked and name == CHECKSUMS)]

    def changes(name: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
        kinds = [st.none(), damaged(sound[name]), one_of([*sound.values()])]
        if name.endswith(".json"):
            kinds += [json_texts(json.loads(sound[name]))] * 3
        else:
            kinds += [header_changes(sound[name])] * 3
        return st.tuples(st.just(name), st.one_of(kinds))

    def check(change: tuple[str, bytes | None]) -> None:
        name, content = change
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        if checked:
            sums = {file.name: sha256(file) for file in folder.iterdir() if file.name != CHECKSUMS}
            (folder / CHECKSUMS).write_text(json.dumps(sums))
        use(folder)
        for changed in {name, CHECKSUMS}:
            (folder / changed).write_bytes(sound[changed])

    fuzz(st.one_of([changes(name) for name in names]), check, count)
