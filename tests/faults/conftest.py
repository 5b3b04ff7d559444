"""Fixtures of the tests that kill."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from command import STARTED

from tt_ray.distributed.train import train_model


@pytest.fixture(scope="session", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data set, in a Minari folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        tiny.write_data()
        yield


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # nothing happens to one that has ended
        process.wait()


@pytest.fixture(scope="session")
def undisturbed(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that two workers trained without interruption."""
    assert os.environ["OMP_NUM_THREADS"] == "1"  # sums are then the same in every process
    config = tiny.experiment(tmp_path_factory.mktemp("undisturbed"))
    tokens, model = tiny.prepare(config)
    train_model(config, tokens, model, 0, tiny.TWO_WORKERS)
    return model
