"""`tt-ray sweep` and `tt-ray cancel`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.arguments import Resume, settings
from tt_ray.cli.figures import Figures, copy_figures, figures_folder
from tt_ray.cli.session import session, show_places
from tt_ray.cli.sweep_view import LiveBoard, forecast_table, sweep_table
from tt_ray.cli.view import Bars, console, duration, waiting
from tt_ray.config import ResourcesConfig
from tt_ray.errors import UserError
from tt_ray.sweep_file import Sweep, load_sweep

if TYPE_CHECKING:
    from tt_ray.distributed.sweeps.driver import SweepOutcome
    from tt_ray.distributed.sweeps.study import Study

CANCEL_WAIT = 120.0  # seconds that `cancel` waits for the sweep to end
DETACH_WAIT = 120.0  # seconds that `--detach` waits for it to begin


def sweep(
    file: Annotated[Path, typer.Argument(help="Experiment file with a search section (YAML).")],
    overrides: Annotated[list[str] | None, settings("search.num_trials=20")] = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the trials, and what of each is there already.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The same study shrunk to seconds, on a tiny data set.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the trials that failed once more, and no others.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; see `tt-ray results NAME --follow`.")
    ] = False,
    figures: Figures = None,
) -> None:
    """Run every trial of a search, each stage once, and name an honest winner."""
    from tt_ray.distributed.sweeps.checks import Flags, check_sweep
    from tt_ray.distributed.sweeps.driver import run_sweep
    from tt_ray.smoke import smoke as shrunk

    started = time.perf_counter()
    loaded = load_sweep(file, overrides or [])
    loaded = shrunk(loaded) if smoke else loaded
    flags = Flags(resume=resume, only_failed=retry_failed, dry_run=dry_run)
    study = check_sweep(loaded, flags)
    if dry_run:
        console.print(forecast_table(study))
        return
    figures_folder(figures)
    if detach:
        _detach(study)
        return
    with session(loaded.base, study.folder) as (tracker, _):
        outcome = run_sweep(study, tracker, flags, Bars(), LiveBoard)
    _show(outcome, loaded, time.perf_counter() - started)
    copy_figures(outcome.folder, figures)
    if (outcome.frame["status"] == "failed").any():
        raise typer.Exit(1)


def _show(outcome: SweepOutcome, sweep: Sweep, seconds: float) -> None:
    """The table, what to compare it with, and where to look next."""
    console.print(
        sweep_table(outcome.frame, outcome.baselines, sweep.search, sweep.base.evaluation.confidence)
    )
    for line in outcome.data:
        console.print(f"data set {line}", soft_wrap=True)
    for problem in outcome.problems:
        console.print(problem, style="yellow")
    if outcome.cancelled:
        console.print("cancelled; the same command with --resume goes on from here")
    console.print()
    saved = float(outcome.frame["saved"].sum())
    places = [("took", f"{duration(seconds)}; reused stages saved {duration(saved)} of computing")]
    if best := sorted(map(str, outcome.folder.glob("best*.yaml"))):
        places.append(("ready to run", ", ".join(best)))
    show_places([*places, ("tables and figures", str(outcome.folder))], sweep.base)


def cancel(
    name: Annotated[str, typer.Argument(help="The sweep's name.")],
    storage: Annotated[Path, typer.Option(help="The storage folder that it uses.")] = Path(
        ResourcesConfig().storage
    ),
) -> None:
    """End a running sweep: what is finished stays, and `--resume` goes on with the rest."""
    from tt_ray.distributed.sweeps.board import CANCEL
    from tt_ray.distributed.sweeps.study import sweep_folder
    from tt_ray.locks import is_held

    folder = sweep_folder(storage.resolve(), name)
    if not folder.is_dir():
        known = [path.name for path in sorted((storage / "sweeps").glob("*")) if path.is_dir()]
        raise UserError(f"no sweep {name!r} in {storage}: {', '.join(known) or 'it holds none'}")
    if not is_held(folder):
        raise UserError(f"sweep {name!r} is not running here; there is nothing to cancel")
    with waiting(f"waiting for sweep {name!r} to end"):
        deadline = time.monotonic() + CANCEL_WAIT
        while is_held(folder):
            (folder / CANCEL).touch()  # again and again: a sweep that has just begun tidies it away
            if time.monotonic() > deadline:
                raise UserError(f"sweep {name!r} was asked to end, and has not after {CANCEL_WAIT:.0f} s")
            time.sleep(0.5)
    (folder / CANCEL).unlink(missing_ok=True)
    console.print(f"sweep {name!r} has ended; `tt-ray sweep FILE --resume` goes on with it")


def _detach(study: Study) -> None:
    """Start this very command once more, in a session of its own, and leave it alone once it is under way."""
    folder, name = study.folder, study.sweep.base.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    began = time.time()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tt_ray", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with waiting(f"starting sweep {name!r}"):
        while process.poll() is None and not _in_mlflow(folder, began) and time.time() < began + DETACH_WAIT:
            time.sleep(0.2)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"sweep {name!r} has not started: {''.join(last).removeprefix('tt-ray: error: ')}")
    console.print(f"sweep {name!r} runs as process {process.pid}; what it says goes to {log}", soft_wrap=True)
    follow, end = study.commands
    console.print(f"{follow}   shows it\n{end}   ends it", soft_wrap=True)


def _in_mlflow(folder: Path, began: float) -> bool:
    """Whether the sweep's run has been in MLflow since that time, so that others can see it there."""
    from tt_ray.tracking.run import RunState

    file = folder / "run.json"
    if not file.exists() or file.stat().st_mtime < began:
        return False
    state = RunState.load(folder)
    return state is not None and state.run_id is not None
