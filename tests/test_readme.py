"""What the README promises is there: files, commands, targets, and an example that is a valid experiment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from tt_ray.cli.app import app
from tt_ray.experiment_file import load_experiment
from tt_ray.planning.objectives import TransitionCandidates, find_objective
from tt_ray.sweep_file import load_sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_linked_file_exists(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_command_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    data = commands["data"].commands
    listed = re.search(r"```text\n(tt-ray sweep FILE .*?)```", README, flags=re.DOTALL)
    assert listed is not None
    named = set(re.findall(r"^tt-ray ([\w-]+)", listed[1], flags=re.MULTILINE))
    assert named == set(commands)
    assert set(re.findall(r"tt-ray data (\w+)", README)) <= set(data)
    listed = re.search(r"tt-ray data ((?:[\w.]+(?: [\w.]+)? \| )+\w+)", README)
    assert listed is not None
    assert {part.split()[0] for part in listed[1].split(" | ")} == set(data)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]*)", README))
    assert "quickstart" in targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_example_file_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml parsed\n(name: .*?)```", README, flags=re.DOTALL)
    assert block is not None
    file = tmp_path / "example.yaml"
    file.write_text(block[1])
    assert load_experiment(file).name == "my-experiment"


def test_the_objective_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python run\n(# my_objectives.py.*?)```", README, flags=re.DOTALL)
    assert block is not None
    (tmp_path / "my_objectives.py").write_text(block[1])
    monkeypatch.chdir(tmp_path)
    name = re.search(r'objective: "([^"]+)"', block[1])
    assert name is not None
    best_step = find_objective(name[1])(0.99)  # type: ignore[operator]
    rewards, values = torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2)
    step = TransitionCandidates(1, rewards, values, None)  # type: ignore[arg-type]
    assert best_step.extend(torch.tensor([[[2.0]]]), step)[1].tolist() == [[[2.0, 3.0]]]


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_a_shipped_file_is_valid_and_says_what_it_asks_and_costs(file: Path) -> None:
    assert load_sweep(file).base.question.endswith("?")
    header = file.read_text().partition("name:")[0]
    assert "Usage:" in header
    assert "Cost:" in header


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "tt_ray", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "evaluate" in result.stdout
