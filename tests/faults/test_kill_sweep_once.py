"""The shortest of the tests that kill a sweep, for every run; the others are in test_kill_sweep.py."""

from collections import Counter
from pathlib import Path

import pytest
import sweep_tools as tools
import tiny
from command import run
from sweep_tools import Kept, at_step

STEPS = 1000  # long enough for the kill to come in the middle of them


@pytest.mark.ray
def test_a_sweep_killed_in_training_goes_on(tmp_path: Path) -> None:
    search = {**tools.BY_RETURN, "parameters": {"planner.horizon": {"values": [1, 2]}}}
    file = tools.write_file(tmp_path, search, training={"steps": STEPS, "validate_every": 200})
    tools.start_until(tmp_path, at_step(25), file).kill()
    assert "add --resume" in tools.one_line(run(tmp_path, "sweep", file, expected=2))
    kept = Kept(tmp_path)
    tools.resume(tmp_path, file)
    kept.check()
    found = tools.outcome(tmp_path)
    assert found.table["status"].tolist() == ["finished", "finished"]
    assert found.table["return/mean"].notna().all()
    assert found.table["confirmed/mean"].notna().sum() == 1
    assert len(found.statuses) == 3
    assert set(found.statuses.values()) == {"FINISHED"}
    curves = Counter(run for run, key, _, _ in found.points if key == "train/loss")
    assert list(curves.values()) == [STEPS, STEPS]  # the second trial shares the model
    assert tiny.leftovers(tmp_path / "runs") == []
    (line,) = run(tmp_path, "cancel", "study", "--storage", "runs", expected=2).splitlines()
    assert line == "tt-ray: error: sweep 'study' is not running here; there is nothing to cancel"
