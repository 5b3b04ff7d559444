"""Pictures of a sweep's winners: their training, their returns beside the data's, their films."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from tt_ray.distributed import cluster
from tt_ray.distributed.baselines import data_rows
from tt_ray.distributed.evaluate import Row
from tt_ray.distributed.line import Line, Progress
from tt_ray.distributed.pictures import FIGURES, film, paths_picture, returns_picture, training_picture
from tt_ray.distributed.scoring import PLANNER, make_row
from tt_ray.distributed.sweeps.capacity import share_out
from tt_ray.distributed.sweeps.cells import Record
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import winners
from tt_ray.search import safe_name
from tt_ray.sweep_file import Trial

Confirmed = Sequence[tuple[Trial, list[Record]]]


def winner_pictures(
    study: Study, frame: pd.DataFrame, confirmed: Confirmed, progress: Progress
) -> Iterator[Path]:
    """Draw the pictures of every case's winner, and give them as they are made."""
    by_fingerprint = {trial.fingerprint: trial for trial in study.trials}
    fresh = {trial.fingerprint: records for trial, records in confirmed}
    allocation = share_out(study.sweep.base.resources, cluster.offer(), 1).allocation
    for _, row in winners(frame, study.sweep.search).iterrows():
        trial = by_fingerprint[row["fingerprint"]]
        # A model that has been removed from the store since takes its pictures along.
        records = [record for record in study.records(trial) if record.has_model]
        data = study.fingerprint_of(trial.config)
        if not records or data is None:
            continue
        line = Line(replace(trial.config, seeds=(records[0].seed,)), progress)
        line.allocation = allocation
        line.locate(data)
        line.make_tokens()
        case = f"{safe_name(trial.case)}-" if trial.case else ""
        yield from _of_winner(line, records, fresh.get(trial.fingerprint, []), study.folder / FIGURES, case)


def _of_winner(
    line: Line, records: Sequence[Record], fresh: Sequence[Record], folder: Path, case: str
) -> Iterator[Path]:
    first, name = records[0], f"{line.config.name}, {records[0].name}"
    checkpoint = Path(first.checkpoint)
    yield from training_picture(
        checkpoint.parent.parent, folder / f"{case}training.png", f"{name}, seed {first.seed}"
    )
    if not any(record.episodes for record in records):
        return
    rows = [_row(line, PLANNER, records)]
    rows += [_row(line, f"{PLANNER}, fresh seeds", fresh)] if fresh else []
    yield returns_picture(line, [*rows, *data_rows(line)[:1]], folder / f"{case}returns.png")
    yield from film(line, checkpoint, first.seed, first.results, folder, f"{case}episode")
    results = [result for record in records for result in record.results]
    yield from paths_picture(line, results, folder / f"{case}paths.png")


def _row(line: Line, label: str, records: Sequence[Record]) -> Row:
    """The episodes of all training seeds in one row."""
    return make_row(line, label, None, [result for record in records for result in record.results])
