"""What a study costs in hours and money: python analysis/scaling.py [FILE] [key=value ...]

Operations are counted from the study's file, speeds and prices come from analysis/scaling.yaml.
docs/scaling.md has its tables and says what is measured and what is assumed.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from study import markdown_table

from tt_ray.bench.work import Work
from tt_ray.config import ExperimentConfig, PlannerConfig, to_dict
from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS, parse_d4rl_name
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.sweep_file import Sweep, load_sweep
from tt_ray.training.speed import training_flops_per_token

HERE = Path(__file__).parent
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Useful GFLOP/s in training and planning; USD an hour on demand and on the spot market."""

    train: float
    plan: float
    price: float
    spot: float
    basis: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """So many machines, a trial on each; `players` more for each trial play its episodes."""

    title: str
    machine: str
    count: int
    player: str | None = None
    players: int = 0
    market: str = "price"
    head: bool = True


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a machine costs beside its work, and what there is once; prices in USD an hour."""

    head_price: float
    boot_minutes: float
    idle_minutes: float
    disk_price: float
    storage_price: float
    interruptions: float
    lost_minutes: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a model and its episodes need beside operations."""

    start_seconds: float
    episode_steps: int
    refed: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """analysis/scaling.yaml."""

    machines: Mapping[str, Machine]
    plans: Sequence[Plan]
    cluster: Cluster
    cell: Cell


@dataclass(frozen=True, kw_only=True)
class Load:
    """One trial: `seeds` models, each with its episodes."""

    title: str
    seeds: int
    layout: TokenLayout
    tokens: int
    """Trained on by one model; 0 where an earlier trial trains it."""
    token_flop: float
    decisions: float
    """Of one model's episodes."""
    decision_flop: float

    def train_hours(self, machine: Machine) -> float:
        """For one model."""
        return self.tokens * self.token_flop / GIGA / machine.train / 3600

    def play_hours(self, machine: Machine) -> float:
        """For one model's episodes."""
        return self.decisions * self.decision_flop / GIGA / machine.plan / 3600


@dataclass(frozen=True)
class Bill:
    """What a plan takes."""

    wall_hours: float
    machine_hours: float
    dollars: float


def read_parameters(path: Path) -> Parameters:
    """`UserError` where the file is not of the form of analysis/scaling.yaml."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        parameters = Parameters(
            machines={name: Machine(**values) for name, values in data["machines"].items()},
            plans=[Plan(**values) for values in data["plans"]],
            cluster=Cluster(**data["cluster"]),
            cell=Cell(**data["cell"]),
        )
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}; compare it with analysis/scaling.yaml"
        ) from error
    for plan in parameters.plans:
        for name in filter(None, (plan.machine, plan.player)):
            if name not in parameters.machines:
                raise UserError(f"{path}: plan {plan.title!r} names no machine of the file: {name!r}")
        if (
            plan.count < 1
            or plan.market not in ("price", "spot")
            or (plan.player is None) != (plan.players == 0)
        ):
            raise UserError(
                f"{path}: plan {plan.title!r}: count at least 1, market price or spot, player with players"
            )
    return parameters


def loads_of(sweep: Sweep, cell: Cell) -> list[Load]:
    """The sweep's trials in their order; a model that several of them share is trained by the first."""
    loads, trained = list[Load](), list[Any]()
    for trial in sweep.trials():
        config = trial.config
        identity = [to_dict(config)[key] for key in ("dataset", "discretizer", "model", "training", "seeds")]
        load = load_of(trial.name, config, cell, trains=identity not in trained)
        trained.append(identity)
        loads.append(load)
    return loads


def load_of(title: str, config: ExperimentConfig, cell: Cell, *, trains: bool = True) -> Load:
    """What one trial needs; `UserError` for data whose dimensions are not known here."""
    layout = layout_of(config)
    training, planner = config.training, config.planner
    work = Work(config.model, layout, planner)
    window = config.model.context_transitions * layout.slots - 1
    refed = refed_tokens(planner, config.model.context_transitions, layout, cell.refed)
    return Load(
        title=title,
        seeds=len(config.seeds),
        layout=layout,
        tokens=training.steps * training.batch_size * window if trains else 0,
        token_flop=training_flops_per_token(config.model, layout),
        decisions=config.evaluation.episodes * cell.episode_steps / planner.plan_every,
        decision_flop=work.decision(refed),
    )


def layout_of(config: ExperimentConfig) -> TokenLayout:
    """Slots of D4RL's locomotion data; `UserError` for other data."""
    parts = parse_d4rl_name(config.dataset.id)
    if parts is None:
        raise UserError(
            f"dataset.id: {config.dataset.id}: only D4RL's locomotion sets (hopper-medium-v2) are known here"
        )
    environment = D4RL_ENVIRONMENTS[parts[0]]
    return TokenLayout(
        config.dataset.observation_dims or environment.observation_dim,
        environment.action_dim,
        num_bins=config.discretizer.num_bins,
    )


