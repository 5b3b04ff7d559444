"""Sending journals to MLflow: the journal is the truth, and MLflow is brought up to date with it.

Sending is safe to repeat: MLflow's SQL stores keep one row for each (run, metric, step, time, value), params
that are there are left alone, and everything else overwrites itself. So the offset of what was sent moves
only after MLflow has accepted it, and after a crash the last batch simply goes out again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_ray.errors import UserError
from tt_ray.locks import exclusive
from tt_ray.tracking.connection import one_line, prepare_environment, sqlite_file
from tt_ray.tracking.journal import Record, now, read
from tt_ray.tracking.run import FINAL, RunState

logger = logging.getLogger(__name__)

IDENTITY_TAG = "tt_ray.run"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Else MLflow's UI opens an experiment on its page for traces of language models, which is empty."""
BATCH_POINTS = 800  # MLflow's limits for one log_batch call: 1000 of all, of these
BATCH_PARAMS = 100  # and as many tags
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_DIGEST_LENGTH = 36


class MlflowStore:
    """One experiment at one tracking URI: a client that any number of runs share, used by one thread."""

    def __init__(self, uri: str, experiment: str) -> None:
        prepare_environment()
        self.uri, self.experiment = uri, experiment
        self._client: Any = None
        self._experiment_id: str | None = None

    @property
    def client(self) -> Any:
        """MLflow's client, made when it is first needed: making one can fail."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment, which is made or restored where that is needed."""
        if self._experiment_id is None:
            self._experiment_id = ensure_experiment(self.client, self.experiment, self.uri)
        return self._experiment_id

    def forget(self) -> None:
        """Look for the experiment again: after an error it, or the whole database, may be gone."""
        self._experiment_id = None

    def problem(self) -> Exception | None:
        """Why the store answers nobody, or None if it does."""
        return attempt(lambda: self.client.search_experiments(max_results=1))

    def find(self, identity: str) -> str | None:
        """MLflow's id of the run that carries this identity."""
        condition = f"tags.`{IDENTITY_TAG}` = '{identity}'"
        runs = self.client.search_runs([self.experiment_id], condition, max_results=1)
        return runs[0].info.run_id if runs else None


@dataclass
class Batch:
    """What one call of MLflow's log_batch can take, of several lines of a journal."""

    points: list[tuple[str, float, int, int]] = field(default_factory=list)
    """key, value, time, step."""
    params: dict[str, str] = field(default_factory=dict)
    """The first value of each: MLflow refuses another."""
    tags: dict[str, str] = field(default_factory=dict)
    """The last value of each."""

    def add(self, record: Record) -> None:
        """Take up a line."""
        for key, value in record.get("metrics", {}).items():
            self.points.append((key, value, record["time"], record["step"]))
        self.params = record.get("params", {}) | self.params
        self.tags |= record.get("tags", {})

    def clear(self) -> None:
        """Be empty again."""
        self.points, self.params, self.tags = [], {}, {}


