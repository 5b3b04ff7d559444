"""Beam search over whole transitions, for E episodes at once. Knows the decoder's functions, no environment.

Shape letters: E episodes, B beams, n copies of a beam, H horizon, D slots, N observation, M action, V bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tt_ray.data.tokens import TokenLayout
from tt_ray.planning.objectives import Objective
from tt_ray.planning.sampling import sample


class Decoder(Protocol):
    """The model as the search sees it; `tt_ray.model.cache.SearchCache` is one."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> Tensor:
        """Contexts [E, P] of past[e] whole transitions -> logits [E, V + 1] of the first action token."""
        ...

    def extend_candidates(self, tokens: Tensor) -> Tensor:
        """Each candidate's next token [E, B, n] -> logits [E, B, n, V + 1] of the one after."""
        ...

    def select(self, parents: Tensor) -> None:
        """The candidates [E, B], numbered beam * n + copy, become the beams."""
        ...

    def extend_beams(self, tokens: Tensor) -> Tensor:
        """Each beam's next token [E, B] -> logits [E, B, V + 1] of the one after."""
        ...

    def finish(self, tokens: Tensor) -> Tensor:
        """The last value tokens [E, B] -> tokens [E, B, H, D] of every beam's plan."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """Size of the search and how its tokens are sampled; see PlannerConfig."""

    horizon: int
    beam_width: int
    n_expand: int
    k_act: int | None = None
    cdf_act: float | None = None
    k_obs: int = 1


@dataclass(frozen=True)
class Uniforms:
    """The random numbers of one search."""

    actions: Tensor
    """[E, H, M, B, n]"""
    observations: Tensor | None
    """[E, H - 1, N, B]; None when observations are greedy."""


@dataclass(frozen=True)
class Plans:
    """Every beam's plan, best first."""

    tokens: Tensor
    """[E, B, H, D]; from the transition that a plan stopped at, all its tokens are stop tokens."""
    scores: Tensor
    """[E, B], descending."""


class BeamSearch:
    """The search for one objective with fixed settings.

    `reward_values` and `value_values` [V + 1] are what the bins of the reward and value slots stand for,
    with 0 for the stop token.
    """

    def __init__(
        self,
        layout: TokenLayout,
        settings: SearchSettings,
        objective: Objective,
        reward_values: Tensor,
        value_values: Tensor,
    ) -> None:
        self.layout, self.settings, self.objective = layout, settings, objective
        self.reward_values, self.value_values = reward_values, value_values

    def run(self, decoder: Decoder, tokens: Tensor, past: Sequence[int], uniforms: Uniforms) -> Plans:
        """Search from contexts [E, P] of past[e] whole transitions and the present observation."""
        settings, horizon = self.settings, self.settings.horizon
        logits = decoder.open(tokens, past)[:, None].expand(-1, settings.beam_width, -1)
        rewards = torch.zeros(logits.shape[:2], dtype=logits.dtype, device=logits.device)
        scores, stopped = rewards, torch.zeros_like(rewards, dtype=torch.bool)
        for step in range(horizon):
            reward, value, value_tokens = self._expand(decoder, logits, uniforms.actions[:, step])
            totals = self.objective.accumulate(rewards[..., None], reward, step)
            candidates = self.objective.score(totals, value, step)
            candidates = keep_stopped(candidates, scores, stopped)
            scores, parents = candidates.flatten(1).topk(settings.beam_width, dim=-1)
            decoder.select(parents)
            rewards = totals.flatten(1).gather(1, parents)
            value_tokens = value_tokens.flatten(1).gather(1, parents)
            stopped = stopped.gather(1, parents // settings.n_expand)
            if step < horizon - 1:
                noise = None if uniforms.observations is None else uniforms.observations[:, step]
                logits, stopped = self._observe(decoder, value_tokens, stopped, noise)
        return Plans(self._blank_after_stop(decoder.finish(value_tokens)), scores)

    def _expand(self, decoder: Decoder, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample every copy's actions; mean reward and value [E, B, n], and the likeliest value token."""
        settings, bins = self.settings, self.layout.num_bins
        candidates = logits[:, :, None].expand(-1, -1, settings.n_expand, -1)
        for j in range(self.layout.action_dim):
            actions = sample(candidates[..., :bins], uniforms[:, j], settings.k_act, settings.cdf_act)
            candidates = decoder.extend_candidates(actions)
        reward = candidates.softmax(dim=-1) @ self.reward_values
        candidates = decoder.extend_candidates(candidates[..., :bins].argmax(dim=-1))
        value = candidates.softmax(dim=-1) @ self.value_values
        return reward, value, candidates[..., :bins].argmax(dim=-1)

    def _observe(
        self, decoder: Decoder, value_tokens: Tensor, stopped: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decode the next observation; logits [E, B, V + 1] of the action token after it, and who stopped.

        Only the first token may be the stop token: an episode ends between transitions.
        """
        logits = decoder.extend_beams(value_tokens)
        stop = self.layout.stop_token
        for i in range(self.layout.observation_dim):
            allowed = logits if i == 0 else logits[..., :stop]
            noise = None if uniforms is None else uniforms[:, i]
            tokens = sample(allowed, noise, self.settings.k_obs)
            if i == 0:
                stopped = stopped | (tokens == stop)
            logits = decoder.extend_beams(tokens.masked_fill(stopped, stop))
        return logits, stopped

    def _blank_after_stop(self, tokens: Tensor) -> Tensor:
        stop = self.layout.stop_token
        over = (tokens[..., 0] == stop).cumsum(dim=-1) > 0
        return tokens.masked_fill(over[..., None], stop)


def keep_stopped(candidates: Tensor, scores: Tensor, stopped: Tensor) -> Tensor:
    """Scores [E, B, n] in which a stopped beam's first copy keeps its old score and the others are out."""
    frozen = torch.full_like(candidates, float("-inf"))
    frozen[..., 0] = scores
    return torch.where(stopped[..., None], frozen, candidates)
