"""Passing on the curves of a training job while it writes them to its journal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tt_ray.tracking import Run, read

Update = Callable[[int, str], None]
"""`update(done, message)` of a stage under way."""


def replay(journal: Path, run: Run) -> None:
    """Pass on the curves of a training job that is over, with their times."""
    for record, _ in read(journal):
        if "metrics" in record:
            run.journal.append(record["metrics"], record["step"], record["time"])


@contextmanager
def following(journal: Path, run: Run, update: Update) -> Iterator[None]:
    """Pass on the curves in a training job's journal, as they come, to `run` and a progress bar."""
    finished = threading.Event()
    offset = 0

    def catch_up() -> None:
        nonlocal offset
        for record, end in read(journal, offset):
            offset = end
            if "metrics" in record:
                run.journal.append(record["metrics"], record["step"], record["time"])
                loss = record["metrics"].get("train/loss")
                update(record["step"], "" if loss is None else f"loss {loss:.3f}")

    def work() -> None:
        while not finished.wait(0.5):
            catch_up()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        catch_up()
