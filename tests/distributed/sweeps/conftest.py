"""Fixtures of the sweeps' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import study_tools
import tiny
from ray import cloudpickle
from study_tools import CountingMaking, count_trainings, make_sweep
from tracking_tools import new_store

from tt_ray.distributed import line
from tt_ray.distributed.sweeps import schedule
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.study import Study


@pytest.fixture(scope="session")
def minari_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Minari folder with the tiny data set."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        tiny.write_data()
    return folder


@pytest.fixture(autouse=True, scope="module")
def data(minari_folder: Path) -> Iterator[None]:
    """The data set is where Minari looks, for as long as a file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(minari_folder))
        yield


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of this process are written down, for `trainings`."""
    monkeypatch.setattr(line, "train_model", line.train_model)  # which puts it back
    count_trainings()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A checked study of three horizons, of which nothing has been done."""
    return check_sweep(make_sweep(tmp_path), Flags())


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database; to make one takes seconds."""
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def counted_everywhere() -> Iterator[None]:
    """Trainings are written down in Ray's processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "Making", CountingMaking)
        patch.setattr(line, "train_model", line.train_model)  # which puts it back
        cloudpickle.register_pickle_by_value(study_tools)  # Ray's processes cannot import it
        yield
        cloudpickle.unregister_pickle_by_value(study_tools)
