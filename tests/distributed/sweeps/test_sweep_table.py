"""A trial's figures against numpy, which trial wins, and the tables as files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import trim_mean
from study_tools import board_of, launch, make_sweep

from tt_ray.config import DatasetConfig, EvaluationConfig, ExperimentConfig
from tt_ray.distributed.sweeps.cells import Record, read_record, reuse_text
from tt_ray.distributed.sweeps.report import interval_of, markdown_table, write_tables
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import (
    ranking,
    trial_metrics,
    trial_row,
    trials_frame,
    winners,
    with_confirmed,
)
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.search import METRICS, MetricConfig, SearchConfig

CONFIG = ExperimentConfig(
    name="x", dataset=DatasetConfig(id="d"), evaluation=EvaluationConfig(bootstrap_samples=4_000)
)
SCORE, LOSS = "score/mean", "val/loss"


def record(returns: list[float], seed: int = 0, scored: bool = True, **more: Any) -> Record:
    """A finished cell with these returns, scores a tenth of them, lengths 10, 11, ..."""
    results = [
        EpisodeResult(
            seed=i,
            episode_return=value,
            length=10 + i,
            terminated=i == 0,
            decisions=1,
            environment_seconds=0.0,
            planning_seconds=0.0,
            score=value / 10 if scored else None,
        )
        for i, value in enumerate(returns)
    ]
    fields = {"status": "finished", **more}
    identity = {"trial": "f", "name": "t", "index": 0, "case": "", "settings": {}}
    return Record(**identity, seed=seed, episodes=[result.to_json() for result in results], **fields)


def frame_of(*rows: dict[str, Any], metric: str = SCORE) -> tuple[pd.DataFrame, SearchConfig]:
    """A table of finished trials with these figures, and a search for `metric`."""
    goal = "minimize" if metric == LOSS else "maximize"
    search = SearchConfig(metric=MetricConfig(name=metric, goal=goal))  # type: ignore[arg-type]
    whole = [
        {
            "index": i,
            "trial": f"t{i}",
            "fingerprint": f"f{i}",
            "case": "",
            "status": "finished",
            "cause": "",
            "seeds": 1,
            "episodes": 4,
            "seconds": 1.0,
            "saved": 0.0,
            "reused": "",
            **row,
        }
        for i, row in enumerate(rows)
    ]
    return trials_frame(whole, search), search


def best(*rows: dict[str, Any], metric: str = SCORE) -> list[str]:
    frame, search = frame_of(*rows, metric=metric)
    return list(winners(frame, search)["trial"])


class TestFigures:
    def test_means_and_spreads_by_hand(self) -> None:
        first, second = [1.0, 2.0, 3.0, 10.0], [4.0, 4.0, 6.0, 6.0]
        figures = trial_metrics([record(first), record(second, seed=1)], CONFIG)
        everything = np.array(first + second)
        for stem, values in (("return", everything), ("score", everything / 10)):
            means = [values[:4].mean(), values[4:].mean()]
            assert figures[f"{stem}/mean"] == pytest.approx(values.mean())
            assert figures[f"{stem}/iqm"] == pytest.approx(trim_mean(values, 0.25))
            assert figures[f"{stem}/seed_std"] == pytest.approx(np.std(means, ddof=1))
            assert figures[f"{stem}/seed_error"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(2))
        assert figures["return/std"] == pytest.approx(np.std(everything, ddof=1))
        assert figures["episodes/length"] == pytest.approx(11.5)
        assert figures["episodes/terminated"] == pytest.approx(0.25)

    def test_intervals_resample_within_each_training_seed(self) -> None:
        groups = [np.array([0.0, 0.0, 30.0]), np.array([100.0, 100.0, 130.0])]
        figures = trial_metrics([record(list(g), seed=i) for i, g in enumerate(groups)], CONFIG)
        random = np.random.default_rng(1)
        draws = [g[random.integers(3, size=(20_000, 3))] for g in groups]
        low, high = np.quantile(np.concatenate(draws, axis=1).mean(axis=1), [0.025, 0.975])
        assert figures["return/ci_low"] == pytest.approx(low, abs=1.0)
        assert figures["return/ci_high"] == pytest.approx(high, abs=1.0)
        assert high - low < 40  # the seeds' own distance of 100 is not in there

    def test_losses_and_speeds_are_means_over_the_seeds(self) -> None:
        cells = [
            record([1.0], metrics={LOSS: 2.0, "speed/latency_p50_ms": 1.0, "return/mean": 99.0}),
            record([3.0], seed=1, metrics={LOSS: 4.0, "speed/latency_p50_ms": 4.0}),
        ]
        figures = trial_metrics(cells, CONFIG)
        assert (figures[LOSS], figures["speed/latency_p50_ms"], figures["return/mean"]) == (3.0, 2.5, 2.0)

    def test_one_episode_of_one_seed(self) -> None:
        figures = trial_metrics([record([5.0])], CONFIG)
        assert figures["return/std"] == 0.0
        assert {figures[f"return/{name}"] for name in ("mean", "iqm", "ci_low", "ci_high")} == {5.0}
        assert "return/seed_std" not in figures

    def test_no_scores_without_references_and_nothing_without_episodes(self) -> None:
        figures = trial_metrics([record([5.0], scored=False)], CONFIG)
        assert [name for name in figures if name.startswith("score")] == []
        assert figures["return/mean"] == 5.0
        assert trial_metrics([record([])], CONFIG) == {}
        assert trial_metrics([], CONFIG) == {}

    def test_all_searchable_names_come_from_here_or_from_a_cell(self) -> None:
        own = {"speed/latency_p50_ms": 1.0, **{name: 1.0 for name in METRICS if name.startswith("speed/")}}
        own |= {name: 1.0 for name in METRICS if name.startswith("val/")}
        assert set(METRICS) <= trial_metrics([record([1.0, 2.0], metrics=own)], CONFIG).keys()


class TestRows:
    @pytest.mark.parametrize(
        ("statuses", "expected"),
        [
            (["finished", "finished"], "finished"),
            (["finished", "failed"], "failed"),
            (["running", "stopped"], "running"),
            (["failed", "running"], "failed"),
            (["stopped", "finished"], "stopped"),
            (["finished"], "running"),  # of two
            ([], "waiting"),
        ],
    )
    def test_status(self, study: Study, statuses: list[Any], expected: str) -> None:
        trial = study.trials[0]
        cells = [record([1.0], seed=i, status=status) for i, status in enumerate(statuses)]
        assert trial_row(trial, cells, 2)["status"] == expected

    def test_what_the_cells_add_up_to(self, study: Study) -> None:
        cells = [
            record([1.0, 2.0], seconds={"training": 2.0, "evaluation": 1.0}, saved=1.5, reused={"tokens": 1}),
            record([3.0], seed=1, seconds={"training": 4.0}, saved=0.5, reused={"models": 1, "tokens": 1}),
        ]
        row = trial_row(study.trials[0], cells, 2)
        assert (row["seeds"], row["episodes"], row["seconds"], row["saved"]) == (2, 3, 7.0, 2.0)
        assert row["reused"] == "tokens, model"
        assert row["planner.horizon"] == 1
        assert (row["index"], row["trial"]) == (0, "horizon=1")

    def test_reuse_in_words(self) -> None:
        assert reuse_text({}) == ""
        assert reuse_text({"evaluations": 1}) == "episode"
        assert reuse_text({"evaluations": 20, "models": 2, "tokens": 3}) == "tokens, 2 models, 20 episodes"

    def test_columns_are_there_before_any_trial_is_done(self, study: Study) -> None:
        frame = board_of(study).frame()
        assert frame[["score/mean", "confirmed/mean", "confirmed/ci_high"]].isna().all(None)
        assert list(frame.columns[:8]) == [
            *("index", "trial", "fingerprint", "case", "status", "cause", "seeds", "episodes")
        ]
        assert frame.columns[8] == "planner.horizon"
        assert list(frame["status"]) == 3 * ["waiting"]


class TestWinners:
    def test_the_largest_score_and_the_smallest_loss(self) -> None:
        assert best({SCORE: 1.0}, {SCORE: 3.0}, {SCORE: 2.0}) == ["t1"]
        assert best({LOSS: 1.0}, {LOSS: 3.0}, {LOSS: 0.5}, metric=LOSS) == ["t2"]

    def test_among_equals_the_first(self) -> None:
        assert best({SCORE: 1.0}, {SCORE: 3.0}, {SCORE: 3.0}, {SCORE: 3.0}) == ["t1"]
        assert best({LOSS: 3.0}, {LOSS: 3.0}, metric=LOSS) == ["t0"]

    @pytest.mark.parametrize("metric", [SCORE, LOSS])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number_never_wins(self, metric: str, bad: float) -> None:
        assert best({metric: bad}, {metric: 1.0}, {metric: bad}, metric=metric) == ["t1"]
        assert best({metric: bad}, metric=metric) == []

    @pytest.mark.parametrize("status", ["stopped", "failed", "running", "waiting"])
    def test_what_is_not_finished_never_wins(self, status: str) -> None:
        assert best({SCORE: 9.0, "status": status}, {SCORE: 1.0}) == ["t1"]
        assert best({SCORE: 9.0, "status": status}) == []

    def test_one_for_each_case_in_the_order_of_the_cases(self) -> None:
        rows = [("z", 1.0), ("z", 2.0), ("a", 0.1), ("a", 0.2), ("m", np.nan)]
        assert best(*({"case": case, SCORE: value} for case, value in rows)) == ["t1", "t3"]

    def test_ranking(self) -> None:
        rows = [
            *({"case": "z", SCORE: value} for value in (1.0, np.nan, 2.0, 2.0)),
            {"case": "z", SCORE: 9.0, "status": "stopped"},
            *({"case": "a", SCORE: value} for value in (5.0, 7.0)),
        ]
        frame, search = frame_of(*rows)
        assert list(ranking(frame, search)["index"]) == [2, 3, 0, 1, 4, 6, 5]
        assert list(ranking(frame, search, by_case=False)["index"]) == [6, 5, 2, 3, 0, 1, 4]
        frame, search = frame_of({LOSS: 2.0}, {LOSS: 1.0}, {LOSS: np.nan}, metric=LOSS)
        assert list(ranking(frame, search)["index"]) == [1, 0, 2]


class TestFiles:
    def test_tables_of_a_study(self, tmp_path: Path) -> None:
        mixed = {"parameters": {"planner.cdf_act": {"values": [None, 0.6, 0.9]}}}
        board = launch(make_sweep(tmp_path, mixed, question="Which | is best?"))
        frame = board.frame()
        parquet, _, markdown = write_tables(board.study, frame)
        stored = pd.read_parquet(parquet)
        pd.testing.assert_frame_equal(
            stored.drop(columns="planner.cdf_act"), frame.drop(columns="planner.cdf_act")
        )
        assert np.isnan(stored["planner.cdf_act"][0])
        assert list(stored["planner.cdf_act"][1:]) == [0.6, 0.9]
        text = markdown.read_text()
        ranked = ranking(frame, board.study.sweep.search)
        rows = [line for line in text.splitlines() if line.startswith("| cdf_act=")]
        assert [row.split(" | ")[0][2:] for row in rows] == list(ranked["trial"])
        assert text.startswith("# tiny\n\nWhich | is best?\n")
        assert all(
            interval_of(row, SCORE) in line for (_, row), line in zip(ranked.iterrows(), rows, strict=True)
        )
        assert [path.name for path in board.study.folder.glob(".*")] == []

    def test_a_column_of_several_types_becomes_text(self, study: Study) -> None:
        frame, _ = frame_of({SCORE: 1.0, "x.y": "auto"}, {SCORE: 1.0, "x.y": 2}, {SCORE: 1.0, "x.y": None})
        study.folder.mkdir(parents=True)
        frame["planner.horizon"] = 1
        parquet, *_ = write_tables(study, frame)
        assert list(pd.read_parquet(parquet)["x.y"][:2]) == ["auto", "2"]
        assert pd.read_parquet(parquet)["x.y"].isna()[2]

    def test_causes_and_bars_in_markdown(self, study: Study) -> None:
        rows = [{"trial": "a|b", "status": "failed", "cause": "went | wrong"}, {SCORE: 1.0}]
        frame, _ = frame_of(*rows)
        text = markdown_table(study, frame.assign(**{"planner.horizon": 1}), frame[:0])
        assert "| a\\|b | failed | 1 |" in text
        assert "Failed:\n\n- a|b: went | wrong\n" in text

    def test_confirmed_scores_stand_beside_the_winner(self, tmp_path: Path) -> None:
        study = launch(make_sweep(tmp_path)).study
        frame, trial = board_of(study).frame(), study.trials[1]
        fresh = record([100.0, 300.0])
        found = with_confirmed(frame, [(trial, [fresh])])
        assert found["confirmed/mean"][1] == pytest.approx(20.0)
        assert 10.0 <= found["confirmed/ci_low"][1] <= 20.0 <= found["confirmed/ci_high"][1] <= 30.0
        assert found["confirmed/mean"].isna().tolist() == [True, False, True]
        assert frame["confirmed/mean"].isna().all()
        unscored = with_confirmed(frame, [(trial, [record([100.0, 300.0], scored=False)])])
        assert unscored["confirmed/mean"][1] == pytest.approx(200.0)


def test_a_trial_at_a_time_or_in_any_order_gives_one_table(tmp_path: Path) -> None:
    tables = []
    for folder, horizons in (("a", [1, 2, 3]), ("b", [3, 1, 2])):
        search = {"parameters": {"planner.horizon": {"values": horizons}}}
        frame = launch(make_sweep(tmp_path / folder, search)).frame()
        frame = frame.sort_values("planner.horizon", ignore_index=True)
        tables.append(frame[["trial", "status", "score/mean", "score/ci_low", "val/loss", "return/iqm"]])
    pd.testing.assert_frame_equal(*tables)


def test_a_record_reads_back_as_it_was(tmp_path: Path) -> None:
    whole = record([1.0, 2.5], metrics={LOSS: 1.0, "val/loss_value": float("nan")}, reports=[[1, 2.0]])
    whole.save(tmp_path / "cell")
    found = read_record(tmp_path / "cell")
    assert found is not None
    assert found.results == whole.results
    assert np.isnan(found.metrics.pop("val/loss_value"))
    assert found == replace(whole, metrics={LOSS: 1.0})
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["result.json"]
