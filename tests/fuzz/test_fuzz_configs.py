"""Damaged experiment, sweep and cluster files: refused in one line that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import BOMB, DEEP, count_of, damaged, fuzz, odd_data, result_or_line
from hypothesis import strategies as st

from tt_ray.distributed.launch.cluster_file import load_cluster
from tt_ray.experiment_file import dump_yaml, load_experiment
from tt_ray.sweep_file import load_sweep

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
name: toy
dataset: {id: toy/toy-v0, discount: 0.9}
model: {num_layers: 2, embed_dim: 32, num_heads: 2}
planner: {objective: return, horizon: 5, beam_width: 8}
evaluation: {episodes: 4}
resources: {workers: auto, storage: runs}
seeds: [0, 1]
"""
SWEEP = (
    EXPERIMENT
    + """
search:
  parameters:
    discretizer.strategy: {values: [uniform, quantile]}
    planner.horizon: {values: [2, 3]}
  cases:
  - {name: one, training.steps: 50}
  - {name: two, training.steps: 60}
  method: grid
  metric: {name: return/mean, goal: maximize}
  max_concurrent_trials: 2
"""
)
HOSTILE = [
    BOMB,
    f"{BOMB}name: *l\ndataset: {{id: *l}}\n",
    f"{BOMB}file_mounts: {{x: *l}}\ncluster_name: *l\nprovider: {{type: *l}}\n",
    "a: &a {x: *a}\n",
    "a: &a [*a]\nname: *a\n",
    "name: !!python/object/apply:os.system ['touch executed']\n",
    "!!python/object/apply:os.system ['touch executed']",
    "? [1, 2]\n: x\n",
    "[" * DEEP,
    "{a: " * DEEP,
    "- " * DEEP,
    "name: x\n---\nname: y\n",
    "name: 2020-01-01\ndataset: {id: 12:30:00}\n",
    "name: x\nseeds: [0" + ", 1" * 3000 + "]\n",
    "%YAML 9.9\n---\n%",
    "name: !!binary aGk=\n",
    "<<: {name: x}\n",
    "name: 'x\n",
    "\ufeff",
    "search: {parameters: {planner.horizon: {min: 1, max: 1.0e+308, distribution: int}}}",
]
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "experiment": (load_experiment, EXPERIMENT),
    "sweep": (load_sweep, SWEEP),
    "cluster": (load_cluster, (ROOT / "cluster.local.yaml").read_text()),
}


@pytest.mark.parametrize("kind", READERS)
@count_of(300, 4000)
def test_damaged_files(kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read, text = READERS[kind]
    file = tmp_path / "file.yaml"
    plain = yaml.safe_load(text)
    odd = odd_data(plain).map(
        lambda data: yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "replace")
    )
    written = st.one_of(damaged(text.encode()), odd, odd, st.binary(max_size=60))

    def check(content: bytes) -> None:
        file.write_bytes(content)
        found = result_or_line(lambda: read(file))
        if kind == "experiment" and found is not None:
            file.write_text(dump_yaml(found), encoding="utf-8")
            assert load_experiment(file) == found

    for content in HOSTILE:
        check(content.encode())
        check((text + content).encode())
    fuzz(written, check, count)
    assert os.listdir(tmp_path) == ["file.yaml"]
