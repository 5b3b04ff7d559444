"""The evaluation pool with a thousand actors on a simulated clock: python analysis/lease_simulation.py

The pool's own code gives out the seeds and counts the results; analysis/simulated_ray.py stands in for Ray.
Episodes last in proportion to recorded ones, which are drawn with replacement. docs/scaling.md has the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from simulated_ray import Actor, Costs, SimulatedRay
from study import markdown_table

from tt_ray.distributed.rollouts import evaluate_seeds
from tt_ray.errors import UserError
from tt_ray.evaluation.policies import RandomPolicy

RECORDED = Path(__file__).with_name("recorded_episodes.json")
ACTORS_PER_HOST = 16


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is played and what goes wrong; seconds."""

    name: str
    actors: int
    durations: np.ndarray
    """Of each episode, by its seed [episodes]."""
    start: float = 28.0
    """From asking for an actor until its process is up, on a host that is there."""
    late: int = 0
    """So many of the actors come later, a host at a time, evenly spread until `late_until`."""
    late_until: float = 0.0
    lost_hosts: int = 0
    """Hosts that go with all their actors, at random moments of the undisturbed run's first nine tenths.

    They are of those that were there from the beginning.
    """
    new_host: float = 240.0
    """Until a lost host is replaced."""
    seed: int = 0
    costs: Costs = field(default_factory=Costs)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a scenario; seconds of the simulated clock, where nothing else is said."""

    makespan: float
    even: float
    """Until the work would be done if it could be cut at will, what each episode costs beside included."""
    longest: float
    """Of the episodes."""
    limit: float
    """Until the driver, or the lease queue if that is slower, would be through if it never had to wait."""
    utilisation: float
    """Share of the actors' time in episodes that count."""
    lost: float
    """In episodes that a death cut short."""
    deaths: int
    leases: int
    driver_cpu: float
    """Real CPU seconds of the pool's own code, for each lease."""
    queue_cpu: float
    """The same of the lease queue."""
    each_once: bool
    real: float
    """Real seconds that the simulation took."""


def simulate(scenario: Scenario) -> Outcome:
    """Evaluate one episode for each duration with the pool's own code."""
    ray = SimulatedRay(scenario.costs, _starts(scenario))
    seeds = range(len(scenario.durations))
    arrivals: Counter[int] = Counter()
    dead: list[Actor] = []
    for moment, host in _losses(scenario):
        ray.at(moment, _loss(ray, host, dead))

    def make_worker() -> tuple[RandomPolicy, Callable[[], gym.Env]]:
        return RandomPolicy([-1], [1]), lambda: _Episode(ray, scenario.durations)

    began, cpu = time.monotonic(), time.thread_time()
    with ray.installed():
        evaluate_seeds(
            seeds,
            make_worker,
            actors=scenario.actors,
            on_result=lambda result: arrivals.update([result.seed]),
        )
    cpu = time.thread_time() - cpu - ray.outside_cpu
    makespan = ray.clock
    work, lost = float(scenario.durations.sum()), sum(actor.lost for actor in ray.actors)
    costs, count = scenario.costs, len(seeds)
    slowest = max(costs.result + costs.stream * scenario.actors, costs.lease)
    return Outcome(
        makespan=makespan,
        even=_even(ray.actors, work + lost + count * (costs.lease + costs.trip + costs.episode)),
        longest=float(scenario.durations.max()),
        limit=scenario.start + count * slowest,
        utilisation=work / sum(actor.present(makespan) for actor in ray.actors),
        lost=lost,
        deaths=len(dead),
        leases=ray.leases,
        driver_cpu=cpu / ray.leases,
        queue_cpu=ray.queue_cpu / ray.leases,
        each_once=arrivals == Counter(seeds),
        real=time.monotonic() - began,
    )


class _Episode(gym.Env):
    """One step, which lasts as long as the episode."""

    observation_space = gym.spaces.Box(0, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, ray: SimulatedRay, durations: np.ndarray) -> None:
        self._ray, self._durations = ray, durations

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        assert seed is not None
        self._duration = float(self._durations[seed])
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._ray.play(self._duration)
        return np.zeros(1, dtype=np.float32), 1.0, True, False, {}


def _starts(scenario: Scenario) -> Callable[[int, float], float]:
    """When an actor is up: on a host that is there, a late one, or the one that replaces a lost one."""
    punctual = scenario.actors - scenario.late
    hosts = math.ceil(scenario.late / ACTORS_PER_HOST)

    def start(number: int, now: float) -> float:
        if number >= scenario.actors:
            return now + scenario.new_host + scenario.start
        if number < punctual:
            return now + scenario.start
        host = 1 + (number - punctual) // ACTORS_PER_HOST
        return now + scenario.start + scenario.late_until * host / hosts

    return start


