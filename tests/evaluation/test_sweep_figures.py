from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from tt_ray.evaluation.figure_parts import Scale, open_figure, thinned, value_text
from tt_ray.evaluation.sweep_figures import (
    curves_figure,
    frontier,
    frontier_figure,
    parallel_figure,
    parameter_figure,
)

STRATEGY, HORIZON, FILTER = "discretizer.strategy", "planner.horizon", "planner.k_act"
KEYS = [STRATEGY, HORIZON, FILTER]
COST = "speed/latency_p50_ms"
METRIC = "score/mean"

DRAWN: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "parameters": lambda trials, path: parameter_figure(trials, KEYS, METRIC, path),
    "parallel": lambda trials, path: parallel_figure(trials, KEYS, METRIC, "maximize", path),
    "frontier": lambda trials, path: frontier_figure(trials, COST, METRIC, "maximize", path),
}
every_figure = pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN.keys())


def some_trials(count: int, cases: tuple[str, ...] = ("",)) -> pd.DataFrame:
    random = np.random.default_rng(0)
    score = random.uniform(20.0, 100.0, count)
    return pd.DataFrame(
        {
            "trial": [f"trial {i} of many" for i in range(count)],
            "case": [cases[i % len(cases)] for i in range(count)],
            "status": "finished",
            STRATEGY: [("uniform", "quantile")[i % 2] for i in range(count)],
            HORIZON: [(1, 5, 15, 50)[i // 2 % 4] for i in range(count)],
            FILTER: [(None, 10.0, 40.0)[i % 3] for i in range(count)],
            METRIC: score,
            "score/ci_low": score - 4.0,
            "score/ci_high": score + 3.0,
            COST: random.uniform(1.0, 100.0, count),
        }
    )


def words_of(path: Path) -> str:
    """The texts of an SVG: matplotlib notes each one as a comment beside its outlines."""
    return path.read_text(encoding="utf-8").replace("&gt;", ">")


@every_figure
@pytest.mark.parametrize("count", [1, 2, 4, 200])
@pytest.mark.filterwarnings("error")
def test_figures_of_few_and_of_many_trials(
    draw: Callable[[pd.DataFrame, Path], None], count: int, tmp_path: Path
) -> None:
    draw(some_trials(count, ("hopper", "ant")), tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.02
    edge = np.concatenate([picture[:3].ravel(), picture[-3:].ravel(), picture[:, :3].ravel()])
    assert (edge == 1.0).all()  # nothing runs out of the picture
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@every_figure
@pytest.mark.parametrize(
    "emptied",
    [
        lambda trials: trials.assign(**{METRIC: np.nan}),
        lambda trials: trials.assign(status="failed"),
        lambda trials: trials.drop(columns=METRIC),
        lambda trials: trials[:0],
    ],
    ids=["nan", "failed", "no metric", "no rows"],
)
def test_a_picture_without_trials_says_so(
    draw: Callable[[pd.DataFrame, Path], None],
    emptied: Callable[[pd.DataFrame], pd.DataFrame],
    tmp_path: Path,
) -> None:
    draw(emptied(some_trials(4)), tmp_path / "figure.svg")
    assert "no finished trials" in words_of(tmp_path / "figure.svg")


@every_figure
@pytest.mark.filterwarnings("error")
def test_a_constant_metric_is_drawn(draw: Callable[[pd.DataFrame, Path], None], tmp_path: Path) -> None:
    trials = some_trials(6).assign(**{METRIC: 50.0, "score/ci_low": np.nan})
    draw(trials, tmp_path / "figure.svg")
    assert "no finished trials" not in words_of(tmp_path / "figure.svg")


@every_figure
def test_equal_tables_give_equal_files(draw: Callable[[pd.DataFrame, Path], None], tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(some_trials(5), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_names_are_shown_whole_and_are_no_formulas(tmp_path: Path) -> None:
    trials = some_trials(4, ("costs $5 and $6", "b"))
    trials[STRATEGY] = ["a category of a good many words in one line, not wrapped here", "b"] * 2
    parallel_figure(trials, KEYS, METRIC, "maximize", tmp_path / "figure.svg")
    words = words_of(tmp_path / "figure.svg")
    for text in ("costs $5 and $6", *trials[STRATEGY], "none", "5"):
        assert f"<!-- {text} -->" in words


def test_failed_trials_are_left_out(tmp_path: Path) -> None:
    trials = some_trials(4)
    trials.loc[1, ["status", HORIZON]] = ["failed", 77]
    trials.loc[2, [METRIC, HORIZON]] = [np.nan, 88]
    parallel_figure(trials, KEYS, METRIC, "maximize", tmp_path / "figure.svg")
    words = words_of(tmp_path / "figure.svg")
    assert "<!-- 1 -->" in words
    assert "<!-- 77 -->" not in words
    assert "<!-- 88 -->" not in words


def test_without_keys_the_cases_are_the_axis(tmp_path: Path) -> None:
    trials = some_trials(4, ("hopper", "ant"))
    parameter_figure(trials, [], METRIC, tmp_path / "parameters.svg")
    parallel_figure(trials, [], METRIC, "maximize", tmp_path / "parallel.svg")
    for name in ("parameters", "parallel"):
        words = words_of(tmp_path / f"{name}.svg")
        assert words.count("<!-- hopper -->") == words.count("<!-- ant -->") == 1


def test_frontier_points_are_named(tmp_path: Path) -> None:
    trials = some_trials(40)
    frontier_figure(trials, COST, METRIC, "maximize", tmp_path / "figure.svg")
    words = words_of(tmp_path / "figure.svg")
    front = frontier(trials, COST, METRIC, "maximize")
    assert 1 < front.sum() < 20
    for name, named in zip(trials["trial"], front, strict=True):
        assert (f":  {name} -->" in words) == named


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_frontier_is_what_no_other_trial_beats(goal: str) -> None:
    random = np.random.default_rng(1)
    table = pd.DataFrame(
        {
            "case": random.choice(["a", "b"], 120),
            COST: random.integers(1, 12, 120).astype(float),
            METRIC: random.integers(1, 12, 120).astype(float),
        },
        index=random.permutation(120),
    )
    table.iloc[5, 2] = np.nan
    sign = 1.0 if goal == "maximize" else -1.0
    wanted, seen = [], set()
    for case, cost, value in table.sort_index(key=lambda _: np.arange(120)).itertuples(index=False):
        rivals = table[(table["case"] == case) & table[METRIC].notna()]
        better = (rivals[COST] <= cost) & (sign * rivals[METRIC] >= sign * value)
        beaten = (better & ((rivals[COST] < cost) | (sign * rivals[METRIC] > sign * value))).any()
        fresh = (case, cost, value) not in seen
        seen.add((case, cost, value))
        wanted.append(bool(not beaten and fresh and value == value))
    found = frontier(table, COST, METRIC, goal)
    assert found.index.equals(table.index)
    assert found.tolist() == wanted


def falling(end: float) -> tuple[list[int], list[float]]:
    return [0, 100, 200], [4.0, (4.0 + end) / 2.0, end]


def test_few_learning_curves_all_have_labels(tmp_path: Path) -> None:
    curves = {f"model {i}": falling(1.0 + i) for i in range(3)} | {"lost": ([0], [np.nan])}
    curves_figure(curves, tmp_path / "figure.svg", "val/loss")
    words = words_of(tmp_path / "figure.svg")
    assert all(f"<!-- model {i} -->" in words for i in range(3))
    assert "lost" not in words


@pytest.mark.parametrize(("ylabel", "best", "worst"), [("val/loss", 0, 19), ("score", 19, 0)])
def test_of_many_learning_curves_the_best_and_the_worst_have_labels(
    ylabel: str, best: int, worst: int, tmp_path: Path
) -> None:
    curves = {f"model {i}.": ([0, 1], [1.0 + i, 1.5 + i]) for i in range(20)}
    curves_figure(curves, tmp_path / "figure.svg", ylabel)
    words = words_of(tmp_path / "figure.svg")
    assert f"<!-- best of 20: model {best}. -->" in words
    assert f"<!-- worst: model {worst}. -->" in words
    assert words.count("model ") == 2


def test_no_learning_curves(tmp_path: Path) -> None:
    curves_figure({}, tmp_path / "figure.svg", "val/loss")
    assert "no learning curves" in words_of(tmp_path / "figure.svg")


@pytest.mark.parametrize(
    ("values", "ticks", "places"),
    [
        ([15, 5, 5], [(5, "5"), (15, "15")], [15, 5, 5]),
        ([10, 1000, 100], [(1, "10"), (2, "100"), (3, "1000")], [1, 3, 2]),
        ([True, False], [(0, "False"), (1, "True")], [1, 0]),
        ([40.0, None, 5.0], [(0, "none"), (1, "5"), (2, "40")], [2, 0, 1]),
        (["b", 2, None], [(0, "none"), (1, "2"), (2, "b")], [2, 1, 0]),
        ([0.0, 30.0], [(0, "0"), (30, "30")], [0, 30]),
    ],
)
def test_a_scale_suits_its_values(
    values: list[object], ticks: list[tuple[float, str]], places: list[float]
) -> None:
    scale = Scale.of(pd.Series(values))
    assert scale.ticks == ticks
    assert scale.places.tolist() == places
    assert scale.discrete


def test_a_scale_of_many_numbers_has_round_ticks() -> None:
    even = Scale.of(pd.Series(np.linspace(0.0, 1.0, 50)))
    assert not even.discrete
    assert [text for _, text in even.ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    wide = Scale.of(pd.Series(np.geomspace(1e-5, 1e-2, 50)))
    assert [text for _, text in wide.ticks][:4] == ["1e-05", "2e-05", "5e-05", "0.0001"]
    assert wide.places[0] == pytest.approx(-5.0)


def test_ticks_that_would_overlap_are_left_out() -> None:
    ticks = [(0.0, "1"), (0.01, "2"), (0.5, "50"), (1.0, "100")]
    assert thinned(ticks, [0.05] * 4) == [(0.0, "1"), (0.5, "50"), (1.0, "100")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(10.0, "10"), (np.int64(3), "3"), (0.0003, "0.0003"), (None, "none"), (np.nan, "none"), (True, "True")],
)
def test_settings_are_shown_as_they_are_written(value: object, text: str) -> None:
    assert value_text(value) == text


def test_a_figure_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"), open_figure(tmp_path / "figure.nope", 3, 3):
        pass
    with pytest.raises(ZeroDivisionError), open_figure(tmp_path / "figure.png", 3, 3):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
