"""What a run asks of its machine, beside its curves: MLflow shows these on a tab of their own.

MLflow has a monitor too. It sends by itself, from each process and past the journal, and needs mlflow
imported there; this one only writes journals.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

from tt_ray.tracking.run import Run

logger = logging.getLogger(__name__)

FIRST = 2.0
"""Seconds until the first sample: what is over sooner has none."""
EVERY = 10.0
_CPU = "system/cpu_utilization_percentage"


@contextmanager
def system_metrics(run: Run, first: float = FIRST, every: float = EVERY) -> Iterator[None]:
    """Log this host's and this process's load to `run`, `every` so many seconds, for the duration of a block.

    The step counts the samples, also over several blocks. Trouble with it is no trouble of the run's.
    """
    over = threading.Event()

    def work() -> None:
        sample = Sampler()
        wait, step = first, None
        while not over.wait(wait):
            step = _samples(run) if step is None else step + 1
            run.log(sample(), step)
            wait = every

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # psutil on an odd system, or a journal that cannot be written
            logger.info("system metrics end here: %s", error)

    thread = threading.Thread(target=guarded, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Sampler:
    """Reads the counters; traffic counts from its making."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the next call tells of the time since this one
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()

    def __call__(self) -> dict[str, float]:
        """The figures now, under the names of MLflow's own monitor where it has them."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("."), psutil.net_io_counters()
        figures = {
            _CPU: psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
            "system/disk_available_megabytes": disk.free / 1e6,
        }
        if network is not None and self._network is not None:  # None on a host without any interface
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            figures["system/network_receive_megabytes"] = received / 1e6
            figures["system/network_transmit_megabytes"] = sent / 1e6
        return {name: round(value, 1) for name, value in (figures | _gpus()).items()}


def _gpus() -> dict[str, float]:
    """Memory of the GPUs that this process computes on; nothing before PyTorch uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    figures = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        figures[f"system/gpu_{number}_memory_usage_megabytes"] = (total - free) / 1e6
        figures[f"system/gpu_{number}_memory_usage_percentage"] = 100.0 * (total - free) / total
    return figures


def _samples(run: Run) -> int:
    """How many the run's journal has, of earlier blocks and processes."""
    return run.journal.count(_CPU)
