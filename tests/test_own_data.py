"""The worked example of docs/own-data.md runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tt_ray.experiment_file import load_experiment

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-data.md").read_text()


def block(tag: str, first: str) -> str:
    """The block with this tag that begins so."""
    (found,) = re.findall(rf"```{tag}\n({first}.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def run(folder: Path, line: str) -> str:
    """A line of the page, with this Python."""
    program, *arguments = shlex.split(line)
    command = [sys.executable, *({"python": [], "tt-ray": ["-m", "tt_ray"]}[program]), *arguments]
    variables = {**os.environ, "MINARI_DATASETS_PATH": str(folder / "data"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's commands have been run."""
    path = tmp_path_factory.mktemp("own")
    for text in (block("python run", "# make_log.py"), block("yaml parsed", "# pendulum.yaml")):
        (path / text.split()[1]).write_text(text)
    return path


def test_the_import(folder: Path) -> None:
    lines = block("sh parsed", "python make_log.py")
    shown = [run(folder, line) for line in lines.strip().splitlines()]
    assert "nothing was written" in shown[1]
    assert "my/pendulum-v0" in shown[2]
    for text in shown[1:]:
        assert "30, 0 terminated, 30 truncated" in text
    assert load_experiment(folder / "pendulum.yaml").dataset.id == "my/pendulum-v0"


@pytest.mark.ray
@pytest.mark.slow
def test_the_training(folder: Path) -> None:
    if not (folder / "data").exists():
        test_the_import(folder)
    assert "Models" in run(folder, "tt-ray train pendulum.yaml")


def test_every_option_is_told() -> None:
    import typer

    from tt_ray.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {option for item in commands["data"].commands["import"].params for option in item.opts}
    told = set(re.findall(r"(?<!-)--[a-z][a-z-]+", PAGE))
    assert told <= options
    assert {option for option in options if option.startswith("--")} - told == {"--environment"}
