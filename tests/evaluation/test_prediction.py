from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_spec import toy_spec

from tt_ray.config import PredictionConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import Episodes
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.evaluation.prediction import (
    NARROWEST,
    BinDensities,
    HeldOut,
    Prediction,
    Rollouts,
    Scorer,
    choose_starts,
    difference_table,
    error_table,
    hidden_observations,
    likelihood_table,
)
from tt_ray.evaluation.prediction_figures import error_figure, likelihood_figure

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=4)
SPEC = toy_spec(2, 1)
FLOOR = 0.1


def episodes_of(lengths: list[int]) -> Episodes:
    """Both observation dimensions count the rows of all episodes; the second in tens."""
    rows = sum(lengths)
    count = np.arange(rows, dtype=np.float32)
    return Episodes(
        np.stack([count, 10 * count], axis=1),
        -count[:, None],
        np.zeros(rows, dtype=np.float32),
        np.zeros(rows, dtype=bool),
        np.zeros(rows, dtype=bool),
        np.cumsum([0, *lengths]),
        SPEC,
    )


def held_out(horizon: int = 2, rows: tuple[int, ...] = (1, 4)) -> HeldOut:
    """Nine rows, four uniform bins each: dimension 0 has edges 0 2 4 6 8, dimension 1 ten times these."""
    episodes = episodes_of([9])
    columns = np.concatenate([episodes.observations, np.zeros((9, 3), dtype=np.float32)], axis=1)
    columns[:, 2:] = np.arange(9)[:, None]
    bins = Discretizer.fit(columns, strategy="uniform", num_bins=4)
    return HeldOut(episodes, bins.encode(columns), bins, LAYOUT, np.array(rows), horizon)


def rollouts_of(tokens: Any, live: Any = None) -> Rollouts:
    """From observation tokens [R, H, 2]."""
    tokens = np.array(tokens, dtype=np.int64)
    alive = np.ones(tokens.shape[:2], dtype=bool) if live is None else np.array(live)
    return Rollouts(held_out().bins.decode(tokens), tokens, alive)


def test_the_log_likelihood_by_hand() -> None:
    """From row 1: what follows is (2, 20) in bins (1, 1) and (3, 30) in bins (1, 1)."""
    drawn = rollouts_of([[[1, 1], [0, 1]], [[1, 2], [1, 1]], [[1, 1], [3, 1]], [[0, 3], [2, 1]]])
    scorer = Scorer.of(held_out(rows=(1,)), FLOOR)
    found = scorer.score([drawn])
    width = (2.0, 20.0)

    def density(mass: float, dim: int) -> float:
        return math.log(((1 - FLOOR) * mass + FLOOR / 4) / width[dim])

    expected = [density(3 / 4, 0) + density(2 / 4, 1), density(1 / 4, 0) + density(1, 1)]
    assert found.log_likelihood[0] == pytest.approx(expected)
    assert found.live.tolist() == [[1.0, 1.0]]


