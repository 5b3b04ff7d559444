"""The commands. Each reads its arguments, calls one function of `distributed`, and shows what came out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.data import data_app
from tt_ray.cli.view import Bars, console, errors, plain_table, result_table, times_table
from tt_ray.config import ExperimentConfig
from tt_ray.errors import UserError
from tt_ray.experiment_file import load_experiment

if TYPE_CHECKING:
    from tt_ray.distributed.line import Line
    from tt_ray.tracking import MlflowTracker

app = typer.Typer(
    help="Trajectory Transformer experiments on Ray, logged to MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")

File = Annotated[Path, typer.Argument(help="Experiment file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, such as planner.horizon=5.", metavar="KEY=VALUE"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a training that was interrupted.")]


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2, never a traceback."""
    logging.basicConfig(format="tt-ray: %(message)s", level=logging.WARNING)
    try:
        app(standalone_mode=True)
    except UserError as error:
        errors.print(
            f"tt-ray: error: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("tt-ray: interrupted; the same command with --resume goes on from here", soft_wrap=True)
        sys.exit(130)


@app.command()
def run(file: File, overrides: Overrides = None, resume: Resume = False) -> None:
    """The whole line: collect (where the file says how), train, evaluate against baselines, one table."""
    from tt_ray.distributed.experiment import run_experiment

    started = time.perf_counter()
    config = load_experiment(file, overrides or [])
    with _session(config, resume) as (line, tracker):
        outcome = run_experiment(line, tracker, resume)
    console.print(result_table(outcome.rows, config.evaluation.confidence))
    _show_end(line.seconds, line.reused, started, outcome.folder)


@app.command()
def train(file: File, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train one model for each of the file's seeds."""
    from tt_ray.distributed.experiment import train_experiment
    from tt_ray.model.checkpoint import load_checkpoint

    started = time.perf_counter()
    config = load_experiment(file, overrides or [])
    with _session(config, resume) as (line, tracker):
        outcome = train_experiment(line, tracker, resume)
    rows = []
    for seed, path in outcome.checkpoints.items():
        checkpoint = load_checkpoint(path)
        losses = [checkpoint.metrics.get(f"val/loss{part}", float("nan")) for part in _LOSS_PARTS]
        rows.append([seed, checkpoint.step, *losses, str(path)])
    columns = ["seed", "best step", "val loss", "observation", "action", "reward", "value", "checkpoint"]
    console.print(plain_table(columns, rows, "Models"))
    _show_end(line.seconds, line.reused, started, outcome.folder)


_LOSS_PARTS = ("", "_observation", "_action", "_reward", "_value")


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="Checkpoint or model folder, or an MLflow run id.")],
    overrides: Overrides = None,
) -> None:
    """Score the planner of a trained model; needs the environment, not the data set."""
    from tt_ray.distributed.checkpoints import find_checkpoint, load_for_evaluation
    from tt_ray.distributed.experiment import evaluate_experiment

    started = time.perf_counter()
    uri = _connect(None)
    path = find_checkpoint(target, uri)
    config, spec, seed = load_for_evaluation(path, overrides or [])
    with _session(config, resume=False) as (line, tracker):
        outcome = evaluate_experiment(line, tracker, path, spec, seed)
    console.print(result_table(outcome.rows, config.evaluation.confidence))
    _show_end(line.seconds, line.reused, started, outcome.folder)


@app.command()
def results(
    name: Annotated[str, typer.Argument(help="The experiment's name in MLflow.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """The table of an experiment's runs, read from MLflow."""
    from tt_ray.tracking import results_table

    frame = results_table(name, _connect(None))
    if csv is not None:
        frame.to_csv(csv)
    shown = frame.reset_index().rename(columns={"run_id": "run id"})
    console.print(plain_table(list(shown.columns), _cells(shown.to_numpy().tolist()), name))


def _cells(rows: Sequence[Sequence[object]]) -> list[list[object]]:
    """Missing values as empty cells."""
    return [["" if cell is None or cell != cell else cell for cell in row] for row in rows]


@contextmanager
def _session(config: ExperimentConfig, resume: bool) -> Iterator[tuple[Line, MlflowTracker]]:
    """MLflow checked, Ray up, and the line of stages ready, for the duration of a block."""
    from tt_ray.distributed import cluster
    from tt_ray.distributed.line import Line, writable
    from tt_ray.tracking import MlflowTracker, send_leftovers

    uri = _connect(config.tracking.uri)
    storage = writable(Path(config.resources.storage))
    if resume and (sent := send_leftovers(storage, uri)):
        console.print(f"sent what {sent} earlier runs had not been able to send to MLflow")
    with ExitStack() as stack:
        with console.status("starting Ray"):
            allocation = stack.enter_context(cluster.connect(config.resources))
        yield Line(config, allocation, Bars()), MlflowTracker(uri, config.tracking.experiment or config.name)


def _connect(uri: str | None) -> str:
    from tt_ray.tracking import connect

    return connect(uri)


def _show_end(seconds: dict[str, float], reused: list[str], started: float, folder: Path) -> None:
    """Times, and where to look next."""
    seconds = {**seconds, "start-up and logging": time.perf_counter() - started - sum(seconds.values())}
    console.print(times_table(seconds, reused))
    console.print(f"tables and figures: {folder}", soft_wrap=True, highlight=False)
    console.print(f"MLflow UI:          {_ui_command()}", soft_wrap=True, highlight=False)


def _ui_command() -> str:
    """How to open the MLflow UI on the store that was used."""
    uri = _connect(None)
    if uri.startswith(("http://", "https://")):
        return uri
    return f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}  ->  http://127.0.0.1:5000"
