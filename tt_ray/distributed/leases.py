"""Which episodes wait, and who holds the others: the lease queue of the evaluation pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class LeaseQueue:
    """Which seeds wait and who holds the others.

    An actor of its own, so that free slots are filled without waiting for the driver.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._waiting = deque(seeds)
        self._held: dict[int, list[int]] = {}
        self._begun: set[int] = set()
        self._revoked: set[int] = set()
        self._steps: dict[int, int] = {}

    def report(self, worker: int, steps: int) -> None:
        """Note the environment steps that `worker` has taken in all."""
        self._steps[worker] = steps

    def steps(self) -> int:
        """Environment steps that all workers together have reported."""
        return sum(self._steps.values())

    def take(self, worker: int) -> int | None:
        """Lease the next seed to `worker`; None when none waits, or when `worker` is not to get any more."""
        self._begun.add(worker)
        if not self._waiting or worker in self._revoked:
            return None
        seed = self._waiting.popleft()
        self._held.setdefault(worker, []).append(seed)
        return seed

    def revoke(self, worker: int) -> list[int]:
        """Give `worker` nothing more; every seed that it was ever given."""
        self._revoked.add(worker)
        return self._held.pop(worker, [])

    def not_begun(self, workers: Sequence[int]) -> list[int]:
        """Those of `workers` that have never asked for a seed."""
        return [worker for worker in workers if worker not in self._begun]

    def let_go(self, workers: Sequence[int], count: int, spare: int = 0) -> list[int]:
        """Up to `count` of `workers` that have not begun, and leave `spare`; they never get a seed then."""
        idle = self.not_begun(workers)
        chosen = idle[: max(0, min(count, len(idle) - spare))]
        self._revoked.update(chosen)
        return chosen

    def waiting(self) -> list[int]:
        """The seeds that nobody holds, in line."""
        return list(self._waiting)

    def put(self, seeds: Sequence[int]) -> None:
        """Make seeds wait again, behind the others."""
        self._waiting.extend(seeds)
