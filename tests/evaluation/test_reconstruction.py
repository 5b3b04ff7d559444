from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from tt_ray.config import DatasetConfig, DiscretizerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.tokens import fit_tokens, token_columns
from tt_ray.data.windows import split_episodes
from tt_ray.errors import UserError
from tt_ray.evaluation.reconstruction import (
    column_names,
    overview,
    reconstruction_errors,
    reconstruction_table,
)
from tt_ray.evaluation.reconstruction_figures import reconstruction_figure

DATA = DatasetConfig(id="tiny/numbers-v0", validation_fraction=0.4)
BINS = [
    DiscretizerConfig(strategy=strategy, num_bins=number)  # type: ignore[arg-type]
    for strategy in ("uniform", "quantile")
    for number in (4, 16)
]


def make_episodes(count: int = 10, length: int = 30, observation_dim: int = 2) -> Episodes:
    """Episodes of normal numbers; the last observation dimension never changes."""
    random, total = np.random.default_rng(0), count * length
    spec = DataSpec(
        dataset_id=DATA.id,
        environment={"id": ""},
        observation_keys=(),
        observation_dim=observation_dim,
        action_dim=1,
        action_low=(-1.0,),
        action_high=(1.0,),
        ref_min_score=None,
        ref_max_score=None,
        fingerprint="0",
    )
    observations = random.normal(size=(total, observation_dim)).astype(np.float32)
    observations[:, -1] = 3.0
    last = np.arange(total) % length == length - 1
    return Episodes(
        observations=observations,
        actions=random.uniform(-1, 1, (total, 1)).astype(np.float32),
        rewards=random.normal(size=total).astype(np.float32),
        terminated=last & (np.arange(total) < total // 2),
        truncated=last & (np.arange(total) >= total // 2),
        offsets=np.arange(count + 1) * length,
        spec=spec,
    )


def test_errors_against_a_hand_computation() -> None:
    # Four uniform bins from 0 to 8: they decode to 1, 3, 5 and 7.
    bins = Discretizer.fit(np.array([[0.0], [8.0]], dtype=np.float32), strategy="uniform", num_bins=4)
    values = np.array([[1.0], [2.5], [7.0], [10.0]], dtype=np.float32)  # errors 0, 0.5, 0 and, clipped, 3
    (row,) = reconstruction_errors(bins, values, np.array([2.0])).to_dict("records")
    assert row["dimension"] == 0
    assert row["rmse"] == pytest.approx(np.sqrt((0.25**2 + 1.5**2) / 4))
    assert row["median_error"] == pytest.approx(0.125)
    assert row["max_error"] == pytest.approx(1.5)
    assert row["in_use"] == pytest.approx(3 / 4)
    assert row["entropy"] == pytest.approx(0.25 * 2 + 0.25 * 2 + 0.5 * 1)


def test_columns_are_those_that_become_tokens() -> None:
    episodes = make_episodes()
    for changes in ({}, {"terminal_penalty": -50.0}, {"delayed_rewards": True, "discount": 0.9}):
        dataset = DatasetConfig(id=DATA.id, **changes)  # type: ignore[arg-type]
        columns = token_columns(episodes, dataset)
        tokens, bins, _ = fit_tokens(episodes, dataset, DiscretizerConfig(num_bins=50))
        assert (bins.encode(columns) == tokens).all()
        assert column_names(episodes) == ["observation 0", "observation 1", "action 0", "reward", "value"]


def test_bins_are_fitted_to_training_episodes_and_measured_on_the_others() -> None:
    episodes = make_episodes()
    table = reconstruction_table(episodes, DATA, BINS)
    assert len(table) == len(BINS) * 5
    columns = token_columns(episodes, DATA)
    train, held_out = split_episodes(10, 0.4, 0)
    rows = {n: np.concatenate([np.arange(e * 30, e * 30 + 30) for e in n_episodes])
            for n, n_episodes in (("train", train), ("held", held_out))}  # fmt: skip
    bins = Discretizer.fit(columns[rows["train"]], strategy="quantile", num_bins=16)
    lost = bins.decode(bins.encode(columns[rows["held"]])) - columns[rows["held"]]
    wanted = np.sqrt((lost.astype(np.float64) ** 2).mean(axis=0)) / columns.std(
        axis=0, dtype=np.float64
    ).clip(1e-9)
    found = table[(table["strategy"] == "quantile") & (table["num_bins"] == 16)]
    varied = [0, 2, 3, 4]
    assert found["rmse"].to_numpy()[varied] == pytest.approx(wanted[varied], rel=1e-5)
    assert found["kind"].tolist() == ["observation", "observation", "action", "reward", "value"]
    assert set(found["dataset"]) == {DATA.id}
    constant = table[table["dimension"] == 1]
    assert (constant[["rmse", "max_error", "entropy"]] < 1e-6).all(axis=None)


def test_more_bins_lose_less_and_quantiles_use_theirs_evenly() -> None:
    table = reconstruction_table(make_episodes(), DATA, BINS)
    normal = table[table["dimension"].isin([0, 3])]  # the first observation and the reward
    varied = normal.set_index(["strategy", "num_bins", "dimension"]).sort_index()
    for strategy in ("uniform", "quantile"):
        assert (varied["rmse"][strategy, 16] < varied["rmse"][strategy, 4]).all()
        assert (varied["entropy"][strategy, 16] > varied["entropy"][strategy, 4]).all()
    assert (varied["entropy"] <= np.log2(varied.index.get_level_values("num_bins")) + 1e-9).all()
    assert (varied["entropy"]["quantile", 16] > varied["entropy"]["uniform", 16]).all()
    assert (varied["median_error"]["quantile", 16] < varied["median_error"]["uniform", 16]).all()


def test_the_terminal_penalty_keeps_its_own_bin() -> None:
    episodes = make_episodes()
    dataset = DatasetConfig(id=DATA.id, validation_fraction=0.4, terminal_penalty=-1000.0)
    table = reconstruction_table(episodes, dataset, [DiscretizerConfig(strategy="uniform", num_bins=32)])
    reward = table[table["kind"] == "reward"].iloc[0]
    scale = token_columns(episodes, dataset)[:, 3].std()
    assert reward["max_error"] * scale < 1.0  # one bin of the ordinary rewards at most, not of a thousand


def test_an_overview_of_each_choice() -> None:
    table = reconstruction_table(make_episodes(), DATA, BINS)
    whole = overview(table)
    choices = [("uniform", 4), ("uniform", 16), ("quantile", 4), ("quantile", 16)]
    assert list(zip(whole["strategy"], whole["num_bins"], strict=True)) == choices
    first = table[:5]
    assert whole["rmse"][0] == pytest.approx(first["rmse"].mean())
    assert whole["observation"][0] == pytest.approx(first["rmse"][:2].mean())
    assert whole["value"][0] == pytest.approx(first["rmse"][4])
    assert whole["max_error"][0] == first["max_error"].max()
    assert whole["worst"][0] == first["name"][first["rmse"].idxmax()]


def test_data_without_held_out_episodes_is_refused() -> None:
    for dataset, count in ((DatasetConfig(id=DATA.id, validation_fraction=0.0), 10), (DATA, 1)):
        with pytest.raises(UserError, match=r"tiny/numbers-v0: no episode is held out .*validation_fraction"):
            reconstruction_table(make_episodes(count), dataset, BINS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("observation_dim", [2, 45])
def test_a_figure_of_few_and_of_many_dimensions(observation_dim: int, tmp_path: Path) -> None:
    table = reconstruction_table(make_episodes(observation_dim=observation_dim), DATA, BINS)
    reconstruction_figure(table, tmp_path / "bins.png")
    reconstruction_figure(table, tmp_path / "bins.svg")
    assert min(imread(tmp_path / "bins.png").shape[:2]) > 500
    words = (tmp_path / "bins.svg").read_text()
    assert "<!-- tiny/numbers-v0: what bins lose of held-out episodes -->" in words
    for text in ("uniform, 4", "quantile, 16", "observation 0", "value", "entropy, mean"):
        assert f"<!-- {text} -->" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bins.png", "bins.svg"]


def test_progress_is_told() -> None:
    told: list[int] = []
    table = reconstruction_table(make_episodes(), DATA, BINS, told.append)
    assert told == [1, 2, 3, 4]
    assert isinstance(table, pd.DataFrame)
