"""Whole sweeps under Ray Tune, and what they leave on disk and in MLflow."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import study_tools
from ray import cloudpickle
from study_tools import (
    CountingMaking,
    Quiet,
    cells,
    comparable,
    launch,
    make_sweep,
    played,
    points,
    trainings,
)
from tracking_tools import new_store

from tt_ray.config import flatten
from tt_ray.distributed import line
from tt_ray.distributed.sweeps import schedule
from tt_ray.distributed.sweeps.cells import cell_folder
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.driver import SweepOutcome, run_sweep
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import winners
from tt_ray.distributed.sweeps.trial import cell_name, cell_params
from tt_ray.experiment_file import load_experiment
from tt_ray.tracking import MlflowTracker

pytestmark = pytest.mark.ray

NAME = "Größe a/b, beams"
TWELVE = {
    "parameters": {
        "planner.horizon": {"values": [1, 2, 3]},
        "planner.beam_width": {"values": [2, 4]},
        "planner.n_expand": {"values": [1, 2]},
    },
    "max_concurrent_trials": 2,
}
FRESH = [1_010_000 + i for i in range(4)]


@dataclass(frozen=True)
class Launched:
    """A sweep at its end."""

    study: Study
    outcome: SweepOutcome
    before: dict[str, Any]
    """Its cells at the beginning."""
    trained: list[str]
    """Keys of the models trained up to now."""
    client: Any

    @property
    def frame(self) -> pd.DataFrame:
        return self.outcome.frame

    def runs(self) -> tuple[Any, list[Any]]:
        """The parent's run in MLflow, and its children in the order of their cells."""
        experiment = self.client.get_experiment_by_name(NAME).experiment_id
        found = self.client.search_runs([experiment], max_results=500)
        (parent,) = (run for run in found if run.data.tags["kind"] == "sweep")
        children = [run for run in found if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        return parent, sorted(
            children, key=lambda run: (int(run.data.tags["trial.index"]), run.data.tags["seed"])
        )

    def cells(self) -> list[tuple[Any, int, Path]]:
        seeds = self.study.sweep.base.seeds
        pairs = itertools.product(self.study.trials, seeds)
        return [(trial, seed, cell_folder(self.study.folder, trial, seed)) for trial, seed in pairs]

    def artifacts(self, run: Any) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, ""))


def start(
    folder: Path, uri: str, search: dict[str, Any], flags: Flags = Flags(), **sections: Any
) -> Launched:
    from mlflow import MlflowClient

    sweep = make_sweep(folder, search, **{"name": NAME, **sections})
    study = check_sweep(sweep, flags)
    before = cells(study)
    outcome = run_sweep(study, MlflowTracker(uri, sweep.base.name, interval=0.2), flags, Quiet())
    return Launched(study, outcome, before, trainings(study.storage), MlflowClient(tracking_uri=uri))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True, scope="module")
