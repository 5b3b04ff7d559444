"""The registered model and the experiment's page, in an SQLite store."""

import json
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import new_store

from tt_ray.tracking import (
    Champion,
    MlflowRun,
    MlflowStore,
    MlflowTracker,
    experiment_page,
    register,
    show_runs,
)
from tt_ray.tracking.registry import NOTE, VIEW_TAG


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def store(uri: str, request: pytest.FixtureRequest) -> MlflowStore:
    return MlflowStore(uri, request.node.name)


def trained(store: MlflowStore, folder: Path) -> MlflowRun:
    """A run that has ended with a checkpoint."""
    checkpoint = folder / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    with MlflowTracker(store.uri, store.experiment).start("trial", folder) as run:
        run.artifact(checkpoint, "checkpoint")
    return run


def champion(folder: Path, fingerprint: str = "f1") -> Champion:
    tags = {"checkpoint.fingerprint": fingerprint, "seed": "0"}
    return Champion(model="a study: bins/beams", folder=folder, tags=tags, description="Which?")


def test_the_alias_follows_the_champion_and_no_version_comes_twice(
    store: MlflowStore, tmp_path: Path
) -> None:
    name, client = "a study- bins-beams", store.client
    runs = {letter: trained(store, tmp_path / letter) for letter in "ab"}
    held: list[Any] = []
    for letter in "aabba":  # a again, b in its place, and a once more
        register(store, champion(tmp_path / letter))
        held.append(client.get_model_version_by_alias(name, "champion"))
    assert [int(version.version) for version in held] == [1, 1, 2, 2, 1]
    assert [version.run_id for version in held[1:3]] == [runs["a"].run_id, runs["b"].run_id]
    assert (Path(held[0].source) / "model.safetensors").read_bytes() == b"weights"
    assert held[0].tags["seed"] == "0"
    register(store, champion(tmp_path / "a", "f2"))  # the same run, trained anew
    assert int(client.get_model_version_by_alias(name, "champion").version) == 3
    assert len(client.search_model_versions(f"name='{name}'")) == 3


def test_a_run_that_is_not_there_yet(store: MlflowStore, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="is not there yet"):
        register(store, champion(tmp_path))


def test_the_page_of_an_experiment(store: MlflowStore, tmp_path: Path) -> None:
    client = store.client
    assert experiment_page(store.uri, store.experiment) == ""
    run = trained(store, tmp_path / "a")
    number = store.experiment_id
    plain = f"#/experiments/{number}/runs?workflowType=machine_learning"
    assert experiment_page(store.uri, store.experiment) == plain
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == "custom_model_development"
    for question in ("Which?", "Which one?"):
        show_runs(store, question, ["params.`planner.horizon`"], "val/loss", True, tmp_path / "a")
        tags = client.get_experiment(number).tags
        assert tags[NOTE].startswith(f"{question}\n\n[")
        assert experiment_page(store.uri, store.experiment) in tags[NOTE]
    view = json.loads(tags[VIEW_TAG])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val/loss`", True)
    assert view["runsExpanded"] == {run.run_id: True}
    client.set_experiment_tag(number, NOTE, "mine")
    show_runs(store, "Which?", [], "val/loss", True, tmp_path / "a")
    assert client.get_experiment(number).tags[NOTE] == "mine"


def test_a_store_that_is_away() -> None:
    assert experiment_page("http://127.0.0.1:9", "any") == ""
