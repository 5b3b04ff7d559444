"""The shipped sweeps made small, run for real: what they leave on disk and in MLflow, and for scripts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import tt_ray
from mlflow import MlflowClient
from mlflow.entities import Run

from tt_ray.config import flatten, to_dict
from tt_ray.distributed.sweeps.checks import Flags, Silent, check_sweep
from tt_ray.distributed.sweeps.driver import run_sweep
from tt_ray.experiment_file import load_experiment
from tt_ray.search import Values, safe_name
from tt_ray.smoke import smoke
from tt_ray.sweep_file import Sweep, load_sweep
from tt_ray.tracking import MlflowTracker

ROOT = Path(__file__).parents[2]
FILES = sorted({path.stem for path in (ROOT / "sweeps").glob("*.yaml")} - {"prediction"})  # no sweep
QUICK = ("bins", "tuning")  # a grid; Optuna, stopped early by validation loss
PLANNERS = ("imitation", "goal_reaching", "pointmaze_q", "antmaze")
MAZES = ("goal_reaching", "pointmaze_q")
PARTS = ("", "_observation", "_action", "_reward", "_value")
CURVES = {
    *(f"{kind}/loss{part}" for kind in ("train", "val") for part in PARTS),
    *("train/learning_rate", "train/gradient_norm", "speed/tokens_per_second"),
}
PLAYED = {
    *("score/mean", "score/ci_low", "score/ci_high", "score/iqm", "score/iqm_ci_low", "score/iqm_ci_high"),
    *("return/mean", "return/ci_low", "return/ci_high", "return/std", "return/iqm"),
    *("episodes/length", "episodes/terminated", "episodes/count"),
    *("speed/decisions_per_second", "speed/latency_p50_ms", "speed/latency_p95_ms", "speed/idle_slot_share"),
    *("seconds/tokens", "seconds/training", "seconds/evaluation", "seconds/saved"),
}
PARENT = {"trials/finished", "trials/stopped", "trials/failed", "seconds/saved"}
TABLE = (PLAYED | {f"val/loss{part}" for part in PARTS}) - {
    name for name in PLAYED if name.startswith("seconds/") or name == "episodes/count"
}


@dataclass
class Ended:
    """A small sweep that has run, in a working folder of its own."""

    sweep: Sweep
    folder: Path
    uri: str

    @property
    def table(self) -> pd.DataFrame:
        """The sweep's own table."""
        return pd.read_parquet(self.own / "trials.parquet")

    @property
    def own(self) -> Path:
        """The sweep's folder in the storage."""
        return self.folder / "runs" / "sweeps" / safe_name(self.sweep.base.name)

    @property
    def stem(self) -> str:
        """What the episodes are judged by: scores, unless the file says that there may be none."""
        return "return" if self.sweep.search.metric.name.startswith("return/") else "score"

    def expected(self, metrics: set[str]) -> set[str]:
        """Those of `metrics` that every trial has, whatever its data."""
        return {name for name in metrics if self.stem == "score" or not name.startswith("score/")}

    @property
    def client(self) -> MlflowClient:
        """MLflow as the sweep left it."""
        return MlflowClient(tracking_uri=self.uri)

    def runs(self) -> tuple[Run, list[Run]]:
        """The parent's run and its cells'; there are no others."""
        experiment = self.client.get_experiment_by_name(self.sweep.base.name)
        assert experiment is not None
        runs = self.client.search_runs([experiment.experiment_id], max_results=1000)
        (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
        cells = [run for run in runs if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in cells} == {parent.info.run_id}
        return parent, cells

    def artifacts(self, run: Run, folder: str | None = None) -> set[str]:
        """Paths below the run's artifacts, or below one folder of them."""
        return {item.path for item in self.client.list_artifacts(run.info.run_id, folder)}


@pytest.fixture
def run(ray_local: None, here: Path, store: str) -> Callable[[str], Ended]:
    """Run the small version of a shipped file in this process."""

    def small(name: str) -> Ended:
        sweep = smoke(load_sweep(ROOT / "sweeps" / f"{name}.yaml"))
        study = check_sweep(sweep, Flags())
        outcome = run_sweep(study, MlflowTracker(store, sweep.base.name), Flags(), Silent())
        assert outcome.problems == []
        assert not outcome.cancelled
        return Ended(sweep, here, store)

    return small


def expected_trials(whole: Sweep) -> int:
    """Two values of each parameter, or three tries, in each case."""
    search = whole.search
    if search.method != "grid":
        assert search.num_trials is not None
        return min(search.num_trials, 3) * max(1, len(search.cases))
    spaces = [space for space in search.parameters.values() if isinstance(space, Values)]
    return math.prod(min(2, len(space.values)) for space in spaces) * max(1, len(search.cases))


def check(ended: Ended, name: str) -> None:
    """Everything that a sweep has to leave."""
    whole = load_sweep(ROOT / "sweeps" / f"{name}.yaml")
    trials, seeds = expected_trials(whole), min(2, len(whole.base.seeds))
    check_table(ended, trials, seeds)
    parent, cells = ended.runs()
    check_parent(ended, parent, trials)
    assert len(cells) == trials * seeds
    assert {(run.data.tags["trial"], run.data.tags["seed"]) for run in cells} == {
        (fingerprint, str(seed))
        for fingerprint in ended.table["fingerprint"]
        for seed in ended.sweep.base.seeds
    }
    for run in cells:
        check_cell(ended, run)
    check_models(ended, cells)


def check_table(ended: Ended, trials: int, seeds: int) -> None:
    table, search = ended.table, ended.sweep.search
    assert table["index"].tolist() == list(range(trials))
    assert table["fingerprint"].is_unique
    assert set(table["cause"]) == {""}
    assert set(table["status"]) <= ({"finished"} if search.scheduler is None else {"finished", "stopped"})
    assert set(search.parameters) <= set(table.columns)
    finished = table[table["status"] == "finished"]
    assert len(finished) > 0
    assert (finished["seeds"] == seeds).all()
    assert (finished["episodes"] == seeds * ended.sweep.base.evaluation.episodes).all()
    for metric in ended.expected(TABLE):
        assert finished[metric].map(math.isfinite).all(), metric
    stem = ended.stem
    assert (finished[f"{stem}/ci_low"] <= finished[f"{stem}/mean"]).all()
    assert (finished[f"{stem}/mean"] <= finished[f"{stem}/ci_high"]).all()
    rivals = table.groupby("case")["trial"].transform("size") > 1
    winners = table[table["confirmed/mean"].map(math.isfinite)]
    assert len(winners) == table[rivals]["case"].nunique()
    check_episodes(ended, finished, winners, seeds)


def check_episodes(ended: Ended, finished: pd.DataFrame, winners: pd.DataFrame, seeds: int) -> None:
    """The episodes' own table: the scores, or else returns, in it are those of the trials."""
    episodes, stem = pd.read_parquet(ended.own / "episodes.parquet"), ended.stem
    value = {"score": "score", "return": "episode_return"}[stem]
    assert episodes[value].map(math.isfinite).all()
    recorded = len(ended.sweep.base.evaluation.record)
    assert {len(point) for path in episodes["path"] for point in path} == ({recorded} if recorded else set())
    fresh, played = episodes[episodes["fresh"]], episodes[~episodes["fresh"]]
    assert set(fresh["trial"]) == set(winners["trial"])
    assert len(fresh) == 2 * seeds * len(winners)
    assert set(fresh["seed"]).isdisjoint(played["seed"])
    means = played.groupby("trial_index")[value].mean()
    for _, row in finished.iterrows():
        assert means[row["index"]] == pytest.approx(row[f"{stem}/mean"])
    for _, row in winners.iterrows():
        mine = fresh[fresh["trial"] == row["trial"]]
        judged = "score" if mine["score"].notna().all() else "episode_return"
        assert mine[judged].mean() == pytest.approx(row["confirmed/mean"])


def check_parent(ended: Ended, parent: Run, trials: int) -> None:
    base, search, table = ended.sweep.base, ended.sweep.search, ended.table
    assert (parent.info.run_name, parent.info.status) == (base.name, "FINISHED")
    tags, metrics = parent.data.tags, parent.data.metrics
    assert (tags["kind"], tags["sweep"], tags["question"]) == ("sweep", base.name, base.question)
    assert (tags["search.method"], tags["search.metric"]) == (search.method, search.metric.name)
    assert metrics.keys() >= PARENT
    assert metrics["trials/finished"] + metrics["trials/stopped"] == trials
    assert metrics["trials/failed"] == 0
    if len(ended.sweep.case_names) == 1:
        best = table[table["confirmed/mean"].notna()].iloc[0]
        assert metrics[f"best/{search.metric.name}"] == pytest.approx(best[search.metric.name])
        stem = "score" if "best/score/mean" in metrics else "return"
        assert metrics[f"confirmed/{stem}/mean"] == pytest.approx(best["confirmed/mean"])
    files = ended.artifacts(parent)
    assert files >= {"sweep.yaml", "trials.parquet", "results.md", "episodes.parquet", "figures"}
    check_baselines(ended)
    figures = {"figures/learning-curves.png"}
    figures |= {"figures/parameters.png", "figures/parallel.png"} if search.parameters else set()
    figures |= {"figures/frontier.png"} if trials > 1 else set()
    shown = ended.artifacts(parent, "figures")
    assert {path for path in shown if path.endswith(".svg")} == {path[:-3] + "svg" for path in figures}
    figures |= {"figures/training.png", "figures/returns.png"}
    assert {path for path in shown if "/episode-" not in path and path.endswith(".png")} == figures
    check_best(ended, files)


def check_baselines(ended: Ended) -> None:
    """What stands beside the planners: the data, and what else the file names, with finite figures."""
    rows = pd.read_parquet(ended.own / "baselines.parquet")
    asked = set(ended.sweep.base.evaluation.baselines)
    assert {"data"} <= set(rows["baseline"]) <= asked
    assert rows["return/mean"].map(math.isfinite).all()
    text = (ended.own / "results.md").read_text()
    assert all(f"| {label} | baseline |" in text for label in rows["trial"])


def check_best(ended: Ended, files: set[str]) -> None:
    """A configuration of each case's best trial, ready to run."""
    search, table = ended.sweep.search, ended.table
    names = {case: f"best-{safe_name(case)}.yaml" if case else "best.yaml" for case in set(table["case"])}
    assert {file for file in files if file.startswith("best")} == set(names.values())
    for case, name in names.items():
        ranked = table[(table["case"] == case) & (table["status"] == "finished")].sort_values(
            [search.metric.name, "index"], ascending=[search.metric.goal == "minimize", True]
        )
        best = ranked.iloc[0]
        config = flatten(to_dict(load_experiment(ended.own / name)))
        for key in search.parameters:
            assert config[key] == best[key] or (config[key] is None and pd.isna(best[key])), key


def check_cell(ended: Ended, run: Run) -> None:
    tags, metrics, params = run.data.tags, run.data.metrics, run.data.params
    assert (tags["kind"], tags["sweep"], run.info.status) == ("trial", ended.sweep.base.name, "FINISHED")
    star = "★ " if tags.get("best") == "yes" else ""
    assert run.info.run_name == f"{star}{tags['trial.name']} seed {tags['seed']}"
    row = ended.table.set_index("fingerprint").loc[tags["trial"]]
    assert (tags["trial.status"], tags["trial.case"]) == (row["status"], row["case"])
    assert tags["error"] == "" if "error" in tags else True
    for key in ended.sweep.search.parameters:
        assert yaml.safe_load(params[key]) == row[key] or (params[key] == "None" and pd.isna(row[key])), key
    assert params["seed"] == tags["seed"]
    wanted = CURVES | (ended.expected(PLAYED) if row["status"] == "finished" else set())
    assert metrics.keys() >= wanted, wanted - metrics.keys()
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == set()
    history = ended.client.get_metric_history(run.info.run_id, "val/loss")
    steps = [point.step for point in history]
    assert steps == sorted(set(steps))
    assert len(steps) > 1 or row["status"] == "stopped"
    files = ended.artifacts(run)
    assert "config.yaml" in files
    assert "episodes.parquet" in files or row["status"] == "stopped"


def check_models(ended: Ended, cells: list[Run]) -> None:
    """Each model is trained by one of the cells that need it; it and the best have the checkpoint."""
    trained: dict[str, int] = {}
    for run in cells:
        tags = run.data.tags
        if tags["trial.status"] != "finished":
            continue
        here = "checkpoint" in ended.artifacts(run)
        own = "model" not in tags["reused"]
        assert here == (own or tags.get("best") == "yes")
        trained[tags["stage.model"]] = trained.get(tags["stage.model"], 0) + own
    assert set(trained.values()) == {1}


def analyse(ended: Ended, script: str, figures: set[str]) -> str:
    """A script of analysis/ on the sweep; what it has printed."""
    out = ended.folder / "analysis"
    arguments = [ended.sweep.base.name, "--uri", ended.uri, "--out", str(out)]
    command = [sys.executable, str(ROOT / "analysis" / script), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ended.folder)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    written = {path.name for path in out.iterdir()}
    assert {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} <= written
    return found.stdout


def check_report(ended: Ended) -> None:
    """What sweep_report.py says of the sweep."""
    text = analyse(ended, "sweep_report.py", {"parameters", "parallel", "frontier", "curves"})
    search, table = ended.sweep.search, ended.table
    counts = ", ".join(f"{n} {status}" for status, n in table["status"].value_counts(sort=False).items())
    headline = f"{len(table)} trials ({search.method}): {counts}. {search.metric.goal} {search.metric.name}."
    assert headline in text
    assert ended.sweep.base.question in text
    best = text.partition("## Best")[2].partition("## ")[0]
    assert all(f"| {trial} " in best for trial in table[table["confirmed/mean"].notna()]["trial"])
    effects = pd.read_parquet(ended.folder / "analysis" / "parameters.parquet")
    rivals = table[table["status"] == "finished"].groupby("case").size().max() > 1
    assert set(effects["parameter"]) == (set(search.parameters) if rivals else set())


def check_benchmark(ended: Ended) -> None:
    """The paper's table: every task of ours beside what was published for it."""
    text = analyse(ended, "benchmark_table.py", {"benchmark-locomotion"})
    table = pd.read_parquet(ended.folder / "analysis" / "benchmark.parquet")
    ours = table[~table["published"].astype(bool)].set_index("task")["mean"].to_dict()
    assert all(f"| {task} " in text for task in ours)
    means = {task.lower().replace(" ", "-"): mean for task, mean in ours.items()}
    assert means == pytest.approx(ended.table.set_index("case")["score/mean"].to_dict())


def check_planners(ended: Ended) -> None:
    """Planners beside each other and beside the data, on real episodes."""
    analyse(ended, "objectives.py", {"returns"})
    table = pd.read_parquet(ended.folder / "analysis" / "objectives.parquet")
    trials, data = table[table["kind"] == "trial"], table[table["kind"] == "data"]
    means, configs = ended.table.set_index("trial")["return/mean"], [t.config for t in ended.sweep.trials()]
    assert trials.set_index("trial")["return"].to_dict() == pytest.approx(means.to_dict())
    assert set(data["task"]) == {config.dataset.id for config in configs}
    assert data["return"].map(math.isfinite).all()
    assert {config.planner.objective for config in configs} <= set(trials["objective"])


def check_paths(ended: Ended) -> None:
    """Where the best trials' episodes went, over the walls; a goal is rewarded with 1."""
    analyse(ended, "maze_paths.py", set())
    table = pd.read_parquet(ended.folder / "analysis" / "paths.parquet")
    shares, means = table.groupby("trial")["reached"].mean(), ended.table.set_index("trial")["return/mean"]
    assert len(shares) == len(ended.sweep.case_names)
    assert shares.to_dict() == pytest.approx(means[shares.index].to_dict())


@pytest.mark.ray
@pytest.mark.parametrize("name", QUICK)
def test_a_shipped_sweep_in_small(name: str, run: Callable[[str], Ended]) -> None:
    check(run(name), name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_shipped_sweep_in_small_and_its_report(name: str, run: Callable[[str], Ended]) -> None:
    ended = run(name)
    check(ended, name)
    check_report(ended)
    if name == "locomotion":
        check_benchmark(ended)
    if name in PLANNERS:
        check_planners(ended)
    if name in MAZES:
        check_paths(ended)


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_on_a_shipped_sweep(tmp_path: Path) -> None:
    file = str(ROOT / "sweeps" / "quickstart.yaml")
    first = tt_ray(tmp_path, "sweep", file, "--smoke")
    assert first.code == 0, first.err
    assert first.err == ""
    ended = Ended(smoke(load_sweep(file)), tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    check(ended, "quickstart")
    assert str(ended.own / "best.yaml") in first.out
    before = ended.table
    again = tt_ray(tmp_path, "sweep", file, "--smoke")
    assert again.code == 0, again.err
    pd.testing.assert_frame_equal(ended.table, before)  # nothing is computed, and nothing forgotten
    check(ended, "quickstart")
