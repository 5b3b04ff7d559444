"""Whole sweeps under Ray Tune, and what they leave on disk and in MLflow."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from launch_tools import NAME, Launched, start
from study_tools import (
    cells,
    comparable,
    launch,
    make_sweep,
    played,
    points,
    trainings,
)

from tt_ray.config import flatten
from tt_ray.distributed.scoring import run_params
from tt_ray.distributed.sweeps.cells import cell_name
from tt_ray.distributed.sweeps.table import winners
from tt_ray.experiment_file import load_experiment

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("counted_everywhere")]

TWELVE = {
    "parameters": {
        "planner.horizon": {"values": [1, 2, 3]},
        "planner.beam_width": {"values": [2, 4]},
        "planner.n_expand": {"values": [1, 2]},
    },
    "max_concurrent_trials": 2,
}
MODEL = NAME.replace("/", "-")
FRESH = [1_010_000 + i for i in range(4)]


@pytest.fixture(scope="module")
def twelve(
    ray_local: None, counted_everywhere: None, tmp_path_factory: pytest.TempPathFactory, uri: str
) -> Launched:
    """Twelve beam settings over one model."""
    return start(tmp_path_factory.mktemp("twelve"), uri, TWELVE)


@pytest.fixture(scope="module")
def extended(twelve: Launched, uri: str) -> Launched:
    """The same file with another training seed, launched again in the same place."""
    return start(twelve.study.storage.parent, uri, TWELVE, seeds=[0, 1], tracking={"films": 1})


def unmarked(file: bytes) -> list[dict[str, Any]]:
    """Lines of a cell's record or journal, without what says that its trial is the best."""
    lines = [{**json.loads(line), "best": None} for line in file.splitlines()]
    return [
        line
        for line in lines
        if "best" not in line.get("tags", ()) and "checkpoint" not in line.get("artifact", ())
    ]


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
        marks = {name for name in extended.before if after[name] != extended.before[name]}
        for name in marks:
            assert unmarked(after[name][1]) == unmarked(extended.before[name][1])
        assert len(marks) in (0, 4)  # two files each of the best of one seed and the best of both
        assert len(after) == 2 * 24
        models = [stage.key for stage in extended.study.store.stages() if stage.kind == "models"]
        assert sorted(trainings(extended.study.storage)) == sorted(models)
        assert len(models) == 2
        once = played(extended.study.storage)
        assert set(once.values()) == {1}
        greedy = 2 * 4  # beside the planners, by each model
        assert sum(seed not in FRESH for _, seed in once) == 24 * 4 + greedy
        assert list(extended.frame["seeds"]) == 12 * [2]

    def test_the_same_once_more_runs_nothing(self, extended: Launched, uri: str) -> None:
        again = start(extended.study.storage.parent, uri, TWELVE, seeds=[0, 1], tracking={"films": 1})
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
        (best,) = winners(extended.frame, extended.study.sweep.search)["trial"]
        names = [cell_name(trial, seed, trial.name == best) for trial, seed, _ in extended.cells()]
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
            assert run.data.params == {k: str(v) for k, v in flatten(run_params(trial.config, seed)).items()}
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
            *("episodes/length", "episodes/terminated", "episodes/count"),
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
        trained = kept = 0
        for run, (trial, seed, _) in zip(children, extended.cells(), strict=True):
            folder = extended.artifacts(run)
            config = load_experiment(folder / "config.yaml")
            assert (config.planner, config.seeds) == (trial.config.planner, (seed,))
            assert len(pd.read_parquet(folder / "episodes.parquet")) == 4
            with_checkpoint = (folder / "checkpoint" / "model.safetensors").exists()
            own, best = "model" not in run.data.tags["reused"], run.data.tags.get("best") == "yes"
            assert with_checkpoint or not (own or best)
            kept += with_checkpoint and not (own or best)
            trained += own
        assert trained == 2
        assert kept <= 1  # that of the best of one seed, which is not the best of both

    def test_the_best_is_marked_and_registered_once(self, extended: Launched) -> None:
        (best,) = winners(extended.frame, extended.study.sweep.search)["fingerprint"]
        parent, children = extended.runs()
        marked = {run.data.tags["trial"] for run in children if run.data.tags.get("best") == "yes"}
        assert marked == {best}
        versions = extended.client.search_model_versions(f"name='{MODEL}'")
        champion = extended.client.get_model_version_by_alias(MODEL, "champion")
        assert champion.version in [version.version for version in versions]
        assert champion.tags["trial"] == best
        assert (Path(champion.source) / "model.safetensors").is_file()
        note = parent.data.tags["mlflow.note.content"]
        assert "Which is best?" in note
        assert sum(line.startswith("| horizon=") for line in note.splitlines()) == 12
        assert f"run_uuid={parent.info.run_id}" in note

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
        assert figures >= {"parameters", "parallel", "learning-curves", "frontier", "training", "returns"}
        assert "episode-10000" in figures

    def test_figures_of_the_parent(self, extended: Launched) -> None:
        parent, _ = extended.runs()
        metrics, frame = parent.data.metrics, extended.frame
        (best,) = winners(frame, extended.study.sweep.search)["index"]
        assert (metrics["trials/finished"], metrics["trials/failed"], metrics["trials/stopped"]) == (12, 0, 0)
        assert metrics["best/score/mean"] == frame["score/mean"][best] == frame["score/mean"].max()
        assert metrics["confirmed/score/mean"] == frame["confirmed/mean"][best]
        assert metrics["seconds/saved"] == pytest.approx(frame["saved"].sum())
