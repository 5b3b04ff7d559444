"""What a sweep costs beside its stages: many trials with next to nothing to compute."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil  # type: ignore[import-untyped]

from tt_ray.config import ResourcesConfig
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.distributed.cluster import connect, offer
from tt_ray.distributed.following import Update
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.cells import read_record
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.driver import run_sweep
from tt_ray.distributed.sweeps.study import Study
from tt_ray.errors import UserError
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.search import Range, SearchConfig
from tt_ray.sweep_file import Sweep
from tt_ray.tracking import MlflowTracker, read
from tt_ray.tracking import connect as connect_mlflow

MARKS = (25, 50, 100)
"""Percent of the trials at which memory is looked at."""
_DATASET = "bench/pendulum-v0"
_EXPERIMENT = {
    "name": "sweep bench",
    "dataset": {"id": _DATASET},
    "discretizer": {"num_bins": 10},
    "model": {"num_layers": 1, "num_heads": 1, "embed_dim": 16, "context_transitions": 2},
    "training": {
        "steps": 10,
        "batch_size": 4,
        "warmup_steps": 1,
        "log_every": 1,
        "validate_every": 5,
        "validation_windows": 4,
    },
    "planner": {"horizon": 1, "beam_width": 1, "max_context_transitions": 1},
    "evaluation": {"episodes": 1, "max_steps": 2, "bootstrap_samples": 100},
}


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """One measurement of a sweep, in seconds and bytes."""

    trials: int
    at_once: int
    first_seconds: float
    """From the start of Ray Tune until the first trial has ended: mostly starting processes."""
    trial_seconds: float
    """Wall time for each trial. This and the figures below are from 25 % of the trials on."""
    stage_seconds: float
    """Mean time that a trial's stages took by themselves."""
    overhead_seconds: float
    """Of a slot's wall time, what did not go into stages; there are `at_once` slots."""
    overhead_in_trial: float
    """Of this, between the first line of the trial's journal and its status: records, journals, claims."""
    overhead_around_trial: float
    """The rest: Ray Tune, and processes that wait for a CPU."""
    driver_cpu: float
    """CPU time of the driver for each trial."""
    driver_cpu_table: float
    """Of this, in keeping the table of trials."""
    driver_cpu_tuning: float
    """Of this, in the rest of the main thread: Ray Tune."""
    driver_cpu_mlflow: float
    """Of this, in the threads that send to MLflow."""
    trial_cpu: float
    """CPU time of the trials' processes for each trial, stages included."""
    ray_cpu: float
    """CPU time of the rest of Ray for each trial."""
    processes: int
    """Of Ray's Python processes, seen at one of MARKS; fewer than trials, as they are used again."""
    driver_rss_25: int
    """When 25 % of the trials had ended."""
    driver_rss_50: int
    driver_rss_100: int
    mlflow_points: int
    """Metric points of all trials, the stages' curves included."""
    end_seconds: float
    """From the last trial's end: the winner's fresh episodes, figures, and what MLflow still has to get."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)


def measure_sweep(trials: int = 200, at_once: int = 2) -> SweepReport:
    """Run a random search over a setting of the planner, with one model and episodes of two steps.

    On the Ray of `cluster.connect`, with MLflow in an SQLite file that is removed afterwards. `UserError`
    where Ray has a second host, since its processes are looked at from here.
    """
    if trials < 4:
        raise UserError("measuring a sweep needs at least 4 trials")
    with tempfile.TemporaryDirectory(prefix="tt-ray-sweep-") as temporary, _own_places(Path(temporary)):
        _write_data()
        sweep = _sweep(Path(temporary) / "runs", trials, at_once)
        study = check_sweep(sweep, Flags())
        tracker = MlflowTracker(connect_mlflow(f"sqlite:///{temporary}/mlflow.db"), sweep.base.name)
        with connect(ResourcesConfig()):
            if offer().hosts > 1:
                raise UserError("a sweep is measured on one host: unset RAY_ADDRESS, and Ray is started here")
            watcher = _Watcher(trials)
            run_sweep(study, tracker, Flags(), _Silent(), watcher.watch)
            return watcher.report(study, at_once)


@contextmanager
def _own_places(folder: Path) -> Iterator[None]:
    """Data and MLflow in a folder of ours, in this process and those that it starts."""
    before = dict(os.environ)
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "data")
    try:
        yield
    finally:
        os.environ.clear()  # also of what connecting to MLflow has set
        os.environ.update(before)


def _write_data(episodes: int = 8, length: int = 8) -> None:
    """Pendulum's spaces with arbitrary numbers."""
    random = np.random.default_rng(0)

    def episode() -> RecordedEpisode:
        return RecordedEpisode(
            observations=random.normal(size=(length + 1, 3)).astype(np.float32),
            actions=random.uniform(-2, 2, (length, 1)).astype(np.float32),
            rewards=random.normal(size=length).astype(np.float32),
            terminations=np.zeros(length, bool),
            truncations=np.arange(length) == length - 1,
            behavior_policy="arbitrary numbers",
        )

    write_dataset(
        _DATASET,
        (episode() for _ in range(episodes)),
        environment="Pendulum-v1",
        observation_space=gym.spaces.Box(-8, 8, (3,), np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
        ref_min_score=-500.0,
        ref_max_score=0.0,
    )


def _sweep(storage: Path, trials: int, at_once: int) -> Sweep:
    base = experiment_from_dict({**_EXPERIMENT, "resources": {"storage": str(storage)}})
    search = SearchConfig(
        parameters={"planner.cdf_act": Range(min=0.0, max=0.9)},
        method="random",
        num_trials=trials,
        max_concurrent_trials=at_once,
    )
    return Sweep(base=base, search=search)


class _Watcher:
    """Sees the trials begin and end, and looks at the processes on the way."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._marks = {-(-percent * trials // 100): percent for percent in MARKS}
        self._began = self._first = 0.0
        self._ended, self._events = 0, 0.0
        self._looks: dict[int, _Look] = {}

    @contextmanager
    def watch(self, board: Board) -> Iterator[None]:
        """As `run_sweep` wants it."""
        started, ended = board.started, board.ended
        self._began = time.monotonic()
        board.started = self._timed(started)  # type: ignore[method-assign]
        board.ended = self._timed(ended, self._one_more)  # type: ignore[method-assign]
        yield

    def report(self, study: Study, at_once: int) -> SweepReport:
        """What was seen."""
        cells = sorted(
            (_Cell.read(folder) for folder in (study.folder / "cells").iterdir()), key=attrgetter("ended")
        )
        first, last = self._looks[MARKS[0]], self._looks[MARKS[-1]]
        later = cells[-(self._trials - next(iter(self._marks))) :]
        each = (last.time - first.time) / len(later)
        inside, stages = (
            float(np.mean([getattr(cell, name) for cell in later])) for name in ("inside", "stages")
        )
        driver = {name: (cpu - first.driver[name]) / len(later) for name, cpu in last.driver.items()}
        table = (last.events - first.events) / len(later)
        used = {
            pid: (last.below[pid] - first.below[pid]) / len(later) for pid in first.below.keys() & last.below
        }
        workers = set[int]().union(*(look.workers for look in self._looks.values()))
        return SweepReport(
            trials=len(cells),
            at_once=at_once,
            first_seconds=self._first - self._began,
            trial_seconds=each,
            stage_seconds=stages,
            overhead_seconds=at_once * each - stages,
            overhead_in_trial=inside - stages,
            overhead_around_trial=at_once * each - inside,
            driver_cpu=driver["all"],
            driver_cpu_table=table,
            driver_cpu_tuning=driver["main"] - table,
            driver_cpu_mlflow=driver["mlflow"],
            trial_cpu=sum(cpu for pid, cpu in used.items() if pid in workers),
            ray_cpu=sum(cpu for pid, cpu in used.items() if pid not in workers),
            processes=len(workers),
            mlflow_points=sum(cell.points for cell in cells),
            end_seconds=time.monotonic() - last.time,
            **{f"driver_rss_{percent}": look.rss for percent, look in self._looks.items()},
        )

    def _timed(self, event: Callable[..., None], then: Callable[[], None] | None = None) -> Any:
        def told(*arguments: Any) -> None:
            before = time.thread_time()
            event(*arguments)
            self._events += time.thread_time() - before
            if then is not None:
                then()

        return told

    def _one_more(self) -> None:
        self._ended += 1
        self._first = self._first or time.monotonic()
        if self._ended in self._marks:
            self._looks[self._marks[self._ended]] = _Look.now(self._events)


@dataclass(frozen=True)
class _Cell:
    """A trial's times in seconds, as it has left them."""

    began: float
    ended: float
    stages: float
    points: int
    """In its journal."""

    @property
    def inside(self) -> float:
        """Between the first line of its journal and its last status."""
        return self.ended - self.began

    @classmethod
    def read(cls, folder: Path) -> _Cell:
        """The cell in a folder."""
        lines = [line for line, _ in read(folder / "journal.jsonl")]
        record = read_record(folder)
        assert record is not None
        points = sum(len(line.get("metrics", ())) for line in lines)
        ended = max(line["time"] for line in lines if "status" in line)  # marks of the best come after it
        return cls(lines[0]["time"] / 1000, ended / 1000, sum(record.seconds.values()), points)


@dataclass(frozen=True)
class _Look:
    """Clocks and memory at one moment; CPU time in seconds."""

    time: float
    rss: int
    events: float
    """In keeping the table of trials, so far."""
    driver: dict[str, float]
    """This process: all, its main thread, the threads that send to MLflow."""
    below: dict[int, float]
    """Each process below this one: all of Ray on this host."""
    workers: set[int]
    """Of these, Ray's Python processes."""

    @classmethod
    def now(cls, events: float) -> _Look:
        """What there is to see, of this process and those below it."""
        driver, below, workers = psutil.Process(), dict[int, float](), set[int]()
        for process in driver.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                below[process.pid] = sum(process.cpu_times()[:2])
                if "".join(process.cmdline()).startswith("ray::"):
                    workers.add(process.pid)
        rss, now = driver.memory_info().rss, time.monotonic()
        return cls(now, rss, events, _thread_times(driver), below, workers)


def _thread_times(process: psutil.Process) -> dict[str, float]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    times = {"all": 0.0, "main": 0.0, "mlflow": 0.0}
    for thread in process.threads():
        used, name = thread.user_time + thread.system_time, names.get(thread.id, "")
        times["all"] += used
        times["main"] += used * (name == threading.main_thread().name)
        times["mlflow"] += used * name.startswith("tracking-")
    return times


class _Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """Nothing."""
        yield lambda done, message: None

    def note(self, message: str) -> None:
        """Nothing."""
