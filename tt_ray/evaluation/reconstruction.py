"""What bins lose of a data set: each dimension of held-out episodes encoded, decoded and compared.

Shape letters: T rows, D dimensions (observations, actions, reward, value), V bins.

The bins are fitted to the training episodes alone: what the held-out ones lose is then what new data loses.
An error is measured in standard deviations of its dimension over all episodes, so that dimensions can be
set side by side; that of a constant dimension, which has none, counts as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tt_ray.config import DatasetConfig, DiscretizerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import Episodes
from tt_ray.data.tokens import token_columns
from tt_ray.data.windows import split_episodes
from tt_ray.errors import UserError

Floats = NDArray[np.float64]

STRATEGIES = ("uniform", "quantile")
KINDS = ("observation", "action", "reward", "value")


def reconstruction_table(
    episodes: Episodes,
    dataset: DatasetConfig,
    bins: Sequence[DiscretizerConfig],
    progress: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """A row for each choice of bins and each dimension, with what its held-out values lose.

    Columns: dataset, strategy, num_bins, dimension (its slot), name, kind; rmse, median_error and max_error
    in standard deviations of the dimension; in_use, the share of the bins that held-out values fall into;
    entropy of these, in bits. `progress` is told how many of `bins` are done. `UserError` where no episode is
    held out.
    """
    train, held_out = split_episodes(
        len(episodes), dataset.validation_fraction, dataset.split_seed, dataset.fraction
    )
    if len(held_out) == 0:
        raise UserError(
            f"{dataset.id}: no episode is held out to measure the bins on: it takes two episodes at least, "
            "and dataset.validation_fraction above 0"
        )
    columns, names = token_columns(episodes, dataset), column_names(episodes)
    scale = columns.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    fitted_to, compared = columns[_rows(episodes, train)], columns[_rows(episodes, held_out)]
    reserved = {} if dataset.terminal_penalty is None else {names.index("reward"): dataset.terminal_penalty}
    tables = []
    for done, choice in enumerate(bins, start=1):
        discretizer = Discretizer.fit(
            fitted_to, strategy=choice.strategy, num_bins=choice.num_bins, reserved=reserved
        )
        errors = reconstruction_errors(discretizer, compared, scale)
        tables.append(errors.assign(strategy=choice.strategy, num_bins=choice.num_bins, name=names))
        progress(done)
    table = pd.concat(tables, ignore_index=True)
    kinds = table["name"].str.partition(" ")[0]
    table = table.assign(dataset=dataset.id, kind=kinds)
    first = ["dataset", "strategy", "num_bins", "dimension", "name", "kind"]
    return table[[*first, *(name for name in table if name not in first)]]


def reconstruction_errors(
    discretizer: Discretizer, values: NDArray[np.float32], scale: Floats
) -> pd.DataFrame:
    """What values [T, D] lose, a row for each dimension; errors are in units of `scale` [D]."""
    tokens = discretizer.encode(values)
    errors = np.abs(discretizer.decode(tokens).astype(np.float64) - values) / scale
    shares = [np.bincount(column, minlength=discretizer.num_bins) / len(values) for column in tokens.T]
    return pd.DataFrame(
        {
            "dimension": np.arange(discretizer.dims),
            "rmse": np.sqrt((errors**2).mean(axis=0)),
            "median_error": np.median(errors, axis=0),
            "max_error": errors.max(axis=0),
            "in_use": [float((share > 0).mean()) for share in shares],
            "entropy": [_entropy(share) for share in shares],
        }
    )


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each choice of bins.

    The mean over the dimensions of rmse, in all and by kind, of median_error, in_use and entropy; the largest
    max_error; the worst dimension by rmse.
    """
    rows = []
    for (strategy, num_bins), group in table.groupby(["strategy", "num_bins"], sort=False):
        kinds = group.groupby("kind")["rmse"].mean()
        worst = group.iloc[int(group["rmse"].to_numpy().argmax())]
        rows.append(
            {"strategy": strategy, "num_bins": num_bins, "rmse": group["rmse"].mean()}
            | {kind: kinds[kind] for kind in KINDS}
            | {"worst": worst["name"], "worst_rmse": worst["rmse"]}
            | {"median_error": group["median_error"].mean(), "max_error": group["max_error"].max()}
            | {"in_use": group["in_use"].mean(), "entropy": group["entropy"].mean()}
        )
    return pd.DataFrame(rows)


def column_names(episodes: Episodes) -> list[str]:
    """Of each token of a transition, [D]."""
    spec = episodes.spec
    observations = [f"observation {i}" for i in range(spec.observation_dim)]
    return [*observations, *(f"action {i}" for i in range(spec.action_dim)), "reward", "value"]


def _rows(episodes: Episodes, chosen: Iterable[int]) -> NDArray[np.int64]:
    """Rows of the chosen episodes."""
    offsets = episodes.offsets
    return np.concatenate([np.arange(offsets[e], offsets[e + 1]) for e in chosen])


def _entropy(share: Floats) -> float:
    used = share[share > 0]
    return float(-(used * np.log2(used)).sum()) + 0.0
