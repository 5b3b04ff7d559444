"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before anything can start Ray, here or in a subprocess of a test.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# Before torch is imported: tiny models gain nothing from threads, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# A shell's background job ignores Ctrl-C, and so would the commands that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One private two-CPU Ray for every test of the session that asks for it."""
    import ray

    from tt_ray.distributed.cluster import on_loopback
    from tt_ray.distributed.patience import patiently

    with on_loopback(), patiently():
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=200_000_000,
        )
    yield
    ray.shutdown()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that native code is kept in, empty, and nothing of it loaded."""
    from tt_ray.model.native import build

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library.cache_clear()
    yield tmp_path / "tt-ray"
    build.load_library.cache_clear()
