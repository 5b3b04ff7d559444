"""Readers that go wrong, for a process apart."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from tt_ray.data.limited import Arrays, allow_files


def environment(path: Path) -> Arrays:
    return {"names": np.array(sorted(os.environ))}


def add(path: Path, number: int) -> Arrays:
    print("a library says something")
    return {"bytes": np.frombuffer(path.read_bytes(), np.uint8) + number, "none": np.zeros((0, 3))}


def crash(path: Path) -> Arrays:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def spin(path: Path) -> Arrays:
    while True:
        pass


def wait(path: Path) -> Arrays:
    time.sleep(600)
    return {}


def fill_memory(path: Path) -> Arrays:
    return {"much": np.ones(1 << 40, np.uint8)}


def fill_disk(path: Path) -> Arrays:
    return {"much": np.broadcast_to(np.uint8(1), (1 << 40,))}


def outgrow(path: Path) -> Arrays:
    return {"much": np.broadcast_to(np.uint8(1), (1 << 28,))}


def objects(path: Path) -> Arrays:
    return {"objects": np.array([path], dtype=object)}


def leave(path: Path) -> Arrays:
    os._exit(0)


def open_another(path: Path) -> Arrays:
    allow_files(1)
    with path.open("rb"):
        opened: list[Any] = []
        for attempt in (lambda: os.open(os.devnull, os.O_RDONLY), socket.socket):
            try:
                opened.append(attempt())
            except OSError:
                continue
        return {"opened": np.array(len(opened))}
