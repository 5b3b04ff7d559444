"""A block is left soon after what it depends on has died, and not before."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tt_ray.distributed import vigil
from tt_ray.distributed.vigil import while_ray_lives
from tt_ray.errors import UserError


@pytest.fixture
def service() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_block_ends_when_a_service_dies(service: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        addresses = {"control service": other.getsockname(), "raylet": service.getsockname()}
        died = pytest.raises(UserError, match=r"^Ray has died: its raylet does not answer any more; ")
        with died, while_ray_lives(0.1, addresses):
            service.close()
            time.sleep(60)


def test_a_process_that_has_left_its_block_goes_on() -> None:
    code = """
import time
from tt_ray.distributed import vigil
from tt_ray.errors import UserError
vigil.UNWIND = 0.2
try:
    with vigil.while_ray_lives(0.1, {"raylet": ("127.0.0.1", 1)}):
        time.sleep(60)
except UserError:
    time.sleep(1)
print("goes on")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "goes on\n")


def test_a_living_service_is_left_alone(service: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "INTERVAL", 0.01)
    with while_ray_lives(0.02, {"raylet": service.getsockname()}):
        for _ in range(5):
            service.accept()[0].close()
    with pytest.raises(KeyboardInterrupt), while_ray_lives(0.02, {"raylet": service.getsockname()}):
        raise KeyboardInterrupt
    assert "ray-vigil" not in {thread.name for thread in threading.enumerate()}


def test_a_service_may_come_back_in_time(service: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "INTERVAL", 0.01)
    address = service.getsockname()
    with while_ray_lives(30.0, {vigil.CONTROL: address}):
        service.close()
        time.sleep(0.1)
        with socket.create_server(address) as again:
            again.accept()[0].close()


def test_a_block_that_does_not_react_ends_with_its_process() -> None:
    """It waits inside a library that does not listen to signals."""
    code = """
import signal, time
from tt_ray.distributed import vigil
vigil.UNWIND = 0.2
with vigil.while_ray_lives(0.1, {"raylet": ("127.0.0.1", 1)}):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: Ray has died: its raylet does not answer")
    assert result.stderr.count("\n") == 1


def test_on_a_cluster_the_raylet_does_not_come_back_but_its_head_may(service: socket.socket) -> None:
    gone = ("127.0.0.1", 1)
    with (
        pytest.raises(UserError, match=r"^Ray has died: its raylet does"),
        while_ray_lives(3600.0, {vigil.CONTROL: gone, "raylet": gone}),
    ):
        time.sleep(600)
