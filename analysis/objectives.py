"""Objectives side by side on the same episodes: python analysis/objectives.py SWEEP [--against N]

A table for each data set of the sweep, whose trials play in the same environment from the same starts: returns,
their share of what the data returns, and the differences from one of the trials.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from compare_runs import Side, differences
from published import Group, read_published, task_name
from study import (
    Study,
    interval_text,
    load_study,
    markdown_table,
    run_script,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.data.d4rl_names import resolve_id
from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import number_text, open_figure, say_nothing, tidy
from tt_ray.evaluation.figures import COLORS
from tt_ray.evaluation.scores import aggregate_interval

TRIAL, DATA, PUBLISHED = "trial", "data", "published"
GREEDY = "greedy decoding"
SIZES = ("planner.beam_width", "planner.n_expand", "planner.k_act")
FACTS = re.compile(r"- data set (\S+): (\d+) episodes, mean return (\S+)(?: \(score (\S+)\))?,")
"""A line of a sweep's results.md, which `DataFacts` writes."""
METHODS = """\
Intervals are 95 % bootstraps: of a return over episodes, resampled within each training seed; of a difference over
pairs of episodes that began alike, each a mean over training seeds. They say how sure the episodes make us of these
models; s.e. is the standard error of the difference over training seeds, which says what other models might have
done. Rewarded: per cent of the episodes with any reward at all, where every return is a count."""


@dataclass(frozen=True)
class Facts:
    """What a sweep says of a data set."""

    episodes: int
    mean_return: float
    score: float
    """NaN where the data set has no reference scores."""


def data_facts(study: Study) -> dict[str, Facts]:
    """The sweep's data sets by id, as its results.md has them; empty where it has none yet."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = MlflowClient().download_artifacts(study.run_id, "results.md", folder)
            text = Path(path).read_text(encoding="utf-8")
        except (MlflowException, OSError):
            return {}
    found = FACTS.findall(text)
    return {name: Facts(int(count), float(mean), float(score or "nan")) for name, count, mean, score in found}


def compared(study: Study, against: int | None = None) -> pd.DataFrame:
    """A row for each finished trial, each data set's own mean, and each figure published for its task.

    Columns: task (data set), kind, trial, index, objective, episodes, return, low, high, score, of_data and
    rewarded (per cent), first (whether the others of its task are compared with it), pairs, difference,
    difference_low, difference_high, seed_error; what a row does not have is NaN.

    Raises:
        UserError: no trial has finished, or none of them has the number `against`.
    """
    trials = study.trials[study.trials["status"].eq("finished")]
    if trials.empty:
        raise UserError(f"sweep {study.name!r} has no finished trials to compare")
    if against is not None and against not in set(trials["index"]):
        raise UserError(f"--against {against}: sweep {study.name!r} has no finished trial of that number")
    settings = settings_of(study)
    data = [settings.get(trial, {}).get("dataset.id") or "" for trial in trials["fingerprint"]]
    facts, groups, rows = data_facts(study), read_published(), list[dict[str, Any]]()
    for name, mine in trials.groupby(pd.Series(data, trials.index), sort=False):
        known = facts.get(resolve_id(str(name)))
        task = task_name(str(name), groups)
        label = str(name) or study.name
        own = _trial_rows(study, mine, settings, against)
        rows += [{"task": label, **row} for row in [*own, *_data_row(known), *_published_rows(task, groups)]]
        mean = math.nan if known is None else known.mean_return
        for row in rows[len(rows) - len(own) :] if False else own:
            row["of_data"] = 100 * row["return"] / mean if mean > 0 else math.nan
    return pd.DataFrame(rows)
