"""Two or more sweeps or runs side by side: python analysis/compare_runs.py A B [C ...]

Each is a sweep (its best trial of each case is compared), a sweep and the number of a trial (SWEEP#3), or an
MLflow run id (a sweep, or one training seed). The first is what the others are measured against.

Episodes are paired by case and episode seed: both sides start from the same state. A pair is the difference
of the two sides' means over their training seeds; the interval resamples pairs within each case. It says how
sure the episodes make us of these models; how much other training seeds would matter is the standard error
beside it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from study import (
    Curves,
    Study,
    cells_of,
    learning_curves,
    load_study,
    markdown_table,
    read_artifact,
    run_script,
    tags_of,
    write_figure,
    write_report,
    write_table,
)

from tt_ray.errors import UserError
from tt_ray.evaluation.figure_parts import COLORS, open_figure, say_nothing, tidy
from tt_ray.evaluation.scores import bootstrap_interval, mean
from tt_ray.evaluation.sweep_figures import curves_figure
from tt_ray.texts import interval_text, number_text

ALL = "all cases"


@dataclass(frozen=True)
class Side:
    """One of what is compared."""

    label: str
    what: str
    """Which of its trials are meant."""
    episodes: pd.DataFrame
    """case, training_seed, seed, fresh, score, episode_return."""
    cells: pd.DataFrame
    """Its runs, as `mlflow.search_runs` gives them."""
    remark: str = ""
    """What was left out of its sweep."""


def load_side(text: str, uri: str) -> Side:
    """The side that `text` names; see the module."""
    name, hash_, number = text.rpartition("#")
    if hash_ and number.isdecimal():
        study = load_study(name, uri)
        return _side_of_trials(text, study, study.trials[study.trials["index"] == int(number)])
    run = _run(text) if re.fullmatch(r"[0-9a-f]{32}", text) else None
    kind = None if run is None else run.get("tags.kind")
    if run is None or kind == "sweep":
        study = load_study(text, uri)
        return _side_of_trials(text, study, study.winners())
    if kind == "trial":
        return _side_of_cell(run, load_study(str(run["tags.mlflow.parentRunId"]), uri))
    return _side_of_run(text, run)


def _side_of_trials(label: str, study: Study, trials: pd.DataFrame) -> Side:
    if trials.empty:
        raise UserError(f"{label!r}: sweep {study.name!r} has no such trial, or none that has finished")
    cells = cells_of(study.cells, trials)
    return Side(label, "; ".join(trials["trial"]), study.episodes_of(trials), cells, study.gone_text)


def _side_of_cell(cell: pd.Series, study: Study) -> Side:
    """One training seed of a trial."""
    name, mine = str(cell["tags.mlflow.runName"]), study.trials["fingerprint"] == cell["tags.trial"]
    if not mine.any():
        raise UserError(f"run {name!r}: its trial is not in the table of sweep {study.name!r}")
    side = _side_of_trials(name, study, study.trials[mine])
    seeds = side.episodes["training_seed"].astype(str) == cell["tags.seed"]
    own = side.cells["run_id"] == cell["run_id"]
    return replace(side, episodes=side.episodes[seeds], cells=side.cells[own])


def _run(run_id: str) -> pd.Series | None:
    import mlflow

    found = mlflow.search_runs(search_all_experiments=True, filter_string=f"attributes.run_id = '{run_id}'")
    return None if found.empty else found.iloc[0]


def _side_of_run(run_id: str, run: pd.Series) -> Side:
    """A run of `tt-ray run` or `tt-ray evaluate`: the planner's episodes, of all its seeds or of one."""
    tags = tags_of(run)
    name, parent = tags.get("mlflow.runName", run_id), tags.get("mlflow.parentRunId")
    episodes = read_artifact(parent or run_id, "episodes.parquet", f"run {name!r}")
    episodes = episodes[episodes["policy"] == "planner"] if "policy" in episodes else episodes
    if parent:
        episodes = episodes[episodes["training_seed"].astype(float) == float(tags.get("seed", "nan"))]
    columns = {"episode_return": episodes["return"], "case": "", "fresh": False}
    return Side(name, name, episodes.assign(**columns), run.to_frame().T)


def value_of(sides: Sequence[Side]) -> str:
    """`score` where every side has it, or else `episode_return`."""
    return "score" if all(side.episodes["score"].notna().all() for side in sides) else "episode_return"


