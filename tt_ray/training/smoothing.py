"""What the bins of a dimension learn together: gradients of their weights, spread over neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from tt_ray.model.transformer import TrajectoryTransformer

OWN, WIDE = 0.05, 0.5
"""Shares of a bin's own gradient and of the wider of two Gaussians, beside the narrower one."""


class BinSmoothing:
    """Spreads the gradients of a bin's embedding and of its row of the head over the bins beside it.

    Neighbouring bins mean nearly the same, but as tokens they have nothing in common: with little data, what
    is learned of one place says nothing of the next. Descending along K g, with K positive definite, is
    descending on weights that are made of Gaussian bumps over the bins, without another parameter in the
    model. Clipping (by the norm that K g has) and the optimizer's steps by coordinate come after that. A part
    of the gradient is a bin's own, so that one that differs from its neighbours (a contact, a bound) can
    still become different.
    """

    def __init__(self, num_bins: int, width: float, device: torch.device) -> None:
        """`width`: the narrower Gaussian's deviation, as a share of the bins; the other's is 3 times that."""
        places = torch.arange(num_bins, dtype=torch.float32, device=device)
        distance = (places[:, None] - places) / (width * num_bins)
        narrow, wide = (torch.exp(-((distance / scale) ** 2) / 2) for scale in (1.0, 3.0))
        self.kernel: Tensor = OWN * torch.eye(num_bins, device=device) + narrow + WIDE * wide

    def __call__(self, model: TrajectoryTransformer) -> None:
        """Treat the gradient that the model has; the stop token and the hidden one keep theirs."""
        slots, bins = model.layout.slots, model.layout.num_bins
        embedding, head = model.token_embedding.weight.grad, model.head.grad
        if embedding is not None:
            self._spread(embedding[: slots * bins].unflatten(0, (slots, bins)))
        if head is not None:
            self._spread(head[:, :bins])

    def _spread(self, gradient: Tensor) -> None:
        """In place, [D, V, d]."""
        gradient.copy_(torch.einsum("uv,svd->sud", self.kernel, gradient))
