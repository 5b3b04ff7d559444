import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tt_ray.distributed.pool_bench import PoolReport, _make_worker, measure_pool
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import run_episodes

MB = 1_000_000


def check(report: PoolReport, actors: int, episodes: int) -> None:
    assert (report.actors, report.episodes) == (actors, episodes)
    assert report.each_once
    assert report.actors_with_torch == 0
    assert report.fewest_episodes <= episodes / actors <= report.most_episodes
    assert report.start_seconds > 0
    assert report.episodes_per_second > 0
    assert 0 < report.refill_p50 <= report.refill_p95 <= report.refill_max
    assert report.overhead_per_episode > 0
    assert report.driver_cpu_per_episode > 0
    assert report.driver_rss_100 - report.driver_rss_50 < 40 * MB
    assert report.lease_rss_100 - report.lease_rss_50 < 40 * MB
    assert report.actor_rss > 0
    assert replace(report, **json.loads(json.dumps(report.to_json()))) == report


def test_stub_episodes_have_every_length_alike(tmp_path: Path) -> None:
    waiting = iter(range(78))
    planner, make_environment = _make_worker(tmp_path, actors=1, step_seconds=0)
    lengths = [
        result.length for result in run_episodes(planner, make_environment, lambda: next(waiting, None))
    ]
    assert sorted(lengths) == sorted([*range(1, 40)] * 2)


@pytest.mark.ray
def test_the_pool_can_be_measured(ray_local: None) -> None:
    check(measure_pool(actors=4, episodes=200, step_seconds=0.001), actors=4, episodes=200)


@pytest.mark.parametrize(("actors", "episodes"), [(0, 100), (4, 9), (64, 63)])
def test_too_few_episodes_are_refused(actors: int, episodes: int) -> None:
    with pytest.raises(UserError, match="one for each actor"):
        measure_pool(actors, episodes)


def head_bytes() -> int:
    """Memory of the process in which Ray keeps what it knows of the cluster."""
    processes = psutil.Process().children(recursive=True)
    return next(process.memory_info().rss for process in processes if process.name() == "gcs_server")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sixty_four_actors_and_ten_thousand_episodes(ray_local: None) -> None:
    before = head_bytes()
    check(measure_pool(actors=64, episodes=10_000, step_seconds=0.01), actors=64, episodes=10_000)
    assert head_bytes() - before < 40 * MB  # with a record for each lease it would grow by 60
