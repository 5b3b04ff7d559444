"""Nodes of a cluster die under a command, and its head does: what it had is found again elsewhere."""

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_host
import pytest
import runs
import tiny
from command import run, start_until
from processes import Growth, wait_until
from runs import ONE_WORKER, played

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD_IS_GONE = re.compile(
    r"Ray has died: its (raylet|control service \(gcs_server\)) does not answer any more"
)


class Cluster:
    """Nodes 0 and 1 with a CPU each, and a head without any, in a process of its own."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, cluster_host.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.address = self._answer()
        for _ in range(2):
            self.tell("add")

    def tell(self, what: str) -> None:
        """Have it done: `add`, `kill 0`, `kill head`."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        assert self._answer() == "done"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def start(tmp_path: Path, no_command_outlives_its_test: None) -> Iterator[Callable[[], Cluster]]:
    """Starts a cluster that does not outlive its test."""
    started: list[Cluster] = []

    def begin() -> Cluster:
        started.append(Cluster(tmp_path / f"cluster-{len(started)}.txt"))
        return started[-1]

    yield begin
    for cluster in started:
        cluster.end()


def trained(folder: Path, steps: int) -> Callable[[], bool]:
    """Whether so many training steps are done."""
    growths: dict[Path, Growth] = {}

    def come() -> bool:
        models = (folder / "runs" / "models").glob("*")
        return any(growths.setdefault(model, Growth(model / "journal.jsonl"))() >= steps for model in models)

    return come


@pytest.mark.fault("node", "training, step {case}; another joins", "equal")
@pytest.mark.parametrize("step", [random.Random(20).randrange(tiny.EVERY, tiny.STEPS - tiny.EVERY)])
def test_a_node_dies_in_training(
    undisturbed: Path, tmp_path: Path, start: Callable[[], Cluster], step: int
) -> None:
    cluster = start()
    file = tiny.write_file(tmp_path)
    command = start_until(tmp_path, trained(tmp_path, step), "train", file, address=cluster.address)
    cluster.tell("kill 1")
    cluster.tell("add")
    command.wait()
    tiny.assert_same(tiny.model_folder(tmp_path), undisturbed)
    assert tiny.mlflow_curves(tmp_path, "faults seed 0") == tiny.curves(undisturbed)
    assert tiny.leftovers(tmp_path) == []


@pytest.mark.fault("node", "evaluation, episodes {case}; another joins", "equal", "undisturbed_run")
@pytest.mark.parametrize("moments", [[runs.moment(seed) for seed in (12, 14)]], ids=str)
def test_nodes_die_in_evaluation(
    undisturbed_run: Path, tmp_path: Path, start: Callable[[], Cluster], moments: list[int]
) -> None:
    cluster = start()
    file = tiny.write_file(tmp_path)
    first, second = moments
    here = (file, ONE_WORKER, "resources.evaluation_actors=auto")
    command = start_until(tmp_path, played(tmp_path, first), "run", *here, address=cluster.address)
    cluster.tell("kill 0")
    wait_until(played(tmp_path, second), f"{second} episodes are finished")
    cluster.tell("add")
    cluster.tell("kill 1")
    command.wait()
    runs.assert_same(tmp_path, undisturbed_run)


@pytest.mark.fault("head", "{case}", "goes on to the end, or one line; equal, with --resume on a new cluster")
@pytest.mark.parametrize("stage", ["training", "evaluation"])
def test_the_head_dies(
    undisturbed_run: Path, tmp_path: Path, start: Callable[[], Cluster], stage: str
) -> None:
    cluster = start()
    file = tiny.write_file(tmp_path)
    step, episodes = random.Random(21).randrange(1, tiny.STEPS), runs.moment(14)
    come = trained(tmp_path, step) if stage == "training" else played(tmp_path, episodes)
    command = start_until(tmp_path, come, "run", file, ONE_WORKER, address=cluster.address)
    cluster.tell("kill head")
    if command.process.wait() != 0:  # it may be through before the head has been away for long
        said = command.wait(2)
        assert "Traceback" not in said
        assert "state-dump" not in said
        assert HEAD_IS_GONE.search(" ".join(said.split()))
        cluster.end()
        run(tmp_path, "run", file, ONE_WORKER, "--resume", address=start().address)
    runs.assert_same(tmp_path, undisturbed_run)
