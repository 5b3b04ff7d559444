"""What is asked of a cluster: JSON and nothing else, and an end to the wait for those that do not come."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tt_ray.distributed.launch import report
from tt_ray.distributed.launch.report import Report, main, read_report
from tt_ray.errors import UserError


def node(number: int) -> Any:
    use = [SimpleNamespace(resource_name=name, used=1.0, total=2.0) for name in ("CPU", "node:10.0.0.1")]
    return SimpleNamespace(
        ip_address=f"10.0.0.{number}", node_id=str(number), resource_usage=SimpleNamespace(usage=use)
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let Ray say that so many nodes are active, and the autoscaler what it is at, one after another."""
    monkeypatch.setenv("TT_RAY_HEAD_ADDRESS", "10.0.0.2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(report, "_ask_dashboard", lambda: ({}, {"2"}, []))

    def use(*counts: int, pending: list[str]) -> None:
        left = list(counts)

        def status(address: str) -> Any:
            count = left.pop(0) if len(left) > 1 else left[0]
            return SimpleNamespace(active_nodes=[node(i + 1) for i in range(count)], idle_nodes=[])

        monkeypatch.setattr(report, "cluster_status", status)
        monkeypatch.setattr(report, "pending", lambda address: pending)

    return use


def test_a_report_is_json_alone(cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    cluster(2, pending=["10.0.0.3: setting-up"])
    main([])
    found = Report.parse(capsys.readouterr().out)
    assert [(one.address, one.is_head, one.used) for one in found.nodes] == [
        ("10.0.0.2", True, {"CPU": 1.0}),
        ("10.0.0.1", False, {"CPU": 1.0}),
    ]
    assert (found.address, found.pending, found.mlflow) == ("10.0.0.2:6379", ["10.0.0.3: setting-up"], None)


def test_each_change_is_a_line_until_all_are_there(
    cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(1, 1, 2, 3, pending=["10.0.0.3: setting-up"])
    main(["--until", "3"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"{count} of 3 nodes have joined" for count in (1, 2, 3)]
    assert len(json.loads(last)["nodes"]) == 3


def test_the_wait_ends_when_nothing_is_done_for_the_others(
    cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(1, pending=["10.0.0.3: uninitialized"])
    main(["--until", "3", "--patience", "600"])
    assert report.time.monotonic() < 60
    cluster(1, pending=["10.0.0.3: setting-up"])
    main(["--until", "3", "--patience", "600"])
    assert report.time.monotonic() > 600
    assert len(Report.parse(capsys.readouterr().out.splitlines()[-1]).nodes) == 1


def test_where_nobody_answers_it_says_so() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: "):
        read_report("127.0.0.1:1")
