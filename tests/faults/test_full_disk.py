"""A full disk: one line that says so, exit code 2, and --resume goes on once there is room again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import tiny
from command import run, start_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small disk that this needs"),
]


@pytest.fixture
def disk(tmp_path: Path, no_command_outlives_its_test: None) -> Iterator[Path]:
    """A disk of 8 MB, where an experiment's storage is."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves `left` bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    return ballast


@pytest.mark.fault("full disk", "training, bytes left and workers {case}", "named; equal, with --resume")
@pytest.mark.parametrize(
    ("left", "workers"), [(0, 1), (60_000, 1), (250_000, 1), (700_000, 1), (0, 2), (250_000, 2)]
)
def test_a_full_disk_is_named_and_nothing_is_lost(
    undisturbed: Path, tmp_path: Path, disk: Path, left: int, workers: int
) -> None:
    file = tiny.write_file(tmp_path)
    ballast = fill(disk, left)
    check_named(run(tmp_path, "train", file, f"resources.workers={workers}", expected=2), disk)
    ballast.unlink()
    run(tmp_path, "train", file, f"resources.workers={workers}", "--resume")
    model = tiny.model_folder(tmp_path)
    assert tiny.mlflow_curves(tmp_path, "faults seed 0") == tiny.curves(model)
    assert tiny.mlflow_runs(tmp_path) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]
    assert tiny.leftovers(tmp_path) == []
    if workers == 2:
        tiny.assert_same(model, undisturbed)


@pytest.mark.fault(
    "full disk", "evaluation, episode {case}", "named; equal, with --resume", "undisturbed_run"
)
@pytest.mark.parametrize("moment", [runs.moment(seed) for seed in (16, 17)])
def test_a_disk_that_fills_up_during_the_evaluation(
    undisturbed_run: Path, tmp_path: Path, disk: Path, moment: int
) -> None:
    file = tiny.write_file(tmp_path)
    command = start_until(tmp_path, runs.played(tmp_path, moment), "run", file, runs.ONE_WORKER)
    ballast = fill(disk, 0)
    check_named(command.wait(2), disk)
    ballast.unlink()
    run(tmp_path, "run", file, runs.ONE_WORKER, "--resume")
    runs.assert_same(tmp_path, undisturbed_run)


def check_named(said: str, disk: Path) -> None:
    last = said.splitlines()[-1]
    assert last.startswith("tt-ray: error:")
    assert "No space left on device" in last
    assert str(disk) in last
    assert "Traceback" not in said
