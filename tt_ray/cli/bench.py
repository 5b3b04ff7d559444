"""`tt-ray bench`: speed on this machine, as tables, a JSON file, and an MLflow run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tt_ray.cli.view import Bars, console, plain_table, waiting
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from tt_ray.bench.limit import Limit
    from tt_ray.bench.report import Growth, SpeedRow

SHORT: dict[str, tuple[int, ...]] = {"halfcheetah": (1, 8), "hopper": (1, 8)}
FULL: dict[str, tuple[int, ...]] = dict.fromkeys(("halfcheetah", "hopper", "ant", "pen"), (1, 8, 32))
BATCH = 64


def bench(
    full: Annotated[bool, typer.Option("--full", help="All configurations; many minutes on a CPU.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only these: halfcheetah, hopper, ant, pen, train, growth, pool, sweep."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Also log them to MLflow.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; all cores without it.", min=1, max=4 * (os.cpu_count() or 1)),
    ] = None,
    decoder: Annotated[str, typer.Option(help="auto, native, compiled or eager.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[
        float, typer.Option(help="Spent on each measurement, about.", min=0.0, max=3600.0)
    ] = 3.0,
) -> None:
    """Speed of planning and training, as shares of what this machine can do at most."""
    import torch

    from tt_ray.bench.limit import measure_limit
    from tt_ray.bench.planning import CASES

    cases, parts = _chosen(full, only)
    if decoder not in ("auto", "native", "compiled", "eager"):
        raise UserError(f"--decoder {decoder}: must be auto, native, compiled or eager")
    if json is not None:
        _check_writable(json)
    place = _device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    with waiting("measuring matrix products"):
        limit = measure_limit(CASES["hopper"].model, place)
    _show_limit(limit, place)
    rows = _measure(cases, "train" in parts, limit, place, seconds, decoder)
    if rows:
        console.print(_speed_table(rows))
    curves = _grow(place, seconds, decoder, full) if "growth" in parts else []
    if curves:
        console.print(_growth_table(curves))
    pool = _pool() if "pool" in parts else {}
    sweep = _sweep() if "sweep" in parts else {}
    if json is not None:
        _write(json, rows)
    if mlflow:
        _log(rows, curves, limit, {"pool": pool, "sweep": sweep})


def _chosen(full: bool, only: Sequence[str] | None) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Cases with their numbers of episodes, and what else is measured."""
    cases = FULL if full else SHORT
    known = {*FULL, "train", "growth", "pool", "sweep"}
    for name in only or []:
        if name not in known:
            raise UserError(f"--only {name}: must be one of {', '.join(sorted(known))}")
    if only:
        sizes: tuple[int, ...] = (1, 8, 32) if full else (1, 8)
        return {name: sizes for name in only if name in FULL}, set(only)
    return cases, {"train", "growth"}


