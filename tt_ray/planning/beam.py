"""Beam search for E episodes at once, for every objective. Knows the decoder's functions, no environment.

Shape letters: E episodes, B beams, n candidates of a beam, H horizon, D slots, V bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tt_ray.data.tokens import TokenLayout
from tt_ray.planning.expansions import (
    ByToken,
    ByTransition,
    CandidateDecoder,
    Decoder,
    SearchSettings,
    TokenDecoder,
    Transitionwise,
    Uniforms,
)
from tt_ray.planning.objectives import Objective


@dataclass(frozen=True)
class Plans:
    """Every beam's plan, best first."""

    tokens: Tensor
    """[E, B, H, D]; from the transition that a plan stopped at, all its tokens are stop tokens."""
    scores: Tensor
    """[E, B], descending."""
    actions: Tensor | None = None
    """[E, B, H, M] means of the distributions that the action tokens were chosen from, if asked for."""


class BeamSearch:
    """The search for one objective with fixed settings.

    `reward_values` and `value_values` [V + 1] are what the bins of the reward and value slots stand for,
    with 0 for the stop token; `action_values` [M, V], the same for the action slots, asks for the means of
    the actions.
    """

    def __init__(
        self,
        layout: TokenLayout,
        settings: SearchSettings,
        objective: Objective,
        reward_values: Tensor,
        value_values: Tensor,
        action_values: Tensor | None = None,
    ) -> None:
        self.layout, self.settings, self.objective = layout, settings, objective
        self.reward_values, self.value_values = reward_values, value_values
        self.action_values = action_values

    def run(
        self, decoder: Decoder | TokenDecoder, tokens: Tensor, past: Sequence[int], uniforms: Uniforms
    ) -> Plans:
        """Search from contexts [E, G + P]: goals, past[e] whole transitions and the present observation."""
        expansion = self._expansion(decoder)
        scores = totals = expansion.open(tokens, past, uniforms)
        stopped = torch.zeros_like(totals, dtype=torch.bool)
        while (candidates := expansion.expand()) is not None:
            extended, offered = self.objective.extend(totals[..., None], candidates)
            offered = keep_stopped(offered, scores, stopped)
            scores, parents = offered.flatten(1).topk(self.settings.beam_width, dim=-1)
            totals = extended.flatten(1).gather(1, parents)
            stopped = expansion.select(parents, stopped)
        means = expansion.mean_actions() if isinstance(expansion, ByToken) else None
        return Plans(self._blank_after_stop(expansion.finish()), scores, means)

    def _expansion(self, decoder: Decoder | TokenDecoder) -> ByTransition | ByToken:
        if self.objective.expansion == "token":
            return ByToken(cast(TokenDecoder, decoder), self.settings, self.layout, self.action_values)
        if isinstance(decoder, CandidateDecoder):
            values = (self.reward_values, self.value_values)
            decoder = Transitionwise(decoder, self.settings, self.layout, *values)
        return ByTransition(cast(Decoder, decoder), self.settings)

    def _blank_after_stop(self, tokens: Tensor) -> Tensor:
        stop = self.layout.stop_token
        over = (tokens[..., 0] == stop).cumsum(dim=-1) > 0
        return tokens.masked_fill(over[..., None], stop)


def keep_stopped(candidates: Tensor, scores: Tensor, stopped: Tensor) -> Tensor:
    """Scores [E, B, n] in which a stopped beam's first copy keeps its old score and the others are out."""
    frozen = torch.full_like(candidates, float("-inf"))
    frozen[..., 0] = scores
    return torch.where(stopped[..., None], frozen, candidates)
