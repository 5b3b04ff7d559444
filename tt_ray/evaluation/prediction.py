"""Long-horizon prediction: how likely held-out trajectories are under a model's open-loop rollouts.

From a start in a held-out episode, a model's rollouts give each state dimension a distribution over the
discretizer's bins at every step. What the episode really went through is scored under these.

Shape letters: S starts, R rollouts, H steps, N observation, V bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from tt_ray.config import DecoderName, PredictionConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import Episodes
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.evaluation.scores import mean_interval
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.dynamics import Ensemble
from tt_ray.planning.open_loop import RolloutSampler, ensemble_rollouts, stream_of

Floats = NDArray[np.float64]

NARROWEST = 1e-3
"""No bin counts as narrower than this share of its dimension's mean bin width."""
ERRORS = ("mean", "median", "best_tenth")
"""Distances to the reference: of the rollouts' mean; what half of the rollouts, and a tenth, are within."""


@dataclass(frozen=True)
class Rollouts:
    """Predicted states of R rollouts, from one step after the start on."""

    values: NDArray[np.float32]  # [R, H, N]
    tokens: NDArray[np.int64]  # [R, H, N] their bins
    live: NDArray[np.bool_]  # [R, H] false from the step at which a rollout has ended on

    @classmethod
    def of_tokens(cls, tokens: NDArray[np.int64], bins: Discretizer, layout: TokenLayout) -> Rollouts:
        """From transitions [R, H, D], as the Transformer gives them."""
        dims = layout.observation_dim
        last = bins.bins_in_use[:dims] - 1  # a model may draw a bin that no data is in
        observed = np.minimum(tokens[..., :dims], last)
        return cls(bins.decode(observed), observed, tokens[..., 0] != layout.stop_token)

    @classmethod
    def of_values(cls, values: NDArray[np.float32], bins: Discretizer) -> Rollouts:
        """From states [R, H, N]; all go on to the end."""
        return cls(values, bins.encode(values).astype(np.int64), np.ones(values.shape[:2], dtype=bool))


@dataclass(frozen=True)
class HeldOut:
    """Recorded episodes, and the rows of them that rollouts start from."""

    episodes: Episodes
    tokens: NDArray[np.integer]  # [T, D] in which observations may be hidden
    bins: Discretizer
    layout: TokenLayout
    rows: NDArray[np.int64]  # [S] rows of the present observations
    horizon: int

    def context(self, start: int, transitions: int) -> torch.Tensor:
        """Tokens [T] of so many transitions up to a start, of the present one the observation."""
        row = self.rows[start]
        tokens = self.tokens[row - transitions + 1 : row + 1].astype(np.int64).flatten()
        return torch.from_numpy(tokens[: len(tokens) - self.layout.slots + self.layout.observation_dim])

    def hidden(self, start: int) -> NDArray[np.bool_] | None:
        """Which dimensions [N] of the present observation are hidden; None where nothing ever is."""
        if not self.layout.partial:
            return None
        return hidden_observations(self.tokens[self.rows[start]], self.layout)

    def present(self, start: int) -> NDArray[np.float32]:
        """The observation [N] at a start, all of it."""
        return self.episodes.observations[self.rows[start]]

    def reference(self, start: int) -> NDArray[np.float32]:
        """The observations [H, N] that really followed, all of them."""
        row = self.rows[start] + 1
        return self.episodes.observations[row : row + self.horizon]

    def actions(self, start: int) -> NDArray[np.float32]:
        """The actions [H, M] that were taken from the start on."""
        row = self.rows[start]
        return self.episodes.actions[row : row + self.horizon]


def hidden_observations(tokens: NDArray[np.integer], layout: TokenLayout) -> NDArray[np.bool_]:
    """Which observations [..., N] of transitions [..., D] are hidden."""
    return np.ascontiguousarray(tokens[..., : layout.observation_dim] == layout.hidden_token)


def choose_starts(
    episodes: Episodes, chosen: NDArray[np.int64], config: PredictionConfig
) -> NDArray[np.int64]:
    """Rows [starts] of present observations, spread evenly over the places in the episodes `chosen`.

    Before a place there are `config.context` - 1 rows of its episode, after it `config.horizon`. Fewer where
    there are not so many places; `UserError` where there is none.
    """
    before, after = config.context - 1, config.horizon
    offsets = episodes.offsets
    ranges = [np.arange(offsets[e] + before, offsets[e + 1] - after) for e in chosen]
    places = np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)
    if len(places) == 0:
        longest = max((int(episodes.lengths[e]) for e in chosen), default=0)
        raise UserError(
            f"{episodes.spec.dataset_id}: none of its {len(chosen)} held-out episodes has the "
            f"{before + 1 + after} rows of prediction.context + prediction.horizon (the longest: {longest}); "
            "lower prediction.horizon or raise dataset.validation_fraction"
        )
    count = min(config.starts, len(places))
    return places[((np.arange(count) + 0.5) / count * len(places)).astype(np.int64)]


