"""The native cache of a search that chooses its beams at every token, also within a transition.

Letters as in `tt_ray.model.native.cache`. Whole transitions are nodes that stay where they are, as there; the
node of an unfinished one belongs to one beam, and whoever comes of that beam takes a copy along.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from tt_ray.model.native.cache import NativeCache, pointer
from tt_ray.model.transformer import TrajectoryTransformer


class NativeTokenCache(NativeCache):
    """`open`, and then for each token of the search `select` of beams and `extend_beams`; `finish`, at last.

    What a beam computes does not depend on the other beams, bit for bit.
    """

    unseen = 0

    def __init__(
        self,
        model: TrajectoryTransformer,
        *,
        episodes: int,
        beams: int,
        horizon: int,
        max_context_transitions: int,
        window: int,
        keep: int,
    ) -> None:
        nothing = torch.zeros(model.layout.num_bins + 1)  # it predicts tokens, not what they stand for
        super().__init__(
            model,
            episodes=episodes,
            beams=beams,
            copies=1,
            horizon=horizon,
            max_context_transitions=max_context_transitions,
            window=window,
            keep=keep,
            reward_values=nothing,
            value_values=nothing,
        )

    def select(self, parents: Tensor) -> None:
        """Make the beams numbered `parents` [E, B] the new beams; one may become several."""
        transition, begun = divmod(self.used, self.layout.slots)
        episodes, chosen = torch.arange(self.active)[:, None], self.suffix_tokens[: self.active]
        chosen[..., : self.used] = chosen[..., : self.used][episodes, parents]
        self._inherit(transition, parents.numpy())
        if begun:
            for name in ("node_keys", "node_values"):
                nodes = self._arrays[name][:, : self.active, transition]
                nodes.copy_(nodes[:, episodes, parents])

    def extend_beams(self, tokens: Tensor) -> Tensor:
        """Feed every beam its next token [E, B]; logits [E, B, V + 1] of the one after.

        A value token completes a transition: where that fills the window, the window slides first.
        """
        transition, begun = divmod(self.used, self.layout.slots)
        # A node's places are actions, reward and the next observation: the value token has none.
        stored = begun + 1 if begun < self.tail_length else begun
        is_value = begun == self.tail_length
        if begun == 0:
            self.ancestors[: self.active, transition] = np.arange(self.beams)
        if is_value:
            self._complete(transition)
        self.suffix_tokens[: self.active, :, self.used] = tokens
        place = (transition, -1 if is_value else stored - 1, stored)
        slot = (self.layout.observation_dim + begun) % self.layout.slots
        tokens = tokens.contiguous()
        rows = self._rows(self.beam_rows, self.used)
        self._call("extend", rows, *map(ctypes.c_int64, (*place, slot)), pointer(tokens))
        self.used += 1
        return self._arrays["pending"][: self.active].clone()
