"""The commands. Each reads its arguments, calls one function of `distributed`, and shows what came out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from tt_ray.cli.arguments import Critic, Model, Resume, settings
from tt_ray.cli.attention import attention
from tt_ray.cli.bench import bench
from tt_ray.cli.cluster import cluster_app
from tt_ray.cli.data import data_app
from tt_ray.cli.figures import Figures, copy_figures, figures_folder
from tt_ray.cli.import_checkpoint import import_checkpoint
from tt_ray.cli.play import play
from tt_ray.cli.predict import predict
from tt_ray.cli.results import results
from tt_ray.cli.session import find_checkpoint, session, show_places
from tt_ray.cli.store import store_app
from tt_ray.cli.submit import push, submit
from tt_ray.cli.sweep import cancel, sweep
from tt_ray.cli.view import INTERRUPTED, Bars, console, errors, plain_table, result_table, times_table
from tt_ray.config import ExperimentConfig
from tt_ray.errors import UserError
from tt_ray.experiment_file import load_experiment

if TYPE_CHECKING:
    from tt_ray.distributed.experiment import Outcome
    from tt_ray.distributed.line import Line
    from tt_ray.distributed.usage import Usage
    from tt_ray.tracking import MlflowTracker

app = typer.Typer(
    help="Trajectory Transformer experiments on Ray, logged to MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
File = Annotated[Path, typer.Argument(help="Experiment file (YAML).")]
Overrides = Annotated[list[str] | None, settings("planner.horizon=5")]


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2, never a traceback."""
    logging.basicConfig(format="tt-ray: %(message)s", level=logging.WARNING)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _refuse(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        advice = f" (see `{context.command_path} -h`)" if context else ""
        _refuse(error.format_message() and f"{error.format_message().rstrip('.')}{advice}")
    except OSError as error:  # a full disk, a file that may not be written
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if code == INTERRUPTED:
        resumes = sys.argv[1:2] in (["run"], ["train"], ["sweep"], ["predict"])
        again = "the same command with --resume" if resumes else "the same command"
        errors.print(f"tt-ray: interrupted; {again} goes on from here", soft_wrap=True)
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    """Say what is wrong, in one line; exit code 2. Nothing to say: help has been shown in its place."""
    if message:
        line = f"tt-ray: error: {' '.join(message.split())}"
        errors.print(line, style="bold red", soft_wrap=True)
    sys.exit(2)


def run(file: File, overrides: Overrides = None, resume: Resume = False, figures: Figures = None) -> None:
    """The whole line: collect (where the file says how), train, evaluate against baselines, one table."""
    from tt_ray.distributed.experiment import run_experiment

    started = time.perf_counter()
    line = _checked_line(load_experiment(file, overrides or []), resume)
    figures_folder(figures)
    with _session(line, resume) as tracker:
        outcome = run_experiment(line, tracker, resume)
    console.print(result_table(outcome.rows, line.config.evaluation.confidence))
    _show_end(line, outcome, started, figures)


def train(file: File, overrides: Overrides = None, resume: Resume = False, figures: Figures = None) -> None:
    """Train one model for each of the file's seeds."""
    from tt_ray.distributed.experiment import train_experiment
    from tt_ray.model.checkpoint import load_checkpoint

    started = time.perf_counter()
    line = _checked_line(load_experiment(file, overrides or []), resume, plays=False)
    figures_folder(figures)
    with _session(line, resume) as tracker:
        outcome = train_experiment(line, tracker, resume)
    rows = []
    for seed, path in outcome.checkpoints.items():
        checkpoint = load_checkpoint(path)
        losses = [checkpoint.metrics.get(f"val/loss{part}", float("nan")) for part in _LOSS_PARTS]
        rows.append([seed, checkpoint.step, *losses])
    columns = ["seed", "best step", "val loss", "observation", "action", "reward", "value"]
    console.print(plain_table(columns, rows, "Models"))
    _show_end(line, outcome, started, figures)


_LOSS_PARTS = ("", "_observation", "_action", "_reward", "_value")


def evaluate(
    model: Model,
    overrides: Overrides = None,
    critic: Critic = None,
    figures: Figures = None,
) -> None:
    """Score the planner of a trained model; needs the environment, not the data set."""
    from tt_ray.distributed.checkpoints import find_critic, load_for_evaluation
    from tt_ray.distributed.experiment import evaluate_experiment
    from tt_ray.distributed.line import Line, check_objective

    started = time.perf_counter()
    path = find_checkpoint(model, overrides or [])
    scorer = None if critic is None else find_critic(critic)
    config, spec, seed = load_for_evaluation(path, overrides or [], scorer)
    line = Line(config, Bars())
    line.use(spec)
    line.locate(spec.fingerprint)
    line.given_critic = scorer
    check_objective(line.config)
    figures_folder(figures)
    with _session(line, resume=False) as tracker:
        outcome = evaluate_experiment(line, tracker, path, seed)
    console.print(result_table(outcome.rows, config.evaluation.confidence))
    _show_end(line, outcome, started, figures)


def _checked_line(config: ExperimentConfig, resume: bool, plays: bool = True) -> Line:
    """The line of stages; what can be refused is refused here, before anything is started or written.

    Without `plays`, data that names no environment will do.
    """
    from tt_ray.distributed.line import Line

    line = Line(config, Bars())
    line.plays = plays
    line.check(resume)
    return line


@contextmanager
def _session(line: Line, resume: bool) -> Iterator[MlflowTracker]:
    """MLflow checked, and Ray up for the line's stages, for the duration of a block."""
    with session(line.config, line.storage if resume else None) as (tracker, line.allocation):
        yield tracker


def _show_end(line: Line, outcome: Outcome, started: float, figures: Path | None) -> None:
    """Times, and where to look next."""
    elsewhere = time.perf_counter() - started - sum(line.usage.seconds.values())
    console.print(times_table({**line.usage.seconds, "start-up and logging": elsewhere}))
    console.print()
    places = [("reused", _reuse(line.usage))] if line.usage.reused else []
    places += [(f"model, seed {seed}", str(path)) for seed, path in outcome.checkpoints.items()]
    copy_figures(outcome.folder, figures)
    show_places([*places, ("tables and figures", str(outcome.folder))], line.config)


def _reuse(usage: Usage) -> str:
    """What was reused, and the time that saved."""
    return f"{', '.join(usage.reused)}; that saved {usage.saved:.0f} s"


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(sweep, results, cancel, run, train, evaluate, play, predict),
    *(import_checkpoint, attention, submit, bench),
)
for _command in _COMMANDS:
    app.command()(_command)
data_app.command()(push)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")
app.add_typer(cluster_app, name="cluster")