def test_ended_rollouts_keep_no_mass() -> None:
    """The mass is shared by the live ones; where none is, only the floor is left."""
    tokens = [[[1, 1], [1, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    drawn = rollouts_of(tokens, [[True, True], [True, True], [True, False]])
    scorer = Scorer.of(held_out(rows=(1,)), FLOOR)
    found = scorer.score([drawn])
    assert found.live[0] == pytest.approx([1.0, 2 / 3])
    half = (1 - FLOOR) / 2 + FLOOR / 4
    assert found.log_likelihood[0, 1] == pytest.approx(math.log(half / 2) + math.log(half / 20))
    assert np.isnan(found.example[2, 1]).all()
    assert np.isfinite(found.example[:, 0]).all()
    none = scorer.score([rollouts_of(tokens, [[True, False]] * 3)])
    assert none.log_likelihood[0, 1] == pytest.approx(2 * math.log(FLOOR / 4) - math.log(2 * 20))
    assert np.isnan(none.errors[:, 0, 1]).all()
    assert np.isfinite(none.errors[:, 0, 0]).all()


def test_nothing_is_likelier_than_the_oracle() -> None:
    case, random = held_out(), np.random.default_rng(0)
    scorer = Scorer.of(case, FLOOR)
    best = scorer.oracle()
    best_density = math.log((1 - FLOOR + FLOOR / 4) / 2) + math.log((1 - FLOOR + FLOOR / 4) / 20)
    assert best.log_likelihood == pytest.approx(np.full((2, 2), best_density))
    for _ in range(20):
        found = scorer.score([rollouts_of(random.integers(4, size=(3, 2, 2))) for _ in range(2)])
        assert (found.log_likelihood <= best.log_likelihood + 1e-12).all()


def test_densities_integrate_to_one() -> None:
    """Over all bins, whatever masses they hold."""
    values = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    for strategy in ("uniform", "quantile"):
        bins = Discretizer.fit(values, strategy=strategy, num_bins=10)
        densities = BinDensities.of(bins, 3, FLOOR)
        mass = np.random.default_rng(1).dirichlet(np.ones(10), size=3).T  # [V, N]
        tokens = np.tile(np.arange(10)[:, None], 3)
        density = np.exp(densities.log_density(mass, tokens))
        widths = np.diff(bins.edges.astype(np.float64), axis=1).T
        assert (density * widths).sum(axis=0) == pytest.approx(np.ones(3))


def test_bins_of_practically_no_width_and_constant_dimensions() -> None:
    values = np.random.default_rng(0).uniform(size=(1000, 2)).astype(np.float32)
    values[:600, 0] = 0.5  # an atom, which has a bin to itself
    values[:, 1] = 3.0
    bins = Discretizer.fit(values, strategy="quantile", num_bins=10)
    densities = BinDensities.of(bins, 2, FLOOR)
    used = bins.bins_in_use[0]
    mean = (bins.edges[0, used] - bins.edges[0, 0]) / used
    atom = bins.encode(np.array([0.5, 3.0], dtype=np.float32)).astype(np.int64)
    assert np.diff(bins.edges[0])[atom[0]] < 1e-6
    found = densities.log_density(np.ones(2), atom)
    assert found[0] == pytest.approx(math.log((1 - FLOOR + FLOOR / used) / (NARROWEST * mean)), rel=1e-3)
    assert found[1] == pytest.approx(0.0)


def test_errors_in_standard_deviations() -> None:
    """From row 1, first step: the reference is (2, 20), bins decode to (1, 3, 5, 7) and ten times these."""
    case = held_out(rows=(1,))
    drawn = rollouts_of([[[0, 0], [0, 0]], [[1, 1], [0, 0]], [[3, 1], [0, 0]]])
    found = Scorer.of(case, FLOOR).score([drawn]).errors[:, 0, 0]
    std = case.episodes.observations.std(axis=0)
    away = np.abs(np.array([[1, 10], [3, 30], [7, 30]]) - [2, 20])
    expected = [
        np.abs(np.array([11 / 3, 70 / 3]) - [2, 20]),
        np.median(away, axis=0),
        np.quantile(away, 0.1, axis=0),
    ]
    np.testing.assert_allclose(found, expected / std, rtol=1e-5)


def test_tokens_become_states() -> None:
    """Bins that no data is in stand for the last one in use; from the stop token on a rollout is over."""
    case = held_out()
    stop = LAYOUT.stop_token
    tokens = np.array([[[0, 3, 0, 0, 0], [stop] * 5], [[1, 2, 0, 0, 0], [3, 3, 1, 1, 1]]])
    found = Rollouts.of_tokens(tokens, case.bins, LAYOUT)
    assert found.values[0, 0].tolist() == [1.0, 70.0]
    assert found.values[1].tolist() == [[3.0, 50.0], [7.0, 70.0]]
    assert found.live.tolist() == [[True, False], [True, True]]
    back = Rollouts.of_values(found.values[1:], case.bins)
    assert back.tokens[0].tolist() == [[1, 2], [3, 3]]
    few = Discretizer.fit(np.zeros((3, 5), dtype=np.float32), strategy="quantile", num_bins=4)
    assert Rollouts.of_tokens(tokens[1:], few, LAYOUT).tokens.max() == 0


def test_contexts_references_and_actions_of_a_start() -> None:
    case = held_out(rows=(4,))
    context = case.context(0, 3)
    assert context.tolist() == [
        *case.tokens[2].tolist(),
        *case.tokens[3].tolist(),
        *case.tokens[4, :2].tolist(),
    ]
    assert case.context(0, 1).tolist() == case.tokens[4, :2].tolist()
    assert case.present(0).tolist() == [4.0, 40.0]
    assert case.reference(0).tolist() == [[5.0, 50.0], [6.0, 60.0]]
    assert case.actions(0).tolist() == [[-4.0], [-5.0]]
    assert case.hidden(0) is None


def test_only_the_context_is_hidden() -> None:
    layout, case = replace(LAYOUT, partial=True), held_out(rows=(4,))
    tokens = case.tokens.astype(np.int64)
    tokens[4, 1] = layout.hidden_token
    partial = replace(case, layout=layout, tokens=tokens)
    hidden = partial.hidden(0)
    assert hidden is not None
    assert hidden.tolist() == [False, True]
    assert partial.context(0, 1).tolist() == [tokens[4, 0], layout.hidden_token]
    assert partial.reference(0).tolist() == case.reference(0).tolist()
    assert hidden_observations(tokens, layout).sum() == 1


def test_starts_are_spread_over_where_there_is_room() -> None:
    """Episodes of 4, 10 and 12 rows; 2 rows before a start, and 5 after."""
    episodes = episodes_of([4, 10, 12])
    config = PredictionConfig(context=3, horizon=5, starts=4)
    chosen = np.arange(3)
    room = [*range(6, 9), *range(16, 21)]
    starts = choose_starts(episodes, chosen, config)
    assert starts.tolist() == [7, 16, 18, 20]
    assert set(starts) <= set(room)
    assert choose_starts(episodes, chosen, replace(config, starts=50)).tolist() == room
    assert choose_starts(episodes, np.array([1]), config).tolist() == [6, 7, 8]
    last = choose_starts(episodes, np.array([2]), replace(config, starts=50))[-1]
    assert last + config.horizon == 25  # the last row's observation is still a reference


@pytest.mark.parametrize("chosen", [[0], []])
def test_without_room_for_a_start(chosen: list[int]) -> None:
    longest = 4 if chosen else 0
    text = rf"none of its {len(chosen)} held-out episodes has the 8 rows .*longest: {longest}\); lower"
    with pytest.raises(UserError, match=text):
        choose_starts(
            episodes_of([4, 10]), np.array(chosen, dtype=np.int64), PredictionConfig(context=3, horizon=5)
        )


def predictions() -> dict[str, Prediction]:
    """Two models and the oracle from two starts; the first is ahead by one everywhere."""
    scorer, random = Scorer.of(held_out(), FLOOR), np.random.default_rng(0)
    first = scorer.score([rollouts_of(random.integers(4, size=(5, 2, 2))) for _ in range(2)])
    second = replace(first, log_likelihood=first.log_likelihood - 1, live=first.live / 2)
    return {"transformer": first, "ensemble": second, "oracle": scorer.oracle()}


def test_tables() -> None:
    found = predictions()
    table = likelihood_table(found, samples=200)
    assert list(table["model"].unique()) == ["transformer", "ensemble", "oracle"]
    first = table[(table["model"] == "transformer") & (table["step"] == 2)].iloc[0]
    values = found["transformer"].log_likelihood[:, 1]
    assert first["log_likelihood"] == pytest.approx(values.mean())
    assert values.min() - 1e-9 <= first["ci_low"] <= first["ci_high"] <= values.max() + 1e-9
    assert table[table["model"] == "ensemble"]["live"].tolist() == [0.5, 0.5]
    ahead = difference_table(found, "transformer", samples=200)
    rows = ahead[ahead["model"] == "ensemble"]
    for column in ("log_likelihood", "ci_low", "ci_high"):
        assert rows[column].tolist() == pytest.approx([1.0, 1.0])
    errors = error_table(found)
    assert len(errors) == 3 * 2 * 2
    cell = errors[(errors["model"] == "transformer") & (errors["step"] == 1) & (errors["dimension"] == 1)]
    assert cell["error_median"].item() == pytest.approx(found["transformer"].errors[1, :, 0, 1].mean())


def test_figures(tmp_path: Path) -> None:
    found = predictions()
    likelihood_figure(likelihood_table(found, samples=50), tmp_path / "likelihood.png", "toy")
    error_figure(error_table(found), tmp_path / "errors.png", ["a", "b"])
    for name in ("likelihood", "errors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("rollouts", 0), ("horizon", 0), ("starts", 0), ("context", 0), ("floor", 0.0)]
)
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^prediction\.{name}: must"):
        PredictionConfig(**{name: value})
