"""The evaluation pool follows its cluster: hosts join and go, an autoscaler is asked for what is of use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_rollouts

from tt_ray.distributed import rollouts
from tt_ray.distributed.rollouts import _Size
from tt_ray.evaluation.rollout import EpisodeResult

STORY = Path(__file__).with_name("elastic_cluster.py")
NAMESPACES = ["unshare", "--fork", "--pid", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child"]


def tell(folder: Path, story: str, *before: str) -> dict[str, Any]:
    """Run a story of `elastic_cluster.py`; what it has seen."""
    command = [*before, sys.executable, str(STORY), story, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, f"{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
    return json.loads((folder / "seen.json").read_text())


def check(seen: dict[str, Any], folder: Path, episodes: int) -> None:
    """Every episode came once, and they are those that one process plays by itself."""
    assert seen["error"] == ""
    assert seen["arrived"] == [[seed, 1] for seed in range(episodes)]
    expected = test_rollouts.here(test_rollouts.Factory(folder), range(episodes))
    assert [EpisodeResult.from_json(result) for result in seen["results"]] == expected


def test_a_fixed_pool_has_no_more_actors_than_work() -> None:
    size = _Size(4, slots=8)
    assert [size.target(missing) for missing in (100, 32, 25, 24, 9, 8, 1)] == [4, 4, 4, 3, 2, 1, 1]


def test_a_pool_that_follows_asks_for_twice_the_room_once_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, room = 100.0, 2
    monkeypatch.setattr(rollouts.time, "monotonic", lambda: now)
    size = _Size(lambda: room, slots=8)
    assert size.target(1000) == 2
    now += 1000  # waiting for a first host is no work
    assert size.target(1000) == 2
    size.begin()
    now += 10
    size.begin()
    assert size.target(1000) == 2
    now += 10
    assert (size.target(1000), size.room) == (4, 2)
    assert size.target(24) == 3
    room = 8
    assert size.target(1000) == 16
    room = 0  # every host has gone: one actor asks for another
    assert size.target(1000) == 2
    assert size.target(8) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_hosts_that_join_are_used_and_hosts_that_go_are_given_up(tmp_path: Path) -> None:
    seen = tell(tmp_path, "hosts")
    assert seen["alone"] == 1
    assert seen["begun"] >= 2
    assert 2 <= seen["joined_at"] < 40
    check(seen, tmp_path, 40)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the namespaces that Ray's autoscaler needs")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare (util-linux) is not installed")
def test_an_autoscaler_is_asked_for_what_is_of_use(tmp_path: Path) -> None:
    seen = tell(tmp_path, "autoscaler", *NAMESPACES)
    check(seen["few"], tmp_path, 2)
    assert 1 <= seen["few"]["most_hosts"] <= 2  # of eight actors that might be, two have work
    assert seen["hosts_between"] == 0
    check(seen["many"], tmp_path, 30)
    assert seen["many"]["most_hosts"] >= 2  # it began with one
