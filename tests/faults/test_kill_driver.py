"""A killed command takes all its processes with it, and finishes with --resume as if nothing had been."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from command import run, start_until
from processes import Growth

pytestmark = pytest.mark.ray

Moment = Callable[[Path], bool]
"""Given the experiment's folder, whether the time to kill has come."""


def at_step(step: int) -> Moment:
    """When the journal has reached `step`."""
    growths: dict[Path, Growth] = {}

    def come(folder: Path) -> bool:
        for model in (folder / "runs" / "models").glob("[!.]*"):  # beside it lie claims
            return growths.setdefault(model, Growth(model / "journal.jsonl"))() >= step
        return False

    return come


def when_there(pattern: str) -> Moment:
    """When a file or folder of that name exists."""
    return lambda folder: any(folder.glob(pattern))


def train_killed(folder: Path, moment: Moment) -> Path:
    """The experiment's file, after a first try at training was killed."""
    file = tiny.write_file(folder)
    start_until(folder, lambda: moment(folder), "train", file).kill()
    return file


def check_trained(folder: Path, undisturbed: Path) -> None:
    tiny.assert_same(tiny.model_folder(folder), undisturbed)
    assert tiny.mlflow_curves(folder, "faults seed 0") == tiny.curves(undisturbed)
    assert tiny.mlflow_runs(folder) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]
    assert tiny.leftovers(folder) == []


@pytest.mark.fault("driver", "training, before its second checkpoint", "equal, with --resume")
@pytest.mark.slow  # minutes long, and what it kills when depends on the machine
def test_a_killed_training_is_resumed_exactly(undisturbed: Path, tmp_path: Path) -> None:
    file = train_killed(tmp_path, at_step(random.Random(0).randrange(tiny.EVERY, 2 * tiny.EVERY)))
    before = tiny.checkpoints(tiny.model_folder(tmp_path))
    assert "step-00000240" not in before  # its workers went on for a moment, but not to the end
    refused = run(tmp_path, "train", file, expected=2).strip()
    assert "add --resume" in refused
    assert "\n" not in refused
    assert tiny.checkpoints(tiny.model_folder(tmp_path)) == before
    run(tmp_path, "train", file, "--resume")
    check_trained(tmp_path, undisturbed)


@pytest.mark.fault("driver", "training alone: {case}", "equal, with --resume")
@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        when_there("runs/tokens/*"),
        at_step(1),
        at_step(random.Random(1).randrange(tiny.EVERY, tiny.STEPS - tiny.EVERY)),
        at_step(random.Random(2).randrange(tiny.EVERY, tiny.STEPS - tiny.EVERY)),
        at_step(tiny.STEPS),
        when_there("runs/models/*/checkpoints/step-00000240"),
        when_there("runs/models/*/stage.json"),
        when_there("mlruns/*/*/artifacts/checkpoint/*"),
    ],
    ids=[
        "tokens",
        "first step",
        "random 1",
        "random 2",
        "last step",
        "last checkpoint",
        "complete",
        "upload",
    ],
)
def test_a_training_killed_at_any_moment_is_resumed(
    undisturbed: Path, tmp_path: Path, moment: Moment
) -> None:
    file = train_killed(tmp_path, moment)
    run(tmp_path, "train", file, "--resume")
    check_trained(tmp_path, undisturbed)


@pytest.mark.fault("driver", "training, twice in a row", "equal, with --resume")
@pytest.mark.slow
def test_a_training_resumed_at_once_and_killed_again_is_resumed(undisturbed: Path, tmp_path: Path) -> None:
    """The next command starts while workers of the killed one may still be writing."""
    file = tiny.write_file(tmp_path)
    resume: list[str] = []
    for step in (30, 130):
        reached = at_step(step)
        start_until(tmp_path, lambda reached=reached: reached(tmp_path), "train", file, *resume).kill_only()
        resume = ["--resume"]
    run(tmp_path, "train", file, *resume)
    check_trained(tmp_path, undisturbed)
