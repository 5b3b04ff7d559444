from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from toy_training import LAYOUT, Curve, Curves, append_lines, merge, toy_job

from tt_ray.model.checkpoint import (
    best_checkpoint,
    checkpoint_folders,
    last_checkpoint,
    load_checkpoint,
    load_training_state,
)
from tt_ray.training.loop import fit

DIVERGING = {"learning_rate": 3.0, "warmup_steps": 10, "final_learning_rate_fraction": 1.0}


GOALS = {"layout": replace(LAYOUT, goal_slots=(0,))}


class CrashError(Exception):
    pass


class CrashingCurve(Curve):
    """Crashes in place of its call number `at` (from 0)."""

    def __init__(self, points: Curves, at: int) -> None:
        super().__init__()
        self.points, self.left = points, at

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        if self.left == 0:
            raise CrashError
        self.left -= 1
        super().__call__(metrics, step)


def assert_same_results(folder: Path, expected: Path) -> None:
    """The same checkpoints, bit for bit."""
    names = [path.name for path in checkpoint_folders(expected)]
    assert [path.name for path in checkpoint_folders(folder)] == names
    for find in (best_checkpoint, last_checkpoint):
        ours, theirs = find(folder), find(expected)
        assert ours is not None
        assert theirs is not None
        assert ours.name == theirs.name
        one, other = load_checkpoint(ours), load_checkpoint(theirs)
        assert (one.step, one.metrics) == (other.step, other.metrics)
        assert_equal_tensors(one.model.state_dict(), other.model.state_dict())
        assert_equal_tensors(load_training_state(ours), load_training_state(theirs))


def assert_equal_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", [{}, DIVERGING, {"validate_every": 5, "batch_size": 13}, GOALS])
@pytest.mark.parametrize("crashes", [[1], [4], [5], [6], [9], [14], [0, 5, 2, 6]])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, settings: dict[str, Any], crashes: Iterable[int]
) -> None:
    """Crashes between updates, at a validation, before and after checkpoints; several in one run."""
    straight = Curve()
    fit(toy_job(**settings), tmp_path / "straight", straight)
    points: Curves = {}
    for at in crashes:
        with pytest.raises(CrashError):
            fit(toy_job(**settings), tmp_path / "crashed", CrashingCurve(points, at))
    curve = Curve()
    curve.points = points
    fit(toy_job(**settings), tmp_path / "crashed", curve)
    assert points == straight.points
    assert_same_results(tmp_path / "crashed", tmp_path / "straight")


def start(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, toy_training.__file__, str(folder), json.dumps(settings)]
    folders = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment)


def lines(file: Path) -> list[str]:
    """Whole lines: a killed process may have left the last one unfinished."""
    return (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def kill_after(process: subprocess.Popen[bytes], log: Path, count: int, delay: float) -> None:
    """SIGKILL a moment after the process has logged `count` times."""
    before, deadline = len(lines(log)), time.monotonic() + 120
    while len(lines(log)) < before + count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 120, "validate_every": 5, "warmup_steps": 20}
    straight = Curve()
    fit(toy_job(**settings), tmp_path / "straight", straight)
    folder, rng = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    for _ in range(2):
        process = start(folder, settings)
        kill_after(process, folder / "log.jsonl", rng.randint(5, 50), rng.uniform(0.0, 0.02))
    fit(toy_job(**settings), folder, append_lines(folder / "log.jsonl", 0.0))
    points: Curves = {}
    for line in lines(folder / "log.jsonl"):
        step, metrics = json.loads(line)
        merge(points, metrics, step)
    assert points == straight.points
    assert_same_results(folder, tmp_path / "straight")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        path.name for path in checkpoint_folders(folder)
    }
