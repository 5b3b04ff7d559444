"""Starting Ray on a busy machine, where Ray's own limits of 15 and 30 seconds are too short.

Ray 2.60 gives up when a raylet has not registered within 30 seconds, and no setting changes that. The raylet
in turn dies when its helpers have not said within 15 seconds which ports they have found, unless it is told
which they are to use.
"""

from __future__ import annotations

import inspect
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import services

PORTS = range(20_000, 32_000)
"""Where helpers listen: below those that systems give out, above those of Ray's workers."""
LISTEN = "dashboard_agent_listen_port"
_HELPERS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", LISTEN)


@contextmanager
def patiently(seconds: float = 120.0) -> Iterator[None]:
    """A Ray that this process starts in this block has so long."""
    ask, start, deadline = services.get_node, services.start_raylet, time.monotonic() + seconds

    def get_node(*arguments: Any, **options: Any) -> Any:
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:  # it has not registered yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def start_raylet(*arguments: Any, **options: Any) -> Any:
        given = inspect.signature(start).bind(*arguments, **options)
        free = dict(zip(_HELPERS, _free_ports(len(_HELPERS)), strict=True))
        given.arguments |= {name: given.arguments.get(name) or port for name, port in free.items()}
        _write_port(given.arguments)
        return start(*given.args, **given.kwargs)

    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(int(seconds)))
    services.get_node, services.start_raylet = get_node, start_raylet
    try:
        yield
    finally:
        services.get_node, services.start_raylet = ask, start


def _write_port(given: dict[str, Any]) -> None:
    """The file that the dashboard's agent writes when it is up: the raylet waits for it all the same."""
    from ray._raylet import (  # type: ignore[attr-defined]
        DASHBOARD_AGENT_LISTEN_PORT_NAME,
        persist_port,
    )

    persist_port(given["session_dir"], given["node_id"], DASHBOARD_AGENT_LISTEN_PORT_NAME, given[LISTEN])


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found
