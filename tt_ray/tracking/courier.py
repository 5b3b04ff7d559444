"""One process sends to MLflow what many others write into journals, on any host that shares the disk."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ray.tracking.connection import one_line
from tt_ray.tracking.journal import Journal
from tt_ray.tracking.mlflow_store import MissingParentError, MlflowStore, Shipper, journal_size
from tt_ray.tracking.rounds import MAX_DELAY, Rounds
from tt_ray.tracking.run import RunState, Status, as_strings

logger = logging.getLogger(__name__)

LOOKS = 100  # ended runs per round that are looked at for a writer that came back


@dataclass
class Step:
    """What is done for one run again and again: at once, or after a refusal later and later."""

    work: Callable[[], None]
    due: float = 0.0
    delay: float = 0.0
    problem: Exception | None = None

    def refused(self, problem: Exception, interval: float) -> None:
        """Try again later; a parent that is missing is expected any moment."""
        longer = interval if isinstance(problem, MissingParentError) else min(2 * self.delay, MAX_DELAY)
        self.problem, self.delay = problem, max(longer, interval)
        self.due = time.monotonic() + self.delay

    def done(self) -> None:
        """Nothing stands in the way."""
        self.problem, self.due, self.delay = None, 0.0, 0.0


class Parcel:
    """One run on its way: its folder, and the two steps that bring MLflow up to date with it."""

    def __init__(self, folder: Path, shipper: Shipper) -> None:
        self.folder, self.shipper = folder, shipper
        self.send, self.upload = Step(shipper.send), Step(shipper.upload)

    @property
    def problem(self) -> Exception | None:
        """Why not all of it is in MLflow."""
        return self.send.problem or self.upload.problem

    @property
    def unsent(self) -> int:
        """Points and artifacts that MLflow does not have yet."""
        return self.shipper.unsent() + len(self.shipper.state.pending)

    @property
    def accepted(self) -> tuple[str | None, int, int]:
        """Changes when MLflow accepts something."""
        state = self.shipper.state
        return state.run_id, state.offset, len(state.pending)


class Courier:
    """Sends the journals of any number of folders from one thread, over one connection.

    Writers use `open_journal`; this process alone keeps the folders' `run.json`. A run that has ended and is
    sent costs next to nothing, yet is taken up again when its journal grows.
    """

    def __init__(self, uri: str, experiment: str, interval: float = 2.0) -> None:
        """`uri` as `connect` returned it; interval: seconds between batches."""
        self._store, self._interval = MlflowStore(uri, experiment), interval
        self._lock = threading.Lock()  # for the two dictionaries
        self._parcels: dict[Path, Parcel] = {}
        self._ended: OrderedDict[Path, int] = OrderedDict()  # folders and the sizes of their journals
        self._away: Exception | None = None  # why the server takes nothing from anyone
        self._rounds = Rounds(self._round, interval, "tracking-courier")
        self._rounds.start()

    def add(self, name: str, folder: Path | str, parent_identity: str | None = None) -> None:
        """Send what is and will be in the folder's journal, which need not be there yet, as the run `name`.

        A run that the folder already has keeps its identity, and so its place in MLflow; one that was sent
        before is checked there and sent again if it is gone. `UserError` where `run.json` is damaged.
        """
        folder = Path(folder).resolve()
        with self._lock:
            if folder in self._parcels:
                return
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".run.json.*"):  # of a driver that was killed while it wrote
                leftover.unlink()
            state = RunState.load(folder) or RunState(name, self._store.experiment)
            state.name, state.experiment, state.parent = name, self._store.experiment, parent_identity
            state.save(folder)
            self._ended.pop(folder, None)
            self._parcels[folder] = Parcel(folder, Shipper(folder, state, self._store))

    def end(self, folder: Path | str, status: Status, tags: Mapping[str, Any] | None = None) -> None:
        """Record how a run ended whose process cannot do so any more; also for one that never started."""
        Journal(folder).write({"tags": as_strings(tags or {}), "status": status})

    @property
    def under_way(self) -> int:
        """Runs that have not ended or are not wholly in MLflow."""
        return len(self._all())

    @property
    def unsent(self) -> int:
        """Points and artifacts that MLflow does not have yet."""
        return sum(parcel.unsent for parcel in self._all())

    def close(self, wait: float = 30.0) -> None:
        """Send the rest; give up, with a warning, when MLflow takes nothing for `wait` seconds."""
        problem = self._rounds.close(wait)
        left = {parcel.folder: parcel.unsent for parcel in self._all() if parcel.unsent}
        if left and problem is not None:  # without one, it is what has been written since by others
            logger.warning(
                "%d points and artifacts of %d runs stay below %s, because MLflow at %s did not take them "
                "(%s); the next command with --resume sends them",
                *(sum(left.values()), len(left), os.path.commonpath(left), self._store.uri),
                one_line(problem),
            )

    def _all(self) -> list[Parcel]:
        with self._lock:
            return list(self._parcels.values())

    def _round(self) -> Exception | None:
        """All journals, then the artifacts; what one run alone is refused counts only at the end."""
        self._take_up(LOOKS)
        away = self._send() or self._upload()
        self._note(away)
        complete = [parcel for parcel in self._all() if parcel.shipper.complete]
        with self._lock:
            for parcel in complete:
                self._ended[parcel.folder] = parcel.shipper.state.offset
                del self._parcels[parcel.folder]
        refusals = (parcel.problem for parcel in self._all() if parcel.problem is not None)
        return away or (next(refusals, None) if self._rounds.finishing else None)

    def _take_up(self, count: int) -> None:
        """Ended runs with a new line in their journal, from among those not looked at for longest."""
        with self._lock:
            for _ in range(len(self._ended) if self._rounds.finishing else min(count, len(self._ended))):
                folder, size = self._ended.popitem(last=False)
                if journal_size(folder) in (size, None):
                    self._ended[folder] = size
                elif (state := RunState.load(folder)) is not None:
                    self._parcels[folder] = Parcel(folder, Shipper(folder, state, self._store))

    def _send(self) -> Exception | None:
        """Journals that have grown. Returned is why the server is away, if it is."""
        for parcel in sorted(self._all(), key=lambda parcel: parcel.send.due):
            if parcel.shipper.behind and (away := self._try(parcel, parcel.send)):
                return away
        return None

    def _upload(self) -> Exception | None:
        """Pending artifacts; as one can take minutes, the journals have their turn in between."""
        sent = time.monotonic()
        for parcel in sorted(self._all(), key=lambda parcel: parcel.upload.due):
            if parcel.shipper.state.pending and (away := self._try(parcel, parcel.upload)):
                return away
            if time.monotonic() > sent + self._interval:
                if away := self._send():
                    return away
                sent = time.monotonic()
        return None

    def _try(self, parcel: Parcel, step: Step) -> Exception | None:
        """Take a step if it is due. Returned is why the server is away, if it is."""
        early = step.due > time.monotonic() and not self._rounds.finishing
        if early or self._rounds.stopped:
            return None
        before = parcel.accepted
        problem = parcel.shipper.attempt(step.work)
        if parcel.accepted != before:
            self._rounds.getting_on()
        if problem is None:
            step.done()
            return None
        if not isinstance(problem, MissingParentError) and (away := self._store.problem()) is not None:
            return away
        if not any(other.problem for other in self._all()):
            logger.warning(
                "MLflow at %s does not take run %r (%s); its results stay in %s until it does",
                *(self._store.uri, parcel.shipper.state.name, one_line(problem), parcel.shipper.journal),
            )
        step.refused(problem, self._interval)
        return None

    def _note(self, away: Exception | None) -> None:
        """Tell when the server goes and comes; when it is back it may be another, without our runs."""
        if away is not None:
            for parcel in self._all():
                parcel.shipper.forget()
            if self._away is None:
                logger.warning(
                    "MLflow at %s cannot be used (%s); all results stay in the journals until it can",
                    *(self._store.uri, one_line(away)),
                )
        elif self._away is not None:
            logger.info("MLflow at %s is back", self._store.uri)
        self._away = away
