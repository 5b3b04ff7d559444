"""Honest winners: the best trial of each case plays again, on episode seeds that no trial was chosen by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from tt_ray.distributed import cluster
from tt_ray.distributed.line import Line, Progress
from tt_ray.distributed.scoring import score_planner
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.distributed.sweeps.cells import Record
from tt_ray.distributed.sweeps.progress import TrialProgress
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import winners
from tt_ray.distributed.sweeps.trial import POLICY, describe
from tt_ray.sweep_file import Trial

logger = logging.getLogger(__name__)

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
    capacity = share_out(study.sweep.base.resources, cluster.offer(), len(cells))
    confirmed: dict[str, list[Record]] = {trial.fingerprint: [] for trial in trials}
    with progress.stage("the winner on fresh seeds", len(cells)) as update:
        running = {_start(study, trial, record, capacity): (trial, record) for trial, record in cells}
        for done, reference in enumerate(_as_they_finish(list(running)), start=1):
            trial, record = running[reference]
            try:
                confirmed[trial.fingerprint].append(ray.get(reference))
            except ray.exceptions.RayError as error:
                cause = describe(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
                board.refused(f"{trial.name}, seed {record.seed}: no score on fresh seeds: {cause}")
            update(done, "")
    whole = [trial for trial in trials if len(confirmed[trial.fingerprint]) == len(study.records(trial))]
    return [(trial, sorted(confirmed[trial.fingerprint], key=lambda record: record.seed)) for trial in whole]


def _start(study: Study, trial: Trial, record: Record, capacity: Capacity) -> ray.ObjectRef:
    resources = {"num_cpus": capacity.bundle["CPU"], "num_gpus": capacity.bundle.get("GPU", 0)}
    task = ray.remote(play_fresh).options(**resources, scheduling_strategy="SPREAD")
    data = study.fingerprint_of(trial.config)
    return task.remote(study.folder, trial, record, data, capacity, study.sweep.search.confirm_episodes)


def play_fresh(
    folder: Path, trial: Trial, record: Record, data: str, capacity: Capacity, episodes: int
) -> Record:
    """The record of a cell as if it had been evaluated on fresh seeds; `episodes` 0: as many as before."""
    old = trial.config.evaluation
    evaluation = replace(old, first_seed=old.first_seed + FRESH, episodes=episodes or old.episodes)
    config = replace(trial.config, seeds=(record.seed,), evaluation=evaluation)
    line = Line(config, TrialProgress(folder, trial, record.seed))
    line.allocation = capacity.allocation
    line.locate(data)
    line.make_tokens()
    row = score_planner(line, Path(record.checkpoint), config.planner, POLICY, record.seed)
    return replace(record, episodes=[result.to_json() for result in row.results])


def _as_they_finish(references: Sequence[ray.ObjectRef]) -> Iterator[ray.ObjectRef]:
    waiting = list(references)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        yield from ready