def counted() -> Iterator[None]:
    """Trainings are written down, in whatever process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "Making", CountingMaking)
        patch.setattr(line, "train_model", line.train_model)
        cloudpickle.register_pickle_by_value(study_tools)  # Ray's processes cannot import it
        yield
        cloudpickle.unregister_pickle_by_value(study_tools)


@pytest.fixture(scope="module")
def twelve(ray_local: None, tmp_path_factory: pytest.TempPathFactory, uri: str) -> Launched:
    """Twelve beam settings over one model."""
    return start(tmp_path_factory.mktemp("twelve"), uri, TWELVE)


@pytest.fixture(scope="module")
def extended(twelve: Launched, uri: str) -> Launched:
    """The same file with another training seed, launched again in the same place."""
    return start(twelve.study.storage.parent, uri, TWELVE, seeds=[0, 1])


class TestTwelveBeamSettings:
    def test_one_model_is_trained_once(self, twelve: Launched) -> None:
        study, frame = twelve.study, twelve.frame
        stage = study.store.find("models", str(study.model_key(study.trials[0].config, 0)))
        assert stage is not None
        assert twelve.trained == [stage.key]
        reused = [record.reused for trial in study.trials for record in study.records(trial)]
        assert sum("models" not in counts for counts in reused) == 1
        assert Counter(frame["reused"]) == {"tokens": 1, "tokens, model": 11}
        saved = np.sort(frame["saved"])
        tokens = next(stage for stage in study.store.stages() if stage.kind == "tokens")
        np.testing.assert_allclose(saved, [tokens.seconds] + 11 * [tokens.seconds + stage.seconds])
        assert stage.seconds > 3 * tokens.seconds

    def test_every_row_is_whole(self, twelve: Launched) -> None:
        frame = twelve.frame
        assert list(frame["status"]) == 12 * ["finished"]
        assert list(frame["episodes"]) == 12 * [4]
        numbers = frame.select_dtypes("number").drop(columns=[c for c in frame if c.startswith("confirmed")])
        assert np.isfinite(numbers).all(None)
        assert not twelve.outcome.cancelled
        assert list(twelve.outcome.problems) == []

    def test_two_at_a_time_give_the_table_of_one_at_a_time(self, twelve: Launched, tmp_path: Path) -> None:
        alone = launch(make_sweep(tmp_path, TWELVE, name=NAME)).frame()
        confirmed = [name for name in alone if name.startswith("confirmed")]
        columns = [name for name in comparable(alone) if name not in (*confirmed, "fingerprint")]
        pd.testing.assert_frame_equal(twelve.frame[columns], alone[columns])

    def test_the_winner_plays_fresh_episodes(self, twelve: Launched) -> None:
        (best,) = winners(twelve.frame, twelve.study.sweep.search)["index"]
        confirmed = twelve.frame["confirmed/mean"]
        assert np.isfinite(confirmed[best])
        assert confirmed.drop(best).isna().all()
        episodes = pd.read_parquet(twelve.study.folder / "episodes.parquet")
        fresh = episodes[episodes["fresh"]]
        assert list(fresh["seed"]) == FRESH
        assert set(fresh["trial_index"]) == {best}
        assert fresh["score"].mean() == pytest.approx(confirmed[best])
        assert len(episodes) == 12 * 4 + 4

    def test_nothing_is_left_of_the_running(self, twelve: Launched) -> None:
        folder = twelve.study.folder
        assert [path.name for path in folder.rglob(".*")] == []
        assert [name for name in ("tune", "progress", "cancel") if (folder / name).exists()] == []


class TestLaunchedAgain:
    def test_only_the_new_seed_runs(self, twelve: Launched, extended: Launched) -> None:
        after = cells(extended.study)
        assert len(extended.before) == 2 * 12
        assert {name: after[name] for name in extended.before} == extended.before
        assert len(after) == 2 * 24
        models = [stage.key for stage in extended.study.store.stages() if stage.kind == "models"]
        assert sorted(trainings(extended.study.storage)) == sorted(models)
        assert len(models) == 2
        once = played(extended.study.storage)
        assert set(once.values()) == {1}
        assert sum(seed not in FRESH for _, seed in once) == 24 * 4
        assert list(extended.frame["seeds"]) == 12 * [2]

    def test_the_same_once_more_runs_nothing(self, extended: Launched, uri: str) -> None:
        again = start(extended.study.storage.parent, uri, TWELVE, seeds=[0, 1])
        assert cells(again.study) == again.before
        assert len(again.before) == 2 * 24
        assert len(trainings(again.study.storage)) == 2
        pd.testing.assert_frame_equal(again.frame, extended.frame)
        parent, children = again.runs()
        assert len(children) == 24
        assert parent.info.status == "FINISHED"


class TestMlflow:
    def test_a_parent_and_its_cells(self, extended: Launched) -> None:
        parent, children = extended.runs()
        assert parent.info.run_name == NAME
        tags = parent.data.tags
        assert {key: tags[key] for key in ("kind", "sweep", "question", "status")} == {
            "kind": "sweep",
            "sweep": NAME,
            "question": "Which is best?",
            "status": "",
        }
        found = (tags["search.method"], tags["search.metric"], tags["search.goal"])
        assert found == ("grid", "score/mean", "maximize")
        names = [cell_name(trial, seed) for trial, seed, _ in extended.cells()]
        assert [run.info.run_name for run in children] == names
        assert {run.info.status for run in [parent, *children]} == {"FINISHED"}

    def test_tags_and_params_of_a_cell(self, extended: Launched) -> None:
        _, children = extended.runs()
        for run, (trial, seed, _) in zip(children, extended.cells(), strict=True):
            tags = run.data.tags
            expected = {
                "kind": "trial",
                "sweep": NAME,
                "trial": trial.fingerprint,
                "trial.name": trial.name,
                "trial.index": str(trial.index),
                "trial.case": "",
                "trial.status": "finished",
                "seed": str(seed),
                "stage.model": str(extended.study.model_key(trial.config, seed)),
            }
            assert {key: tags[key] for key in expected} == expected
            assert tags["reused"] in ("tokens", "tokens, model")
            assert Path(tags["checkpoint"]).is_dir()
            assert (extended.study.storage / "tokens" / tags["stage.tokens"]).is_dir()
            assert run.data.params == {k: str(v) for k, v in flatten(cell_params(trial, seed)).items()}
            assert run.data.params["planner.horizon"] == str(trial.settings["planner.horizon"])

    def test_every_point_is_there_once(self, extended: Launched) -> None:
        _, children = extended.runs()
        for run, (_, _, folder) in zip(children, extended.cells(), strict=True):
            history = [
                metric
                for key in run.data.metrics
                for metric in extended.client.get_metric_history(run.info.run_id, key)
            ]
            sent = Counter((metric.key, metric.step) for metric in history)
            assert set(sent.values()) == {1}
            journal = points(folder)
            values = {(m.key, m.step): m.value for m in history if (m.key, m.step) in journal}
            assert values == journal

    def test_the_metrics_of_a_cell(self, extended: Launched) -> None:
        intervals = ["mean", "ci_low", "ci_high", "iqm"]
        expected = {
            *(f"score/{name}" for name in (*intervals, "iqm_ci_low", "iqm_ci_high")),
            *(f"return/{name}" for name in (*intervals, "std")),
            *("length/mean", "terminated/fraction", "episodes"),
            *("speed/decisions_per_second", "speed/latency_p50_ms", "speed/latency_p95_ms"),
            *("speed/idle_slot_share", "speed/tokens_per_second"),
            *("seconds/tokens", "seconds/training", "seconds/evaluation", "seconds/saved"),
            *("train/loss", "train/learning_rate", "train/gradient_norm", "val/loss"),
            *(f"val/loss_{kind}" for kind in ("observation", "action", "reward", "value")),
        }
        _, children = extended.runs()
        for run, (trial, seed, _) in zip(children, extended.cells(), strict=True):
            assert expected - run.data.metrics.keys() == set()
            record = extended.study.records(trial)[seed]
            assert run.data.metrics["score/mean"] == record.metrics["score/mean"]
            history = extended.client.get_metric_history(run.info.run_id, "val/loss")
            assert [metric.step for metric in history] == [20, 40, 60]  # also where the model was reused

    def test_artifacts_of_a_cell(self, extended: Launched) -> None:
        _, children = extended.runs()
        trained = 0
        for run, (trial, seed, _) in zip(children, extended.cells(), strict=True):
            folder = extended.artifacts(run)
            config = load_experiment(folder / "config.yaml")
            assert (config.planner, config.seeds) == (trial.config.planner, (seed,))
            assert len(pd.read_parquet(folder / "episodes.parquet")) == 4
            with_checkpoint = (folder / "checkpoint" / "model.safetensors").exists()
            assert with_checkpoint == ("model" not in run.data.tags["reused"])
            trained += with_checkpoint
        assert trained == 2

    def test_artifacts_of_the_parent(self, extended: Launched) -> None:
        parent, _ = extended.runs()
        folder, study = extended.artifacts(parent), extended.study
        assert (folder / "sweep.yaml").read_text() == study.sweep.source
        (best,) = winners(extended.frame, study.sweep.search)["index"]
        assert load_experiment(folder / "best.yaml") == study.trials[best].config
        pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), extended.frame)
        assert len(pd.read_parquet(folder / "episodes.parquet")) == 24 * 4 + 2 * 4
        assert NAME in (folder / "results.md").read_text()
        figures = {path.stem for path in (folder / "figures").iterdir() if path.read_bytes()[1:4] == b"PNG"}
        assert figures >= {"parameters", "parallel", "learning-curves", "frontier"}

    def test_figures_of_the_parent(self, extended: Launched) -> None:
        parent, _ = extended.runs()
        metrics, frame = parent.data.metrics, extended.frame
        (best,) = winners(frame, extended.study.sweep.search)["index"]
        assert (metrics["trials/finished"], metrics["trials/failed"], metrics["trials/stopped"]) == (12, 0, 0)
        assert metrics["best/score/mean"] == frame["score/mean"][best] == frame["score/mean"].max()
        assert metrics["confirmed/score/mean"] == frame["confirmed/mean"][best]
        assert metrics["seconds/saved"] == pytest.approx(frame["saved"].sum())


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "actors", "seeds"), [(2, 2, [0]), (1, 1, [0, 1])])
def test_several_processes_for_each_trial_do_not_block_two_cores(
    tmp_path: Path, uri: str, workers: int, actors: int, seeds: list[int]
) -> None:
    search = {"parameters": {"planner.horizon": {"values": [1, 2, 3]}}, "max_concurrent_trials": 4}
    resources = {"workers": workers, "evaluation_actors": actors, "episodes_per_actor": 2}
    found = start(tmp_path, uri, search, resources=resources, seeds=seeds, name=f"{workers} workers")
    assert list(found.frame["status"]) == 3 * ["finished"]
    assert list(found.frame["episodes"]) == 3 * [4 * len(seeds)]
    assert np.isfinite(found.frame["confirmed/mean"]).sum() == 1
    assert len(found.trained) == len(set(found.trained)) == len(seeds)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_halving_stops_hopeless_learning_rates(tmp_path: Path, uri: str) -> None:
    search = {
        "parameters": {"training.learning_rate": {"values": [1e-3, 1.0, 3.0, 1e-4]}},
        "metric": {"name": "val/loss", "goal": "minimize"},
        "scheduler": {"type": "asha", "rung": "training_steps", "grace": 20, "reduction": 2},
        "max_concurrent_trials": 1,
    }
    found = start(tmp_path, uri, search, name="halving")
    assert list(found.frame["status"])[:3] == ["finished", "stopped", "stopped"]
    assert list(found.frame["episodes"])[:3] == [4, 0, 0]
    assert (found.frame["val/loss"][1:3] > found.frame["val/loss"][0] + 0.5).all()
    (best,) = winners(found.frame, found.study.sweep.search)["index"]
    assert best in (0, 3)
    models = [
        found.study.store.find("models", str(found.study.model_key(t.config, 0))) for t in found.study.trials
    ]
    assert [model is not None for model in models] == [
        status == "finished" for status in found.frame["status"]
    ]

    again = start(tmp_path, uri, search, name="halving")
    assert cells(again.study) == again.before
    more = {**search, "parameters": {"training.learning_rate": {"values": [1e-3, 1.0, 3.0, 1e-4, 2.0]}}}
    third = start(tmp_path, uri, more, name="halving")  # knows what the others have reported
    assert third.frame["status"][4] == "stopped"
    assert math.isfinite(third.frame["val/loss"][4])


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_optuna_completes_its_budget_and_repeats_nothing(tmp_path: Path, uri: str) -> None:
    search = {
        "method": "optuna",
        "num_trials": 4,
        "seed": 1,
        "max_concurrent_trials": 2,
        "parameters": {
            "planner.max_context_transitions": {"values": [2, 3, 9]},
            "model.context_transitions": {"values": [5, 10]},  # 9 with 5 do not go together
            "planner.cdf_act": {"values": [None, 0.5, 0.9]},
            "planner.beam_width": {"min": 2, "max": 6, "distribution": "int"},
        },
    }
    first = start(tmp_path, uri, search, name="optuna")
    assert list(first.frame["status"]) == 4 * ["finished"]
    assert list(first.frame["index"]) == [0, 1, 2, 3]
    for problem in first.outcome.problems:
        assert "max_context_transitions=9" in problem
        assert "context_transitions=5" in problem

    victim = sorted((first.study.folder / "cells").iterdir())[0]
    record = json.loads((victim / "result.json").read_text())
    record["status"], record["episodes"] = "running", []  # as if the driver had been killed there
    (victim / "result.json").write_text(json.dumps(record))
    kept = {name: state for name, state in cells(first.study).items() if not name.startswith(victim.name)}
    second = start(tmp_path, uri, {**search, "num_trials": 7}, Flags(resume=True), name="optuna")
    after = cells(second.study)
    assert {name: after[name] for name in kept} == kept
    assert list(second.frame["status"]) == 7 * ["finished"]
    assert list(second.frame["index"]) == list(range(7))
    assert second.frame["fingerprint"].is_unique
    assert set(played(second.study.storage).values()) == {1}
    values = [trial.settings["planner.cdf_act"] for trial in second.study.trials]
    assert {type(value) for value in values} <= {type(None), float}
    third = start(tmp_path, uri, {**search, "num_trials": 7}, name="optuna")
    assert cells(third.study) == after
