"""The whole line with the installed command, tiny: what a user sees, what MLflow has, what is reused."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import TT_RAY, Outcome, environment, files_below, tt_ray, write_file
from mlflow import MlflowClient
from mlflow.entities import Run

from tt_ray.model.checkpoint import load_checkpoint
from tt_ray.tracking.connection import prepare_environment

pytestmark = pytest.mark.ray

DATASET = "tiny/inverted-v0"
LINE = {
    "question": "Does the line hold?",
    "dataset": {"id": DATASET},
    "collect": {"environment": "InvertedPendulum-v5", "steps": 600, "final_episodes": 3},
    "evaluation": {"baselines": ["random", "data", "behaviour", "greedy"]},
    "resources": {"workers": 2},
}
POLICIES = (
    "random policy",
    "data set",
    "data set, best tenth",
    "data set, best episode",
    "final behaviour policy",
    "greedy decoding",
    "planner",
)
KINDS = ("observation", "action", "reward", "value")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of everything here."""
    path = tmp_path_factory.mktemp("line")
    write_file(path, **LINE)
    return path


@pytest.fixture(scope="module")
def first(folder: Path) -> Outcome:
    """The first run, from collecting to the table."""
    return succeeded(tt_ray(folder, "run", "tiny.yaml"))


def succeeded(outcome: Outcome) -> Outcome:
    """An outcome that must be a success, with nothing on stderr and nothing cut off."""
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "…" not in outcome.out
    return outcome


def results(outcome: Outcome) -> dict[str, list[str]]:
    """The cells of the result table by policy, without the last column: how fast it went."""
    lines = outcome.out[outcome.out.index("\nResults") :].splitlines()[4:]
    table = [re.split("  +", line.strip()) for line in itertools.takewhile(str.strip, lines)]
    return {policy: cells[:-1] for policy, *cells in table}


def runs(database: Path) -> dict[str, Run]:
    """MLflow's runs by name."""
    prepare_environment()
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = list(client.search_runs(experiments))
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def curve(database: Path, run: Run, name: str) -> list[int]:
    """Steps at which MLflow has a metric; every value is finite."""
    points = MlflowClient(tracking_uri=f"sqlite:///{database}").get_metric_history(run.info.run_id, name)
    assert all(np.isfinite(point.value) for point in points)
    return [point.step for point in points]


def artifacts(database: Path, run: Run) -> set[str]:
    """Names of a run's artifacts, and of what lies in a checkpoint."""
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    found = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    return found | {entry.path for entry in client.list_artifacts(run.info.run_id, "checkpoint")}


