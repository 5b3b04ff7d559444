"""A killed training worker: training goes on by itself and ends with the weights of an undisturbed run."""

import os
import random
import signal
import threading
from pathlib import Path

import psutil
import pytest
import tiny
from processes import Growth, descendants, wait_until

from tt_ray.distributed.train import train_model

pytestmark = pytest.mark.ray


class Killer(threading.Thread):
    """Kills the training worker number `victim` when the journal has reached each of `steps` in turn."""

    def __init__(self, model: Path, victims: list[tuple[int, int]]) -> None:
        super().__init__(daemon=True)
        self.growth, self.victims = Growth(model / "journal.jsonl"), victims
        self.killed: list[int] = []
        self.seen: list[int] = []

    def run(self) -> None:
        for step, victim in self.victims:
            wait_until(lambda step=step: self.growth() >= step, f"step {step} is done")
            worker = descendants(os.getpid(), "ray::RayTrainWorker")[victim]
            os.kill(worker.pid, signal.SIGKILL)
            self.killed.append(worker.pid)
            self.seen.append(self.growth())


def train_disturbed(folder: Path, victims: list[tuple[int, int]], **training: int) -> tuple[Path, Killer]:
    config = tiny.experiment(folder, **training)
    tokens, model = tiny.prepare(config)
    killer = Killer(model, victims)
    killer.start()
    train_model(config, tokens, model, 0, tiny.TWO_WORKERS)
    killer.join()
    return model, killer


def random_victim(seed: int) -> tuple[int, int]:
    source = random.Random(seed)
    return source.randrange(1, tiny.STEPS - 20), source.randrange(2)


def check(folder: Path, victims: list[tuple[int, int]], undisturbed: Path) -> None:
    model, killer = train_disturbed(folder, victims)
    assert len(killer.killed) == len(victims)
    assert not any(psutil.pid_exists(pid) for pid in killer.killed)
    tiny.assert_same(model, undisturbed)
    assert tiny.leftovers(folder) == []


@pytest.mark.fault("training worker", "a random step", "equal", "undisturbed")
def test_a_killed_worker_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    check(tmp_path, [random_victim(0)], undisturbed)


@pytest.mark.fault("training worker", "a random step ({case})", "equal", "undisturbed")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_workers_killed_at_random_change_nothing(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    check(tmp_path, [random_victim(seed)], undisturbed)


@pytest.mark.fault("training worker", "steps 25, 90 and 200", "equal", "undisturbed")
@pytest.mark.slow
def test_workers_killed_again_and_again_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    check(tmp_path, [(25, 0), (90, 1), (200, 0)], undisturbed)