def refed_tokens(
    planner: PlannerConfig, context: int, layout: TokenLayout, shares: Mapping[int, float]
) -> float:
    """Tokens that one decision feeds again because its window slid."""
    window, keep = planner.resolve_window(context)
    whole, slides = planner.max_context_transitions - 1, 0
    for _ in range(planner.horizon - 1):
        slides += whole + 1 >= window
        whole = keep if whole + 1 >= window else whole + 1
    share = float(np.interp(planner.horizon, sorted(shares), [shares[key] for key in sorted(shares)]))
    return share * slides * planner.beam_width * keep * (layout.slots - 1)


def bill(loads: Sequence[Load], plan: Plan, parameters: Parameters) -> Bill:
    """Hours and money: trials in their order, each on the machine that is free first, its models in turn."""
    machine, cluster = parameters.machines[plan.machine], parameters.cluster
    player = parameters.machines[plan.player] if plan.player else None
    slower = 1 + cluster.interruptions * cluster.lost_minutes / 60 if plan.market == "spot" else 1.0
    beside = (cluster.boot_minutes + cluster.idle_minutes) / 60 if plan.head else 0.0
    free = [0.0] * min(plan.count, len(loads))
    for load in loads:
        play = load.play_hours(player) / plan.players if player else load.play_hours(machine)
        one = load.train_hours(machine) + play + parameters.cell.start_seconds / 3600
        heapq.heappush(free, heapq.heappop(free) + slower * load.seeds * one)
    wall = max(free) + (cluster.boot_minutes / 60 if plan.head else 0.0)
    hours = sum(free) + beside * len(free)
    disk = cluster.disk_price if plan.head else 0.0
    dollars = hours * (getattr(machine, plan.market) + disk)
    if player:  # reserved with the trial, so paid as long as it lasts
        dollars += plan.players * hours * (getattr(player, plan.market) + disk)
    if plan.head:
        dollars += wall * (cluster.head_price + cluster.storage_price + disk)
    return Bill(wall, hours * (1 + plan.players), dollars)


def load_table(loads: Sequence[Load], machine: Machine) -> str:
    """A row for each trial; hours are those of one model."""
    rows = [
        [
            load.title,
            f"{load.layout.slots}",
            f"{load.tokens / GIGA:.1f}",
            f"{load.token_flop / 1e6:.2f}",
            f"{load.decision_flop / GIGA:.1f}",
            f"{load.decisions:,.0f}",
            f"{load.train_hours(machine):.1f}",
            f"{load.play_hours(machine):.1f}",
        ]
        for load in loads
    ]
    titles = (
        "trial",
        "slots",
        "10⁹ tokens",
        "MFLOP a token",
        "GFLOP a decision",
        "decisions",
        "train h",
        "play h",
    )
    return markdown_table(titles, rows)


def plan_table(loads: Sequence[Load], parameters: Parameters) -> str:
    """A row for each plan."""
    rows = []
    for plan in parameters.plans:
        cost = bill(loads, plan, parameters)
        players = f" + {plan.players} {plan.player}" if plan.player else ""
        rows.append(
            [
                plan.title,
                f"{plan.count} x {plan.machine}{players}",
                {"spot": "spot", "price": "on demand" if plan.head else "own"}[plan.market],
                parameters.machines[plan.machine].basis,
                f"{cost.wall_hours:,.0f}",
                f"{cost.machine_hours:,.0f}",
                f"{cost.dollars:,.0f}" if plan.head else "",
            ]
        )
    return markdown_table(("plan", "machines", "market", "speed", "hours", "machine hours", "USD"), rows)


def report(loads: Sequence[Load], parameters: Parameters) -> str:
    """Both tables and the totals, as markdown."""
    name, machine = next(iter(parameters.machines.items()))
    train = sum(load.seeds * load.train_hours(machine) for load in loads)
    play = sum(load.seeds * load.play_hours(machine) for load in loads)
    models = sum(load.seeds for load in loads if load.tokens)
    tokens = sum(load.seeds * load.tokens for load in loads)
    flop = sum(load.seeds * load.tokens * load.token_flop for load in loads)
    planned = sum(load.seeds * load.decisions * load.decision_flop for load in loads)
    total = (
        f"{models} models, {tokens:.2g} training tokens, {flop:.2g} FLOP to train and {planned:.2g} to plan. "
        f"On {name}: {train / 24:,.0f} days of training, {play / 24:,.1f} of planning."
    )
    return "\n\n".join((load_table(loads, machine), total, plan_table(loads, parameters)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=HERE.parent / "sweeps" / "locomotion.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid over the file")
    parser.add_argument("--parameters", type=Path, default=HERE / "scaling.yaml", help="speeds and prices")
    options = parser.parse_args(argv)
    try:
        parameters = read_parameters(options.parameters)
        print(report(loads_of(load_sweep(options.file, options.settings), parameters.cell), parameters))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
