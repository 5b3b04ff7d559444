"""What MLflow's UI shows of a sweep at first sight: descriptions, the mark on the best trial, its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from tt_ray.distributed.scoring import checkpoint_identity
from tt_ray.distributed.sweeps.baselines import baseline_frame
from tt_ray.distributed.sweeps.cells import Record, cell_folder, cell_name
from tt_ray.distributed.sweeps.report import interval_of, table_lines
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import CONFIRMED, ranking, winners
from tt_ray.search import interval_names
from tt_ray.sweep_file import Trial
from tt_ray.texts import interval_text, number_text
from tt_ray.tracking import Champion, Courier, Journal, MlflowStore, Run, register, show_runs
from tt_ray.tracking.connection import one_line
from tt_ray.tracking.mlflow_store import MAX_TAG_LENGTH

logger = logging.getLogger(__name__)


def sweep_note(study: Study, frame: pd.DataFrame, figures: Sequence[Path], run_id: str | None) -> str:
    """The parent's description: the question, the answer, as many trials as a tag can hold, the figures."""
    baselines = table_lines(study, baseline_frame(study, frame), brief=True)[2:]
    search, base = study.sweep.search, study.sweep.base
    head = [f"**{base.question}**"] if base.question else []
    head += [_answer(row, search.metric.name) for _, row in winners(frame, search).iterrows()]
    foot = ["\n".join(f"- data set {facts}" for facts in study.facts.values())]
    foot += [_picture(path.stem, run_id) for path in figures if run_id is not None]
    foot += ["All of it: `results.md`, `trials.parquet` and `figures/` among the artifacts."]
    around = sum(len(part) + 2 for part in [*head, *foot])
    trials = table_lines(study, ranking(frame, search), brief=True)
    table = _as_fits(trials, baselines, MAX_TAG_LENGTH - around)
    return "\n\n".join(part for part in [*head, table, *foot] if part)[:MAX_TAG_LENGTH]


def _answer(row: pd.Series, metric: str) -> str:
    """The winner of a case, in a sentence."""
    case = f" of {row['case']}" if row["case"] else ""
    value = f"{number_text(row[metric])} {interval_of(row, metric)}".strip()
    fresh = interval_text(*(row[name] for name in CONFIRMED))
    again = f"; on fresh seeds {fresh}" if fresh else ""
    return f"Best{case}: **{row['trial']}**, {metric} {value}{again}."


def _as_fits(lines: Sequence[str], last: Sequence[str], room: int) -> str:
    """The table's lines as far as there is room for them and the last ones, and how many are left out."""
    table = "\n".join([*lines, *last])
    if len(table) <= room:
        return table
    shown = list(lines)
    while len(shown) > 2:
        shown.pop()
        left = f"\n\n{len(lines) - len(shown)} more trials are in `results.md`: a description is short."
        if len(table := "\n".join([*shown, *last]) + left) <= room:
            return table
    return "The table is in `results.md`: it does not fit in a description."


def _picture(name: str, run_id: str | None) -> str:
    # MLflow shows a picture in its own size: an SVG file's fits the page.
    return f"![{name}](get-artifact?path={quote(f'figures/{name}.svg', safe='')}&run_uuid={run_id})"


def mark_best(study: Study, frame: pd.DataFrame, courier: Courier, parent: str) -> None:
    """Star and tag the cells of the winners, and take both from those that were before this launch."""
    chosen = set(winners(frame, study.sweep.search)["fingerprint"])
    for trial in study.trials:
        best = trial.fingerprint in chosen
        for record in study.records(trial):
            if record.ended and record.best != best:
                _mark(study, trial, record, best)
                courier.add(
                    cell_name(trial, record.seed), cell_folder(study.folder, trial, record.seed), parent
                )


def _mark(study: Study, trial: Trial, record: Record, best: bool) -> None:
    folder = cell_folder(study.folder, trial, record.seed)
    run = Run(None, Journal(folder))
    run.set_tags({"best": "yes" if best else "", "mlflow.runName": cell_name(trial, record.seed, best)})
    if best and not record.trained and record.has_model:
        run.artifact(record.checkpoint, "checkpoint")  # of the trial that trained it; a winner has its own
    record.best = best
    record.save(folder)


def present(study: Study, frame: pd.DataFrame, store: MlflowStore) -> None:
    """Register the winners' models and prepare the experiment's page; trouble is a warning.

    Everything has been sent by now. What MLflow refuses is done by the next launch: nothing is done twice.
    """
    search, records = study.sweep.search, {t.fingerprint: study.records(t) for t in study.trials}
    try:
        for _, row in winners(frame, search).iterrows():
            played = [record for record in records[row["fingerprint"]] if record.has_model]
            if played:
                register(store, _champion(study, row, _best_seed(study, played)))
        name = search.metric.name
        metrics = dict.fromkeys((name, *(interval_names(name) or ()), "return/mean"))
        columns = [f"metrics.`{name}`" for name in metrics]
        columns += [f"params.`{key}`" for key in search.parameters] + ["tags.`best`"]
        ascending = search.metric.goal == "minimize"
        show_runs(store, study.sweep.base.question, columns, name, ascending, study.folder)
    except Exception as error:  # whatever MLflow's client raises
        logger.warning("the best model is not registered in MLflow (%s); --resume does it", one_line(error))


def _best_seed(study: Study, records: Sequence[Record]) -> Record:
    """Of the winner's training seeds, the one that did best in the trial's own episodes."""
    metric = study.sweep.search.metric
    sign = 1.0 if metric.goal == "minimize" else -1.0
    return min(records, key=lambda record: sign * record.metrics.get(metric.name, sign * float("inf")))


def _champion(study: Study, row: pd.Series, record: Record) -> Champion:
    base, metric = study.sweep.base, study.sweep.search.metric.name
    trial = next(trial for trial in study.trials if trial.fingerprint == record.trial)
    tags: Mapping[str, str] = {
        "trial": record.trial,
        "trial.name": record.name,
        "seed": str(record.seed),
        "sweep": base.name,
        metric: number_text(row[metric]),
        "stage.model": Path(record.checkpoint).parent.parent.name,
        "checkpoint.fingerprint": checkpoint_identity(Path(record.checkpoint)),
    }
    return Champion(
        model=f"{base.name} {row['case']}".strip(),
        folder=cell_folder(study.folder, trial, record.seed),
        tags=tags,
        description=f"{base.question}\n\n{_answer(row, metric)}".strip(),
    )
