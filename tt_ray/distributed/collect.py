"""A `map` over Ray actors, for `evaluation.collect`: results in order, crashed actors replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import ray

from tt_ray.errors import UserError

BATCHES_PER_ACTOR = 3  # enough to even out episodes of unequal length, few enough that a call costs nothing

# How the loss of an actor, of its node, or of a result that it held shows itself.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError)
_Batch = tuple[int, list[Any], int]  # its place, its items, the actors that died running it


@ray.remote
class _Caller:
    def run(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        return [function(item) for item in items]


class ActorMap:
    """`map` over a pool of actors, one CPU each; a context manager, inside which Ray is initialised.

    An actor process lives as long as the pool, so that what a function keeps there (its environment) is built
    once. An actor that dies is replaced and its items are run again, so a function must give the same twice.
    """

    def __init__(self, actors: int, *, max_failures: int = 3) -> None:
        """A pool of `actors`, at most the cluster's CPUs; the same items may lose `max_failures` actors."""
        self.actors = max(1, min(actors, int(ray.cluster_resources().get("CPU", 1))))
        self.max_failures = max_failures
        self._idle: list[Any] = []

    def __enter__(self) -> ActorMap:
        self._idle = [_Caller.remote() for _ in range(self.actors)]  # type: ignore[attr-defined]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._idle:
            ray.kill(actor)
        self._idle = []

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`[function(item) for item in items]` by the actors; an exception of `function` is raised here."""
        todo = deque((index, batch, 0) for index, batch in enumerate(self._batches(list(items))))
        results: list[list[Any]] = [[] for _ in todo]
        shared = ray.put(function)  # what the items have in common travels once
        running: dict[Any, tuple[Any, _Batch]] = {}
        try:
            while todo or running:
                while todo and self._idle:
                    actor, work = self._idle.pop(), todo.popleft()
                    running[actor.run.remote(shared, work[1])] = (actor, work)
                (done,), _ = ray.wait(list(running), num_returns=1)
                actor, (index, batch, failures) = running.pop(done)
                try:
                    results[index] = self._result(actor, done)
                except _LOST as error:
                    if failures == self.max_failures:
                        raise UserError(_gave_up(failures + 1, error)) from error
                    todo.appendleft((index, batch, failures + 1))
        finally:
            self._idle.extend(actor for actor, _ in running.values())
        return [result for batch in results for result in batch]

    def _result(self, actor: Any, done: Any) -> list[Any]:
        """What the actor's call returned, the actor (or one in its place) idle again."""
        try:
            result = ray.get(done)
        except _LOST:
            ray.kill(actor)  # it may only have been out of reach
            self._idle.append(_Caller.remote())  # type: ignore[attr-defined]
            raise
        except ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            raise error.cause from error
        self._idle.append(actor)
        return result

    def _batches(self, items: list[Any]) -> list[list[Any]]:
        size = max(1, len(items) // (BATCHES_PER_ACTOR * self.actors))
        return [items[i : i + size] for i in range(0, len(items), size)]


def _gave_up(failures: int, error: Exception) -> str:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"collecting stopped: {failures} actors died running the same episodes ({cause}); what is finished "
        "is kept: run it again, with fewer actors (resources.evaluation_actors) if memory ran out"
    )
