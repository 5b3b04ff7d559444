"""Normalised scores, and how sure we are of them: means and interquartile means with bootstrap intervals.

The names are those of rliable (Agarwal et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import trim_mean

from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult

Statistic = Callable[[NDArray[np.float64]], Any]
"""Reduces the last axis, as `mean` and `iqm` do."""

_CHUNK = 2_000_000  # resampled values in memory at once: 16 MB


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic and its bootstrap percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Training seeds x episodes as one figure, and how far the training seeds lie apart."""

    interval: Interval
    """Over all episodes; its width knows nothing of how few models were trained."""
    seed_values: tuple[float, ...]
    """The statistic of each training seed alone."""
    seed_std: float | None
    """Standard deviation of `seed_values` (n - 1); None for a single seed."""
    seed_error: float | None
    """Standard error of their mean; None for a single seed."""


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """What a set of episodes says; scores are None where the data set has no reference scores."""

    episodes: int
    returns: Interval
    return_std: float
    return_iqm: float
    score: Interval | None
    score_iqm: Interval | None
    length_mean: float
    terminated_fraction: float

    def metrics(self) -> dict[str, float]:
        """Figures under their MLflow names; no `score/...` without reference scores."""
        figures = {
            "episodes/count": float(self.episodes),
            "return/mean": self.returns.value,
            "return/ci_low": self.returns.low,
            "return/ci_high": self.returns.high,
            "return/std": self.return_std,
            "return/iqm": self.return_iqm,
            "episodes/length": self.length_mean,
            "episodes/terminated": self.terminated_fraction,
        }
        if self.score is not None and self.score_iqm is not None:
            figures["score/mean"] = self.score.value
            figures["score/ci_low"] = self.score.low
            figures["score/ci_high"] = self.score.high
            figures["score/iqm"] = self.score_iqm.value
            figures["score/iqm_ci_low"] = self.score_iqm.low
            figures["score/iqm_ci_high"] = self.score_iqm.high
        return figures


def mean(values: NDArray[np.float64]) -> Any:
    """Mean over the last axis."""
    return np.mean(values, axis=-1)


def iqm(values: ArrayLike) -> Any:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter."""
    return trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=-1)


def normalized_score(returns: ArrayLike, ref_min: float | None, ref_max: float | None) -> Any:
    """100 (R - min) / (max - min), in the shape of `returns`; None where a reference is missing.

    `UserError` where `ref_max` is not the larger one.
    """
    if ref_min is None or ref_max is None:
        return None
    if not ref_max > ref_min:
        raise UserError(
            f"reference scores {ref_min} and {ref_max}: the second (the expert's) must be the larger"
        )
    return 100.0 * (np.asarray(returns, dtype=np.float64) - ref_min) / (ref_max - ref_min)


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` [n] and its bootstrap percentile interval."""
    return bootstrap_interval([np.asarray(values, dtype=np.float64)], mean, confidence, samples, seed)


def bootstrap_interval(
    groups: Sequence[NDArray[np.float64]],
    statistic: Statistic,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`statistic` over all values of the groups [n], and its stratified bootstrap percentile interval.

    Each resample draws within every group as many values as the group has. Equal arguments give equal
    intervals.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("a bootstrap interval needs at least one value in each group")
    random = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // sum(len(group) for group in groups))
    resampled = [
        statistic(_resample(groups, min(chunk, samples - done), random)) for done in range(0, samples, chunk)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(resampled), [tail, 1.0 - tail])
    return Interval(value=float(statistic(np.concatenate(groups))), low=float(low), high=float(high))


def _resample(
    groups: Sequence[NDArray[np.float64]], samples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """[samples, n] values drawn with replacement within each group."""
    draws = [group[random.integers(len(group), size=(samples, len(group)))] for group in groups]
    return np.concatenate(draws, axis=1)


def aggregate_interval(
    groups: Sequence[ArrayLike],
    statistic: Statistic = mean,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Aggregate:
    """Training seeds x episodes: one array of episodes for each training seed, resampled within it."""
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    interval = bootstrap_interval(arrays, statistic, confidence, samples, seed)
    values = [float(statistic(array)) for array in arrays]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    error = std / float(np.sqrt(len(values))) if std is not None else None
    return Aggregate(interval=interval, seed_values=tuple(values), seed_std=std, seed_error=error)


def with_scores(
    results: Sequence[EpisodeResult], ref_min: float | None, ref_max: float | None
) -> list[EpisodeResult]:
    """The same episodes with their normalised score filled in, where both references are known."""
    scores = normalized_score([result.episode_return for result in results], ref_min, ref_max)
    if scores is None:
        return list(results)
    return [replace(result, score=float(score)) for result, score in zip(results, scores, strict=True)]


def summarize(
    results: Sequence[EpisodeResult],
    ref_min: float | None = None,
    ref_max: float | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> ScoreSummary:
    """Means, interquartile means and intervals of some episodes; `UserError` for none, or a return of NaN."""
    if not results:
        raise UserError("there are no episodes to summarise: evaluation.episodes must be at least 1")
    returns = np.array([result.episode_return for result in results], dtype=np.float64)
    if not np.isfinite(returns).all():
        bad = [result.seed for result in results if not np.isfinite(result.episode_return)]
        raise UserError(f"the episode with seed {bad[0]} has a return of NaN or infinity ({len(bad)} in all)")
    scores = normalized_score(returns, ref_min, ref_max)
    return ScoreSummary(
        episodes=len(results),
        returns=mean_interval(returns, confidence, samples, seed),
        return_std=float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0,
        return_iqm=float(iqm(returns)),
        score=None if scores is None else mean_interval(scores, confidence, samples, seed),
        score_iqm=None if scores is None else bootstrap_interval([scores], iqm, confidence, samples, seed),
        length_mean=float(np.mean([result.length for result in results])),
        terminated_fraction=float(np.mean([result.terminated for result in results])),
    )
