"""Damaged files of the storage folder: stages, claims, journals, records, tokens."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import count_of, damaged, fuzz, json_texts, odd_data, result_or_line
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_fuzz_models import LAYOUT, SPEC, header_changes

from tt_ray.data.discretizer import Discretizer
from tt_ray.data.token_store import TokenSet, read_spec
from tt_ray.distributed.evaluate import read_episodes
from tt_ray.distributed.holders import Holder
from tt_ray.distributed.prediction import _read as read_prediction
from tt_ray.distributed.stages import MANIFEST, StageStore
from tt_ray.distributed.sweeps.cells import RESULT, Record, read_record
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.tracking.journal import Journal, parse, read
from tt_ray.tracking.mlflow_store import Batch
from tt_ray.tracking.run import RunState

KEY = "0123456789abcdef"
EPISODE = EpisodeResult(
    seed=3,
    episode_return=1.5,
    length=7,
    terminated=True,
    decisions=7,
    environment_seconds=0.5,
    planning_seconds=0.25,
    score=12.0,
    path=((0.0, 1.0), (2.0, 3.0)),
    goal=(1.0, 2.0),
)


def write_stage(folder: Path) -> Path:
    with StageStore(folder).claim("models", KEY, inputs=[("tokens", KEY)]) as stage:
        stage.path.mkdir(parents=True)
        (stage.path / "file").write_text("x")
        stage.publish({"model": "toy"})
    return folder / "models" / KEY / MANIFEST


def read_stage(file: Path) -> None:
    store = StageStore(file.parents[2])
    stage = result_or_line(lambda: store.find("models", KEY))
    result_or_line(lambda: list(store.stages(partial=True)))
    if stage is not None:
        assert stage.seconds >= 0 or stage.seconds < 0 or np.isnan(stage.seconds)
        assert stage.created is not None
        assert stage.created.tzinfo is not None


def write_note(folder: Path) -> Path:
    (folder / "models" / ".claims").mkdir(parents=True)
    file = folder / "models" / ".claims" / f"{KEY}.json"
    note = {"seconds": 3.5, "started": 1.0, "inputs": [["tokens", KEY]]}
    file.write_text(json.dumps(note))
    return file


def read_note(file: Path) -> None:
    """A claim is given whatever the record of earlier holders says."""
    claims = StageStore(file.parents[2]).claims["models"]
    claims.inputs(KEY), claims.begun()
    claim = claims.take(KEY)
    assert claim is not None
    assert isinstance(claim.inputs, list)
    claim.release(remember=False)
    file.parent.mkdir(exist_ok=True)


def write_state(folder: Path) -> Path:
    RunState("toy", "study", "parent", pending=[["a", "b"]]).save(folder)
    return folder / "run.json"


def read_state(file: Path) -> None:
    state = result_or_line(lambda: RunState.load(file.parent))
    if state is not None:
        assert state.offset >= 0


def write_record(folder: Path) -> Path:
    record = Record(trial=KEY, name="toy", index=0, case="", seed=1, settings={"planner.horizon": 5})
    record.metrics, record.reports, record.reused = {"score/mean": 1.0}, [[1, 2.0]], {"models": 1}
    record.episodes = [EPISODE.to_json()]
    record.save(folder)
    return folder / RESULT


def read_cell(file: Path) -> None:
    record = result_or_line(lambda: read_record(file.parent))
    if record is not None:
        assert all(isinstance(result, EpisodeResult) for result in record.results)
        json.dumps(asdict(record))


ONE_FILE: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "manifest": (write_stage, read_stage),
    "claim": (write_note, read_note),
    "run state": (write_state, read_state),
    "record": (write_record, read_cell),
}


@pytest.mark.parametrize("kind", ONE_FILE)
@count_of(200, 5000)
def test_damaged_json_files(kind: str, count: int, tmp_path: Path) -> None:
    write, use = ONE_FILE[kind]
    file = write(tmp_path)
    use(file)
    write(tmp_path / "again").unlink() if kind != "run state" else None
    plain = json.loads(file.read_text()) if file.exists() else {"seconds": 3.5, "inputs": [["tokens", KEY]]}

    def check(content: bytes) -> None:
        file.write_bytes(content)
        use(file)

    fuzz(json_texts(plain), check, count)


LINES = [
    {"time": 5, "status": "RUNNING", "params": {"a": "1"}, "tags": {"b": "2"}},
    {"time": 6, "step": 1, "metrics": {"train/loss": 1.5, "val/loss": 2.0}},
    {"time": 7, "artifact": ["path", "folder"]},
    {"time": 8, "step": 2, "metrics": {"train/loss": 1.0}},
    {"time": 9, "status": "FINISHED"},
]


def journals(plain: list[Any]) -> st.SearchStrategy[bytes]:
    text = b"".join(json.dumps(line).encode() + b"\n" for line in plain)
    odd = odd_data(plain).map(lambda lines: b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return st.one_of(
        damaged(text), odd, odd, json_texts(plain[1]).map(lambda line: text + line + b"\n" + text)
    )


@count_of(200, 5000)
def test_damaged_journals(count: int, tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"

    def check(content: bytes) -> None:
        records = [record for record, _ in parse(io.BytesIO(content), 0)]
        batch = Batch()
        for record in records:
            batch.add(record)
        file.write_bytes(content)
        Journal(tmp_path).append({"new/metric": 1.0}, 1)
        assert [record for record, _ in read(file)][-1]["metrics"] == {"new/metric": 1.0}

    fuzz(journals(LINES), check, count)


@count_of(200, 5000)
def test_damaged_episodes(count: int, tmp_path: Path) -> None:
    def check(content: bytes) -> None:
        (tmp_path / "episodes.jsonl").write_bytes(content)
        found = result_or_line(lambda: read_episodes(tmp_path))
        assert found is None or all(seed == result.seed for seed, result in found.items())

    lines = [{**EPISODE.to_json(), "seed": seed} for seed in range(3)]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sorted(read_episodes(tmp_path)) == [0, 1, 2]
    fuzz(journals(lines), check, count)


@count_of(200, 5000)
def test_damaged_tokens(count: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="uniform", num_bins=LAYOUT.num_bins)
    offsets, ends = np.array([0, 8, 20]), np.arange(20) == 7
    folder = tmp_path / "tokens"
    TokenSet(bins.encode(values), offsets, ends, bins, LAYOUT, SPEC).save(folder)
    arrays, description = folder / "tokens.safetensors", folder / "tokens.json"
    sound = {file: file.read_bytes() for file in (arrays, description)}

    def check(change: tuple[Path, bytes]) -> None:
        file, content = change
        file.write_bytes(content)
        found = result_or_line(lambda: TokenSet.load(folder))
        result_or_line(lambda: read_spec(folder))
        if found is not None:
            rows = found.tokens[found.offsets[:-1]]
            stopped = np.minimum(rows, found.layout.num_bins - 1)
            assert np.isfinite(found.discretizer.decode(stopped)).all()
        file.write_bytes(sound[file])

    texts = json_texts(json.loads(sound[description]))
    contents = st.one_of(damaged(sound[arrays]), header_changes(sound[arrays]))
    fuzz(
        st.one_of(st.tuples(st.just(description), texts), st.tuples(st.just(arrays), contents)), check, count
    )


@count_of(100, 2000)
def test_damaged_predictions(count: int, tmp_path: Path) -> None:
    file = tmp_path / "prediction.safetensors"
    names = ("log_likelihood", "live", "errors", "example")
    save_file({name: np.zeros((2, 3)) for name in names}, file)
    sound = file.read_bytes()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        result_or_line(lambda: read_prediction(file))

    fuzz(st.one_of(damaged(sound), header_changes(sound)), check, count)


@count_of(200, 5000)
def test_odd_names_of_holders(count: int, tmp_path: Path) -> None:
    """A file of any name in a claim's folder holds it, is dead, or is left alone; looking never fails."""
    claims = StageStore(tmp_path).claims["models"]
    parts = Holder.new()

    def check(name: str) -> None:
        shutil.rmtree(claims.folder, ignore_errors=True)
        (claims.folder / KEY).mkdir(parents=True)
        (claims.folder / KEY / name).write_text("{}")
        claims.holder(KEY)
        claim = claims.take(KEY)
        if claim is not None:
            claim.release(remember=False)

    numbers = st.sampled_from(["0", "1", "-1", "2147483648", "9" * 40, "٣", "x", "", str(parts.pid)])
    texts = st.sampled_from([parts.machine, "other", "", "é"])
    names = st.tuples(texts, texts, numbers, numbers, texts).map("~".join)
    fuzz(st.one_of(names, damaged(parts.name.encode()).map(_file_name)), check, count)


def _file_name(content: bytes) -> str:
    text = content.decode("latin-1").replace("/", "_").replace("\x00", "_")[:100]
    return text if text.strip(".") else "x"
