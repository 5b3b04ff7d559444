"""The load of the machine, in a run's journal."""

import pytest
from tracking_tools import wait_until

from tt_ray.tracking import JournalTracker, MemoryTracker, open_journal, read, system_metrics

CPU = "system/cpu_utilization_percentage"


def test_samples_go_on_where_an_earlier_process_has_ended(tmp_path) -> None:
    for expected in (2, 4):
        run = open_journal(tmp_path)
        with system_metrics(run, first=0.01, every=0.01):
            wait_until(lambda wanted=expected, run=run: run.journal.count(CPU) >= wanted)
    points = [record for record, _ in read(tmp_path / "journal.jsonl") if CPU in record.get("metrics", {})]
    assert [point["step"] for point in points] == list(range(len(points)))
    assert {"system/system_memory_usage_percentage", "system/process_memory_usage_megabytes"} <= {
        *points[-1]["metrics"]
    }
    assert all(name.startswith("system/") for name in points[-1]["metrics"])
    assert 0.0 < points[-1]["metrics"]["system/system_memory_usage_percentage"] < 100.0


def test_what_is_over_at_once_has_none() -> None:
    run = MemoryTracker().start("short", "unused")
    with system_metrics(run):
        pass
    assert run.journal.count(CPU) == 0


def test_the_block_does_not_notice_that_the_journal_cannot_be_written(tmp_path, monkeypatch) -> None:
    run = JournalTracker().start("full", tmp_path)
    tried = []

    def refuse(*arguments) -> None:
        tried.append(arguments)
        raise OSError("no space")

    monkeypatch.setattr(run, "log", refuse)
    with system_metrics(run, first=0.01, every=0.01):
        wait_until(lambda: tried)
    with pytest.raises(ValueError, match="still raised"), system_metrics(run):
        raise ValueError("still raised")
    assert len(tried) == 1
