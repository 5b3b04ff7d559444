"""Choosing tokens: top-k and mass filters, inverse-CDF sampling, and every episode's own random stream."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def filter_probabilities(probabilities: Tensor, top_k: int | None = None, cdf: float | None = None) -> Tensor:
    """Probabilities [..., V] with the unlikely ones set to 0, not normalised again.

    `top_k` keeps the k most likely (and ties with the last of them). `cdf` then drops the least likely, as
    many as together hold less than that share of the remaining mass; the most likely one always stays.
    """
    if top_k is not None and top_k < probabilities.shape[-1]:
        smallest = probabilities.topk(top_k, dim=-1).values[..., -1:]
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
    if cdf is not None:
        ascending = probabilities.sort(dim=-1).values
        mass = ascending.cumsum(dim=-1)
        dropped = (mass < cdf * mass[..., -1:]).sum(dim=-1, keepdim=True)
        smallest = ascending.gather(-1, dropped.clamp(max=probabilities.shape[-1] - 1))
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
    return probabilities


def sample(
    logits: Tensor, uniforms: Tensor | None, top_k: int | None = None, cdf: float | None = None
) -> Tensor:
    """Tokens [...] drawn from filtered logits [..., V] with uniform numbers [...] in [0, 1).

    With top_k = 1, or without numbers, the likeliest.
    """
    if top_k == 1 or uniforms is None:
        return logits.argmax(dim=-1)
    probabilities = filter_probabilities(logits.softmax(dim=-1), top_k, cdf)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[..., -1:]
    # Rounding may lift u * total to total; a threshold below it always meets a token that the filters kept.
    threshold = torch.minimum(uniforms[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= threshold).sum(dim=-1)


class EpisodeStream:
    """Uniform numbers of one episode: a counter-based stream, addressed by decision.

    Philox keyed by the episode's seed, its counter set by the decision: what an episode draws depends on
    nothing else.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniforms(self, decision: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Numbers in [0, 1) for decision number `decision`; the same whenever asked for."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, decision, 0])
        return np.random.Generator(bits).random(shape, dtype=np.float32)