def _check_writable(path: Path) -> None:
    """`UserError` unless a file can be written there; better now than when all is measured."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--json {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--json {path}: no file can be written there")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name}: must be auto, cpu or cuda, and there must be one")
    return torch.device(name)


def _show_limit(limit: Limit, device: Any) -> None:
    import torch

    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name()
    others = "".join(f"; {name} alone {rate:.1f}" for name, rate in limit.others.items())
    console.print(
        f"limit: {limit.gflops:.1f} GFLOP/s by {limit.library} on {where} (large square product "
        f"{limit.square:.1f}, the model's own shapes {limit.shapes:.1f}){others}",
        soft_wrap=True,
    )


def _measure(
    cases: dict[str, tuple[int, ...]], train: bool, limit: Limit, device: Any, seconds: float, decoder: Any
) -> list[SpeedRow]:
    from tt_ray.bench.planning import CASES
    from tt_ray.bench.report import plan_rows, train_row

    rows: list[SpeedRow] = []
    total = sum(len(sizes) for sizes in cases.values()) + train
    with Bars().stage("measuring", max(1, total)) as update:
        for name, sizes in cases.items():
            for row in plan_rows(CASES[name], sizes, limit, device, seconds, decoder):
                rows.append(row)
                update(len(rows), f"{name}, {row.episodes} at once")
        if train:
            rows.append(train_row(CASES["hopper"], BATCH, limit, device, 3 * seconds))
            update(len(rows), "training")
    return rows


def _grow(device: Any, seconds: float, decoder: Any, full: bool) -> list[Growth]:
    from tt_ray.bench.report import GROWTH, growth

    total, done = sum(len(values) for values in GROWTH.values()), 0
    with Bars().stage("growth", total) as update:

        def tick() -> None:
            nonlocal done
            done += 1
            update(done, "")

        return [growth(what, device, seconds if full else seconds / 3, decoder, tick) for what in GROWTH]


def _speed_table(rows: Sequence[SpeedRow]) -> Table:
    columns = [
        "configuration",
        "at once",
        "per second",
        "p50/p95 ms",
        "GFLOP each",
        "GFLOP/s",
        "of limit",
        "ratio",
    ]
    cells = [
        [
            row.configuration if row.kind == "plan" else f"train {row.configuration}",
            row.episodes,
            f"{row.per_second:,.2f}" if row.kind == "plan" else f"{row.per_second:,.0f}",
            "-" if row.p50_ms is None else f"{row.p50_ms:,.0f}/{row.p95_ms:,.0f}",
            f"{row.gflop:.2f}" if row.kind == "plan" else f"{row.gflop:.4f}",
            f"{row.gflops:.0f}",
            f"{100 * row.share:.0f} %",
            f"{row.ratio:.1f}x",
            row.how,
            f"{row.window}/{'-' if row.keep is None else row.keep}",
            f"{row.memory_mib:,.0f}",
        ]
        for row in rows
    ]
    return plain_table([*columns, "how", "window/keep", "MiB"], cells, "Speed")


def _growth_table(curves: Sequence[Growth]) -> Table:
    cells = [
        [
            curve.what,
            "  ".join(
                f"{value}: {1000 * time:,.0f}"
                for value, time in zip(curve.values, curve.seconds, strict=True)
            ),
            f"{curve.exponent:.2f}",
        ]
        for curve in curves
    ]
    return plain_table(["grows with", "ms a round", "exponent"], cells, "Growth, from HalfCheetah's case")


def _pool() -> dict[str, Any]:
    """The evaluation pool at scale, on Ray."""
    from tt_ray.distributed.pool_bench import measure_pool

    with waiting("64 evaluation actors, 10,000 episodes of a stub planner"):
        report = measure_pool()
    return _show_report(asdict(report), "evaluation pool", "Pool at scale")


def _sweep() -> dict[str, Any]:
    """A sweep of many trials, on Ray."""
    from tt_ray.distributed.sweep_bench import measure_sweep

    with waiting("200 trials with next to nothing to compute"):
        report = measure_sweep()
    return _show_report(asdict(report), "sweep", "Cost of a trial")


def _show_report(report: dict[str, Any], what: str, title: str) -> dict[str, Any]:
    """Print a report's figures as a table; returned as they are."""
    cells = [[name.replace("_", " "), _report_cell(name, value)] for name, value in report.items()]
    console.print(plain_table([what, ""], cells, title))
    return report


def _report_cell(name: str, value: float) -> str:
    """A figure of a report with its unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "rss" in name:
        return f"{value / 1e6:,.0f} MB"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if name == "episodes_per_second" else f"{value:.4g} s"


def _write(path: Path, rows: Sequence[SpeedRow]) -> None:
    from tt_ray.bench.report import write_json

    write_json(path, rows)
    console.print(f"rows: {path}")


def _log(
    rows: Sequence[SpeedRow], curves: Sequence[Growth], limit: Limit, reports: dict[str, dict[str, Any]]
) -> None:
    import torch

    from tt_ray.bench.report import write_json
    from tt_ray.tracking import MlflowTracker, connect, provenance_tags

    metrics = {"limit/square_gflops": limit.square, "limit/shapes_gflops": limit.shapes}
    for row in rows:
        name = f"{row.kind}/{row.configuration}-{row.episodes}"
        metrics |= {
            f"{name}/per_second": row.per_second,
            f"{name}/share": row.share,
            f"{name}/ratio": row.ratio,
        }
    metrics |= {f"growth/{curve.what}_exponent": curve.exponent for curve in curves}
    for what, report in reports.items():
        metrics |= {
            f"{what}/{name}": value for name, value in report.items() if isinstance(value, int | float)
        }
    settings = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    folder = Path("runs") / "bench" / time.strftime("%Y%m%d-%H%M%S")
    tracker = MlflowTracker(connect(None), "tt-ray bench")
    with tracker.start("bench", folder, params=settings, tags=provenance_tags()) as run:
        run.log(metrics, 0)
        write_json(folder / "rows.json", rows)
        run.artifact(folder / "rows.json")
    console.print("logged to the MLflow experiment tt-ray bench")
