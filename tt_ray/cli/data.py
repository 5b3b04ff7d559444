"""`tt-ray data`: what is there, where it comes from, and making one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress

from tt_ray.cli.arguments import DataSet, settings
from tt_ray.cli.data_import import import_command
from tt_ray.cli.data_view import sets_table, show_findings, show_made
from tt_ray.cli.figures import figures_folder, say_figures
from tt_ray.cli.reconstruct import bins
from tt_ray.cli.view import Bars, console, plain_table
from tt_ray.config import CollectConfig, ExperimentConfig
from tt_ray.errors import UserError
from tt_ray.experiment_file import apply_overrides, experiment_from_dict, load_experiment

data_app = typer.Typer(help="List, show, download, collect and import data sets.", no_args_is_help=True)
data_app.command()(bins)
data_app.command("import")(import_command)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a data set of that id.")]


@data_app.command("list")
def list_command() -> None:
    """The data sets on this machine."""
    from tt_ray.data.minari_folder import datasets_root
    from tt_ray.data.minari_sets import list_datasets

    if found := list_datasets():
        console.print(sets_table(found, f"Data sets in {datasets_root()}"))
    else:
        console.print(
            f"no data sets in {datasets_root()}: `tt-ray data collect ENV` makes one", soft_wrap=True
        )


@data_app.command()
def show(
    dataset: DataSet,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Draw how returns and lengths are spread, here."),
    ] = None,
) -> None:
    """Spaces, columns, returns and origin of a data set."""
    from tt_ray.data.log_report import stored_findings
    from tt_ray.data.minari_sets import describe

    found = describe(dataset)
    order = ", ".join(f"{path or 'observation'} ({size})" for path, size in found.flattening)
    facts = [
        ("environment", found.info.environment),
        (
            "episodes",
            f"{found.info.episodes}, {found.terminations} terminated, {found.truncations} truncated",
        ),
        ("steps", str(found.info.steps)),
        ("length", "mean {mean:.1f}, {min:.0f} to {max:.0f}".format(**found.lengths)),
        (
            "return",
            "mean {mean:.1f}, {min:.1f} to {max:.1f}, best tenth {best_tenth:.1f}".format(**found.returns),
        ),
        ("reference scores", f"{found.info.ref_min_score} (0) and {found.info.ref_max_score} (100)"),
        ("observation space", found.observation_space),
        ("flattened order", order),
        ("action space", found.action_space),
        ("fingerprint", found.fingerprint),
    ]
    hidden = ("final_policy", "final_policy_returns", "random_returns", "history", "collect", "report")
    facts += [(key, str(value)) for key, value in found.metadata.items() if key not in hidden and value]
    console.print(plain_table(["", "value"], facts, dataset))
    columns = ["column", "min", "max", "mean", "std", "distinct"]
    rows = [[c.name, c.minimum, c.maximum, c.mean, c.std, c.distinct] for c in found.columns]
    console.print(plain_table(columns, rows, "Columns"))
    if findings := stored_findings(found.metadata):
        console.print("\nWhen it was imported")
        show_findings(findings)
    if figures is not None:
        figures_folder(figures)
        _draw(dataset, figures)


def _draw(dataset: str, folder: Path) -> None:
    """Returns and lengths of the episodes."""
    from tt_ray.data.minari_reader import load_episodes
    from tt_ray.evaluation.figures import data_figure
    from tt_ray.search import safe_name

    episodes = load_episodes(dataset)
    name = f"{safe_name(dataset)}.png"
    data_figure(episodes.returns, episodes.lengths, folder / name, dataset)
    say_figures(folder, [name])


@data_app.command()
def download(dataset: DataSet, overwrite: Overwrite = False) -> None:
    """Download a data set: an id of Minari's hub, or a D4RL v2 name such as hopper-medium-replay-v2."""
    from tt_ray.data import d4rl
    from tt_ray.data.d4rl_names import parse_d4rl_name
    from tt_ray.data.minari_sets import download_minari

    if parse_d4rl_name(dataset) is None:
        console.print(f"downloading {dataset} from Minari's hub")
        found = download_minari(dataset)
    else:
        with Progress(*Progress.get_default_columns(), DownloadColumn(), console=console) as bar:
            task = bar.add_task(f"downloading {dataset}", total=None)
            found = d4rl.download(
                dataset, lambda done, total: bar.update(task, completed=done, total=total), overwrite
            )
    show_made(found)


@data_app.command()
def collect(
    environment: Annotated[str, typer.Argument(help="Environment id, module:EnvId, or an experiment file.")],
    overrides: Annotated[list[str] | None, settings("steps=50000")] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--id", help="Id of the new set; default: ars/NAME-v0 or waypoints/NAME-v0."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set on Ray actors: a random search's history, or walks in a maze (method=waypoints)."""
    from tt_ray.data.minari_folder import check_new_id, staging_folder
    from tt_ray.distributed import cluster
    from tt_ray.distributed.collect import ActorMap
    from tt_ray.evaluation.collect import collect as collect_dataset
    from tt_ray.evaluation.collect import method_of

    config, settings = _collect_config(environment, overrides or [], dataset)
    folder = check_new_id(config.dataset.id, overwrite=True)
    method_of(settings)  # that it can act in the environment, before Ray starts
    if overwrite or not folder.exists():
        with staging_folder(config.dataset.id):  # and that it can be written
            pass
    with (
        cluster.connect(config.resources) as allocation,
        Bars().stage(f"collecting {config.dataset.id}", settings.steps) as update,
        ActorMap(allocation.evaluation_actors, max_failures=config.resources.max_failures) as pool,
    ):
        report = collect_dataset(
            config.dataset.id,
            settings,
            map=pool,
            progress=lambda done, _, message: update(done, message),
            overwrite=overwrite,
        )
    rows: list[list[object]] = [
        ["random policy", report.random_return],
        ["data set, mean", report.mean_return],
        ["data set, best tenth", report.best_tenth_return],
    ]
    if report.final_policy_return is not None:
        rows.append(["final policy", report.final_policy_return])
    console.print(plain_table(["returns", "mean"], rows, report.dataset_id))
    goal = "" if report.success_share is None else f", {report.success_share:.1%} reached the goal"
    how = "was there already" if report.reused else f"took {report.seconds:.0f} s"
    console.print(f"{report.episodes} episodes{goal}, {report.steps} steps, {how}")


def _collect_config(
    environment: str, overrides: list[str], dataset: str | None
) -> tuple[ExperimentConfig, CollectConfig]:
    """The settings of a `collect` command, from a file's section or from the defaults."""
    if environment.endswith((".yaml", ".yml")):
        config = load_experiment(environment, [f"collect.{text}" for text in overrides])
    else:
        settings = {"environment": environment}
        config = experiment_from_dict({"name": "collect", "dataset": {"id": "?"}, "collect": settings})
        config = apply_overrides(config, [f"collect.{text}" for text in overrides], ["collect"])
        dataset = dataset or _usual_id(config.collect)
    if dataset is not None:
        config = apply_overrides(config, [f"dataset.id={dataset}"], ["dataset"])
    if config.collect is None:
        raise UserError(f"{environment}: collect: this section is missing; it has at least an environment")
    return config, config.collect


def _usual_id(settings: CollectConfig | None) -> str:
    """Id of a data set that was given none: how it is made, and where."""
    assert settings is not None
    name = settings.environment.rpartition(":")[2].rpartition("-v")[0] or settings.environment
    maker = {"random_search": "ars", "waypoints": "waypoints"}[settings.method]
    undirected = "" if settings.segment_cells is None else "-undirected"
    return f"{maker}/{name.lower()}{undirected}-v0"
