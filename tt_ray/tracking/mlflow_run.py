"""Runs of this process in MLflow: each writes its journal, and a thread of its own sends it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tt_ray.tracking.connection import one_line
from tt_ray.tracking.journal import Journal
from tt_ray.tracking.mlflow_store import MlflowStore, Shipper
from tt_ray.tracking.rounds import Rounds
from tt_ray.tracking.run import Run, RunState, Status, open_folder

logger = logging.getLogger(__name__)

KILLED_WAIT = 5.0  # seconds that a run ended by Ctrl-C waits for a server that is away


class MlflowTracker:
    """Starts runs in one MLflow experiment; `uri` as `connect` returned it."""

    def __init__(
        self, uri: str, experiment: str, *, interval: float = 2.0, finish_wait: float = 30.0
    ) -> None:
        """interval: seconds between batches; finish_wait: seconds that `finish` waits for a lost server."""
        self.uri, self.experiment = uri, experiment
        self.interval, self.finish_wait = interval, finish_wait

    def start(
        self,
        name: str,
        folder: Path | str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> MlflowRun:
        """See `Tracker.start`. With the server away the run starts all the same and appears there later."""
        folder = Path(folder)
        state, journal = open_folder(name, self.experiment, folder, params, tags, parent)
        shipper = Shipper(folder, state, MlflowStore(self.uri, self.experiment))
        return MlflowRun(state, journal, shipper, self.interval, self.finish_wait)


class MlflowRun(Run):
    """A run whose journal is sent to MLflow, also the lines that other processes append to it."""

    state: RunState

    def __init__(
        self, state: RunState, journal: Journal, shipper: Shipper, interval: float, finish_wait: float
    ) -> None:
        """Find or make the run in MLflow now, if the server is there, and send from a thread of its own."""
        super().__init__(state, journal)
        self._shipper, self._finish_wait = shipper, finish_wait
        self._rounds = Rounds(self._round, interval, f"tracking-{state.name}")
        self._rounds.problem = self._noted(shipper.attempt(shipper.find))
        self._rounds.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None while no server has been reached yet."""
        return self.state.run_id

    @property
    def unsent(self) -> int:
        """Metric points in the journal that MLflow has not accepted yet."""
        return self._shipper.unsent()

    def finish(self, status: Status = "FINISHED") -> None:
        """Send everything, waiting a bounded time for a lost server; what it misses stays in the journal."""
        if self.finished:
            return
        super().finish(status)
        wait = min(self._finish_wait, KILLED_WAIT) if status == "KILLED" else self._finish_wait
        problem = self._rounds.close(wait)
        if unsent := self.unsent + len(self.state.pending):
            logger.warning(
                "%d points and artifacts of run %r stay in %s, because MLflow at %s did not take them (%s); "
                "the next command with --resume sends them",
                *(unsent, self.state.name, self._shipper.journal, self._shipper.store.uri),
                one_line(problem) if problem else "no time left",
            )

    def _round(self) -> Exception | None:
        return self._noted(self._shipper.attempt(self._shipper.sync))

    def _noted(self, problem: Exception | None) -> Exception | None:
        """Tell when problems begin and end."""
        before, uri = self._rounds.problem, self._shipper.store.uri
        if problem is not None and before is None:
            logger.warning(
                "MLflow at %s does not take run %r (%s); its results stay in %s until it does",
                *(uri, self.state.name, one_line(problem), self._shipper.journal),
            )
        if problem is None and before is not None:
            logger.info("MLflow at %s is back; run %r is up to date", uri, self.state.name)
        return problem
