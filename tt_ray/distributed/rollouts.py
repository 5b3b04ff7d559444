"""Evaluation episodes on a pool of Ray actors, each counted once whatever dies.

Seeds are leased one at a time from a queue the moment a slot is free, wherever that is; results stream to the
driver, which alone decides what is done. What a dead actor held goes back to the queue. Hosts may join and
leave meanwhile: who runs an episode makes no difference to it.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tt_ray.distributed.leases import LeaseQueue
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult, Policy, run_episodes

logger = logging.getLogger(__name__)

WorkerFactory = Callable[[], tuple[Policy, Callable[[], gym.Env]]]
"""Called once inside each actor: the planner, and how to make an environment."""

_DEATHS = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)
_POLL = 2.0  # seconds between two looks at how far the actors are
_PATIENCE = 60.0  # seconds without a step before the log says what is being waited for
_LASTING = 15.0  # seconds after which an evaluation is worth new hosts, which take minutes to start

Places = Callable[[], int]
"""Actors that the cluster has room for at the moment."""


def evaluate_seeds(
    seeds: Sequence[int],
    make_worker: WorkerFactory,
    *,
    actors: int | Places,
    slots: int = 1,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    reserved: bool = False,
    max_tries: int = 3,
    on_result: Callable[[EpisodeResult], None] | None = None,
    on_steps: Callable[[int], None] | None = None,
) -> list[EpisodeResult]:
    """Run one episode for each of `seeds` (all different) on a pool of actors; results in that order.

    `actors`: so many, or as many as there is room for, asked every few seconds; but no more than have work at
    `slots` episodes each. Those that find no room wait for it, which is what has an autoscaler start hosts: a
    pool that follows its cluster asks for up to twice the room once it has worked for a while.

    `make_worker` must be picklable. `on_result` is called here, on the driver, once for each episode as it
    arrives, and `on_steps` every few seconds with the environment steps taken so far. An episode whose actor
    or host dies is run again, `max_tries` times in all. `UserError` when they are used up (it names the
    seeds), and at once when the planner or an environment raises.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError("evaluate_seeds: a seed is given twice")
    if not seeds:
        return []
    size = _Size(actors, slots)
    pool = _Pool(seeds, make_worker, size, cpus_per_actor, gpus_per_actor, max_tries, on_steps, reserved)
    try:
        for result in pool.results():
            if on_result is not None:
                on_result(result)
        return [pool.received[seed] for seed in seeds]
    finally:
        pool.close()


