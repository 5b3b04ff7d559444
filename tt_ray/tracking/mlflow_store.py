"""Runs in MLflow: the journal is the truth, and a background thread sends what MLflow does not have yet.

Sending is safe to repeat: MLflow's SQL stores keep one row for each (run, metric, step, time, value), params
that are there are left alone, and everything else overwrites itself. So the offset of what was sent moves
only after MLflow has accepted it, and after a crash the last batch simply goes out again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tt_ray.errors import UserError
from tt_ray.locks import exclusive
from tt_ray.tracking.connection import one_line, prepare_environment, sqlite_file
from tt_ray.tracking.journal import Journal, Record, now, read
from tt_ray.tracking.run import Run, RunState, Status, open_folder

logger = logging.getLogger(__name__)

IDENTITY_TAG = "tt_ray.run"
BATCH_POINTS = 1000  # MLflow's limits for one log_batch call
BATCH_PARAMS = 100  # and tags
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_DIGEST_LENGTH = 36
MAX_DELAY = 30.0  # seconds between two tries
KILLED_WAIT = 5.0  # seconds that a run ended by Ctrl-C waits for a server that is away


class MlflowTracker:
    """Starts runs in one MLflow experiment; `uri` as `connect` returned it."""

    def __init__(
        self, uri: str, experiment: str, *, interval: float = 2.0, finish_wait: float = 30.0
    ) -> None:
        """interval: seconds between batches; finish_wait: seconds that `finish` waits for a lost server."""
        self.uri, self.experiment = uri, experiment
        self.interval, self.finish_wait = interval, finish_wait

    def start(
        self,
        name: str,
        folder: Path | str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> MlflowRun:
        """See `Tracker.start`. With the server away the run starts all the same and appears there later."""
        folder = Path(folder)
        state, journal = open_folder(name, self.experiment, folder, params, tags, parent)
        shipper = Shipper(folder, state, self.uri, self.interval)
        shipper.start()
        return MlflowRun(state, journal, shipper, self.finish_wait)


class MlflowRun(Run):
    """A run whose journal is sent to MLflow, also the lines that other processes append to it."""

    def __init__(self, state: RunState, journal: Journal, shipper: Shipper, finish_wait: float) -> None:
        super().__init__(state, journal)
        self._shipper, self._finish_wait = shipper, finish_wait

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None while no server has been reached yet."""
        return self.state.run_id

    @property
    def unsent(self) -> int:
        """Metric points in the journal that MLflow has not accepted yet."""
        return self._shipper.unsent()

    def finish(self, status: Status = "FINISHED") -> None:
        """Send everything, waiting a bounded time for a lost server; what it misses stays in the journal."""
        if self.finished:
            return
        super().finish(status)
        self._shipper.close(min(self._finish_wait, KILLED_WAIT) if status == "KILLED" else self._finish_wait)


