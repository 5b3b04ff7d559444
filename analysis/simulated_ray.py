"""Ray as far as the evaluation pool uses it, in one process and on a simulated clock.

It takes the place of the names `ray` and `time` in `tt_ray.distributed.rollouts`. Everything else there runs
as it is: the pool on the driver, the lease queue, the actors and their episodes. Each actor is a thread, but
only one thread runs at any moment, in the order of the simulated clock: a run can be repeated exactly.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ray.exceptions import ActorDiedError

from tt_ray.distributed import rollouts


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that Ray and the pool take; as measured in docs/pool.md and docs/scaling.md."""

    lease: float = 0.0012
    """Of the lease queue, which serves one call after another."""
    trip: float = 0.0013
    """The rest of a lease, from asking to the answer."""
    episode: float = 0.0052
    """What an episode costs its actor beside its lease and its own work."""
    result: float = 0.0008
    """Of the driver, for each result."""
    stream: float = 1.9e-6
    """Of the driver, for each result and each actor that it waits for."""


class _Killed(BaseException):
    """Ends an actor's thread wherever it waits."""


_END = object()


@dataclass
class _Ref:
    """A value, there at the moment `at`; `work` is what the driver spends on taking it."""

    value: Any = None
    at: float = 0.0
    work: float = 0.0
    error: Exception | None = None


class _Stream:
    """Results of one actor as they come, then its end or its death."""

    def __init__(self, ray: SimulatedRay) -> None:
        self.items: deque[Any] = deque()
        self._ray = ray

    def __next__(self) -> _Ref:
        with self._ray.outside():
            item = self.items.popleft()
        if item is _END:
            raise StopIteration
        return item


@dataclass(eq=False)
class Actor:
    """One simulated actor, its thread and its account; times are of the simulated clock."""

    number: int
    target: Any
    born: float
    """When its process is up."""
    resume: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    stream: _Stream | None = None
    died: float = math.inf
    busy_since: float | None = None
    busy: float = 0.0
    """Seconds in episodes, those that its death cut short included."""
    lost: float = 0.0
    """Seconds in episodes that its death cut short."""

    def present(self, end: float) -> float:
        """Seconds that it was there until `end`."""
        return max(0.0, min(end, self.died) - self.born)