class Shipper:
    """Brings one run in MLflow up to date with its folder; used by one thread at a time.

    Any exception means: call `forget` and try again later, as `attempt` does.
    """

    def __init__(self, folder: Path, state: RunState, store: MlflowStore) -> None:
        self.state, self.store = state, store
        self.journal = folder / "journal.jsonl"
        self._folder = folder
        self._found = False
        self._params: set[str] | None = None  # keys that the run has in MLflow; None: not known

    @property
    def behind(self) -> bool:
        """Whether `send` has anything to do."""
        size = journal_size(self._folder)
        return size is not None and not (self._found and size == self.state.offset)

    @property
    def complete(self) -> bool:
        """The run has ended, and MLflow has all of it."""
        return not self.behind and self.state.status in FINAL and not self.state.pending

    def unsent(self) -> int:
        """Metric points after the offset."""
        return sum(len(record.get("metrics", ())) for record, _ in read(self.journal, self.state.offset))

    def attempt(self, step: Callable[[], None]) -> Exception | None:
        """Take a step (`find`, `send`, `upload` or `sync`): what went wrong, or None."""
        problem = attempt(step)
        if problem is not None:
            self.forget()
        return problem

    def forget(self) -> None:
        """Look for the run again: it, or the whole database, may be gone."""
        self._found, self._params = False, None
        self.store.forget()

    def sync(self) -> None:
        """Send what MLflow does not have yet; the metrics first."""
        self.send()
        self.upload()

    def find(self) -> None:
        """Point the state at this folder's run on this server; a new one there gets the whole journal."""
        if self._found:
            return
        state = self.state
        run_id = self.store.find(state.identity)
        shrunk = (journal_size(self._folder) or 0) < state.offset
        if run_id is None or run_id != state.run_id or shrunk:
            state.offset, state.pending, state.status = 0, [], ""
        state.run_id, state.uri = run_id or self._create(), self.store.uri
        state.save(self._folder)
        self._found = True

    def send(self) -> None:
        """Send what the journal holds beyond the offset; its artifacts are left to `upload`."""
        self.find()
        batch = Batch()
        end = self.state.offset
        for record, after in read(self.journal, end):
            if len(batch.points) + len(record.get("metrics", ())) > BATCH_POINTS:
                self._send(batch, end)
            batch.add(record)
            if record.get("status") in FINAL:  # by then MLflow has all the rest
                self._send(batch, end)
            self._apply(record)
            end = after
        self._send(batch, end)

    def upload(self) -> None:
        """Upload what is pending; what fails goes to the back of the queue, so that all have their turn."""
        self.find()
        pending = self.state.pending
        while pending:
            path, folder = pending[0]
            try:
                self._upload(Path(path), folder or None)
            except Exception:
                pending.append(pending.pop(0))
                raise
            del pending[0]
            self.state.save(self._folder)

    def _create(self) -> str:
        tags = {IDENTITY_TAG: self.state.identity}
        if self.state.parent is not None:
            parent = self.store.find(self.state.parent)
            if parent is None:
                raise MissingParentError("its parent run is not there yet")
            tags["mlflow.parentRunId"] = parent
        begin = next((record["time"] for record, _ in read(self.journal)), now())
        run = self.store.client.create_run(
            self.store.experiment_id, start_time=begin, tags=tags, run_name=self.state.name
        )
        self.state.status, self._params = "RUNNING", set()
        return run.info.run_id

    def _send(self, batch: Batch, end: int) -> None:
        """Send the batch in as few calls as MLflow allows, then move the offset to `end`."""
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*point) for point in batch.points]
        params = [Param(k, v[:MAX_PARAM_LENGTH]) for k, v in self._missing(batch.params).items()]
        tags = [RunTag(k, v[:MAX_TAG_LENGTH]) for k, v in batch.tags.items()]
        while points or params or tags:
            self.store.client.log_batch(
                self.state.run_id,
                metrics=points[:BATCH_POINTS],
                params=params[:BATCH_PARAMS],
                tags=tags[:BATCH_PARAMS],
            )
            del points[:BATCH_POINTS], params[:BATCH_PARAMS], tags[:BATCH_PARAMS]
        if self._params is not None:
            self._params |= batch.params.keys()
        batch.clear()
        if end != self.state.offset:
            self.state.offset = end
            self.state.save(self._folder)

    def _missing(self, params: Mapping[str, str]) -> dict[str, str]:
        """Those whose key the run does not have: MLflow refuses a changed value."""
        if params and self._params is None:
            self._params = set(self.store.client.get_run(self.state.run_id).data.params)
        return {key: value for key, value in params.items() if key not in (self._params or ())}

    def _apply(self, record: Record) -> None:
        """What goes into no batch; the status comes last."""
        run_id = self.state.run_id
        if "dataset" in record:
            self.store.client.log_inputs(run_id, [dataset_input(record["dataset"])])
        if "artifact" in record and record["artifact"] not in self.state.pending:
            self.state.pending.append(record["artifact"])
        status = record.get("status")
        if status in FINAL:
            self.store.client.set_terminated(run_id, status, record["time"])
        elif status is not None and status != self.state.status:
            self.store.client.update_run(run_id, status=status)
        self.state.status = status or self.state.status

    def _upload(self, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self.store.client.log_artifacts(self.state.run_id, str(path), folder)
        elif path.exists():
            self.store.client.log_artifact(self.state.run_id, str(path), folder)
        else:
            logger.warning("artifact %s of run %r was removed before it was uploaded", path, self.state.name)


class MissingParentError(LookupError):
    """The parent's run is to be made first."""


def journal_size(folder: Path) -> int | None:
    """Bytes in the folder's journal; None while there is none."""
    try:
        return (folder / "journal.jsonl").stat().st_size
    except FileNotFoundError:
        return None


def ensure_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment `name`: made or restored by whichever process comes first."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            place = _artifact_location(name, uri)
            return client.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process was faster?
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def _artifact_location(experiment: str, uri: str) -> str | None:
    """Beside an SQLite file, where MLflow's default is the working folder; a server knows its own."""
    database = sqlite_file(uri)
    if database is None:
        return None
    readable = re.sub(r"[^\w.-]+", "_", experiment)
    digest = hashlib.sha256(experiment.encode()).hexdigest()[:8]
    return str(database.parent / "mlruns" / f"{readable}-{digest}")


def dataset_input(record: Record) -> Any:
    """MLflow's data set entity of a journal's `dataset` line."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = record["source"]
    remote = source.startswith(("http://", "https://"))
    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:MAX_DIGEST_LENGTH],
        source_type="http" if remote else "local",
        source=json.dumps({"url" if remote else "uri": source}),
        profile=json.dumps(record["profile"]),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", record["context"])])


def send_leftovers(root: Path | str, uri: str) -> int:
    """Send what runs in folders below `root` could not send when they ended; how many runs that was.

    Runs that another process holds, or whose parent it holds, are left to it. `UserError` where MLflow does
    not take them.
    """
    found = [(path.parent, RunState.load(path.parent)) for path in sorted(Path(root).rglob("run.json"))]
    runs = {folder: state for folder, state in found if state is not None}
    homes = {state.identity: folder for folder, state in runs.items()}
    sent, problems = 0, list[str]()
    for folder, state in sorted(runs.items(), key=lambda run: run[1].parent is not None):  # parents first
        complete = state.uri == uri and journal_size(folder) == state.offset
        if not complete or state.pending:
            with suppress(UserError), ExitStack() as locks:
                for home in {folder, homes.get(state.parent or "", folder)}:
                    locks.enter_context(exclusive(home, "its command sends it"))
                current = RunState.load(folder) or state  # its command may have sent more since
                shipper = Shipper(folder, current, MlflowStore(uri, state.experiment))
                problem = shipper.attempt(shipper.sync)
                sent += problem is None
                problems += [] if problem is None else [f"{folder}: {one_line(problem)}"]
    if problems:
        raise UserError(f"MLflow at {uri} does not take what earlier runs left: {problems[0]}")
    return sent


def attempt(call: Callable[[], Any]) -> Exception | None:
    """The exception that the call ends with, or None."""
    try:
        call()
    except Exception as error:  # whatever MLflow's client raises
        return error
    return None
