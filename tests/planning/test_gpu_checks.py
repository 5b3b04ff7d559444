from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "analysis" / "gpu_checks.py"
ABSENT = ("ray", "mlflow", "gymnasium", "minari", "typer", "pydantic", "safetensors")


@pytest.mark.slow
def test_the_gpu_checks_run_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--json", figures],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["tiny"] is True
    assert found["parity/float32/equal_best_plans"] == 1.0
    assert found["parity/float32/best_score_gap"] < 1e-3
    assert found["latency/graphed/replay_is_exact"] is True
    assert found["latency/graphed/really_captured"] is True
    assert found["latency/compiled/really_compiled"] is True
    assert 0 < found["reordering/share"] < 1
    assert found["training/fast"] > 0
    if not torch.cuda.is_available():
        assert "No GPU here" in done.stdout
