"""Curves are passed on as they are: every point once, with the time at which it was made."""

import time
from pathlib import Path

from tt_ray.distributed.following import following, replay
from tt_ray.tracking import Journal, MemoryTracker


def write(folder: Path, steps: range) -> Path:
    journal = Journal(folder)
    for step in steps:
        journal.append({"train/loss": 1.0 / (step + 1)}, step, timestamp=1000 + step)
    return journal.path


def points(run) -> list[tuple[int, int, dict[str, float]]]:
    return [(r["time"], r["step"], r["metrics"]) for r in run.journal.records if "metrics" in r]


def test_a_finished_curve_is_replayed_once_with_its_times(tmp_path: Path) -> None:
    source = write(tmp_path, range(3))
    run = MemoryTracker().start("reused", tmp_path)
    replay(source, run)
    replay(source, run)
    assert points(run) == [(1000 + step, step, {"train/loss": 1.0 / (step + 1)}) for step in range(3)]


def test_a_growing_curve_is_followed_to_its_end(tmp_path: Path) -> None:
    run, shown = MemoryTracker().start("trained", tmp_path), []
    source = write(tmp_path, range(2))
    with following(source, run, lambda done, message: shown.append((done, message))):
        deadline = time.monotonic() + 30
        while len(points(run)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        write(tmp_path, range(2, 5))
    assert [step for _, step, _ in points(run)] == list(range(5))
    assert shown[0] == (0, "loss 1.000")
    assert shown[-1] == (4, "loss 0.200")
