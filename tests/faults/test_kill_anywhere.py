"""Killed before any file operation, a training keeps a checkpoint that loads, and resumes exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import die_everywhere


def test_a_kill_at_any_file_operation_changes_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, die_everywhere.__file__, tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(die_everywhere.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    trials = [json.loads(line) for line in result.stdout.splitlines()]
    killed_before = {trial["operation"] for trial in trials}
    assert {"os.mkdir .step-00000001.tmp", "os.rename .step-00000003.tmp"} <= killed_before
    assert {"os.rename step-00000001", "os.remove model.safetensors"} <= killed_before
    assert "open journal.jsonl" in killed_before
    first = next(i for i, trial in enumerate(trials) if trial["checkpoints"])
    assert all(trial["checkpoints"] for trial in trials[first:])  # never again without one
    assert any(trial["left"] for trial in trials)  # and the training after it has tidied up
