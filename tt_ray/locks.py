"""Folders that one process at a time may write in."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tt_ray.errors import UserError

ATTEMPTS = 3


@contextmanager
def exclusive(folder: Path, refusal: str) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing; the lock goes with the process, however it ends.

    `UserError`: `refusal` while another process holds it; the reason where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from error
    with lock:
        if not _locked(lock):
            raise UserError(f"{folder}: {refusal}")
        yield


def _locked(file: IO[str]) -> bool:
    """Lock the file, more than once: somebody may only be looking whether it is (`is_held`)."""
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05 * (attempt < ATTEMPTS - 1))
        else:
            return True
    return False


def is_held(folder: Path) -> bool:
    """Whether some process holds the folder at this moment."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
