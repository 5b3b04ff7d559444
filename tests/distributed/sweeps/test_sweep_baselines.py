"""The rows beside a sweep's planners: which there are, whose they are, and that each is played once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from study_tools import ALONE, RATES, board_of, launch, make_sweep, played

from tt_ray.distributed.sweeps import baselines
from tt_ray.distributed.sweeps.baselines import baseline_frame, jobs_of, play_baselines
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.report import write_tables
from tt_ray.distributed.sweeps.study import Study
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.sweep_file import Sweep

CRITIC = {"steps": 6, "batch_size": 8, "hidden": [8], "log_every": 2, "checkpoint_every": 3}
GREEDY = {"horizon": 1, "beam_width": 1, "n_expand": 1, "k_act": 1, "cdf_act": None}


def ended(sweep: Sweep) -> tuple[Study, pd.DataFrame]:
    """A sweep run to its end with its baselines, in this process; its study and its rows."""
    launch(sweep, Flags(resume=True))
    study = check_sweep(sweep, Flags(resume=True))
    frame = board_of(study).frame()
    for job in jobs_of(study, frame):
        names = [baseline.name for baseline in job.baselines]
        data = study.fingerprint_of(job.trial.config)
        assert data is not None
        job.keep(study, play_baselines(study.folder, job.trial, job.record, data, ALONE, names))
    assert jobs_of(study, frame) == []
    return study, baseline_frame(study, frame)


def asking(folder: Path, *names: str, search: Any = None, **sections: Any) -> Sweep:
    evaluation = {"baselines": list(names)} if names else {}
    search = {"parameters": {"planner.horizon": {"values": [1, 2, 3]}}} if search is None else search
    return make_sweep(folder, search, evaluation=evaluation, **sections)


def test_beam_settings_over_one_model_share_their_baselines(tmp_path: Path) -> None:
    study, rows = ended(asking(tmp_path))
    assert list(rows["trial"]) == ["data set", "data set, best tenth", "greedy decoding"]
    assert set(rows["status"]) == {"baseline"}
    evaluations = played(study.storage)
    assert set(evaluations.values()) == {1}
    assert len({key for key, _ in evaluations}) == 3 + 1  # of the horizons, and of greedy decoding
    (greedy,) = rows[rows["baseline"] == "greedy"].to_dict("records")
    assert (greedy["seeds"], greedy["episodes"]) == (1, 4)
    assert greedy["score/ci_low"] <= greedy["score/mean"] <= greedy["score/ci_high"]
    (facts,) = study.facts.values()
    assert list(rows["return/mean"][:2]) == [facts.mean, facts.best_tenth]
    assert facts.best_tenth < facts.best
    text = write_tables(study, board_of(study).frame())[-1].read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[-3:]] == [f"| {label}" for label in rows["trial"]]
    assert f"{facts.best:.4g}" in text


def test_every_model_has_its_own_and_is_told_apart(tmp_path: Path) -> None:
    _, rows = ended(asking(tmp_path, "greedy", search=RATES, seeds=[0, 1]))
    assert set(rows["trial"]) == {f"greedy decoding, learning_rate={rate}" for rate in ("0.01", "0.001")}
    assert list(rows["episodes"]) == [8, 8]
    assert rows["return/mean"].nunique() == 2


def test_of_many_models_the_best_have_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_MODELS", 1)
    study, rows = ended(asking(tmp_path, "data", "greedy", search=RATES))
    frame = board_of(study).frame()
    best = frame.loc[frame["score/mean"].idxmax(), "trial"]
    assert list(rows["trial"]) == ["data set", "data set, best tenth", "greedy decoding"]
    key = baselines.baselines_of(study, frame)[-1]
    assert [trial.name for trial in key.trials] == [best]


def test_a_trial_that_is_a_baseline_has_no_row_twice(tmp_path: Path) -> None:
    cases = [{"name": "a, greedy", "planner": GREEDY}, {"name": "a, return", "planner": {"horizon": 2}}]
    _, rows = ended(asking(tmp_path, search={"cases": cases}))
    assert list(rows["trial"]) == ["data set", "data set, best tenth"]


def test_all_of_them_and_a_critic_that_no_trial_has_used(tmp_path: Path) -> None:
    first, _ = ended(asking(tmp_path))
    before = played(first.storage)
    names = ("random", "data", "behaviour", "greedy", "iql", "return-conditioned")
    study, rows = ended(asking(tmp_path, *names, critic=CRITIC))
    assert list(dict.fromkeys(rows["baseline"])) == [n for n in names if n != "behaviour"]
    assert np.isfinite(rows["score/mean"].astype(float)).all()
    assert rows["return/mean"].nunique() == len(rows)
    after = played(study.storage)
    assert set(after.values()) == {1}
    assert before.keys() <= after.keys()  # with another file, nothing that was there is played again
    assert len({key for key, _ in after - before}) == 3
    (critic,) = study.store.path("critics", "0" * 16).parent.glob("[0-9a-f]*")
    assert study.store.find("critics", critic.name) is not None


def test_the_same_trial_whatever_stands_beside_it(tmp_path: Path) -> None:
    one = asking(tmp_path, "data", critic=CRITIC).trials()
    critic = {**CRITIC, "inverse_temperature": 10.0}
    other = asking(tmp_path, "data", "iql", critic=critic).trials()
    assert [trial.fingerprint for trial in one] == [trial.fingerprint for trial in other]


def test_kept_episodes_are_those_of_the_store(tmp_path: Path) -> None:
    study, _ = ended(asking(tmp_path, "greedy"))
    (baseline,) = baselines.baselines_of(study, board_of(study).frame())
    (record,) = baseline.records(study)
    seeds = [result.seed for result in record.results]
    assert seeds == [10_000, 10_001, 10_002, 10_003]
    assert all(isinstance(result, EpisodeResult) for result in record.results)