def test_what_a_user_sees(first: Outcome, folder: Path) -> None:
    rows = results(first)
    assert tuple(rows) == POLICIES
    assert all(
        re.fullmatch(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", cell) for row in rows.values() for cell in row[1:3]
    )
    assert "collecting tiny/inverted-v0: 600/600" in first.out
    assert "training, seed 0: 20/20 loss" in first.out
    assert re.search(r"training +\d", first.out)
    (checkpoint,) = (folder / "runs" / "models").glob("*/checkpoints/*")
    assert f"model, seed 0:      {checkpoint}" in first.out
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in first.out
    assert max(len(line) for line in first.out.splitlines() if "─" in line) <= 120


def test_the_parent_run(first: Outcome, folder: Path) -> None:
    database = folder / "mlflow.db"
    parent = runs(database)["tiny"]
    assert parent.info.status == "FINISHED"
    assert {"results.md", "episodes.parquet", "returns.png", "config.yaml"} <= artifacts(database, parent)
    assert parent.data.params["planner.horizon"] == "2"
    assert parent.data.tags["question"] == "Does the line hold?"
    for name in ("return", "score"):
        low, mean, high = (parent.data.metrics[f"{name}/{part}"] for part in ("ci_low", "mean", "ci_high"))
        assert low <= mean <= high
    assert {"random policy/return/mean", "data set/return/mean", "data set best tenth/return/mean"} <= set(
        parent.data.metrics
    )
    (table,) = (folder / "runs" / "experiments").glob("tiny-*/episodes.parquet")
    episodes = pd.read_parquet(table)
    planned = episodes[episodes.policy == "planner"]
    assert len(planned) == 4
    assert planned["return"].mean() == pytest.approx(parent.data.metrics["return/mean"])


def test_the_run_of_a_seed(first: Outcome, folder: Path) -> None:
    database = folder / "mlflow.db"
    found = runs(database)
    assert set(found) == {"tiny", "tiny seed 0"}
    child = found["tiny seed 0"]
    assert child.info.status == "FINISHED"
    tags, params, metrics = child.data.tags, child.data.params, child.data.metrics
    assert tags["mlflow.parentRunId"] == found["tiny"].info.run_id
    assert (tags["seed"], params["seed"], params["model.embed_dim"]) == ("0", "0", "16")
    assert {"host", "version.torch", "version.ray", "version.mlflow", "stage.tokens", "stage.model"} <= set(
        tags
    )
    assert (folder / "runs" / "models" / tags["stage.model"]).is_dir()
    for name in ("train/loss", *(f"train/loss_{kind}" for kind in KINDS), "train/learning_rate"):
        assert curve(database, child, name) == [5, 10, 15, 20]
    for name in ("val/loss", *(f"val/loss_{kind}" for kind in KINDS)):
        assert curve(database, child, name) == [10, 20]
    for name in ("return/mean", "return/ci_low", "return/ci_high", "score/mean", "greedy/return/mean"):
        assert curve(database, child, name) == [20]
    assert metrics["return/ci_low"] <= metrics["return/mean"] <= metrics["return/ci_high"]
    files = ("config.json", "model.safetensors", "discretizer.safetensors", "checksums.json")
    assert {f"checkpoint/{name}" for name in files} <= artifacts(database, child)
    (entry,) = child.inputs.dataset_inputs
    spec = load_checkpoint(Path(tags["checkpoint"])).spec
    assert (entry.dataset.name, entry.dataset.digest) == (DATASET, spec.fingerprint)


def test_where_the_code_comes_from(first: Outcome, folder: Path, tmp_path: Path) -> None:
    """The commit is that of the working folder, where it is a checkout."""
    expected = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    assert runs(folder / "mlflow.db")["tiny"].data.tags.get("git.commit", "") == expected.stdout.strip()


def test_a_second_run_computes_nothing(first: Outcome, folder: Path) -> None:
    (journal,) = (folder / "runs" / "models").glob("*/journal.jsonl")
    before = journal.read_bytes(), files_below(folder)
    again = succeeded(tt_ray(folder, "run", "tiny.yaml", "--resume"))
    assert (journal.read_bytes(), files_below(folder)) == before
    assert set(runs(folder / "mlflow.db")) == {"tiny", "tiny seed 0"}
    assert results(again) == results(first)
    for stage in (
        "data set",
        "tokens",
        "model 0",
        "4 episodes (random policy)",
        "4 episodes (planner, seed 0)",
    ):
        assert stage in again.out[again.out.index("reused:") :]


@pytest.mark.slow  # one more whole run
def test_another_tracking_store(first: Outcome, folder: Path, tmp_path: Path) -> None:
    before = runs(folder / "mlflow.db").keys(), (folder / "mlflow.db").stat().st_mtime_ns
    there = tmp_path / "elsewhere.db"
    uri = f"sqlite:///{there}"
    outcome = succeeded(tt_ray(folder, "run", "tiny.yaml", "--resume", MLFLOW_TRACKING_URI=uri))
    assert uri in outcome.out
    found = runs(there)
    assert set(found) == {"tiny", "tiny seed 0"}
    assert found["tiny seed 0"].data.tags["mlflow.parentRunId"] == found["tiny"].info.run_id
    assert curve(there, found["tiny seed 0"], "train/loss") == [5, 10, 15, 20]
    assert "checkpoint/model.safetensors" in artifacts(there, found["tiny seed 0"])
    assert (runs(folder / "mlflow.db").keys(), (folder / "mlflow.db").stat().st_mtime_ns) == before


def test_results(first: Outcome, folder: Path) -> None:
    outcome = succeeded(tt_ray(folder, "results", "tiny", "--csv", "table.csv", COLUMNS="80"))
    found = runs(folder / "mlflow.db")
    assert all(
        run.info.run_id in outcome.out for run in found.values() if "evaluate" not in run.info.run_name
    )
    frame = pd.read_csv(folder / "table.csv", index_col="run_id")
    assert frame.loc[found["tiny seed 0"].info.run_id, "return/mean"] == pytest.approx(
        found["tiny seed 0"].data.metrics["return/mean"]
    )


def test_data_commands(first: Outcome, folder: Path) -> None:
    listed = succeeded(tt_ray(folder, "data", "list", COLUMNS="80"))
    assert re.search(rf"{DATASET} +InvertedPendulum-v5 +\d+", listed.out)
    shown = succeeded(tt_ray(folder, "data", "show", DATASET, COLUMNS="80"))
    for part in (
        "InvertedPendulum-v5",
        "Box(-3.0, 3.0, (1,), float32)",
        "observation 3",
        "action 0",
        "reward",
    ):
        assert part in shown.out


def test_a_checkpoint_needs_nothing_else(first: Outcome, folder: Path, tmp_path: Path) -> None:
    """Moved to a folder of its own, without data sets; the same figures come out."""
    (checkpoint,) = (folder / "runs" / "models").glob("*/checkpoints/*")
    shutil.copytree(checkpoint, tmp_path / "moved")
    outcome = succeeded(tt_ray(tmp_path, "evaluate", "moved"))
    played = ("random policy", "greedy decoding", "planner")
    assert results(outcome) == {policy: results(first)[policy] for policy in played}
    assert f"the data set {DATASET} is not here, so the table has no row of it" in outcome.out
    assert not (tmp_path / "data").exists()
    (run,) = runs(tmp_path / "mlflow.db").values()
    assert run.data.tags["checkpoint"] == str(tmp_path / "moved")
    assert {"results.md", "episodes.parquet"} <= artifacts(tmp_path / "mlflow.db", run)


def test_a_run_is_evaluated_from_its_artifact(first: Outcome, folder: Path, tmp_path: Path) -> None:
    """With other settings, and with the folder that it was trained in gone."""
    run = runs(folder / "mlflow.db")["tiny seed 0"]
    hidden = (folder / "runs").rename(folder / "hidden")
    try:
        store = f"sqlite:///{folder}/mlflow.db"
        arguments = ("evaluate", run.info.run_id, "evaluation.episodes=2", f"tracking.uri={store}")
        outcome = tt_ray(tmp_path, *arguments, "planner.horizon=1", "name=short")
        kept = tmp_path / "runs" / "downloads"
        (downloaded,) = kept.iterdir()
        made = downloaded.stat().st_mtime_ns
        succeeded(tt_ray(tmp_path, *arguments, "planner.horizon=2", "name=longer"))
        assert [path.stat().st_mtime_ns for path in kept.iterdir()] == [made]  # downloaded once
    finally:
        hidden.rename(folder / "runs")
    assert results(succeeded(outcome))["planner"][0] == "2"
    found = runs(folder / "mlflow.db")["short seed 0 evaluate"]
    assert (found.data.params["planner.horizon"], found.data.params["planner.beam_width"]) == ("1", "2")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_one_worker_and_two_seeds(first: Outcome, folder: Path, tmp_path: Path) -> None:
    write_file(tmp_path, **{**LINE, "resources": {"workers": 1}, "seeds": [3, 5]})
    outcome = succeeded(
        tt_ray(tmp_path, "run", "tiny.yaml", MINARI_DATASETS_PATH=str(folder / "data"), COLUMNS="80")
    )
    assert max(len(line) for line in outcome.out.splitlines() if "─" in line) <= 80
    found = runs(tmp_path / "mlflow.db")
    assert set(found) == {"tiny", "tiny seed 3", "tiny seed 5"}
    for seed in (3, 5):
        assert curve(tmp_path / "mlflow.db", found[f"tiny seed {seed}"], "train/loss") == [5, 10, 15, 20]
    means = [found[f"tiny seed {seed}"].data.metrics["return/mean"] for seed in (3, 5)]
    assert found["tiny"].data.metrics["return/mean"] == pytest.approx(np.mean(means))
    assert "return/seed_std" in found["tiny"].data.metrics


ENVIRONMENT = '''
import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    """Keep a point near zero; one of its observations never changes."""

    observation_space = gym.spaces.Dict({
        "place": gym.spaces.Box(-9, 9, (2,), np.float64),
        "goal": gym.spaces.Box(-1, 1, (1,), np.float64),
    })
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self.observation(), {}

    def step(self, action):
        self.place, self.steps = np.clip(self.place + 0.3 * action, -9, 9), self.steps + 1
        return self.observation(), -float(abs(self.place).sum()), False, self.steps == 15, {}

    def observation(self):
        return {"place": self.place.copy(), "goal": np.zeros(1)}


gym.register("MyEnv-v0", entry_point=MyEnv)
'''


def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    """By import path, with a Dict of observations and a constant column: collect, train, evaluate."""
    (tmp_path / "my_env.py").write_text(ENVIRONMENT)
    name = ["--id", "mine/task-v0"]
    collected = tt_ray(tmp_path, "data", "collect", "my_env:MyEnv-v0", *name, "steps=400", "final_episodes=2")
    assert re.search(r"final policy +-", succeeded(collected).out)
    assert "goal 0" in succeeded(tt_ray(tmp_path, "data", "show", "mine/task-v0")).out
    evaluation = {"episodes": 2, "baselines": ["random", "behaviour"]}
    write_file(tmp_path, dataset={"id": "mine/task-v0"}, training={"steps": 5}, evaluation=evaluation)
    rows = results(succeeded(tt_ray(tmp_path, "run", "tiny.yaml")))
    assert [rows[policy][0] for policy in ("random policy", "final behaviour policy", "planner")] == ["2"] * 3
    (episodes,) = (tmp_path / "runs" / "experiments").glob("*/episodes.parquet")
    frame = pd.read_parquet(episodes)
    assert set(frame[frame.policy == "planner"].length) == {15}


@pytest.fixture
def running(tmp_path: Path, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A training that takes some seconds, in a process group of its own."""
    variables = environment(MINARI_DATASETS_PATH=str(folder / "data"))
    write_file(tmp_path, **LINE, training={"steps": 400, "validate_every": 20})
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [TT_RAY, "train", "tiny.yaml"],
            cwd=tmp_path,
            env=variables,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        yield process
        process.kill()
        process.wait()


def test_ctrl_c(first: Outcome, folder: Path, tmp_path: Path, running: "subprocess.Popen[bytes]") -> None:
    """One line that says how to go on, and with --resume the training is finished."""
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/models/*/checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert running.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    assert running.wait(120) == 130
    said = (tmp_path / "err").read_text()
    assert said == "tt-ray: interrupted; the same command with --resume goes on from here\n"
    assert runs(tmp_path / "mlflow.db")["tiny seed 0"].info.status == "KILLED"
    where = {"MINARI_DATASETS_PATH": str(folder / "data")}
    refused = tt_ray(tmp_path, "train", "tiny.yaml", **where)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "add --resume to go on from there" in refused.err
    succeeded(tt_ray(tmp_path, "train", "tiny.yaml", "--resume", **where))
    (journal,) = tmp_path.glob("runs/models/*/journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record["metrics"]]
    assert steps == list(range(5, 401, 5))
    found = runs(tmp_path / "mlflow.db")["tiny seed 0"]
    assert found.info.status == "FINISHED"
    assert curve(tmp_path / "mlflow.db", found, "train/loss") == steps