def _losses(scenario: Scenario) -> list[tuple[float, int]]:
    """Moments at which a host is lost, and which."""
    random = np.random.default_rng(scenario.seed)
    work = float(scenario.durations.sum()) / scenario.actors
    hosts = (scenario.actors - scenario.late) // ACTORS_PER_HOST
    chosen = random.choice(hosts, size=scenario.lost_hosts, replace=False)
    return [
        (scenario.start + float(u) * 0.9 * work, int(host))
        for u, host in zip(random.random(len(chosen)), chosen, strict=True)
    ]


def _loss(ray: SimulatedRay, host: int, dead: list[Actor]) -> Callable[[], None]:
    def lose() -> None:
        for actor in ray.actors[host * ACTORS_PER_HOST : (host + 1) * ACTORS_PER_HOST]:
            ray.die(actor)
            dead.append(actor)

    return lose


def _even(actors: Sequence[Actor], work: float) -> float:
    """The moment until which the actors that are there have had `work` seconds together."""
    low, high = 0.0, work + max(actor.born for actor in actors)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(actor.present(middle) for actor in actors) < work:
            low = middle
        else:
            high = middle
    return high


def recorded_durations(count: int, mean: float, seed: int = 0) -> np.ndarray:
    """Seconds of `count` episodes: recorded ones drawn with replacement, scaled to `mean` seconds [count]."""
    recorded = np.array(json.loads(RECORDED.read_text(encoding="utf-8"))["decisions"])
    return np.random.default_rng(seed).choice(recorded, size=count) * mean / recorded.mean()


def stub_durations(count: int) -> np.ndarray:
    """Seconds of the stub episodes that docs/pool.md measures: 1 to 39 steps of 40 ms [count]."""
    return 0.04 * (1 + np.arange(count) * 7919 % 39)


def scenarios(actors: int, episodes: int, mean: float) -> list[Scenario]:
    """The rows of the table."""
    whole = Scenario(
        name=f"{actors:,} actors, {episodes:,} episodes of {mean:g} s",
        actors=actors,
        durations=recorded_durations(episodes, mean),
    )
    work = float(whole.durations.sum()) / actors
    late, lost = round(0.3 * actors), max(1, round(0.1 * actors / ACTORS_PER_HOST))
    short = recorded_durations(episodes, 1.0)
    return [
        Scenario(name="64 actors, 10,000 stub episodes", actors=64, durations=stub_durations(10_000)),
        whole,
        replace(whole, name="the same, 30 % of the actors come late", late=late, late_until=work / 2),
        replace(whole, name=f"the same, {lost} hosts are lost", lost_hosts=lost),
        replace(whole, name="both", late=late, late_until=work / 2, lost_hosts=lost),
        replace(whole, name=f"{actors:,} actors, episodes of 1 s", durations=short),
    ]


def row(scenario: Scenario, outcome: Outcome) -> list[str]:
    """A line of the table."""
    return [
        scenario.name,
        f"{outcome.makespan:,.0f}",
        f"{outcome.even:,.0f}",
        f"{outcome.even + outcome.longest:,.0f}",
        f"{outcome.limit:,.0f}",
        f"{100 * outcome.utilisation:.0f} %",
        f"{outcome.deaths}",
        f"{100 * outcome.lost / float(scenario.durations.sum()):.1f} %",
        f"{len(scenario.durations) / (outcome.makespan - scenario.start):,.0f}",
        "all" if outcome.each_once else "NO",
    ]


COLUMNS = (
    "scenario",
    "makespan s",
    "even",
    "even + longest",
    "driver's limit",
    "in use",
    "deaths",
    "lost",
    "episodes/s",
    "seeds once",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and what the pool's own code cost; the exit code."""
    parser = argparse.ArgumentParser(prog="lease_simulation.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--actors", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--mean-seconds", type=float, default=60.0, help="mean duration of an episode")
    options = parser.parse_args(argv)
    told, level = logging.getLogger("tt_ray"), logging.getLogger("tt_ray").level
    told.setLevel(logging.ERROR)  # the pool reports every actor that dies
    try:
        if (
            options.actors < 2 * ACTORS_PER_HOST
            or options.episodes < options.actors
            or options.mean_seconds <= 0
        ):
            raise UserError(
                f"wanted are {2 * ACTORS_PER_HOST} actors at least, an episode for each and a positive mean"
            )
        rows, costs = [], []
        for scenario in scenarios(options.actors, options.episodes, options.mean_seconds):
            outcome = simulate(scenario)
            rows.append(row(scenario, outcome))
            costs.append(outcome)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    finally:
        told.setLevel(level)
    print(markdown_table(COLUMNS, rows))
    for what, values in (
        ("driver", [one.driver_cpu for one in costs]),
        ("lease queue", [one.queue_cpu for one in costs]),
    ):
        least, most = 1e6 * min(values), 1e6 * max(values)
        print(f"CPU of the pool's own code in the {what}, for each lease: {least:.0f} to {most:.0f} µs")
    print(f"simulated in {sum(one.real for one in costs):.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
