"""What lies in a run's folder of the released research code, or of the faster port: read and converted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ray import strict_yaml
from tt_ray.config import DatasetConfig, ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.limited import Arrays, read_apart
from tt_ray.data.published_bins import port_bins
from tt_ray.errors import UserError
from tt_ray.experiment_file import read_text
from tt_ray.model import published
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.plain import convert

READER = "tt_ray.model.inert:read_run"


@dataclass(frozen=True)
class Run:
    """A published run's folder, read and converted, but for what the data set decides."""

    source: str
    """Whose code has written it."""
    files: tuple[Path, ...]
    settings: Mapping[str, Any]
    """What its files of settings say, by file name."""
    model: TrajectoryTransformer
    dataset: DatasetConfig
    """Id and treatment of its data, as its settings have them."""
    planner: Mapping[str, Any]
    bins: Discretizer | None
    """The port's own; those of the released code are in its data only."""

    @property
    def name(self) -> str:
        """The data set's name in the run's own settings."""
        return self.dataset.id.rpartition("/")[2]


def read_run(folder: Path, epoch: int | None) -> Run:
    """The run in `folder`, whoever's code has written it; `UserError` where it is neither's, or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "model_config.pkl").is_file():
        return _authors_run(folder, epoch)
    if (folder / "discretizer.pt").is_file():
        return _port_run(folder, epoch)
    raise UserError(
        f"{folder}: neither a run of the released code (state_N.pt, model_config.pkl, data_config.pkl) nor "
        "one of the faster port (model_last.pt, discretizer.pt, config.yaml)"
    )


def _authors_run(folder: Path, epoch: int | None) -> Run:
    names = ("model_config.pkl", "data_config.pkl")
    states = [re.fullmatch(r"state_(\d{1,9})\.pt", file.name) for file in folder.iterdir()]
    epochs = [int(match[1]) for match in states if match]
    if not epochs and epoch is None:
        raise UserError(f"{folder}: no weights (state_N.pt) in it")
    weights = f"state_{max(epochs) if epoch is None else epoch}.pt"
    tensors, settings = _read(folder, weights, names, None)
    model, data = (settings[name] for name in names)
    _require_class(model, "GPT", folder / names[0])
    _require_class(data, "DiscretizedDataset", folder / names[1])
    sizes = published.read_sizes(model, published.AUTHORS_NAMES, str(folder / names[0]))
    source = str(folder / names[1])
    _require(data, source, "discretizer", "QuantileDiscretizer", "their only discretizer")
    _require(data, source, "step", 1, "a model of every step")
    _require(data, source, "N", sizes.num_bins, "the model's vocab_size")
    return Run(
        source="released research code",
        files=tuple(folder / name for name in (weights, *names)),
        settings=settings,
        model=published.authors_model(tensors, sizes, str(folder / weights)),
        dataset=_dataset(data, source, "env", "penalty"),
        planner=_authors_planner(sizes.config),
        bins=None,
    )


def _port_run(folder: Path, epoch: int | None) -> Run:
    weights, config = "model_last.pt" if epoch is None else f"model_{epoch}.pt", folder / "config.yaml"
    settings, _ = strict_yaml.parse(read_text(config), lambda line: f"{config}:{line}")
    try:
        sections = {name: dict(settings[name]) for name in ("model", "dataset")}
        sections["trainer"] = dict(settings.get("trainer") or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{config}: no settings of the faster port (sections model and dataset)") from None
    sizes = published.port_sizes(sections["model"], f"{config}: model")
    tensors, found = _read(folder, weights, (), "discretizer.pt")
    bins = _port_bins(tensors, found["discretizer.pt"], sizes, folder / "discretizer.pt")
    return Run(
        source="faster port",
        files=tuple(folder / name for name in (weights, "discretizer.pt", "config.yaml")),
        settings={"config.yaml": sections, **found},
        model=published.port_model(tensors, sizes, str(folder / weights)),
        dataset=_dataset(sections["dataset"], str(config), "env_name", None),
        planner=_port_planner(sections["trainer"], sizes.config),
        bins=bins,
    )


def _read(
    folder: Path, weights: str, settings: tuple[str, ...], bins: str | None
) -> tuple[Arrays, dict[str, Any]]:
    """The weights by their names, with `bins/...` among them, and the settings by file name."""
    arrays = read_apart(READER, folder, weights=weights, settings=list(settings), bins=bins)
    plain = json.loads(arrays.pop("settings").tobytes())
    return {name.removeprefix("weights/"): value for name, value in arrays.items()}, plain


def _require_class(settings: Mapping[str, Any], wanted: str, file: Path) -> None:
    found = str(settings.get("_class"))
    if found.rpartition(".")[2] != wanted:
        raise UserError(f"{file}: settings of a {found}; only a {wanted} can be imported")


def _require(settings: Mapping[str, Any], source: str, key: str, wanted: Any, what: str) -> None:
    found = settings.get(key)
    if type(found) is not type(wanted) or found != wanted:
        raise UserError(f"{source}: {key} is {found!r}; only {wanted!r} can be imported, {what}")


def _dataset(settings: Mapping[str, Any], source: str, name: str, penalty: str | None) -> DatasetConfig:
    """The run's data set, and what it does to rewards."""
    try:
        paid = convert(float | None, settings.get(penalty) if penalty else None)
        discount = convert(float, settings["discount"])
        return DatasetConfig(id=convert(str, settings[name]), discount=discount, terminal_penalty=paid)
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]} is missing") from None
    except (TypeError, UserError) as error:
        raise UserError(f"{source}: {error}") from None


def _authors_planner(sizes: ModelConfig) -> dict[str, Any]:
    """The released code's own search settings, which a run's folder does not hold."""
    context = min(PlannerConfig().max_context_transitions, sizes.context_transitions)
    return {"max_context_transitions": context, "window": context, "keep": max(1, context - 1)}


def _port_planner(trainer: Mapping[str, Any], sizes: ModelConfig) -> dict[str, Any]:
    """The search that the port scored its training with, as far as its settings say."""
    names = {
        "horizon": "eval_beam_steps",
        "beam_width": "eval_beam_width",
        "n_expand": "eval_sample_expand",
        "k_act": "eval_k_act",
        "k_obs": "eval_k_obs",
        "plan_every": "eval_plan_every",
        "max_context_transitions": "eval_beam_context",
    }
    found = {ours: trainer[theirs] for ours, theirs in names.items() if type(trainer.get(theirs)) is int}
    context = min(
        found.get("max_context_transitions", PlannerConfig().max_context_transitions),
        sizes.context_transitions,
    )
    return {"cdf_act": None, **found, "max_context_transitions": context}


def _port_bins(tensors: Arrays, settings: Any, sizes: published.Sizes, file: Path) -> Discretizer:
    """The saved bins, taken out of `tensors`."""
    strategy, wanted = settings["strategy"], (sizes.layout.slots, sizes.num_bins + 1)
    edges, centers = tensors.pop("bins/edges"), tensors.pop("bins/centers")
    if strategy not in ("uniform", "quantile"):
        raise UserError(f"{file}: its strategy is {strategy!r}; only uniform and quantile can be imported")
    if edges.shape != wanted:
        raise UserError(f"{file}: has edges {list(edges.shape)}, but the model asks for {list(wanted)}")
    try:
        return port_bins(edges, centers, strategy)
    except ValueError as error:
        raise UserError(f"{file}: holds no bins: {error}") from None