@dataclass(frozen=True)
class BinDensities:
    """A state dimension's bins as uniform densities, with a floor under each.

    A density is ((1 - floor) * mass + floor / bins in use) / width. Atoms of the data (a force that is mostly
    zero) have bins of practically no width, whose density would drown all else: none counts as narrower than
    `NARROWEST` of its dimension's mean. A dimension that is constant in the data has density 1 everywhere.
    """

    widths: Floats  # [N, V]
    used: NDArray[np.int64]  # [N]
    floor: float

    @classmethod
    def of(cls, bins: Discretizer, dims: int, floor: float) -> BinDensities:
        """Of the first `dims` dimensions of `bins`."""
        used, edges = bins.bins_in_use[:dims], bins.edges[:dims].astype(np.float64)
        widths = np.ones((dims, bins.num_bins))
        for n, count in enumerate(used):
            inner = np.diff(edges[n, : count + 1])
            if count > 1:
                widths[n, :count] = np.maximum(inner, NARROWEST * inner.mean())
        return cls(widths, used, floor)

    def log_density(self, mass: Floats, tokens: NDArray[np.integer]) -> Floats:
        """[..., N] at bins `tokens` [..., N] that hold `mass` [..., N]."""
        dims = np.arange(len(self.used))
        return np.log(((1 - self.floor) * mass + self.floor / self.used) / self.widths[dims, tokens])


