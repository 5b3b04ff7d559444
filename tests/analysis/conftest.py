"""MLflow databases that hold small studies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from written_studies import StudyWriter, Written, write_study

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))

from tt_ray.tracking import connect


@pytest.fixture(scope="session")
def analysis_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated SQLite store; its set-up takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "to be replaced")
        return connect(f"sqlite:///{tmp_path_factory.mktemp('analysis')}/mlflow.db")


@pytest.fixture
def write_sweep(analysis_store: str, tmp_path: Path) -> Callable[..., None]:
    """Writes a sweep's run with nothing but its tables."""

    def write(name: str, trials: pd.DataFrame, episodes: pd.DataFrame | None = None, **tags: str) -> None:
        trials = trials.assign(fingerprint=[f"f{index}" for index in trials["index"]])
        StudyWriter(analysis_store, name, tmp_path / "written").parent(trials, episodes, **tags)

    return write


@pytest.fixture(scope="session")
def bins(analysis_store: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_study(analysis_store, "bins of all kinds", tmp_path_factory.mktemp("bins"))


@pytest.fixture(scope="session")
def later(analysis_store: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The same sweep with a longer horizon, 2 better in every episode."""
    return write_study(analysis_store, "later bins", tmp_path_factory.mktemp("later"), shift=2.0)


@pytest.fixture(scope="session")
def shrunk(analysis_store: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`bins`, but two trials were taken out of its file, so that others have their numbers now."""
    case = "hopper-medium"
    gone = [
        pd.Series({"index": index, "trial": "gone", "fingerprint": f"gone {index}", "case": case})
        for index in (0, 3)
    ]
    return write_study(analysis_store, "shrunk bins", tmp_path_factory.mktemp("shrunk"), before=gone)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, analysis_store: str) -> Callable[..., int]:
    """Runs a script's `main` on the store; its exit code."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", analysis_store)

    def run(main: Callable[[list[str]], int], *arguments: object) -> int:
        return main([str(argument) for argument in arguments])

    return run