class SimulatedRay:
    """The part of Ray's interface that `rollouts` calls, and the clock.

    `start(number, now)` says when the process of actor `number`, asked for at `now`, is up.
    """

    def __init__(self, costs: Costs, start: Callable[[int, float], float]) -> None:
        self.costs, self._start = costs, start
        self.clock = 0.0
        self.actors: list[Actor] = []
        self.queue_cpu = 0.0
        """Real CPU seconds in the lease queue's own code."""
        self.leases = 0
        self._outside_cpu = 0.0
        self._queue_free = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._control = threading.Semaphore(0)
        self._running: Actor | None = None

    def remote(self, cls: type) -> Any:
        """A class whose instances are actors, with options that make no difference here."""
        made = SimpleNamespace(remote=lambda *arguments: self._make(cls, arguments))
        made.options = lambda **_: made
        return made

    def put(self, value: Any) -> _Ref:
        """A reference to `value`."""
        return _Ref(value)

    def get(self, ref: _Ref) -> Any:
        """The value, when it is there; the clock goes on to that moment."""
        with self.outside():
            self.clock = max(self.clock, ref.at)
            if self._running is None:
                self.clock += ref.work
        if ref.error is not None:
            raise ref.error
        return ref.value

    def wait(
        self, refs: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """The first `num_returns` in line that are ready, once there is any or `timeout` is over."""
        with self.outside():
            self.clock += self.costs.stream * len(refs)
            end = self.clock + (math.inf if timeout is None else timeout)
            while True:
                self._catch_up()
                ready = list(itertools.islice(filter(self._is_ready, refs), num_returns))
                if ready or self.clock >= end:
                    return ready, []
                if not self._events:
                    raise RuntimeError("the pool waits, and nothing will ever happen")
                self.clock = min(end, self._events[0][0])

    def kill(self, handle: Any) -> None:
        """End an actor; of the lease queue nothing is left to end."""
        with self.outside():
            if isinstance(handle.target, Actor):
                self.die(handle.target)

    def get_runtime_context(self) -> Any:
        """One host."""
        return SimpleNamespace(get_node_id=lambda: "0" * 56)

    def available_resources(self) -> dict[str, float]:
        """Nothing that the log could report."""
        return {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In this block `rollouts` runs on this Ray and this clock."""
        clock = SimpleNamespace(monotonic=lambda: self.clock)
        with patch.object(rollouts, "ray", self), patch.object(rollouts, "time", clock):
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        """A stretch of the driver's thread that is the simulation's and not the pool's."""
        started = time.thread_time()
        try:
            yield
        finally:
            if self._running is None:
                self._outside_cpu += time.thread_time() - started

    @property
    def outside_cpu(self) -> float:
        """Real CPU seconds of the driver's thread that were not the pool's."""
        return self._outside_cpu

    def at(self, moment: float, act: Callable[[], None]) -> None:
        """Do `act` then."""
        heapq.heappush(self._events, (moment, next(self._order), act))

    def play(self, seconds: float) -> None:
        """An episode of the running actor: its thread waits until the clock has come so far."""
        actor = self._running
        assert actor is not None
        actor.busy_since = self.clock
        self._sleep(actor, self.clock + seconds)
        actor.busy += self.clock - actor.busy_since
        actor.busy_since = None
        self.clock += self.costs.episode

    def die(self, actor: Actor) -> None:
        """End an actor now, in the midst of its episode."""
        if actor.died <= self.clock:
            return
        actor.died = self.clock
        if actor.busy_since is not None:
            actor.lost = max(0.0, self.clock - actor.busy_since)
            actor.busy += actor.lost
        if actor.stream is not None:
            actor.stream.items.append(_Ref(error=ActorDiedError()))
        if actor.thread is not None:
            self._hand_over(actor)

    def _make(self, cls: type, arguments: tuple[Any, ...]) -> Any:
        if not issubclass(cls, rollouts.Evaluator):
            return _Handle(cls(*arguments), self._call)
        number = len(self.actors)
        actor = Actor(number, cls(*arguments), self._start(number, self.clock))
        self.actors.append(actor)
        return _Handle(actor, self._launch)

    def _call(self, target: Any, method: str, arguments: tuple[Any, ...]) -> _Ref:
        """A call of the lease queue, by whoever runs now."""
        with self.outside():
            if self._running is None:
                self._catch_up()
            self._queue_free = max(self._queue_free, self.clock) + self.costs.lease
            started = time.thread_time()
            value = getattr(target, method)(*arguments)
            self.queue_cpu += time.thread_time() - started
            self.leases += method == "take" and value is not None
            return _Ref(value, self._queue_free + self.costs.trip)

    def _launch(self, actor: Actor, method: str, arguments: tuple[Any, ...]) -> _Stream:
        """Set an actor to work; its stream of results."""
        with self.outside():
            stream = actor.stream = _Stream(self)
            values = [each.value if isinstance(each, _Ref) else each for each in arguments]
            if actor.died <= self.clock:
                stream.items.append(_Ref(error=ActorDiedError()))
                return stream

            def send(item: Any) -> None:
                self.at(self.clock, lambda: stream.items.append(item))

            def run() -> None:
                actor.resume.acquire()
                try:
                    if actor.died > self.clock:
                        for result in getattr(actor.target, method)(*values):
                            send(_Ref(result, self.clock, self.costs.result))
                        send(_END)
                except _Killed:
                    pass
                except Exception as error:
                    send(_Ref(error=error))
                finally:
                    actor.thread = actor.stream = None
                    self._control.release()

            actor.thread = threading.Thread(target=run, daemon=True)
            actor.thread.start()
            thread, begin = actor.thread, max(actor.born, self.clock + self.costs.trip)
            self.at(begin, lambda: self._hand_over(actor) if actor.thread is thread else None)
            return stream

    def _is_ready(self, ref: Any) -> bool:
        return bool(ref.items) if isinstance(ref, _Stream) else ref.at <= self.clock

    def _catch_up(self) -> None:
        """Everything that happens until now, in its order."""
        while self._events and self._events[0][0] <= self.clock:
            now = self.clock
            self.clock, _, act = heapq.heappop(self._events)
            act()
            self.clock = now

    def _hand_over(self, actor: Actor) -> None:
        """Let the actor's thread run until it waits or ends; the clock is then as it was."""
        now, before = self.clock, self._running
        self._running = actor
        actor.resume.release()
        self._control.acquire()
        self._running, self.clock = before, now

    def _sleep(self, actor: Actor, until: float) -> None:
        thread = actor.thread
        self.at(until, lambda: self._hand_over(actor) if actor.thread is thread else None)
        self._control.release()
        actor.resume.acquire()
        if actor.died <= self.clock:
            raise _Killed


class _Handle:
    """An actor's handle: every attribute is a method of the actor, to be called with `.remote(...)`."""

    def __init__(self, target: Any, call: Callable[[Any, str, tuple[Any, ...]], Any]) -> None:
        self.target, self._call = target, call

    def __getattr__(self, method: str) -> Any:
        made = SimpleNamespace(remote=lambda *arguments: self._call(self.target, method, arguments))
        made.options = lambda **_: made
        return made