class Evaluator:
    """One actor of the pool; keeps its planner and environments' factory between runs."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._steps, self._reported = 0, 0.0
        self._worker: tuple[Policy, Callable[[], gym.Env]] | None = None

    def run(
        self, worker: int, leases: Any, make_worker: WorkerFactory, limit: int
    ) -> Iterator[EpisodeResult]:
        """Run episodes until the queue is empty, at most `limit` at once."""
        if self._worker is None:
            # Here and not in the constructor: an error raised there would look like the actor's death.
            self._worker = make_worker()
            torch = sys.modules.get("torch")
            if torch is not None:
                torch.set_num_threads(self._threads)
        planner, make_environment = self._worker
        yield from run_episodes(
            planner,
            make_environment,
            lambda: ray.get(leases.take.remote(worker)),
            limit=limit,
            on_steps=lambda steps: self._count(steps, leases, worker),
        )

    def _count(self, steps: int, leases: Any, worker: int) -> None:
        self._steps += steps
        if time.monotonic() - self._reported > _POLL:
            self._reported = time.monotonic()
            leases.report.remote(worker, self._steps)


@dataclass(frozen=True)
class _Worker:
    number: int
    handle: Any


class _Size:
    """How many actors a pool should have."""

    def __init__(self, actors: int | Places, slots: int) -> None:
        self._actors, self._slots = actors, slots
        self._began = math.inf
        self.room = 1
        """Actors that run at once, as far as is known."""

    def begin(self) -> None:
        """Note that actors are at work."""
        self._began = min(self._began, time.monotonic())

    def target(self, missing: int) -> int:
        """Actors to have while so many episodes are missing, with those that wait for room; at least one."""
        if isinstance(self._actors, int):
            most = self.room = self._actors
        else:
            self.room = max(1, self._actors())
            lasting = time.monotonic() - self._began > _LASTING
            most = 2 * self.room if lasting else self.room
        return max(1, min(most, math.ceil(missing / self._slots)))


class _Pool:
    """The driver's side: actors, their streams of results, and what has been received."""

    def __init__(
        self,
        seeds: Sequence[int],
        make_worker: WorkerFactory,
        size: _Size,
        cpus: float,
        gpus: float,
        max_tries: int,
        on_steps: Callable[[int], None] | None,
        reserved: bool = False,
    ) -> None:
        self._on_steps = on_steps
        self._strategy = None if reserved else "SPREAD"
        self._steps, self._stepped, self._looked = 0, time.monotonic(), time.monotonic()
        self.received: dict[int, EpisodeResult] = {}
        self._seeds, self._size = seeds, size
        self._cpus, self._gpus, self._max_tries = cpus, gpus, max_tries
        self._tries: Counter[int] = Counter()
        self._numbers = itertools.count()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._unheard: dict[int, _Worker] = {}  # no result of theirs has come yet
        self._stillborn = 0  # actors that died before they took a seed, since the last result
        self._put_back = False
        self._streams: dict[Any, _Worker] = {}
        self._make_worker = ray.put(make_worker)
        # On this host it lives as long as the driver; should it be killed, it starts with every seed again,
        # which costs time and nothing else: a second result is not counted.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._leases = (
            ray.remote(LeaseQueue)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
                enable_task_events=False,  # else Ray's head keeps a record of every lease
            )
            .remote(list(seeds))
        )
        self._asked = self._leases.steps.remote()

    def results(self) -> Iterator[EpisodeResult]:
        """Every seed's result, once, as it arrives."""
        self._follow()
        while len(self.received) < len(self._seeds):
            # By the clock: many actors leave no moment without a result.
            if time.monotonic() - self._looked > _POLL:
                self._look()
                self._follow()
            if not self._streams:
                self._requeue_lost()
            ready, _ = ray.wait(list(self._streams), num_returns=1, timeout=_POLL)
            for stream in ready:
                result = self._advance(stream)
                if result is not None and result.seed not in self.received:
                    self.received[result.seed] = result
                    self._stillborn = 0
                    yield result

    def close(self) -> None:
        """End every actor."""
        for worker in self._workers:
            ray.kill(worker.handle)
        ray.kill(self._leases)

    def _spawn(self) -> _Worker:
        handle = (
            ray.remote(Evaluator)
            .options(num_cpus=self._cpus, num_gpus=self._gpus, scheduling_strategy=self._strategy)
            .remote(max(1, int(self._cpus)))
        )
        worker = _Worker(next(self._numbers), handle)
        self._workers.append(worker)
        self._unheard[worker.number] = worker
        return worker

    def _follow(self) -> None:
        """Have as many actors as there is work and room for; only such as have not begun are let go."""
        target = self._size.target(len(self._seeds) - len(self.received))
        surplus = len(self._workers) - target
        if surplus > 0 and self._unheard:
            self._let_go(surplus)
        elif surplus < 0 and not self._idle:  # an idle one has found nothing to do
            self._idle = [self._spawn() for _ in range(-surplus)]
            self._start_idle()

    def _let_go(self, count: int) -> None:
        """End up to `count` actors that have not begun, which mostly wait for room; the youngest first."""
        spare = int(self._put_back)  # one is there for what was put back
        gone = ray.get(self._leases.let_go.remote(list(reversed(self._unheard)), count, spare))
        for number in gone:
            worker = self._unheard.pop(number)
            ray.kill(worker.handle)
            self._workers.remove(worker)
        self._streams = {key: worker for key, worker in self._streams.items() if worker.number not in gone}
        self._idle = [worker for worker in self._idle if worker.number not in gone]

    def _start_idle(self) -> None:
        """Set idle actors to work, each with its share of what is missing at most: no actor takes it all."""
        missing = len(self._seeds) - len(self.received)
        limit = math.ceil(missing / max(1, min(self._size.room, len(self._workers))))
        for worker in self._idle:
            run = worker.handle.run.options(num_returns="streaming")
            self._streams[run.remote(worker.number, self._leases, self._make_worker, limit)] = worker
        self._idle = []

    def _advance(self, stream: Any) -> EpisodeResult | None:
        """The stream's next result; None when it has ended, in one way or the other."""
        worker = self._streams.pop(stream)
        try:
            result = ray.get(next(stream))
        except StopIteration:
            self._idle.append(worker)
            if self._put_back and ray.get(self._leases.waiting.remote()):
                self._start_idle()  # put back after this one had found the queue empty
            return None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise cause from error
            message = f"evaluation stopped by {type(cause).__name__}: {_first_line(cause)}"
            raise UserError(message) from error
        except _DEATHS as error:
            self._replace(worker, error)
            return None
        except RayError as error:
            raise UserError(f"an evaluation actor could not run: {_first_line(error)}") from error
        self._unheard.pop(worker.number, None)
        self._streams[stream] = worker  # last in line, so that one fast stream does not starve the others
        return result

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Put back what a dead actor held, and start another in its place where there is use for it."""
        ray.kill(worker.handle)  # where the actor was only out of reach
        self._workers.remove(worker)
        self._unheard.pop(worker.number, None)
        held = ray.get(self._leases.revoke.remote(worker.number))
        if not held:
            self._count_stillborn(error)
        lost = [seed for seed in held if seed not in self.received]
        logger.warning(
            "an evaluation actor died; %d episodes start again (%s)", len(lost), _first_line(error)
        )
        if lost and not self._idle and not ray.get(self._leases.not_begun.remote(list(self._unheard))):
            # The others may have found the queue empty: they come back only after their slowest episode.
            self._idle = [self._spawn()]
        self._requeue(lost)
        self._follow()

    def _requeue(self, seeds: list[int]) -> None:
        """Let `seeds` wait again, and set idle actors to work on them."""
        self._tries.update(seeds)
        spent = sorted(seed for seed in seeds if self._tries[seed] >= self._max_tries)
        if spent:
            names = ", ".join(str(seed) for seed in spent)
            raise UserError(
                f"episodes with seeds {names}: the actors that ran them died, {self._max_tries} times each "
                "(out of memory? see Ray's logs, or lower resources.episodes_per_actor)"
            )
        self._put_back = self._put_back or bool(seeds)
        ray.get(self._leases.put.remote(seeds))
        self._start_idle()

    def _count_stillborn(self, error: Exception) -> None:
        self._stillborn += 1
        if self._stillborn >= self._max_tries * (len(self._workers) + 1):
            raise UserError(f"evaluation actors die before they start an episode: {_first_line(error)}")

    def _requeue_lost(self) -> None:
        """Nobody is at work: let what is missing wait again, but for what waits already."""
        waiting = set(ray.get(self._leases.waiting.remote()))
        self._requeue([seed for seed in self._seeds if seed not in self.received and seed not in waiting])

    def _look(self) -> None:
        """Tell how far the actors are, and say so when nothing moves."""
        self._looked = time.monotonic()
        steps = self._steps
        # What was asked at an earlier look: results are never held up for it, however busy the host.
        if ray.wait([self._asked], timeout=0)[0]:
            steps = ray.get(self._asked)
            self._asked = self._leases.steps.remote()
        if steps != self._steps:
            self._steps, self._stepped = steps, time.monotonic()
            self._size.begin()
            if self._on_steps is not None:
                self._on_steps(steps)
        elif time.monotonic() - self._stepped > _PATIENCE:
            self._stepped = time.monotonic()
            self._report_waiting()

    def _report_waiting(self) -> None:
        free = ray.available_resources()
        need = f"an evaluation actor needs {self._cpus:g} CPU and {self._gpus:g} GPU"
        have = f"free are {free.get('CPU', 0):g} and {free.get('GPU', 0):g}"
        logger.warning("nothing moved for %.0f s; %s, %s", _PATIENCE, need, have)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
