"""Honest winners: the best trial of each case plays again, on episode seeds that no trial was chosen by."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from tt_ray.distributed import cluster
from tt_ray.distributed.line import Line, Progress
from tt_ray.distributed.scoring import PLANNER, score_planner
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.distributed.sweeps.cells import Record, read_record
from tt_ray.distributed.sweeps.progress import TrialProgress
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import winners
from tt_ray.distributed.sweeps.trial import describe
from tt_ray.sweep_file import Trial

logger = logging.getLogger(__name__)

Cell = tuple[Trial, Record]
Thing = TypeVar("Thing")
FRESH = 1_000_000
"""How far the fresh seeds lie from evaluation.first_seed."""


def confirm_winners(study: Study, board: Board, progress: Progress) -> list[tuple[Trial, list[Record]]]:
    """Fresh episodes of every winner chosen among several trials, a record for each training seed."""
    frame = board.frame()
    rivals = frame["case"].value_counts()
    best = winners(frame, study.sweep.search)
    chosen = {row["fingerprint"] for _, row in best.iterrows() if rivals[row["case"]] > 1}
    trials = [trial for trial in study.trials if trial.fingerprint in chosen]
    cells = [(trial, record) for trial in trials for record in study.records(trial)]
    if not cells:
        return []
    capacity = without_reservation(share_out(study.sweep.base.resources, cluster.offer(), len(cells)))
    confirmed: dict[str, list[Record]] = {trial.fingerprint: [] for trial in trials}
    to_play = []
    for trial, record in cells:
        kept = read_record(_folder(study, trial, record.seed))
        fits = kept is not None and _request(study, trial, record) == (kept.data, kept.checkpoint)
        if kept is not None and fits and len(kept.episodes) == _count(study, trial):
            confirmed[trial.fingerprint].append(kept.renamed(trial))
        else:
            to_play.append((trial, record))
    with progress.stage("the winner on fresh seeds", len(cells)) as update:
        finished = as_they_finish(to_play, lambda cell: _start(study, *cell, capacity), capacity.concurrent)
        for (trial, record), reference in finished:
            if board.cancelled():
                return []
            try:
                fresh = ray.get(reference)
                fresh.save(_folder(study, trial, record.seed))
                confirmed[trial.fingerprint].append(fresh)
            except ray.exceptions.RayError as error:
                board.refused(f"{trial.name}, seed {record.seed}: no score on fresh seeds: {failure(error)}")
            update(sum(map(len, confirmed.values())), "")
        update(len(cells), "")
    whole = [trial for trial in trials if len(confirmed[trial.fingerprint]) == len(study.records(trial))]
    return [(trial, sorted(confirmed[trial.fingerprint], key=lambda record: record.seed)) for trial in whole]


def without_reservation(capacity: Capacity) -> Capacity:
    """For a task, which Ray gives no placement group: while its actors play, its process needs no CPU."""
    if not capacity.allocation.reserved:
        return capacity
    return replace(capacity, allocation=replace(capacity.allocation, reserved=False), bundle={})


def _folder(study: Study, trial: Trial, seed: int) -> Path:
    return study.folder / "confirmed" / f"{trial.fingerprint}-{seed}"


def _request(study: Study, trial: Trial, record: Record) -> tuple[str, str]:
    """What a kept record must have come from: the data, and the checkpoint that the cell has now."""
    return study.fingerprint_of(trial.config) or "", record.checkpoint


def _count(study: Study, trial: Trial) -> int:
    return study.sweep.search.confirm_episodes or trial.config.evaluation.episodes


def _start(study: Study, trial: Trial, record: Record, capacity: Capacity) -> ray.ObjectRef:
    data, count = study.fingerprint_of(trial.config), _count(study, trial)
    return start(play_fresh, capacity, study.folder, trial, record, data, capacity, count)


def start(function: Callable[..., Any], capacity: Capacity, *arguments: Any) -> ray.ObjectRef:
    """Call `function(*arguments)` as a task, anywhere, with the resources of one trial."""
    resources = {"num_cpus": capacity.bundle.get("CPU", 0), "num_gpus": capacity.bundle.get("GPU", 0)}
    task = ray.remote(function).options(**resources, scheduling_strategy="SPREAD")
    return task.remote(*arguments)


def failure(error: ray.exceptions.RayError) -> str:
    """Why a task has failed, in one line."""
    return describe(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)


def play_fresh(
    folder: Path, trial: Trial, record: Record, data: str, capacity: Capacity, episodes: int
) -> Record:
    """The record of a cell as if it had been evaluated on so many fresh seeds."""
    old = trial.config.evaluation
    evaluation = replace(old, first_seed=old.first_seed + FRESH, episodes=episodes)
    config = replace(trial.config, seeds=(record.seed,), evaluation=evaluation)
    line = Line(config, TrialProgress(folder, trial, record.seed))
    line.allocation = capacity.allocation
    line.locate(data)
    line.make_tokens()
    row = score_planner(line, Path(record.checkpoint), config.planner, PLANNER, record.seed)
    return replace(record, episodes=[result.to_json() for result in row.results])


def as_they_finish(
    things: Sequence[Thing], begin: Callable[[Thing], ray.ObjectRef], at_once: int
) -> Iterator[tuple[Thing, ray.ObjectRef]]:
    """Each thing when its task is over, so many tasks at once: those that wait must leave room for actors."""
    waiting, running = deque(things), dict[ray.ObjectRef, Thing]()
    while waiting or running:
        while waiting and len(running) < at_once:
            thing = waiting.popleft()
            running[begin(thing)] = thing
        (reference, *_), _ = ray.wait(list(running))
        yield running.pop(reference), reference
