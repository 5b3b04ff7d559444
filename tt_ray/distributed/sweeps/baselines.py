"""What stands beside a sweep's planners: a row for each baseline and each model, or data set, it depends on.

Twelve beam settings over one model share one row of greedy decoding. Baselines are played when the trials
have ended, each once in the stage store, and kept in the sweep's folder as a cell's record is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from tt_ray.config import BaselineName, ExperimentConfig, to_dict
from tt_ray.data.episodes import tenth
from tt_ray.distributed import cluster
from tt_ray.distributed.baselines import (
    OF_MODELS,
    TITLES,
    data_baselines,
    greedy,
    model_baselines,
    return_conditioned,
)
from tt_ray.distributed.line import Line, Progress
from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.distributed.sweeps.cells import Record, read_record
from tt_ray.distributed.sweeps.confirm import as_they_finish, failure, start, without_reservation
from tt_ray.distributed.sweeps.progress import TrialProgress
from tt_ray.distributed.sweeps.study import Study, data_key
from tt_ray.distributed.sweeps.table import ranking, trial_metrics, trials_frame
from tt_ray.fingerprints import critic_fingerprint, fingerprint
from tt_ray.sweep_file import Trial
from tt_ray.tracking import open_journal

MOST_MODELS = 6
"""Rows of one baseline and data set: of a larger search, only the models of the best trials have theirs."""


@dataclass
class Baseline:
    """One row: a baseline, and the trials that it stands beside, the best one first."""

    name: BaselineName
    key: str
    """Identity of its episodes."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds that it is played for; without a model, the first stands for all."""
        seeds = self.trials[0].config.seeds
        return seeds if self.name in OF_MODELS else seeds[:1]

    def folder(self, study: Study, seed: int) -> Path:
        """Where its record of a seed is kept."""
        return study.folder / "baselines" / f"{self.key}-{seed}"

    def records(self, study: Study) -> list[Record]:
        """What has been played of it: of all its seeds, or else nothing."""
        kept = [read_record(self.folder(study, seed)) for seed in self.seeds]
        return [record for record in kept if record is not None] if all(kept) else []


def baselines_of(study: Study, frame: pd.DataFrame) -> list[Baseline]:
    """The rows beside the table of trials: of the data for all trials, of models for finished ones."""
    by_fingerprint = {trial.fingerprint: trial for trial in study.trials}
    found: dict[str, Baseline] = {}
    rows: Counter[tuple[str, Any]] = Counter()
    for _, row in ranking(frame, study.sweep.search, by_case=False).iterrows():
        trial = by_fingerprint.get(row["fingerprint"])
        of_data = None if trial is None else study.fingerprint_of(trial.config)
        if trial is None or of_data is None:
            continue
        for name in TITLES:
            wanted = name in trial.config.evaluation.baselines
            if not wanted or (name != "data" and row["status"] != "finished"):
                continue
            key = fingerprint("baseline", name, _identity(study, trial.config, name))
            if key not in found:
                rows[name, of_data] += 1
                if rows[name, of_data] > MOST_MODELS:
                    continue
                found[key] = Baseline(name, key)
            found[key].trials.append(trial)
    kept = [baseline for baseline in found.values() if not _is_a_trial(baseline)]
    return sorted(kept, key=lambda one: (_place(study, one), list(TITLES).index(one.name)))


def play_missing(study: Study, board: Board, progress: Progress) -> None:
    """Play whatever of the baselines has not been kept; what fails is noted, and has no row."""
    jobs = jobs_of(study, board.frame())
    if not jobs:
        return
    capacity = without_reservation(share_out(study.sweep.base.resources, cluster.offer(), len(jobs)))

    def begin(job: Job) -> ray.ObjectRef:
        data = study.fingerprint_of(job.trial.config)
        names = [baseline.name for baseline in job.baselines]
        return start(play_baselines, capacity, study.folder, job.trial, job.record, data, capacity, names)

    with progress.stage("baselines", len(jobs)) as update:
        for done, (job, reference) in enumerate(as_they_finish(jobs, begin, capacity.concurrent), start=1):
            if board.cancelled():
                return
            try:
                job.keep(study, ray.get(reference))
            except ray.exceptions.RayError as error:
                names = ", ".join(baseline.name for baseline in job.baselines)
                beside = f"{job.trial.name}, seed {job.record.seed}"
                board.refused(f"no baseline {names} beside {beside}: {failure(error)}")
            update(done, "")


@dataclass
class Job:
    """Baselines that are played by one process, beside a cell."""

    trial: Trial
    record: Record
    baselines: list[Baseline] = field(default_factory=list)

    def keep(self, study: Study, played: Mapping[BaselineName, list[dict[str, Any]]]) -> None:
        """Write down what came of them."""
        for baseline in self.baselines:
            episodes = played.get(baseline.name, [])
            record = replace(Record.of(self.trial, self.record.seed), status="finished", episodes=episodes)
            record.save(baseline.folder(study, self.record.seed))


def jobs_of(study: Study, frame: pd.DataFrame) -> list[Job]:
    """What is still to play, together where it stands beside the same cell."""
    jobs: dict[tuple[str, int], Job] = {}
    for baseline in baselines_of(study, frame):
        trial = baseline.trials[0]
        for record in study.records(trial) if baseline.name != "data" else ():
            missing = read_record(baseline.folder(study, record.seed)) is None
            if record.seed in baseline.seeds and missing:
                job = jobs.setdefault((trial.fingerprint, record.seed), Job(trial, record))
                job.baselines.append(baseline)
    return list(jobs.values())