def matched(first: Side, other: Side, fresh: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both sides' episodes (case, training_seed, seed, value) of the cases and episode seeds that they share.

    A single case on each side is the same one, whatever its name.
    """
    value, tables = value_of([first, other]), []
    for side in (first, other):
        mine = side.episodes[side.episodes["fresh"] == fresh].rename(columns={value: "value"})
        tables.append(mine[["case", "training_seed", "seed", "value"]].dropna(subset="value"))
    if all(table["case"].nunique() == 1 for table in tables):
        tables[1] = tables[1].assign(case=tables[0]["case"].iloc[0])
    places = [set(zip(table["case"], table["seed"], strict=True)) for table in tables]
    shared = places[0] & places[1]
    first_kept, other_kept = (
        table[[place in shared for place in zip(table["case"], table["seed"], strict=True)]]
        if shared
        else table.iloc[:0]
        for table in tables
    )
    return first_kept, other_kept


def pairs(first: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """case, seed, first, other: means over training seeds of each episode seed; from `matched` episodes."""
    means = [table.groupby(["case", "seed"], sort=False)["value"].mean() for table in (first, other)]
    return pd.DataFrame({"first": means[0], "other": means[1]}).reset_index()


def differences(first: Side, other: Side, *, fresh: bool = False) -> pd.DataFrame:
    """A row for each case, and one for all: pairs, means, difference, low, high, won, seed_error."""
    episodes = matched(first, other, fresh)
    table = pairs(*episodes)
    cases = {str(case): group for case, group in table.groupby("case", sort=False)}
    errors = {case: seed_error(*(frame[frame["case"] == case] for frame in episodes)) for case in cases}
    groups = [(case, [group]) for case, group in cases.items()]
    rows = []
    for case, parts in [*groups, *([(ALL, list(cases.values()))] if len(cases) > 1 else [])]:
        gaps = [(part["other"] - part["first"]).to_numpy() for part in parts]
        interval, whole = bootstrap_interval(gaps, mean), pd.concat(parts)
        names = list(cases) if case == ALL else [case]
        weighted = [errors[name] * len(cases[name]) / len(whole) for name in names]
        rows.append(
            {
                "other": other.label,
                "episodes": "fresh" if fresh else "all trials'",
                "case": case,
                "pairs": len(whole),
                "first_mean": whole["first"].mean(),
                "other_mean": whole["other"].mean(),
                "difference": interval.value,
                "low": interval.low,
                "high": interval.high,
                "won": float(np.mean(np.concatenate(gaps) > 0)),
                "seed_error": math.sqrt(sum(error**2 for error in weighted)),
            }
        )
    return pd.DataFrame(rows)


def seed_error(first: pd.DataFrame, other: pd.DataFrame) -> float:
    """Standard error of the difference over training seeds; NaN where a side has a single one."""
    means = [frame.groupby("training_seed")["value"].mean() for frame in (first, other)]
    return math.sqrt(sum(float(side.var(ddof=1)) / len(side) for side in means))


def differing_params(sides: Sequence[Side]) -> pd.DataFrame:
    """param, and the values of each side, where they are not the same; a seed is no setting."""
    names = sorted({name for side in sides for name in side.cells if name.startswith("params.")})
    rows = []
    for name in names:
        texts = [
            ", ".join(dict.fromkeys(side.cells.get(name, pd.Series()).dropna().astype(str))) for side in sides
        ]
        if len(set(texts)) > 1 and name != "params.seed":
            rows.append([name.removeprefix("params."), *texts])
    return pd.DataFrame(rows, columns=["param", *(side.label for side in sides)])


def mean_curves(sides: Sequence[Side]) -> Curves:
    """Of each side and case the mean of its training seeds' learning curves, at the steps that all have."""
    curves = Curves()
    for side in sides:
        cases = side.cells.get("tags.trial.case", pd.Series("", side.cells.index)).fillna("")
        for case, cells in side.cells.groupby(cases, sort=False):
            found = list(learning_curves(cells, lambda cell: str(cell["run_id"])).values())
            if not found:
                continue
            steps = sorted(set.intersection(*(set(steps) for steps, _ in found)))
            tables = [dict(zip(*curve, strict=True)) for curve in found]
            label = ", ".join(
                filter(None, [side.label, str(case), f"{len(found)} seeds" if found[1:] else ""])
            )
            curves[label] = steps, [float(np.mean([table[step] for table in tables])) for step in steps]
    return curves


def difference_figure(table: pd.DataFrame, first: str, value: str, path: Path) -> None:
    """A line for each row of `differences`: the difference and its interval; zero is no difference."""
    with open_figure(path, 7.0, 1.2 + 0.35 * max(3, len(table))) as figure:
        if table.empty:
            say_nothing(figure, "no episodes in common")
            return
        axes, rows = figure.add_subplot(), np.arange(len(table))[::-1]
        others = list(dict.fromkeys(table["other"]))
        for row, (_, line) in zip(rows, table.iterrows(), strict=True):
            reach = [[line["difference"] - line["low"]], [line["high"] - line["difference"]]]
            color = COLORS[others.index(line["other"]) % len(COLORS)]
            hollow = "white" if line["episodes"] == "fresh" else color
            axes.errorbar(
                line["difference"], row, xerr=reach, fmt="D", color=color, capsize=4, markerfacecolor=hollow
            )
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(rows, [row_name(line) for _, line in table.iterrows()])
        axes.set_xlabel(f"difference of the {value} from {first}, and its interval")
        tidy(axes)


def row_name(row: pd.Series) -> str:
    """The other side, the case if it has a name, and whether the episodes are fresh."""
    return ", ".join(
        [row["other"], *filter(None, [row["case"], "fresh" if row["episodes"] == "fresh" else ""])]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="compare_runs.py", description=about, epilog=more)
    parser.add_argument(
        "name", nargs="+", metavar="SWEEP", help="a sweep, SWEEP#TRIAL or a run id; two or more"
    )
    return run_script(parser, _report, argv)


def _report(options: argparse.Namespace, uri: str, folder: Path) -> None:
    sides = _sides(options.name, uri)
    first, table = sides[0].label, _compared(sides)
    params, value = differing_params(sides), value_of(sides).removeprefix("episode_")
    draw = partial(difference_figure, table, first, value)
    draw_curves = partial(curves_figure, mean_curves(sides), ylabel="val/loss")
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _headline(sides),
        f"## Differences from {first}\n\n{difference_text(table, value)}\n\n{METHODS}\n",
        write_figure(draw, folder, "differences") + "\n",
        f"## Settings that differ\n\n{markdown_table(list(params), params.to_numpy().tolist())}\n",
        "## Learning curves\n\nMeans over training seeds.\n",
        write_figure(draw_curves, folder, "curves") + "\n",
    ]
    write_table(table, folder / "differences.parquet")
    write_table(params, folder / "params.parquet")
    write_report("\n".join(sections), folder / "comparison.md")


