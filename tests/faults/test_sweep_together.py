"""A sweep beside others: its own other commands, a second sweep on its store, a server that goes away."""

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import sweep_tools as tools
from command import Command, run
from processes import wait_gone, wait_until
from sweep_tools import GRID, Kept, Outcome, at_step
from tracking_tools import Server, identifier, journal_points

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONGER = {"steps": 800, "validate_every": 200}
OUTAGE = 60  # seconds, besides those that the server takes to start


@pytest.fixture(scope="module")
def undisturbed_longer(data: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return tools.run_whole(tmp_path_factory.mktemp("longer"), GRID, training=LONGER)


@pytest.fixture
def detached() -> Iterator[list[psutil.Process]]:
    """Processes that nobody waits for; killed at the end where they still run."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def test_a_detached_sweep_is_followed_cancelled_and_resumed(
    undisturbed_longer: Outcome, tmp_path: Path, detached: list[psutil.Process]
) -> None:
    file = tools.write_file(tmp_path, GRID, training=LONGER)
    text = run(tmp_path, "sweep", file, "--detach")
    process = re.search(r"runs as process (\d+)", text)
    assert process is not None, text
    detached.append(psutil.Process(int(process[1])))
    follow = Command(tmp_path, "results", "study", "--follow", "--interval", "0.5")
    wait_until(lambda: at_step(20)(tmp_path), "it trains")
    cancel = Command(tmp_path, "cancel", "study", "--storage", "runs")
    others = [Command(tmp_path, "sweep", file, *more) for more in ([], ["--resume"], ["--detach"])]
    assert "sweep 'study' has ended" in cancel.wait()
    wait_gone(detached)
    assert "cancelled; the same command with --resume goes on from here" in log(tmp_path)
    for other in others:
        refused = other.wait(2).splitlines()
        assert len(refused) == 1
        assert re.search(r"running already|add --resume", refused[0])
    assert "study: interrupted" in follow.wait()
    (again,) = run(tmp_path, "cancel", "study", "--storage", "runs", expected=2).splitlines()
    assert again == "tt-ray: error: sweep 'study' is not running here; there is nothing to cancel"
    kept = Kept(tmp_path)
    assert kept.finished < 4
    assert set(statuses(tmp_path).values()) <= {"KILLED", "FINISHED"}
    assert set(table(tmp_path)["status"]) <= {"finished", "waiting"}
    tools.resume(tmp_path, file)
    kept.check()
    tools.assert_same(tmp_path, undisturbed_longer)
    assert not (tmp_path / "runs" / "sweeps" / "study" / "cancel").exists()


def test_a_detached_sweep_that_cannot_start_says_why(tmp_path: Path) -> None:
    file = tools.write_file(tmp_path, GRID, tracking={"uri": "http://127.0.0.1:9"})
    (line,) = run(tmp_path, "sweep", file, "--detach", expected=2).splitlines()
    assert line.startswith("tt-ray: error: sweep 'study' has not started: ")
    assert "http://127.0.0.1:9" in line


def log(folder: Path) -> str:
    return (folder / "runs" / "sweeps" / "study" / "log.txt").read_text()


def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "runs" / "sweeps" / "study" / "trials.parquet")


def statuses(folder: Path) -> dict[str, str]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return dict(database.execute("select name, status from runs"))


def test_two_sweeps_at_once_share_what_they_have_in_common(tmp_path: Path, data: None) -> None:
    wider = {
        **GRID,
        "parameters": {**GRID["parameters"], "planner.horizon": {"values": [2, 3]}},
    }
    files = [tools.write_file(tmp_path, GRID), tools.write_file(tmp_path, wider, name="other")]
    both = [Command(tmp_path, "sweep", file) for file in files]
    for command in both:
        command.wait()
    assert len(list((tmp_path / "runs" / "models").iterdir())) == 2
    assert len(list((tmp_path / "runs" / "tokens").iterdir())) == 2
    found = {name: tools.outcome(tmp_path, name) for name in ("study", "other")}
    assert sum(outcome.trained for outcome in found.values()) == 2
    tables = {name: outcome.table.set_index("trial") for name, outcome in found.items()}
    shared = [name for name in tables["study"].index if name in tables["other"].index]
    assert len(shared) == 2
    columns = [name for name in tables["study"].columns if not name.startswith(("index", "confirmed"))]
    one, other = (tables[name].loc[shared, columns] for name in ("study", "other"))
    pd.testing.assert_frame_equal(one, other)
    for name, outcome in found.items():
        assert outcome.table["status"].tolist() == 4 * ["finished"]
        assert outcome.table["confirmed/mean"].notna().sum() == 1
        assert set(outcome.statuses.values()) == {"FINISHED"}
        assert len(outcome.statuses) == 5
        curve = Counter(run for run, key, _, _ in outcome.points if key == "train/loss")
        assert set(curve.values()) == {tools.STEPS}, name  # also where the other sweep has trained it
        assert len(curve) == 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.fault("tracking server", "sweep: training, for a minute", "every point once, by itself")
def test_a_server_that_is_away_in_mid_sweep_misses_nothing(
    server: Server, tmp_path: Path, data: None
) -> None:
    longer = {"steps": 3000, "validate_every": 500}
    file = tools.write_file(tmp_path, GRID, training=longer, tracking={"uri": server.uri})
    command = tools.start_until(tmp_path, at_step(200), file)
    server.stop()
    before = written(tmp_path)
    time.sleep(OUTAGE)
    assert written(tmp_path) > before  # the sweep goes on
    server.start()
    text = command.wait()
    assert "cannot be used" in text  # it has noticed
    cells = [path.parent for path in (tmp_path / "runs" / "sweeps" / "study").rglob("run.json")]
    assert len(cells) == 5
    for cell in cells:
        with sqlite3.connect(tmp_path / "server.db") as database:
            query = "select key, step, timestamp, value from metrics where run_uuid = ?"
            points = sorted(database.execute(query, (identifier(cell),)))
            (status,) = database.execute("select status from runs where run_uuid = ?", (identifier(cell),))
        assert points == journal_points(cell)
        assert len(points) > 3
        assert status == ("FINISHED",)


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("runs/sweeps/study/cells/*/journal.jsonl"))
