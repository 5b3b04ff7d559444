"""How far the running trials are: a small file for each, written by its process and read by the driver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tt_ray.distributed.following import Update
from tt_ray.distributed.scoring import PLANNER
from tt_ray.files import whole_file
from tt_ray.plain import MALFORMED, read_json
from tt_ray.sweep_file import Trial

INTERVAL = 1.0  # seconds between two writings


class TrialProgress:
    """Writes `<sweep>/progress/<trial>.json`; where that cannot be done, nothing is shown."""

    def __init__(self, sweep: Path, trial: Trial, seed: int) -> None:
        self._file = progress_file(sweep, trial)
        self._prefix = f"seed {seed}: " if len(trial.config.seeds) > 1 else ""
        self._last = 0.0

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """A stage of `total` steps for the duration of a block."""
        subject = title.partition(",")[0]  # `training, seed 0`, `planner, seed 0: episodes`
        what = "episodes" if subject == PLANNER else subject

        def update(done: int, message: str) -> None:
            self._write(f"{what} {min(done, total)}/{total} {message}".rstrip(), now=False)

        self._write(f"{what} 0/{total}", now=True)
        yield update

    def note(self, message: str) -> None:
        """Show a message."""
        self._write(message, now=True)

    def _write(self, text: str, now: bool) -> None:
        if not now and time.monotonic() - self._last < INTERVAL:
            return
        self._last = time.monotonic()
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._file) as file:
                file.write_text(json.dumps({"text": self._prefix + text, "time": time.time()}))


def progress_file(sweep: Path, trial: Trial) -> Path:
    """Where a trial says how far it is."""
    return sweep / "progress" / f"{trial.fingerprint}.json"


def read_progress(sweep: Path, trial: Trial) -> str:
    """What a running trial says of itself; empty where it has not said anything yet."""
    try:
        return str(read_json(progress_file(sweep, trial))["text"])
    except MALFORMED:
        return ""