class Shipper:
    """Brings one run in MLflow up to date with its folder. One thread at a time calls `sync`."""

    def __init__(self, folder: Path, state: RunState, uri: str, interval: float = 2.0) -> None:
        prepare_environment()
        self._folder, self._state, self._uri, self._interval = folder, state, uri, interval
        self._journal = folder / "journal.jsonl"
        self._client: Any = None
        self._found = False
        self._problem: str | None = None  # why the last try failed
        self._wake = threading.Event()
        self._deadline: float | None = None  # set once the run is finishing
        self._thread = threading.Thread(target=self._work, name=f"tracking-{state.name}", daemon=True)

    def start(self) -> None:
        """Find or make the run in MLflow now, if the server is there, and send from a thread of its own."""
        try:
            self._find_run()
        except Exception as error:
            self._failed(error)
        self._thread.start()

    def close(self, wait: float) -> None:
        """Send the rest. Give up when it cannot be sent for `wait` seconds, and say what stays behind."""
        self._deadline = time.monotonic() + wait
        self._wake.set()
        self._thread.join(wait)
        while self._thread.is_alive() and self._problem is None:  # slow, but getting on
            self._thread.join(0.5)
        if unsent := self.unsent() + len(self._state.pending):
            logger.warning(
                "%d points and artifacts of run %r stay in %s, because MLflow at %s did not take them (%s); "
                "the next command with --resume sends them",
                *(unsent, self._state.name, self._journal, self._uri, self._problem or "no time left"),
            )

    def unsent(self) -> int:
        """Metric points after the offset."""
        return sum(len(record.get("metrics", ())) for record, _ in read(self._journal, self._state.offset))

    def sync(self) -> None:
        """Send what the journal holds beyond the offset; any exception means: try again later."""
        self._find_run()
        points: list[Any] = []
        end = self._state.offset
        for record, after in read(self._journal, end):
            if "metrics" not in record or len(points) >= BATCH_POINTS:
                self._send(points, end)
                points = []
            points += self._points(record)
            if "metrics" not in record:
                self._apply(record)
            end = after
        self._send(points, end)
        self._upload()

    def _work(self) -> None:
        delay = self._interval
        while True:
            self._wake.wait(delay)
            self._wake.clear()
            finishing = self._deadline is not None
            try:
                self.sync()
            except Exception as error:
                self._failed(error)
                delay = 1.0 if finishing else min(2 * delay, MAX_DELAY)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    return
                continue
            if self._problem is not None:
                logger.info("MLflow at %s is back; run %r is up to date", self._uri, self._state.name)
            self._problem, delay = None, self._interval
            if finishing:
                return

    def _failed(self, error: Exception) -> None:
        self._found = False  # the run, or the whole database, may be gone
        if self._problem is None:
            logger.warning(
                "MLflow at %s does not take run %r (%s); its results stay in %s until it does",
                *(self._uri, self._state.name, one_line(error), self._journal),
            )
        self._problem = one_line(error)

    def _find_run(self) -> None:
        """Point the state at this folder's run on this server; a new one there gets the whole journal."""
        if self._found:
            return
        from mlflow import MlflowClient

        state = self._state
        self._client = MlflowClient(tracking_uri=self._uri)
        experiment_id = ensure_experiment(self._client, state.experiment, self._uri)
        run_id = self._search(experiment_id, state.identity)
        shrunk = not self._journal.exists() or self._journal.stat().st_size < state.offset
        if run_id is None or run_id != state.run_id or shrunk:
            state.offset, state.pending = 0, []
        state.run_id, state.uri = run_id or self._create(experiment_id), self._uri
        state.save(self._folder)
        self._found = True

    def _search(self, experiment_id: str, identity: str) -> str | None:
        runs = self._client.search_runs(
            [experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1
        )
        return runs[0].info.run_id if runs else None

    def _create(self, experiment_id: str) -> str:
        tags = {IDENTITY_TAG: self._state.identity}
        if self._state.parent is not None:
            parent = self._search(experiment_id, self._state.parent)
            if parent is None:
                raise LookupError("its parent run is not there yet")
            tags["mlflow.parentRunId"] = parent
        begin = next((record["time"] for record, _ in read(self._journal)), now())
        run = self._client.create_run(experiment_id, start_time=begin, tags=tags, run_name=self._state.name)
        return run.info.run_id

    def _points(self, record: Record) -> list[Any]:
        from mlflow.entities import Metric

        return [Metric(k, v, record["time"], record["step"]) for k, v in record.get("metrics", {}).items()]

    def _send(self, points: list[Any], end: int) -> None:
        """Send the points, then move the offset to `end`."""
        for i in range(0, len(points), BATCH_POINTS):
            self._client.log_batch(self._state.run_id, metrics=points[i : i + BATCH_POINTS])
        if end != self._state.offset:
            self._state.offset = end
            self._state.save(self._folder)

    def _apply(self, record: Record) -> None:
        """Everything that is not metrics, in an order in which the status comes last."""
        run_id = self._state.run_id
        if record.get("params"):
            self._send_params(record["params"])
        if record.get("tags"):
            self._send_tags(record["tags"])
        if "dataset" in record:
            self._client.log_inputs(run_id, [dataset_input(record["dataset"])])
        if "artifact" in record and record["artifact"] not in self._state.pending:
            self._state.pending.append(record["artifact"])
        if record.get("status") == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        elif "status" in record:
            self._client.set_terminated(run_id, record["status"], record["time"])

    def _send_params(self, params: Mapping[str, str]) -> None:
        """Those whose key the run does not have: MLflow refuses a changed value."""
        from mlflow.entities import Param

        known = self._client.get_run(self._state.run_id).data.params
        missing = [Param(k, v[:MAX_PARAM_LENGTH]) for k, v in params.items() if k not in known]
        for i in range(0, len(missing), BATCH_PARAMS):
            self._client.log_batch(self._state.run_id, params=missing[i : i + BATCH_PARAMS])

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(k, v[:MAX_TAG_LENGTH]) for k, v in tags.items()]
        for i in range(0, len(entities), BATCH_PARAMS):
            self._client.log_batch(self._state.run_id, tags=entities[i : i + BATCH_PARAMS])

    def _upload(self) -> None:
        """Pending artifacts; one that fails stays pending and does not hold up the metrics."""
        while self._state.pending:
            path, folder = self._state.pending[0]
            if Path(path).is_dir():
                self._client.log_artifacts(self._state.run_id, path, folder or None)
            elif Path(path).exists():
                self._client.log_artifact(self._state.run_id, path, folder or None)
            else:
                logger.warning(
                    "artifact %s of run %r was removed before it was uploaded", path, self._state.name
                )
            del self._state.pending[0]
            self._state.save(self._folder)


def ensure_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment `name`: made or restored by whichever process comes first."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(name, uri))
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

    Runs that another process holds are left to it. `UserError` where MLflow does not take them.
    """
    found = [(path.parent, RunState.load(path.parent)) for path in sorted(Path(root).rglob("run.json"))]
    runs = [(folder, state) for folder, state in found if state is not None]
    sent, problems = 0, list[str]()
    for folder, state in sorted(runs, key=lambda run: run[1].parent is not None):  # a child needs its parent
        journal = folder / "journal.jsonl"
        complete = state.uri == uri and journal.exists() and journal.stat().st_size == state.offset
        if not complete or state.pending:
            with suppress(UserError), exclusive(folder, "its command sends it"):
                problem = _sync(Shipper(folder, state, uri))
                sent += problem is None
                problems += [] if problem is None else [f"{folder}: {one_line(problem)}"]
    if problems:
        raise UserError(f"MLflow at {uri} does not take what earlier runs left: {problems[0]}")
    return sent


def _sync(shipper: Shipper) -> Exception | None:
    try:
        shipper.sync()
    except Exception as error:  # whatever MLflow's client raises
        return error
    return None
