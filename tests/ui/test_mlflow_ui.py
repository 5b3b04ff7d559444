"""MLflow's UI on a finished sweep, in a real browser: what a user must see, and pictures of it.

The pictures go to the folder TT_RAY_SCREENSHOTS, or else to pytest's temporary one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import Server

from tt_ray.tracking import experiment_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
ROOT = Path(__file__).parents[2]
QUESTION = "do quantile bins beat uniform ones"
ASSISTANT = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"  # a panel that opens at the first visit
PATIENCE = 60_000  # milliseconds; far more than a page takes


@dataclass
class Study:
    """The quickstart's sweep in MLflow, and what is known of it from there."""

    uri: str
    page: str
    parent: Any
    trials: list[Any]

    @property
    def best(self) -> Any:
        (best,) = [run for run in self.trials if run.data.tags.get("best") == "yes"]
        return best

    def run_page(self, run: Any, tab: str = "") -> str:
        return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """The quickstart at smoke size, as a user would run it, behind `mlflow server`."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("quickstart")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["MINARI_DATASETS_PATH"] = str(folder / "minari")
    command = [sys.executable, "-m", "tt_ray", "sweep", str(ROOT / "sweeps/quickstart.yaml"), "--smoke"]
    done = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    server = Server(folder, f"sqlite:///{folder}/mlflow.db")
    server.start()
    try:
        client = MlflowClient(tracking_uri=server.uri)
        (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in runs if run.data.tags["kind"] == "sweep"]
        page = experiment_page(server.uri, experiment.name)
        assert f"http://127.0.0.1:5000/{page}" in done.stdout.replace("\n", "")
        yield Study(server.uri, page, parent, [run for run in runs if run is not parent])
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(study: Study, browser: Any, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """`visit(address)` is the page of a user who has been there before; only this host can be reached."""
    context = browser.new_context(viewport={"width": 1500, "height": 950})
    context.add_init_script(f"localStorage.setItem('{ASSISTANT}', 'true')")
    context.set_default_timeout(PATIENCE)
    context.route(lambda url: not url.startswith(study.uri), lambda route: route.abort())

    def go(address: str) -> Any:
        page = context.new_page()
        page.goto(f"{study.uri}/{address}")
        return page

    yield go
    context.close()


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[Any, str], None]:
    """`picture(page, name)` takes a screenshot."""
    folder = Path(os.environ.get("TT_RAY_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Any, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 10_000

    return take


def shown(page: Any, *texts: str | re.Pattern[str]) -> None:
    """Each of the texts can be seen."""
    for text in texts:
        sync_api.expect(page.get_by_text(text).first).to_be_visible(timeout=PATIENCE)


def number(value: float) -> re.Pattern[str]:
    """A metric as the UI rounds it, to three digits at least."""
    return re.compile(re.escape(f"{value:.10g}"[:5].rstrip(".")))


def test_the_runs_best_first(study: Study, visit: Any, picture: Any) -> None:
    page = visit(study.page)
    shown(page, study.parent.info.run_name, study.best.info.run_name, "score/mean", "planner.horizon")
    for trial in study.trials:
        shown(page, trial.info.run_name, number(trial.data.metrics["score/mean"]))
    picture(page, "runs")


def test_the_sweeps_own_page(study: Study, visit: Any, picture: Any) -> None:
    page = visit(study.run_page(study.parent))
    shown(page, re.compile(QUESTION), study.best.data.tags["trial.name"], re.compile("on fresh seeds"))
    page.set_viewport_size({"width": 1500, "height": 1700})
    page.get_by_text("Show more").click()
    figure = page.locator("img[src*=parameters]")
    sync_api.expect(figure).to_be_visible(timeout=PATIENCE)
    page.wait_for_function("document.querySelector('img[src*=parameters]').naturalWidth > 300")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    for image in page.locator("img[src*=figures]").all():
        box = image.bounding_box()
        assert box["x"] + box["width"] < 1500, "a figure is cut at the page's edge"
    picture(page, "sweep")


def test_the_best_trial(study: Study, visit: Any, picture: Any) -> None:
    page = visit(study.run_page(study.best))
    shown(page, study.best.info.run_name, study.best.data.tags["mlflow.note.content"], "best", "stage.model")
    picture(page, "best-trial")


def test_curves_in_groups(study: Study, visit: Any, picture: Any) -> None:
    page = visit(study.run_page(study.best, "/model-metrics"))
    shown(page, *(re.compile(rf"^{group}( \(\d+\))?$") for group in ("train", "val", "score")))
    picture(page, "curves")


def test_system_metrics(study: Study, visit: Any, picture: Any) -> None:
    page = visit(study.run_page(study.parent, "/system-metrics"))
    shown(page, "cpu_utilization_percentage", "process_memory_usage_megabytes")
    picture(page, "system-metrics")


def test_two_trials_and_a_metric_against_a_parameter(study: Study, visit: Any, picture: Any) -> None:
    other = next(run for run in study.trials if run is not study.best)
    chosen = json.dumps([study.best.info.run_id, other.info.run_id], separators=(",", ":"))
    page = visit(f'#/compare-runs?runs={chosen}&experiments=["{other.info.experiment_id}"]')
    shown(page, study.best.info.run_name, other.info.run_name, "planner.horizon", "score/mean")
    picture(page, "comparison")


@pytest.mark.parametrize("path", ["figures/parameters.png", "results.md"])
def test_artifacts(study: Study, visit: Any, picture: Any, path: str) -> None:
    page = visit(study.run_page(study.parent, f"/artifacts/{path}"))
    shown(page, "trials.parquet", "best.yaml", Path(path).name)
    picture(page, f"artifact-{Path(path).stem}")


def test_the_registered_model(study: Study, visit: Any, picture: Any) -> None:
    page = visit("#/models/" + study.parent.info.run_name.replace(" ", "%20"))
    shown(page, re.compile("champion"), re.compile("Version 1"))
    picture(page, "model")
