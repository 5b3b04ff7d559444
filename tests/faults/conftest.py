"""Fixtures of the tests that kill, and the table of what they have seen."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import ledger
import pytest
import runs
import tiny
from command import STARTED, run

from tt_ray.distributed.train import train_model


def pytest_configure(config: pytest.Config) -> None:
    """The mark of a test that makes one row of the table."""
    config.addinivalue_line("markers", "fault(kind, when, out, against): a row of the table of faults")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the row of each test that has ended."""
    report = yield
    ledger.note(item, report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if ledger.ROWS:
        terminalreporter.write_sep("-", "faults")
        terminalreporter.write_line(ledger.table(ledger.ROWS))


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
    with ledger.undisturbed("undisturbed"):
        train_model(config, tokens, model, 0, tiny.TWO_WORKERS)
    return model


@pytest.fixture(scope="session")
def undisturbed_run(data: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole experiment that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run")
    with ledger.undisturbed("undisturbed_run"):
        run(folder, "run", tiny.write_file(folder), runs.ONE_WORKER)
    return folder
