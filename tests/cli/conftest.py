"""Fixtures of the command line's tests."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from commands import Command, Outcome, Refused, as_refusal, environment, files_below
from rich.console import Console

from tt_ray.cli import follow, trials, view
from tt_ray.cli.app import main
from tt_ray.tracking import connect


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, data sets in its `data`; what a command exports is undone afterwards."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ, environment(MINARI_DATASETS_PATH=str(tmp_path / "data")), clear=True):
        yield tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database; to make one takes seconds."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with mock.patch.dict(os.environ):
        connect(f"sqlite:///{database}")
    return database


@pytest.fixture
def store(here: Path, empty_store: Path) -> str:
    """The working folder's MLflow database, empty; its URI."""
    shutil.copy(empty_store, here)
    return f"sqlite:///{here / empty_store.name}"


@pytest.fixture
def command(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tt-ray", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Outcome(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Console]:
    """Show what MLflow has on a console of that size."""

    def use(width: int, height: int = 50, terminal: bool = False) -> Console:
        console = Console(
            file=io.StringIO(),
            width=width,
            height=height,
            force_terminal=terminal,
            markup=False,
            highlight=False,
        )
        for module in (view, trials, follow):
            monkeypatch.setattr(module, "console", console)
        return console

    return use


@pytest.fixture
def refused(here: Path, command: Command) -> Refused:
    """Run a command that must refuse, in one line with `parts`, and leave nothing behind; that line."""

    def run(*arguments: str, parts: tuple[str, ...], left: tuple[str, ...] = ()) -> str:
        before = files_below(here)
        line = as_refusal(command(*arguments), *parts)
        assert files_below(here) - before <= set(left)
        assert before <= files_below(here)
        return line

    return run
