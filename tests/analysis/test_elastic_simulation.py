"""The pool's own code on a simulated cluster that grows, shrinks, or has an autoscaler."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import pytest
from lease_simulation import _Episode
from simulated_ray import Costs, SimulatedRay

from tt_ray.distributed.rollouts import Places, evaluate_seeds
from tt_ray.evaluation.policies import RandomPolicy

FREE = Costs(lease=0, trip=0, episode=0, result=0)
START = 5.0  # seconds of an actor's process


@dataclass
class Hosts:
    """Hosts with one place each: when they come and go, who is on them, what an autoscaler was asked for."""

    coming: list[float]
    going: dict[int, float] = field(default_factory=dict)
    """When hosts go, by their place in `coming`."""
    autoscaled: float = math.inf
    """Seconds that the autoscaler takes for another host, for an actor that has no place."""
    most: int = 1000
    """Hosts that it may start."""
    taken: dict[int, int] = field(default_factory=dict)
    unplaced: list[float] = field(default_factory=list)
    """When actors were asked for that no host was there for."""

    def __call__(self) -> int:
        return sum(self._there(host, self.ray.clock) for host in range(len(self.coming)))

    def place(self, number: int, now: float) -> float:
        """When actor `number` is up."""
        for host in range(len(self.coming)):
            actor = self.taken.get(host)
            busy = actor is not None and self.ray.actors[actor].died > now
            if self._there(host, now) and not busy:
                self.taken[host] = number
                return now + START
        self.unplaced.append(now)
        if math.isinf(self.autoscaled) or len(self.coming) >= self.most:
            return 1e9  # it waits for as long as anyone cares
        self.coming.append(now + self.autoscaled)
        self.taken[len(self.coming) - 1] = number
        return now + self.autoscaled + START

    def install(self) -> SimulatedRay:
        """The Ray that these hosts make."""
        self.ray = SimulatedRay(FREE, self.place)
        for host, moment in self.going.items():
            self.ray.at(moment, lambda host=host: self._go(host))
        return self.ray

    def _there(self, host: int, now: float) -> bool:
        return self.coming[host] <= now < self.going.get(host, math.inf)

    def _go(self, host: int) -> None:
        if host in self.taken:
            self.ray.die(self.ray.actors[self.taken[host]])


def play(hosts: Hosts, episodes: int, actors: int | Places, slots: int = 1, seconds: float = 10.0) -> float:
    """Evaluate so many episodes, each of which must be counted once; the moment at which all are done."""
    ray, arrived = hosts.install(), Counter[int]()
    durations = np.full(episodes, seconds)

    def make_worker() -> tuple[RandomPolicy, Callable[[], gym.Env]]:
        return RandomPolicy([-1], [1]), lambda: _Episode(ray, durations)

    with ray.installed():
        results = evaluate_seeds(
            range(episodes),
            make_worker,
            actors=actors,
            slots=slots,
            on_result=lambda result: arrived.update([result.seed]),
        )
    assert [result.seed for result in results] == list(range(episodes))
    assert arrived == Counter(range(episodes))
    return ray.clock


def test_a_pool_that_follows_uses_hosts_that_join() -> None:
    alone = Hosts([0.0])
    assert play(alone, 40, alone) == pytest.approx(START + 400, abs=3)
    joined = Hosts([0.0, 100.0, 100.0, 100.0])
    # Until 105 s the first has done 10; the other 30 are then shared by four, one of which is in the middle.
    assert play(joined, 40, joined) == pytest.approx(100 + START + 75, abs=15)


def test_a_fixed_pool_uses_them_too() -> None:
    hosts = Hosts([0.0], autoscaled=60.0)
    assert play(hosts, 40, 4) == pytest.approx(60 + START + (400 - 60) / 4, abs=15)
    assert len(hosts.coming) == 4


@pytest.mark.parametrize("seed", range(20))
def test_hosts_that_go_change_no_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    coming = [0.0, *random.uniform(0, 200, 9)]
    # The first stays, so that there is an end; of the others each goes some time after it has come.
    going = {host: coming[host] + random.uniform(1, 150) for host in range(1, 10) if random.random() < 0.8}
    hosts = Hosts(coming, going)
    assert play(hosts, 60, hosts, slots=int(random.integers(1, 4))) < START + 600 + 3


def test_an_autoscaler_is_asked_for_no_more_than_has_work() -> None:
    hosts = Hosts([], autoscaled=60.0)
    play(hosts, 2, 8)
    assert len(hosts.unplaced) == 2
    hosts = Hosts([], autoscaled=60.0)
    play(hosts, 30, 8, slots=8)
    assert len(hosts.unplaced) == 4  # ceil(30 / 8)


def test_a_pool_that_follows_doubles_an_autoscaled_cluster_while_there_is_work() -> None:
    hosts = Hosts([], autoscaled=60.0, most=64)
    ended = play(hosts, 600, hosts)
    steps = Counter(round(moment) for moment in hosts.coming)
    assert len(hosts.coming) > 8
    assert sorted(hosts.coming)[0] == 60
    growth = np.cumsum([steps[moment] for moment in sorted(steps)])
    assert growth[0] == 1  # one actor asks for the first host, whatever there is to do
    assert all(later <= 2 * now + 1 for now, later in itertools.pairwise(growth))
    assert ended < 60 + 600 * 10 / 4
    short = Hosts([0.0], autoscaled=60.0)
    play(short, 3, short, seconds=1.0)
    assert short.unplaced == []  # it is over before another host would be worth it
