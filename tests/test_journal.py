"""The journal, and the trackers that need no MLflow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_tools import journal_points

from tt_ray.tracking import Journal, MemoryTracker, open_journal, provenance_tags, read


def test_worker_journal_imports_neither_mlflow_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from tt_ray.tracking import Journal\n"
        f"Journal({str(tmp_path)!r}).append({{'loss': 1}}, 0)\n"
        "print([m for m in ('mlflow', 'ray', 'pandas', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert len(journal_points(tmp_path)) == 1


def test_steps_done_again_are_not_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append({"loss": step}, step)
    again = Journal(tmp_path)
    again.append({"loss": -1.0, "other": 7.0}, 4)
    again.append({"loss": 5.0}, 5)
    points = journal_points(tmp_path)
    assert [(key, step, value) for key, step, _, value in points] == [
        *(("loss", step, float(step)) for step in range(6)),
        ("other", 4, 7.0),
    ]


def test_marks_hold_between_two_open_writers(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.append({"loss": 1.0}, 1)
    second.append({"loss": 2.0}, 1)
    second.append({"loss": 3.0}, 2)
    first.append({"loss": 4.0}, 2)
    assert [(step, value) for _, step, _, value in journal_points(tmp_path)] == [(1, 1.0), (2, 3.0)]


def test_torn_last_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"loss": 1.0}, 1)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"time":1,"step":2,"met')
    assert len(list(read(journal.path))) == 1
    Journal(tmp_path).append({"loss": 2.0}, 2)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    assert lines[0] == whole
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_reading_goes_on_from_an_offset_and_skips_a_damaged_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"loss": 1.0}, 1)
    ((_, offset),) = read(journal.path)
    with open(journal.path, "ab") as file:
        file.write(b"\0\0 not json\n")
    journal.append({"loss": 2.0}, 2)
    journal.append({"loss": 3.0}, 3)
    assert [record["step"] for record, _ in read(journal.path, offset)] == [2, 3]


def test_processes_share_one_journal(tmp_path: Path) -> None:
    code = (
        "import sys; from tt_ray.tracking import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for step in range(200): journal.append({sys.argv[2]: step}, step)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    points = [(key, step) for key, step, _, _ in journal_points(tmp_path)]
    assert points == [(name, step) for name in "ab" for step in range(200)]


@pytest.mark.parametrize("name", ["", "a?b", "../up", "/root", "a//b", "x" * 251])
def test_names_that_mlflow_refuses_are_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a metric"):
        Journal(tmp_path).append({name: 1.0}, 0)


def test_full_disk_is_a_clear_error_and_loses_no_whole_line(tmp_path: Path) -> None:
    code = (
        "import resource; from tt_ray.errors import UserError; from tt_ray.tracking import Journal\n"
        # The kernel cuts the write short, as on a full disk.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        f"journal = Journal({str(tmp_path)!r})\n"
        "try:\n    for step in range(100): journal.append({'loss': step}, step)\n"
        "except UserError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/journal.jsonl: cannot write the journal: " in result.stdout
    steps = [step for _, step, _, _ in journal_points(tmp_path)]
    assert steps == list(range(len(steps)))
    assert 3 < len(steps) < 20
    Journal(tmp_path).append({"loss": 0.0}, len(steps))
    assert len(journal_points(tmp_path)) == len(steps) + 1


def test_first_start_has_no_error_tag_and_no_identity(tmp_path: Path) -> None:
    run = open_journal(tmp_path, {"a": {"b": 1}}, {"seed": 0})
    ((record, _),) = read(tmp_path / "journal.jsonl")
    assert {**record, "time": 0} == {
        "time": 0,
        "status": "RUNNING",
        "params": {"a.b": "1"},
        "tags": {"seed": "0"},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    with pytest.raises(ValueError, match="only the process that keeps"):
        _ = run.identity


def test_memory_tracker_records_everything() -> None:
    tracker = MemoryTracker()
    with tracker.start("parent", "unused", params={"model": {"num_layers": 2}}) as parent:
        child = tracker.start("child", "unused", parent=parent.identity)
        child.log({"loss": 1.0}, 0)
        child.log({"loss": 2.0}, 0)
    assert tracker.runs[0].journal.records[0]["params"] == {"model.num_layers": "2"}
    assert tracker.runs[0].journal.records[-1]["status"] == "FINISHED"
    assert tracker.runs[1].state.parent == parent.identity
    assert [r["metrics"] for r in child.journal.records if "metrics" in r] == [{"loss": 1.0}]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (None, "FINISHED")]
)
def test_a_run_ends_as_its_block_does(error: BaseException | None, status: str) -> None:
    run = MemoryTracker().start("run", "unused")
    try:
        with run:
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert run.journal.records[-1]["status"] == status
    causes = [record["tags"]["error"] for record in run.journal.records if record.get("tags")]
    assert causes == (["ValueError: bad"] if status == "FAILED" else [])


def test_provenance_names_versions_and_commit() -> None:
    tags = provenance_tags(seed=3)
    assert tags["seed"] == "3"
    assert {"host", "version.python", "version.torch", "version.ray", "version.mlflow"} <= set(tags)
    assert ("git.commit" in tags) == ("git.dirty" in tags)
