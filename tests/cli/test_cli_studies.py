"""`tt-ray attention` and `tt-ray data bins` on tiny data: what they show, write, log and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import (
    DATASET,
    files_below,
    recorded,
    settings,
    train_here,
    training_job,
    write_data,
    write_file,
)
from matplotlib.image import imread
from mlflow import MlflowClient

from tt_ray.cli.attention import attention
from tt_ray.cli.reconstruct import bins
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.token_store import TokenSet
from tt_ray.errors import UserError
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.training.job import make_job


@pytest.fixture
def checkpoint(here: Path) -> Path:
    """A checkpoint that was trained for one step on the data set that is there."""
    write_data()
    return train_here(training_job(), here / "model")


def test_attention_of_a_model(
    checkpoint: Path, here: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attention(str(here / "model"), windows=5)
    shown = capsys.readouterr().out
    assert "Heads, mean over 5 held-out windows" in shown
    assert "most markovian" in shown
    assert "above the controls' largest" in shown
    (folder,) = (here / "runs" / "attention").iterdir()
    assert str(folder) in shown.replace("\n", "")
    for name in ("maps.png", "heads.png"):
        assert min(imread(folder / name).shape[:2]) > 300
    found = json.loads((folder / "attention.json").read_text())
    assert (found["checkpoint"], found["dataset"], found["step"]) == (str(checkpoint), DATASET, 1)
    assert [(row["layer"], row["head"]) for row in found["heads"]] == [(1, 1), (1, 2)]
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny seed 0 attention", "FINISHED")
    assert run.data.metrics["attention/windows"] == 5
    for name in ("markovian", "striated"):
        assert run.data.metrics[f"attention/{name}"] == pytest.approx(found[name]["score"])
        assert run.data.metrics[f"attention/{name}_control"] == pytest.approx(found[name]["control"])
    assert run.data.params["model.embed_dim"] == "16"
    assert run.data.tags["checkpoint"] == str(checkpoint)
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"maps.png", "heads.png", "attention.json"}


def test_attention_again_is_the_same_run(checkpoint: Path, here: Path, store: str) -> None:
    file = "attention.json"
    for _ in range(2):
        attention(str(checkpoint), windows=5)
    (folder,) = (here / "runs" / "attention").iterdir()
    once = (folder / file).read_text()
    attention(str(checkpoint), ["resources.storage=elsewhere"], windows=5)
    (copy,) = (here / "elsewhere" / "attention").iterdir()
    assert (copy.name, (copy / file).read_text()) == (folder.name, once)
    client = MlflowClient(tracking_uri=store)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 2  # one in each storage


def test_attention_of_a_goal_model(here: Path, store: str) -> None:
    write_data()
    config = experiment_from_dict(settings(training={"steps": 1}, goal={"relabel": "future", "dims": [0, 2]}))
    episodes = load_episodes(DATASET, goal=config.goal)
    tokens = TokenSet.build(episodes, config.dataset, config.discretizer, config.goal)
    train_here(make_job(config, tokens, seed=0), here / "model")
    attention(str(here / "model"), windows=3)
    (folder,) = (here / "runs" / "attention").iterdir()
    assert json.loads((folder / "attention.json").read_text())["windows"] == 3


def refuse_attention(parts: tuple[str, ...], here: Path, target: Path) -> None:
    before = files_below(here)
    with pytest.raises(UserError) as refused:
        attention(str(target), windows=5)
    for part in parts:
        assert part in str(refused.value)
    assert {path for path in files_below(here) - before if not path.startswith("mlflow.db")} <= {"runs"}


def test_attention_needs_the_data(checkpoint: Path, here: Path, store: str) -> None:
    (here / "data").rename(here / "moved")
    refuse_attention((f"no data set {DATASET}", "tt-ray data"), here, checkpoint)


def test_attention_needs_the_same_data(checkpoint: Path, here: Path, store: str) -> None:
    write_data([recorded(9, seed=100 + i) for i in range(12)], overwrite=True)
    refuse_attention((f"data set {DATASET}: not the data that", "held-out"), here, checkpoint)


def test_attention_needs_long_windows(here: Path, store: str) -> None:
    write_data()
    checkpoint = train_here(training_job(model={"context_transitions": 3}), here / "model")
    refuse_attention(
        ("a window of 3 transitions is too short", "model.context_transitions"), here, checkpoint
    )
    (here / "none").mkdir()
    refuse_attention(("no checkpoint folder",), here, here / "none")


def test_bins_of_a_data_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data()
    bins(DATASET, ["dataset.validation_fraction=0.25"], counts="5,20", out=None)
    shown = capsys.readouterr().out
    for text in ("uniform", "quantile", "obs. 2", "rmse of each dimension", "entropy"):
        assert text in shown
    (folder,) = (here / "runs" / "bins").iterdir()
    table = pd.read_parquet(folder / "bins.parquet")
    assert len(table) == 2 * 2 * 6  # three observation dimensions, an action, reward, value
    assert list(dict.fromkeys(zip(table["strategy"], table["num_bins"], strict=True))) == [
        ("uniform", 5), ("uniform", 20), ("quantile", 5), ("quantile", 20)
    ]  # fmt: skip
    assert np.isfinite(table["rmse"]).all()
    assert min(imread(folder / "bins.png").shape[:2]) > 500
    assert not (here / "mlflow.db").exists()


def test_bins_of_an_experiment_file_with_its_settings(here: Path) -> None:
    write_data()
    file = write_file(here, dataset={"validation_fraction": 0.25, "delayed_rewards": True})
    bins(str(file), [], counts="20", out=here / "mine")
    delayed = pd.read_parquet(here / "mine" / "bins.parquet")
    bins(str(file), ["dataset.delayed_rewards=false"], counts="20", out=here / "mine")
    plain = pd.read_parquet(here / "mine" / "bins.parquet")
    assert (delayed["rmse"] != plain["rmse"]).groupby(plain["kind"]).any().to_dict() == {
        "observation": False, "action": False, "reward": True, "value": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "options", "part"),
    [
        (DATASET, {"counts": "10,x"}, "--bins 10,x: expected whole numbers"),
        (DATASET, {"counts": "10,10"}, "names a number twice"),
        (DATASET, {"counts": "1,10"}, "discretizer.num_bins: must lie between 2"),
        ("no/such-v0", {}, "no data set no/such-v0"),
        (DATASET, {"out": Path("file/below")}, "--out file/below: cannot be made"),
        (DATASET, {"overrides": ["model.embed_dim=3"]}, "model.embed_dim"),
        (DATASET, {"overrides": ["dataset.validation_fraction=0"]}, "no episode is held out"),
    ],
)
def test_what_bins_refuses(here: Path, given: str, options: dict[str, object], part: str) -> None:
    write_data()
    (here / "file").touch()
    call: Callable[..., None] = bins
    arguments = {"overrides": [], "counts": "10,20", "out": here / "out", **options}
    with pytest.raises(UserError) as refused:
        call(given, **arguments)
    assert part in str(refused.value)
    assert not list((here / "out").glob("*"))


def test_both_are_commands(refused: Callable[..., str]) -> None:
    refused("attention", "no/such/model", parts=("no/such/model: no such folder",))
    refused("data", "bins", "no/such-v0", "--bins", "5", parts=("no data set no/such-v0",))
