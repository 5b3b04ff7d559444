"""Collecting on actors gives what one process gives, whatever happens to the actors."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from minari.dataset.minari_storage import MinariStorage

from tt_ray.config import CollectConfig
from tt_ray.data.minari_sets import load_episodes
from tt_ray.distributed.collect import ActorMap
from tt_ray.errors import UserError
from tt_ray.evaluation.collect import collect

pytestmark = pytest.mark.ray

CONFIG = CollectConfig(
    environment="Hopper-v5", steps=800, directions=4, top_directions=2, max_steps=30, final_episodes=3, seed=2
)


@pytest.fixture(autouse=True)
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def functions_travel_by_value() -> Iterator[None]:
    """Actors cannot import this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def collected(dataset_id: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """All of the data's values, and what the data set says of itself."""
    metadata = MinariStorage.read_raw_metadata(folder / dataset_id / "data")["tt_ray"]["metadata"]
    return load_episodes(dataset_id).spec.fingerprint, metadata


def square(x: int) -> int:
    return x * x


def pid_of(_: int) -> int:
    return os.getpid()


def refuse(x: int) -> int:
    if x == 5:
        raise UserError("five is refused")
    return x


def die_once(function: Callable[[Any], Any], marker: Path, item: Any) -> Any:
    """Kill this actor's process while it works, unless that was done before."""
    result = function(item)
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return result
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def test_results_come_in_order_from_as_many_processes_as_asked_for(ray_local: None) -> None:
    with ActorMap(2) as actors:
        assert actors(square, range(50)) == [x * x for x in range(50)]
        assert actors(square, []) == []
        assert len({*actors(pid_of, range(50)), os.getpid()}) == 3
    with ActorMap(99) as actors:
        assert actors.actors == 2  # what this Ray has CPUs for


def test_two_actors_collect_what_one_process_collects(ray_local: None, minari_folder: Path) -> None:
    collect("ars/alone-v0", CONFIG)
    with ActorMap(2) as actors:
        collect("ars/actors-v0", CONFIG, map=actors)
    assert collected("ars/actors-v0", minari_folder) == collected("ars/alone-v0", minari_folder)


def test_a_killed_actor_changes_nothing(ray_local: None, minari_folder: Path) -> None:
    collect("ars/alone-v0", CONFIG)
    calls: list[int] = []
    marker = minari_folder / "killed"

    with ActorMap(2) as actors:

        def disturbed(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
            calls.append(1)
            if len(calls) == 3:
                return actors(functools.partial(die_once, function, marker), items)
            if len(calls) == 5:  # and one that dies between two iterations
                os.kill(actors(pid_of, [0])[0], signal.SIGKILL)
            return actors(function, items)

        collect("ars/killed-v0", CONFIG, map=disturbed)
        assert len({*actors(pid_of, range(50))}) == 2
    assert marker.exists()
    assert len(calls) > 5
    assert collected("ars/killed-v0", minari_folder) == collected("ars/alone-v0", minari_folder)


def test_an_error_of_the_work_is_raised_as_it_is(ray_local: None) -> None:
    with ActorMap(2) as actors:
        with pytest.raises(UserError, match=r"^five is refused$"):
            actors(refuse, range(10))
        assert actors(square, range(9)) == [x * x for x in range(9)]


def test_work_that_always_kills_its_actor_is_given_up(ray_local: None) -> None:
    with ActorMap(1, max_failures=1) as actors, pytest.raises(UserError, match="2 actors died") as error:
        actors(die, [0])
    assert "\n" not in str(error.value)
