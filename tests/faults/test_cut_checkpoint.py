"""A checkpoint that was cut short is named, removed, and trained again from an earlier one."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny
from command import run, start_until
from processes import Growth
from runs import ONE_WORKER

from tt_ray.model.checkpoint import best_checkpoint, last_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FILES = ("model.safetensors", "training_state.safetensors", "config.json", "checksums.json")


def cut(folder: Path, name: str, choose: Callable[[Path], Path | None] = last_checkpoint) -> None:
    """Make a file of one of the model's checkpoints shorter, at a place that depends on its name."""
    chosen = choose(tiny.model_folder(folder))
    assert chosen is not None
    file = chosen / name
    os.truncate(file, random.Random(name).randrange(file.stat().st_size))


@pytest.mark.fault(
    "cut checkpoint", "{case}, training killed", "named; equal, with --resume", "undisturbed_run"
)
@pytest.mark.parametrize("name", FILES[:3])
def test_training_goes_on_from_an_earlier_checkpoint(
    undisturbed_run: Path, tmp_path: Path, name: str
) -> None:
    file, steps = tiny.write_file(tmp_path), random.Random(name).randrange(3 * tiny.EVERY, tiny.STEPS)

    def reached() -> bool:
        return any(
            Growth(model / "journal.jsonl")() >= steps for model in (tmp_path / "runs" / "models").glob("*")
        )

    start_until(tmp_path, reached, "run", file, ONE_WORKER).kill()
    cut(tmp_path, name)
    said = run(tmp_path, "run", file, ONE_WORKER, "--resume")
    assert f"/{name}: damaged or truncated" in "".join(said.split("\n"))
    tiny.assert_same(tiny.model_folder(tmp_path), tiny.model_folder(undisturbed_run))
    runs.assert_same(tmp_path, undisturbed_run)


@pytest.mark.fault(
    "cut checkpoint", "of a finished model", "named; equal, by the same command", "undisturbed_run"
)
@pytest.mark.parametrize("choose", [last_checkpoint, best_checkpoint])
def test_a_finished_model_is_trained_again_from_an_earlier_checkpoint(
    undisturbed_run: Path, tmp_path: Path, choose: Callable[[Path], Path | None]
) -> None:
    file = tiny.write_file(tmp_path)
    start_until(tmp_path, runs.played(tmp_path, runs.EPISODES + 2), "run", file, ONE_WORKER).kill()
    cut(tmp_path, FILES[-1], choose)
    said = run(tmp_path, "run", file, ONE_WORKER, "--resume")
    assert f"/{FILES[-1]}: damaged" in "".join(said.split("\n"))
    tiny.assert_same(tiny.model_folder(tmp_path), tiny.model_folder(undisturbed_run))
    runs.assert_same(tmp_path, undisturbed_run)
