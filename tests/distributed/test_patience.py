import socket
from pathlib import Path
from typing import Any

import pytest
from ray._private import services

from tt_ray.distributed import patience
from tt_ray.distributed.patience import patiently

NODE = "ab" * 28


def test_a_raylet_waits_for_none_of_its_helpers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    def start_raylet(
        address: str,
        session_dir: str,
        node_id: str,
        metrics_agent_port: int | None = None,
        metrics_export_port: int | None = None,
        runtime_env_agent_port: int = 0,
        dashboard_agent_listen_port: int | None = None,
    ) -> None:
        told.update(locals())

    monkeypatch.setattr(services, "start_raylet", start_raylet)
    with socket.create_server(("", 0)) as taken:
        busy = taken.getsockname()[1]
        monkeypatch.setattr(patience, "PORTS", [busy, 31001, 31002, 31003, 31004])
        with patiently():
            services.start_raylet("here:1", str(tmp_path), NODE, metrics_export_port=4321)
    ports = [told[name] for name in patience._HELPERS]
    assert told["metrics_export_port"] == 4321
    assert told["address"] == "here:1"
    assert len({*ports, 31001, 31002, 31003, 31004}) == 5
    written = tmp_path / f"dashboard_agent_listen_port_{NODE}"
    assert int(written.read_text()) == told["dashboard_agent_listen_port"]
    assert services.start_raylet is start_raylet


def test_a_slow_node_is_waited_for_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def get_node(address: str, node: str) -> dict[str, str]:
        asked.append((address, node))
        if len(asked) % 4:
            raise RuntimeError("This node has not registered")
        return {"node": node}

    monkeypatch.setattr(services, "get_node", get_node)
    with patiently():
        assert services.get_node("here:1", NODE) == {"node": NODE}
    assert len(asked) == 4
    with patiently(0.0), pytest.raises(RuntimeError, match="not registered"):
        services.get_node("here:1", NODE)
    assert len(asked) == 5