@dataclass(frozen=True)
class Prediction:
    """How one model did, from every start."""

    log_likelihood: Floats  # [S, H] of the reference state, summed over dimensions
    live: Floats  # [S, H] share of the rollouts that have not ended
    errors: Floats  # [3, S, H, N] `ERRORS`, in units of each dimension's standard deviation
    example: NDArray[np.float32]  # [R, H, N] rollouts from the first start; NaN once they have ended

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to save."""
        return {name: np.ascontiguousarray(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Scorer:
    """Compares rollouts with what really followed."""

    held_out: HeldOut
    densities: BinDensities
    scale: NDArray[np.float32]  # [N] standard deviation of each dimension

    @classmethod
    def of(cls, held_out: HeldOut, floor: float) -> Scorer:
        """With the bins' densities and the whole data's standard deviations."""
        std = held_out.episodes.observations.std(axis=0)
        densities = BinDensities.of(held_out.bins, held_out.layout.observation_dim, floor)
        return cls(held_out, densities, np.where(std > 0, std, 1.0).astype(np.float32))

    def score(self, rollouts: Iterable[Rollouts]) -> Prediction:
        """Of one model, its rollouts from each start in order."""
        parts, example = [], np.zeros(0, dtype=np.float32)
        for start, drawn in enumerate(rollouts):
            if start == 0:
                example = np.where(drawn.live[..., None], drawn.values, np.float32(np.nan))
            parts.append(self._score_one(start, drawn))
        likelihood, live, errors = (np.stack(part) for part in zip(*parts, strict=True))
        return Prediction(likelihood, live, np.moveaxis(errors, 1, 0), example)

    def oracle(self) -> Prediction:
        """All mass in the right bin: the best that can be had with these bins and this floor."""
        bins = self.held_out.bins

        def right(start: int) -> Rollouts:
            tokens = bins.encode(self.held_out.reference(start))[None].astype(np.int64)
            return Rollouts(bins.decode(tokens), tokens, np.ones(tokens.shape[:2], dtype=bool))

        return self.score(right(start) for start in range(len(self.held_out.rows)))

    def _score_one(self, start: int, rollouts: Rollouts) -> tuple[Floats, Floats, Floats]:
        """Log-likelihood [H], live share [H] and errors [3, H, N]."""
        reference = self.held_out.reference(start)
        tokens = self.held_out.bins.encode(reference).astype(np.int64)
        count = rollouts.live.sum(axis=0)  # [H]
        right = (rollouts.tokens == tokens) & rollouts.live[..., None]
        mass = right.sum(axis=0) / np.maximum(count, 1)[:, None]
        likelihood = self.densities.log_density(mass, tokens).sum(axis=-1)
        return likelihood, count / len(rollouts.live), self._errors(reference, rollouts)

    def _errors(self, reference: NDArray[np.float32], rollouts: Rollouts) -> Floats:
        """[3, H, N]; NaN at steps that no rollout has lived to see."""
        errors = np.full((len(ERRORS), *reference.shape), np.nan)
        for h, live in enumerate(rollouts.live.T):
            if live.any():
                off = rollouts.values[live, h].astype(np.float64) - reference[h]
                best_tenth, median = np.quantile(np.abs(off), [0.1, 0.5], axis=0)
                errors[:, h] = np.abs(off.mean(axis=0)), median, best_tenth
        return errors / self.scale


Draw = Callable[[int], Rollouts]
"""The rollouts of one model from a start, given by its number."""


def transformer_rollouts(
    checkpoint: Checkpoint, held_out: HeldOut, config: PredictionConfig, decoder: DecoderName = "auto"
) -> Draw:
    """Of a Trajectory Transformer, from as many transitions as it can see and `config` allows."""
    context = min(config.context, checkpoint.model.config.context_transitions)
    sampler = RolloutSampler(
        checkpoint, context=context, horizon=config.horizon, rollouts=config.rollouts, decoder=decoder
    )

    def draw(start: int) -> Rollouts:
        seed = stream_of(config.seed, int(held_out.rows[start]))
        tokens = sampler(held_out.context(start, context), context - 1, seed)
        return Rollouts.of_tokens(tokens.numpy(), held_out.bins, held_out.layout)

    return draw


def feedforward_rollouts(
    ensemble: Ensemble, held_out: HeldOut, config: PredictionConfig, recorded_actions: bool = False
) -> Draw:
    """Of the ensemble, by its own actions or by those that were recorded."""

    def draw(start: int) -> Rollouts:
        values = ensemble_rollouts(
            ensemble,
            held_out.present(start),
            horizon=config.horizon,
            rollouts=config.rollouts,
            seed=stream_of(config.seed, int(held_out.rows[start])),
            hidden=held_out.hidden(start),
            actions=held_out.actions(start) if recorded_actions else None,
        )
        return Rollouts.of_values(values, held_out.bins)

    return draw


def likelihood_table(
    predictions: Mapping[str, Prediction], confidence: float = 0.95, samples: int = 10_000
) -> pd.DataFrame:
    """A row for each model and step (from 1): mean over starts, its bootstrap interval, the live share."""
    rows = [
        {
            "model": model,
            "step": h + 1,
            **_interval(prediction.log_likelihood[:, h], confidence, samples),
            "live": float(prediction.live[:, h].mean()),
        }
        for model, prediction in predictions.items()
        for h in range(prediction.live.shape[1])
    ]
    return pd.DataFrame(rows)


def difference_table(
    predictions: Mapping[str, Prediction], first: str, confidence: float = 0.95, samples: int = 10_000
) -> pd.DataFrame:
    """How far the model `first` is ahead of each other one, by step: paired by start, with intervals."""
    ours = predictions[first].log_likelihood
    rows = [
        {
            "model": other,
            "step": h + 1,
            **_interval(ours[:, h] - theirs.log_likelihood[:, h], confidence, samples),
        }
        for other, theirs in predictions.items()
        if other != first
        for h in range(ours.shape[1])
    ]
    return pd.DataFrame(rows)


def error_table(predictions: Mapping[str, Prediction]) -> pd.DataFrame:
    """A row for each model, step (from 1) and observation dimension: `ERRORS`, as means over starts."""
    frames = []
    for model, prediction in predictions.items():
        live = np.isfinite(prediction.errors).any(axis=1)
        sums = np.nansum(prediction.errors, axis=1)
        counts = np.isfinite(prediction.errors).sum(axis=1)
        means = np.where(live, sums / np.maximum(counts, 1), np.nan)  # [3, H, N]
        steps, dims = np.indices(means.shape[1:])
        columns = {f"error_{name}": means[i].ravel() for i, name in enumerate(ERRORS)}
        frames.append(
            pd.DataFrame({"model": model, "step": steps.ravel() + 1, "dimension": dims.ravel(), **columns})
        )
    return pd.concat(frames, ignore_index=True)


def _interval(values: Floats, confidence: float, samples: int) -> dict[str, float]:
    found = asdict(mean_interval(values, confidence, samples))
    return {"log_likelihood": found["value"], "ci_low": found["low"], "ci_high": found["high"]}
