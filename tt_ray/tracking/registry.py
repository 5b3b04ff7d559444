"""What only MLflow's own client can say: which model is the best one, and how the UI shows an experiment."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ray.tracking.mlflow_store import MlflowStore
from tt_ray.tracking.run import RunState

ALIAS = "champion"
VIEW = "best-first"
"""Key of the view of the runs table that is shared with everybody, in the page's address."""
FIRST_COLUMNS = {"attributes.`Run Name`": 330, "runDateAndNestInfo": 150}
"""Where the UI always has a run's name and age, and how wide they are; names are longer than its default."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
NOTE = "mlflow.note.content"
"""Tag of a description, which the UI shows as Markdown."""


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The run with the best model, as the registry is told of it."""

    model: str
    """Name of the registered model; what MLflow does not allow in one is replaced."""
    folder: Path
    """Of the run, which has the artifact `checkpoint`."""
    tags: Mapping[str, str]
    """Of the model's version; `checkpoint.fingerprint` says whether a version is this one."""
    description: str


def register(store: MlflowStore, champion: Champion) -> None:
    """Give the champion's checkpoint a version of the registered model, once, and the alias to that version.

    Nothing is packed or pickled: the version's source is the checkpoint's folder among the run's artifacts.
    """
    from mlflow.exceptions import MlflowException

    client, name = store.client, re.sub(r"[/:%\"'\\]+", "-", champion.model)
    state = RunState.load(champion.folder)
    run_id = None if state is None else store.find(state.identity)
    if run_id is None:
        raise LookupError(f"the run of {champion.folder} is not there yet")
    try:
        client.create_registered_model(name, tags={"kind": "tt-ray"}, description=champion.description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(name, champion.description)
    mark = champion.tags["checkpoint.fingerprint"]
    for version in client.search_model_versions(f"name='{name}'"):
        if version.run_id == run_id and version.tags.get("checkpoint.fingerprint") == mark:
            break
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/checkpoint"
        version = client.create_model_version(name, source, run_id, tags=dict(champion.tags))
    client.set_registered_model_alias(name, ALIAS, version.version)


def show_runs(
    store: MlflowStore, question: str, columns: Sequence[str], metric: str, ascending: bool, parent: Path
) -> None:
    """The experiment's page: a view with these columns, best on top, and a description that links to it.

    columns: such as "params.`planner.horizon`". A description that the user has written stays.
    """
    client, experiment = store.client, store.experiment_id
    state = RunState.load(parent)
    expanded = {state.run_id: True} if state is not None and state.run_id is not None else {}
    view: dict[str, Any] = {
        "selectedColumns": [*columns, "attributes.`Description`"],
        "columnOrder": [*FIRST_COLUMNS, *columns, "attributes.`Description`"],
        "columnWidths": FIRST_COLUMNS | {"attributes.`Description`": 600},
        "runsExpanded": expanded,
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": ascending,
    }
    client.set_experiment_tag(experiment, VIEW_TAG, json.dumps(view))
    link = f"[The trials, best first]({_page(experiment, VIEW)})"
    present = client.get_experiment(experiment).tags.get(NOTE, "")
    if not present or present.endswith(link):
        client.set_experiment_tag(experiment, NOTE, f"{question}\n\n{link}".strip())


def experiment_page(uri: str, name: str) -> str:
    """What comes after the UI's address to see an experiment's runs; empty where MLflow cannot tell."""
    try:
        experiment = MlflowStore(uri, name).client.get_experiment_by_name(name)
    except Exception:  # whatever MLflow's client raises; the work is done, and this only an address
        experiment = None
    if experiment is None:
        return ""
    return _page(experiment.experiment_id, VIEW if VIEW_TAG in experiment.tags else "")


def _page(experiment: str, view: str) -> str:
    """The workflow is named because the UI is about language models until it is told otherwise."""
    query = f"workflowType=machine_learning{f'&viewStateShareKey={view}' if view else ''}"
    return f"#/experiments/{experiment}/runs?{query}"
