"""Two sweeps at once on one store, as two people would launch them."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command import Command
from study_tools import HORIZONS, make_sweep, played

from tt_ray.distributed.stages import StageStore


@pytest.mark.ray
@pytest.mark.slow
def test_two_sweeps_at_once_compute_what_they_share_once(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    horizons = {"below": [1, 2], "above": [2, 3]}
    commands = {}
    for name, values in horizons.items():
        folder = tmp_path / name
        search = {**HORIZONS, "parameters": {"planner.horizon": {"values": values}}}
        make_sweep(
            folder,
            search,
            name=name,
            resources={"storage": str(storage)},
            tracking={"uri": f"sqlite:///{folder}/mlflow.db"},
        )
        assert yaml.safe_load((folder / "sweep.yaml").read_text())["resources"]["storage"] == str(storage)
        commands[name] = Command(folder, "sweep", "sweep.yaml")
    try:
        for command in commands.values():
            command.wait()
    finally:
        for command in commands.values():
            command.process.kill()
            command.process.wait()

    records = [json.loads(path.read_text()) for path in storage.glob("sweeps/*/cells/*/result.json")]
    assert [record["status"] for record in records] == 4 * ["finished"]
    assert sum("models" not in record["reused"] for record in records) == 1
    assert sum(record["reused"].get("evaluations", 0) for record in records) == 4
    stages = [stage.kind for stage in StageStore(storage).stages(partial=True)]
    assert (stages.count("tokens"), stages.count("models"), stages.count("evaluations")) == (1, 1, 3)
    assert set(played(storage).values()) == {1}

    tables = {name: pd.read_parquet(storage / "sweeps" / name / "trials.parquet") for name in horizons}
    shared = [table[table["planner.horizon"] == 2].iloc[0] for table in tables.values()]
    assert shared[0]["score/mean"] == shared[1]["score/mean"]
    assert shared[0]["val/loss"] == shared[1]["val/loss"]
