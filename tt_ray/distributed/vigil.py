"""Noticing soon that Ray itself has died: its driver would wait for minutes, or go on with half of it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from tt_ray.errors import UserError

logger = logging.getLogger(__name__)

INTERVAL = 0.3  # seconds between two knocks
PRIVATE = 0.6  # seconds without an answer after which a Ray on this machine alone is dead
SHARED = 45.0  # the same for a cluster's control service, which may come back; this host's raylet does not
SILENT_END = 56.0  # soon after, at 60, Ray ends its drivers without a word
NOTICED = PRIVATE + 3 * INTERVAL  # by then a block is left after the death of a Ray on this machine alone
UNWIND = 30.0  # seconds that the main thread then has to leave the block

CONTROL = "control service (gcs_server)"

Address = tuple[str, int]


@contextmanager
def while_ray_lives(patience: float, addresses: Mapping[str, Address] | None = None) -> Iterator[None]:
    """Run a block; `UserError` out of it when Ray has been dead for `patience` seconds.

    The block is left as by Ctrl-C. One that does not react, since it waits inside Ray, is ended with the
    process, exit code 2: all results are on disk at any moment. Outside the main thread nothing is watched.
    addresses: what has to answer, by name; by default Ray's control service and this host's raylet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(_services() if addresses is None else addresses, patience)
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.death:
            raise UserError(watch.death) from None
        raise
    finally:
        watch.over.set()
        watch.join(INTERVAL + 1)


class _Watch(threading.Thread):
    """Knocks at all doors, and interrupts the main thread when one stays shut."""

    def __init__(self, addresses: Mapping[str, Address], patience: float) -> None:
        super().__init__(name="ray-vigil", daemon=True)
        self.over = threading.Event()
        self.death = ""
        self._addresses, self._patience = addresses, patience

    def run(self) -> None:
        since: dict[str, float] = {}
        while not self.over.wait(INTERVAL):
            shut = [name for name, address in self._addresses.items() if not _answers(address)]
            now = time.monotonic()
            since = {name: since.get(name, now) for name in shut}
            dead = [name for name in shut if now - since[name] >= self._patience_with(name)]
            if dead and not self.over.is_set():
                self.death = (
                    f"Ray has died: its {dead[0]} does not answer any more; what is finished is kept, and "
                    "the same command goes on from there (with --resume, where it has that)"
                )
                break
        if self.death:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            left = SILENT_END - self._patience_with(dead[0])
            threading.Thread(target=self._end_process, args=[min(UNWIND, left)], daemon=True).start()

    def _patience_with(self, name: str) -> float:
        """A driver whose raylet has gone is soon ended by Ray, without a word."""
        return self._patience if name == CONTROL else min(self._patience, PRIVATE)

    def _end_process(self, unwind: float) -> None:
        """End the process, unless the block has been left within so many seconds."""
        if not self.over.wait(unwind):
            logger.error("error: %s", self.death)  # as the command line says it
            os._exit(2)


def _answers(address: Address) -> bool:
    """Whether somebody listens there; a host that is too busy to answer in time is taken to be alive."""
    try:
        socket.create_connection(address, timeout=5).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def _services() -> dict[str, Address]:
    """What this driver's work depends on."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    services = {CONTROL: (host.strip("[]"), int(port))}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            services["raylet"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return services
