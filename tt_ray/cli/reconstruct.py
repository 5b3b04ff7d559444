"""`tt-ray data bins`: what bins of several kinds and numbers lose of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.arguments import settings
from tt_ray.cli.figures import Figures, copy_figures, figures_folder
from tt_ray.cli.view import Bars, console, made_folder, plain_table, waiting
from tt_ray.config import DiscretizerConfig, ExperimentConfig
from tt_ray.errors import UserError
from tt_ray.experiment_file import apply_overrides, experiment_from_dict
from tt_ray.files import whole_file
from tt_ray.sweep_file import load_sweep

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = ("dataset", "goal", "resources")
"""What an override may change; the bins are what the command varies."""


def bins(
    dataset: Annotated[str, typer.Argument(metavar="ID_OR_FILE", help="Data set, or an experiment file.")],
    overrides: Annotated[list[str] | None, settings("dataset.discount=0.9")] = None,
    counts: Annotated[str, typer.Option("--bins", help="Numbers of bins to try.")] = "10,30,100,300",
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/bins/ID by default.")] = None,
    figures: Figures = None,
) -> None:
    """What is lost when a data set becomes tokens: by dimension, kind and number of bins."""
    from tt_ray.distributed.line import Line
    from tt_ray.evaluation.reconstruction import reconstruction_table
    from tt_ray.evaluation.reconstruction_figures import reconstruction_figure
    from tt_ray.search import safe_name

    config = _config(dataset, overrides or [])
    choices = _choices(counts)
    folder = out or Path(config.resources.storage) / "bins" / safe_name(config.dataset.id)
    with waiting(f"reading {config.dataset.id}"):
        episodes = Line(config, Bars()).episodes
    made_folder(folder, "--out")
    figures_folder(figures)
    with Bars().stage("fitting bins", len(choices)) as update:
        table = reconstruction_table(episodes, config.dataset, choices, lambda done: update(done, ""))
    with whole_file(folder / "bins.parquet") as file:
        table.to_parquet(file)
    reconstruction_figure(table, folder / "bins.png")
    _show(table)
    for title, name in (("table", "bins.parquet"), ("figure", "bins.png")):
        line = f"{title + ':':<20}{folder / name}"
        console.print(line, soft_wrap=True)
    copy_figures(folder, figures)


def _config(dataset: str, overrides: list[str]) -> ExperimentConfig:
    """The settings of an experiment or sweep file (without its search), or the defaults for a data set."""
    if dataset.endswith((".yaml", ".yml")):
        return apply_overrides(load_sweep(dataset).base, overrides, SECTIONS)
    config = experiment_from_dict({"name": "bins", "dataset": {"id": dataset}})
    return apply_overrides(config, overrides, SECTIONS)


def _choices(counts: str) -> list[DiscretizerConfig]:
    """Both strategies with each of the numbers of bins, in the order given."""
    from tt_ray.evaluation.reconstruction import STRATEGIES

    try:
        numbers = [int(text) for text in counts.split(",")]
    except ValueError:
        raise UserError(f"--bins {counts}: expected whole numbers with commas, such as 10,30,100") from None
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--bins {counts}: names a number twice")
    return [
        DiscretizerConfig(strategy=strategy, num_bins=number)  # type: ignore[arg-type]
        for strategy in STRATEGIES
        for number in numbers
    ]


def _show(table: pd.DataFrame) -> None:
    """What each choice of bins loses in all, and of each dimension."""
    from tt_ray.evaluation.reconstruction import overview

    whole = overview(table)
    titles = {"num_bins": "bins", "worst_rmse": "its rmse", "median_error": "median", "max_error": "largest"}
    titles |= {"observation": "obs.", "in_use": "in use"}
    columns = [titles.get(name, name) for name in map(str, whole)]
    title = "Held-out episodes, mean over dimensions: errors in their standard deviations, entropy in bits"
    cells = [[_digits(cell) for cell in row] for row in whole.to_numpy().tolist()]
    console.print(plain_table(columns, cells, title))
    wide = table.pivot(index="dimension", columns=["strategy", "num_bins"], values="rmse")
    names = table["name"].iloc[: len(wide)].tolist()
    errors = zip(names, wide.to_numpy().tolist(), strict=True)
    rows = [[_digits(cell) for cell in (name, *of_name)] for name, of_name in errors]
    columns = ["", *(f"{column[0]} {column[1]}" for column in wide.columns.to_list())]
    console.print(plain_table(columns, rows, "rmse of each dimension"))
    console.print()


def _digits(cell: object) -> object:
    """A number with three digits, a dimension's name in short: a terminal holds the row."""
    if isinstance(cell, float):
        return float(f"{cell:.3g}")
    return cell.replace("observation", "obs.").replace("action", "act.") if isinstance(cell, str) else cell
