"""Folders that one process at a time may write in."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tt_ray.errors import UserError


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: {refusal}") from error
        yield


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
