"""Work that a thread repeats until it is closed: sending to MLflow, beside what makes the results."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tt_ray.tracking.connection import one_line

logger = logging.getLogger(__name__)

MAX_DELAY = 30.0  # seconds between two tries
FINISHING_DELAY = 1.0  # the same while somebody waits for the end


class Rounds:
    """Calls `work` every `interval` seconds from a thread of its own, less often while it has problems.

    `work` returns why it could not do everything, or None. Once `finishing`, it is called until it can, or
    until time is up.
    """

    def __init__(self, work: Callable[[], Exception | None], interval: float, name: str) -> None:
        self.problem: Exception | None = None
        """What the last round, or the start before it, could not do."""
        self.stopped = False
        """Nobody waits any longer: a round still under way had better end."""
        self._work, self._interval = work, interval
        self._wake = threading.Event()
        self._wait = 0.0
        self._deadline: float | None = None  # set once finishing
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; the first round comes after one interval."""
        self._thread.start()

    @property
    def finishing(self) -> bool:
        """Somebody waits in `close`."""
        return self._deadline is not None

    def getting_on(self) -> None:
        """Called by `work` when something was done in spite of earlier problems: `close` is patient again."""
        self.problem = None
        if self._deadline is not None:
            self._deadline = time.monotonic() + self._wait

    def close(self, wait: float) -> Exception | None:
        """Let `work` finish; give up when it has had problems and done nothing for `wait` seconds.

        Returned is the last problem, None where all is done.
        """
        self._wait = wait
        self._deadline = time.monotonic() + wait
        self._wake.set()
        while self._thread.is_alive() and (self.problem is None or time.monotonic() < self._deadline):
            self._thread.join(0.1)
        problem = self.problem
        self.stopped = True
        self._wake.set()
        return problem

    def _run(self) -> None:
        delay = self._interval
        while not self.stopped:
            self._wake.wait(delay)
            self._wake.clear()
            finishing = self.finishing  # before the round: what is written meanwhile needs another
            self.problem = self._round()
            if self.problem is None:
                delay = self._interval
                if finishing:
                    return
            else:
                delay = FINISHING_DELAY if finishing else min(2 * delay, MAX_DELAY)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    return

    def _round(self) -> Exception | None:
        try:
            return self._work()
        except Exception as error:  # the thread has to live: it is the only one
            if self.problem is None:
                logger.warning("results are not sent (%s); trying again", one_line(error))
            return error
