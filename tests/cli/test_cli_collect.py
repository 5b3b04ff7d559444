"""`tt-ray data collect` with the waypoint controller: by settings on the line, and from a file's section."""

import re
from pathlib import Path

import pytest
from commands import Refused, tt_ray, write_file

from tt_ray.cli.data import _collect_config
from tt_ray.config import CollectConfig
from tt_ray.data.minari_sets import load_episodes
from tt_ray.evaluation.collect import collect

MAZE = "tt_ray.evaluation.mazes:UMazeFar-v0"
SETTINGS = {"environment": MAZE, "method": "waypoints", "steps": 600, "segment_cells": 2, "seed": 5}
GIVEN = [f"{key}={value}" for key, value in SETTINGS.items() if key != "environment"]


def test_walks_that_cannot_be(here: Path, refused: Refused) -> None:
    other = ("collect.method: waypoints are for point mazes",)
    refused("data", "collect", "gymnasium:Pendulum-v1", "method=waypoints", parts=other)
    refused("data", "collect", MAZE, "segment_cells=2", parts=("collect.segment_cells: is a setting of",))
    refused("data", "collect", MAZE, "method=waypoint", parts=("did you mean waypoints?",))


def test_settings_come_from_the_line_or_from_a_file(here: Path) -> None:
    file = str(write_file(here, dataset={"id": "tt/mine-v0"}, collect=SETTINGS))
    on_the_line, in_a_file = _collect_config(MAZE, GIVEN, None), _collect_config(file, [], None)
    assert on_the_line[1] == in_a_file[1] == CollectConfig(**SETTINGS)  # type: ignore[arg-type]
    assert in_a_file[0].dataset.id == "tt/mine-v0"
    assert _collect_config(file, [], "tt/other-v0")[0].dataset.id == "tt/other-v0"
    assert on_the_line[0].dataset.id == "waypoints/umazefar-undirected-v0"
    assert _collect_config(MAZE, ["method=waypoints"], None)[0].dataset.id == "waypoints/umazefar-v0"
    assert _collect_config("Hopper-v5", [], None)[0].dataset.id == "ars/hopper-v0"


@pytest.mark.ray
def test_walks_on_actors_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tt_ray(tmp_path, "data", "collect", MAZE, *GIVEN, "--id", "tt/actors-v0")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"\d+ episodes, [\d.]+% reached the goal, \d+ steps, took", done.out)
    assert "final policy" not in done.out
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    collect("tt/here-v0", CollectConfig(**SETTINGS))  # type: ignore[arg-type]
    assert load_episodes("tt/here-v0").spec.fingerprint == load_episodes("tt/actors-v0").spec.fingerprint
