"""A run killed during its evaluation keeps every finished episode, and counts each once."""

import os
import random
import signal
from pathlib import Path

import pytest
import runs
import tiny
from command import run, start_until
from processes import descendants, wait_gone, wait_until
from runs import EPISODES, ONE_WORKER, played

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ACTOR = "ray::Evaluator"
"""How Ray's name of an evaluation actor's process begins."""


@pytest.mark.fault("driver", "episode {case}", "equal, with --resume", "undisturbed_run")
@pytest.mark.parametrize("moment", [runs.moment(seed) for seed in range(3)])
def test_finished_episodes_are_not_run_again(undisturbed_run: Path, tmp_path: Path, moment: int) -> None:
    file = tiny.write_file(tmp_path)
    start_until(tmp_path, played(tmp_path, moment), "run", file, ONE_WORKER).kill()
    kept = runs.lines(tmp_path)
    assert runs.count(tmp_path) < 3 * EPISODES
    run(tmp_path, "run", file, ONE_WORKER, "--resume")
    for name, found in runs.lines(tmp_path).items():
        assert found[: len(kept.get(name, []))] == kept.get(name, [])
    runs.assert_same(tmp_path, undisturbed_run)


@pytest.mark.fault("evaluation actor", "episodes {case}: one each time", "equal", "undisturbed_run")
@pytest.mark.parametrize(
    "moments", [[runs.moment(first + policy) for policy in range(3)] for first in (3, 6)], ids=str
)
def test_killed_actors_are_replaced(undisturbed_run: Path, tmp_path: Path, moments: list[int]) -> None:
    file = tiny.write_file(tmp_path)
    command = start_until(tmp_path, played(tmp_path, moments[0]), "run", file, ONE_WORKER)
    killed = []
    for moment in moments:
        wait_until(played(tmp_path, moment), f"{moment} episodes are finished")
        actors = [
            each for each in descendants(command.process.pid) if "".join(each.cmdline()[:1]).startswith(ACTOR)
        ]
        victim = random.Random(moment).choice(actors)
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim)
    command.wait()
    assert len(killed) == 3
    wait_gone(killed)
    runs.assert_same(tmp_path, undisturbed_run)


@pytest.mark.fault("Ctrl-C", "twice, episode {case}", "one line; equal, with --resume", "undisturbed_run")
@pytest.mark.parametrize("moment", [runs.moment(seed) for seed in (10, 11)])
def test_ctrl_c_twice(undisturbed_run: Path, tmp_path: Path, moment: int) -> None:
    file = tiny.write_file(tmp_path)
    command = start_until(tmp_path, played(tmp_path, moment), "run", file, ONE_WORKER)
    for _ in range(2):
        os.killpg(command.process.pid, signal.SIGINT)
    said = command.wait(130)
    assert said.splitlines()[-1] == "tt-ray: interrupted; the same command with --resume goes on from here"
    assert "Traceback" not in said
    run(tmp_path, "run", file, ONE_WORKER, "--resume")
    runs.assert_same(tmp_path, undisturbed_run)