def play_baselines(
    folder: Path, trial: Trial, record: Record, data: str, capacity: Capacity, names: Sequence[BaselineName]
) -> dict[BaselineName, list[dict[str, Any]]]:
    """Episodes of baselines beside a finished cell; none of one that its data knows nothing of."""
    seed = record.seed
    line = Line(replace(trial.config, seeds=(seed,)), TrialProgress(folder, trial, seed))
    line.allocation = capacity.allocation
    line.locate(data)
    line.make_tokens()
    if "iql" in names:  # named in the file when the trial had been finished, its critic may still be missing
        line.train_critic(seed, open_journal(folder / "baselines" / f"critic-{line.critics[seed].name}"))
    rows = data_baselines(line, names) + model_baselines(line, Path(record.checkpoint), seed, names)
    by_title = {title: name for name, title in TITLES.items()}
    return {by_title[row.policy]: [result.to_json() for result in row.results] for row in rows}


def baseline_frame(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns of the trials' table, status `baseline`, and `baseline`, the name."""
    rows: list[dict[str, Any]] = []
    shown = [one for one in baselines_of(study, frame) if one.name == "data" or one.records(study)]
    labels = _labels(study, shown)
    for baseline, label in zip(shown, labels, strict=True):
        if baseline.name == "data":
            rows += _data_rows(study, baseline, label)
            continue
        records = [record for record in baseline.records(study) if record.episodes]
        if records:
            figures = trial_metrics(records, baseline.trials[0].config)
            counts = {"seeds": len(records), "episodes": sum(len(record.episodes) for record in records)}
            rows.append({**_row(baseline, label), **counts, **figures})
    return trials_frame([{"index": i, **row} for i, row in enumerate(rows)], study.sweep.search)


def _data_rows(study: Study, baseline: Baseline, label: str) -> list[dict[str, Any]]:
    facts = study.facts[data_key(baseline.trials[0].config)]
    values = {"": facts.mean, ", best tenth": facts.best_tenth}
    rows = []
    for i, (suffix, value) in enumerate(values.items()):
        figures = {"return/mean": value} | ({} if facts.scores is None else {"score/mean": facts.scores[i]})
        episodes = facts.episodes if not suffix else tenth(facts.episodes)
        rows.append({**_row(baseline, label + suffix), "seeds": 0, "episodes": episodes, **figures})
    return rows


def _row(baseline: Baseline, label: str) -> dict[str, Any]:
    return {
        "trial": label,
        "fingerprint": baseline.key,
        "case": "",
        "status": "baseline",
        "cause": "",
        "seconds": 0.0,
        "saved": 0.0,
        "reused": "",
        "baseline": baseline.name,
    }


def _identity(study: Study, config: ExperimentConfig, name: BaselineName) -> list[Any]:
    """What the episodes of a baseline depend on; of the data's own, the data alone."""
    data = study.fingerprint_of(config)
    assert data is not None
    if name == "data":
        return [data]
    evaluation = to_dict(config.evaluation)
    settings = ("episodes", "first_seed", "max_steps", "environment", "record")
    played = [data, *(evaluation[key] for key in settings)]
    if name not in OF_MODELS:
        return [*played, config.dataset.observation_dims, config.dataset.observation_keys]
    if name == "iql":
        return [*played, *(critic_fingerprint(config, data, seed) for seed in config.seeds)]
    planner = greedy(config.planner) if name == "greedy" else return_conditioned(config.planner)
    return [*played, *(study.model_key(config, seed) for seed in config.seeds), to_dict(planner)]


def _is_a_trial(baseline: Baseline) -> bool:
    """Whether a trial is what the baseline would be, so that its row would stand there twice."""
    makers = {"greedy": greedy, "return-conditioned": return_conditioned}
    make = makers.get(baseline.name)
    return make is not None and any(
        trial.config.planner == make(trial.config.planner) for trial in baseline.trials
    )


def _place(study: Study, baseline: Baseline) -> int:
    """Baselines of the same data stand together, in the order of the trials."""
    first = {study.fingerprint_of(trial.config): trial.index for trial in reversed(study.trials)}
    return first[study.fingerprint_of(baseline.trials[0].config)]


def _labels(study: Study, baselines: Sequence[Baseline]) -> list[str]:
    """Titles, with what tells them apart: the cases or data that they belong to, and searched settings."""
    alike: dict[str, list[Baseline]] = {}
    for baseline in baselines:
        alike.setdefault(baseline.name, []).append(baseline)
    labels = []
    for baseline in baselines:
        others = alike[baseline.name]
        settings = _distinguishing(baseline, others) if len(others) > 1 else {}
        prefix = _common_words([trial.case or "" for trial in baseline.trials]) if len(others) > 1 else ""
        words = [prefix, TITLES[baseline.name], study.sweep.name_of(settings, None) if settings else ""]
        if len(study.facts) > 1 and not prefix and "dataset.id" not in settings:
            words.append(baseline.trials[0].config.dataset.id)
        labels.append(", ".join(word for word in words if word))
    return labels


def _distinguishing(baseline: Baseline, others: Sequence[Baseline]) -> Mapping[str, Any]:
    """Searched settings that all trials of a baseline share, and that are not the same everywhere."""
    first = baseline.trials[0].settings
    mine = {
        key: value
        for key, value in first.items()
        if all(trial.settings[key] == value for trial in baseline.trials)
    }
    everywhere = [trial.settings for other in others for trial in other.trials]
    return {key: value for key, value in mine.items() if any(each[key] != value for each in everywhere)}


def _common_words(cases: Sequence[str]) -> str:
    """The parts before commas that the names of all cases begin with."""
    parts = [case.split(", ") for case in cases]
    common = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ", ".join(common)
