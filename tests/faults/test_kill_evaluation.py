"""A run killed during its evaluation keeps every finished episode, and counts each once."""

import random
from pathlib import Path

import pandas as pd
import pytest
import tiny
from command import Command, run
from processes import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPISODES = 12  # of each of three policies: random, greedy, planner
ONE_WORKER = "resources.workers=1"


def lines(folder: Path) -> dict[str, list[str]]:
    """Finished episodes on disk, by policy."""
    files = (folder / "runs" / "evaluations").glob("*/episodes.jsonl")
    return {file.parent.name: file.read_text().splitlines() for file in files}


def count(folder: Path) -> int:
    return sum(len(found) for found in lines(folder).values())


def table(folder: Path) -> tuple[list[str], pd.DataFrame]:
    """What the experiment reports, times left out."""
    (report,) = (folder / "runs" / "experiments").glob("*/results.md")
    episodes = pd.read_parquet(report.parent / "episodes.parquet")
    timed = [name for name in episodes.columns if "seconds" in name or "latency" in name]
    rows = [line.rpartition(" | ")[0] for line in report.read_text().splitlines()]  # without decisions/s
    return rows, episodes.drop(columns=timed)


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, "run", tiny.write_file(folder), ONE_WORKER)
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_finished_episodes_are_not_run_again(undisturbed_run: Path, tmp_path: Path, seed: int) -> None:
    moment = EPISODES * seed + random.Random(seed).randrange(1, EPISODES)
    file = tiny.write_file(tmp_path)
    command = Command(tmp_path, "run", file, ONE_WORKER)
    wait_until(lambda: count(tmp_path) >= moment or command.process.poll() is not None, "enough are done")
    command.kill()
    kept = lines(tmp_path)
    assert count(tmp_path) < 3 * EPISODES
    run(tmp_path, "run", file, ONE_WORKER, "--resume")
    for name, found in lines(tmp_path).items():
        assert len(found) == EPISODES
        assert found[: len(kept.get(name, []))] == kept.get(name, [])
    (rows, episodes), (expected_rows, expected) = table(tmp_path), table(undisturbed_run)
    assert rows == expected_rows
    pd.testing.assert_frame_equal(episodes, expected)
    for name in ("faults", "faults seed 0"):
        assert tiny.mlflow_curves(tmp_path, name) == tiny.mlflow_curves(undisturbed_run, name)
    assert tiny.mlflow_runs(tmp_path) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]
    assert tiny.leftovers(tmp_path) == []