def _sides(names: Sequence[str], uri: str) -> list[Side]:
    """What is compared, under labels that are all different."""
    if len(names) < 2:
        raise UserError("one name is nothing to compare: give two sweeps or runs, or more")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]!r} is given twice")
    sides = [load_side(name, uri) for name in names]
    labels = [side.label for side in sides]
    return [
        side if labels.count(side.label) == 1 else replace(side, label=f"{side.label} ({name})")
        for side, name in zip(sides, names, strict=True)
    ]


def _compared(sides: Sequence[Side]) -> pd.DataFrame:
    """`differences` of all others from the first, then those on fresh episodes."""
    first, *others = sides
    tables = [differences(first, other, fresh=fresh) for fresh in (False, True) for other in others]
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError(
            f"{first.label!r} shares no case and episode seed with the others: "
            "compare runs with the same cases and evaluation seeds"
        )
    return table


def _headline(sides: Sequence[Side]) -> str:
    """The names, what each stands for, and what was left out of their sweeps."""
    legend = markdown_table(["name", "what is compared"], [[side.label, side.what] for side in sides])
    remarks = dict.fromkeys(side.remark for side in sides if side.remark)
    title = f"# {' beside '.join(side.label for side in sides)}"
    return "\n\n".join([title, legend, *remarks]) + "\n"


METHODS = """\
Positive: better than the first. Pairs share the case and the episode seed, and are means over training seeds;
the interval is a 95 % bootstrap over pairs within each case. The last column is the standard error of the
difference over training seeds: where it is as large as the interval, more training seeds are needed, not more
episodes. The best trial of a sweep was chosen on the episodes of all trials, which favours large sweeps;
fresh episodes do not."""


def difference_text(table: pd.DataFrame, value: str) -> str:
    """`differences` in markdown."""
    rows = [
        [
            row_name(row),
            str(row["pairs"]),
            *(number_text(row[name]) for name in ("first_mean", "other_mean")),
            interval_text(row["difference"], row["low"], row["high"]),
            f"{100 * row['won']:.0f} %",
            number_text(row["seed_error"]),
        ]
        for _, row in table.iterrows()
    ]
    titles = [
        "compared",
        "pairs",
        f"first {value}",
        f"its {value}",
        "difference [95 %]",
        "won",
        "s.e. over seeds",
    ]
    return markdown_table(titles, rows)


if __name__ == "__main__":
    sys.exit(main())
