"""A killed process frees its claim on a stage: who waits goes on, and nothing is computed twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from stage_worker import KEYS, WORKERS, lines

from tt_ray.distributed.claims import Claims, Timing
from tt_ray.distributed.stages import StageStore

WORKER = Path(__file__).with_name("stage_worker.py")
UNITS = 60
Start = Callable[[Path, str, int], "Computing"]


class Computing:
    """A process that computes one stage."""

    def __init__(self, root: Path, key: str, units: int) -> None:
        self.output = root.parent / f"output-{len(list(root.parent.glob('output-*')))}.txt"
        with self.output.open("w") as file:
            arguments = [sys.executable, str(WORKER), "one", str(root), key, str(units)]
            self.process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)

    def said(self, word: str) -> int:
        return sum(line.startswith(word) for line in lines(self.output))

    def end(self) -> list[str]:
        assert self.process.wait(timeout=60) == 0, self.output.read_text()
        return lines(self.output)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that does not outlive its test."""
    started: list[Computing] = []

    def begin(root: Path, key: str, units: int = UNITS) -> Computing:
        started.append(Computing(root, key, units))
        return started[-1]

    yield begin
    for computing in started:
        computing.process.kill()
        computing.process.wait()


def hidden(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*"))


def all_of(root: Path, *arguments: str | int) -> Any:
    """What the worker prints at its end."""
    command = [sys.executable, str(WORKER), str(arguments[0]), str(root), *map(str, arguments[1:])]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.fault("stage holder", "two others wait", "one goes on from there, the other takes it")
def test_a_waiting_process_goes_on_where_a_killed_one_stopped(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "store"
    work = root / "models" / KEYS[0] / "work.txt"
    first = start(root, KEYS[0])
    wait_until(lambda: len(lines(work)) >= 10, "ten units are done")
    first.signal(signal.SIGSTOP)  # so that it is not done before the others have started
    second, third = start(root, KEYS[0]), start(root, KEYS[0])
    wait_until(lambda: second.said("waits") > 0 and third.said("waits") > 0, "two others wait")
    assert lines(second.output)[0].startswith(f"waits for process {first.process.pid} on ")
    done = len(lines(work))
    first.signal(signal.SIGCONT)
    first.signal(signal.SIGKILL)
    first.process.wait()
    ends = sorted([second.end()[-2:], third.end()[-2:]], key=lambda end: end[-1])
    begun = int(ends[0][0].removeprefix("begins at "))
    assert done <= begun < UNITS
    assert ends[0][1] == "publishes"
    assert ends[1][1] == "reuses"
    assert lines(work) == [str(unit) for unit in range(UNITS)]
    assert hidden(root) == []
    stage = StageStore(root).find("models", KEYS[0])
    assert stage is not None
    assert stage.seconds > 0.05 * (UNITS - begun)


def test_a_stopped_process_keeps_its_claim(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "store"
    work = root / "models" / KEYS[0] / "work.txt"
    first = start(root, KEYS[0])
    wait_until(lambda: len(lines(work)) >= 5, "five units are done")
    first.signal(signal.SIGSTOP)
    second = start(root, KEYS[0])
    wait_until(lambda: second.said("waits") >= 8, "the other has looked often")
    # Other processes of this host judge it by its process, even when its last touch is long ago.
    impatient = Claims(root / "models" / ".claims", Timing(heartbeat=0.001, expiry=0.001))
    assert impatient.take(KEYS[0]) is None
    assert second.said("begins") == 0
    first.signal(signal.SIGCONT)
    assert first.end()[-1] == "publishes"
    assert second.end()[-1] == "reuses"
    assert lines(work) == [str(unit) for unit in range(UNITS)]
    assert hidden(root) == []


@pytest.mark.fault("stage holder", "before each file operation", "whole, or gone on with")
def test_a_kill_before_any_file_operation_leaves_a_stage_partial_or_complete(tmp_path: Path) -> None:
    trials = all_of(tmp_path, "everywhere")
    assert {trial["killed"] for trial in trials} == {-signal.SIGKILL}
    assert {trial["again"] for trial in trials} == {0}
    published = [trial["complete"] for trial in trials]
    assert published == sorted(published)  # from one operation on
    assert trials[published.index(True) - 1]["operation"].startswith("os.rename")
    for trial in trials:
        assert trial["work"] == ["0", "1"]
        assert trial["left"] == [KEYS[0], "stage.json", "work.txt"], trial["operation"]


@pytest.mark.fault("stage holder", "a crowd, at random ({case})", "each stage computed once")
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_computes_each_stage_once(tmp_path: Path, seed: int) -> None:
    seen = all_of(tmp_path / "crowd", "crowd", seed, 60)
    assert seen["kills"] > 0
    assert seen["stops"] > 0
    assert seen["refused"] == 0
    check(seen)


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_on_many_hosts_publishes_each_stage_once(tmp_path: Path, seed: int) -> None:
    """Stopped for longer than the others wait, a holder loses its claim and must not publish."""
    check(all_of(tmp_path / "crowd", "spread", seed, 60))


def check(seen: dict[str, Any]) -> None:
    assert seen["violations"] == []
    assert seen["twice"] == []
    assert seen["codes"] == WORKERS * [0]
    assert seen["complete"] == len(KEYS)
    assert len(KEYS) - seen["kills"] <= seen["published"] <= len(KEYS)
    assert seen["begun"] <= len(KEYS) + seen["kills"] + seen["refused"] + seen["stops"]
    assert seen["left"] == []
