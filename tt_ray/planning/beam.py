"""Beam search over whole transitions, for E episodes at once. Knows the decoder's functions, no environment.

Shape letters: E episodes, B beams, n copies of a beam, H horizon, D slots, N observation, M action, V bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tt_ray.data.tokens import TokenLayout
from tt_ray.planning.objectives import Objective
from tt_ray.planning.sampling import sample


class Decoder(Protocol):
    """The model as the search sees it, a transition at a time; `tt_ray.model.native.NativeCache` is one."""

    slid_tokens: int
    """Tokens fed again so far because a window was full."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> object:
        """Begin from contexts [E, P] of past[e] whole transitions and the present observation."""
        ...

    def expand(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw every candidate's actions with numbers [E, M, B, n].

        Gives [E, B, n] each: the mean reward, the mean value, and the likeliest value token.
        """
        ...

    def select(self, parents: Tensor) -> None:
        """The candidates [E, B], numbered beam * n + copy, become the beams."""
        ...

    def observe(self, value_tokens: Tensor, stopped: Tensor, uniforms: Tensor | None) -> Tensor:
        """Feed value tokens [E, B] and decode the next observation.

        Where it is sampled, with numbers [E, N, B]. `stopped` [E, B] says which beams have ended, and
        so does what is given back.
        """
        ...

    def finish(self, tokens: Tensor) -> Tensor:
        """The last value tokens [E, B] -> tokens [E, B, H, D] of every beam's plan."""
        ...


@runtime_checkable
class TokenDecoder(Protocol):
    """The model as the search sees it, a token at a time; `tt_ray.model.cache.SearchCache` is one."""

    slid_tokens: int
    """Tokens fed again so far because a window was full."""

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

    def run(
        self, decoder: Decoder | TokenDecoder, tokens: Tensor, past: Sequence[int], uniforms: Uniforms
    ) -> Plans:
        """Search from contexts [E, P] of past[e] whole transitions and the present observation."""
        settings, horizon = self.settings, self.settings.horizon
        if isinstance(decoder, TokenDecoder):
            decoder = Tokenwise(decoder, self)
        decoder.open(tokens, past)
        rewards = self.reward_values.new_zeros(len(past), settings.beam_width)
        scores, stopped = rewards, torch.zeros_like(rewards, dtype=torch.bool)
        for step in range(horizon):
            reward, value, value_tokens = decoder.expand(uniforms.actions[:, step])
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
                stopped = decoder.observe(value_tokens, stopped, noise)
        return Plans(self._blank_after_stop(decoder.finish(value_tokens)), scores)

    def _blank_after_stop(self, tokens: Tensor) -> Tensor:
        stop = self.layout.stop_token
        over = (tokens[..., 0] == stop).cumsum(dim=-1) > 0
        return tokens.masked_fill(over[..., None], stop)


class Tokenwise:
    """A `Decoder` made of a `TokenDecoder`, for the settings of a search."""

    def __init__(self, tokens: TokenDecoder, search: BeamSearch) -> None:
        self.tokens, self.settings, self.layout = tokens, search.settings, search.layout
        self.reward_values, self.value_values = search.reward_values, search.value_values
        self.select, self.finish = tokens.select, tokens.finish
        self.slid_tokens = 0  # the token decoder counts its own
        self.logits: Tensor
        """[E, B, V + 1] of the action token that comes next."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> None:
        """See `Decoder`."""
        self.logits = self.tokens.open(tokens, past)[:, None].expand(-1, self.settings.beam_width, -1)

    def expand(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Decoder`."""
        settings, bins = self.settings, self.layout.num_bins
        logits = self.logits[:, :, None].expand(-1, -1, settings.n_expand, -1)
        for j in range(self.layout.action_dim):
            actions = sample(logits[..., :bins], uniforms[:, j], settings.k_act, settings.cdf_act)
            logits = self.tokens.extend_candidates(actions)
        reward = _expectation(logits, self.reward_values)
        logits = self.tokens.extend_candidates(logits[..., :bins].argmax(dim=-1))
        value = _expectation(logits, self.value_values)
        return reward, value, logits[..., :bins].argmax(dim=-1)

    def observe(self, value_tokens: Tensor, stopped: Tensor, uniforms: Tensor | None) -> Tensor:
        """See `Decoder`. Only the first token may be the stop token: an episode ends between transitions."""
        logits = self.tokens.extend_beams(value_tokens)
        stop = self.layout.stop_token
        for i in range(self.layout.observation_dim):
            allowed = logits if i == 0 else logits[..., :stop]
            noise = None if uniforms is None else uniforms[:, i]
            tokens = sample(allowed, noise, self.settings.k_obs)
            if i == 0:
                stopped = stopped | (tokens == stop)
            logits = self.tokens.extend_beams(tokens.masked_fill(stopped, stop))
        self.logits = logits
        return stopped


def _expectation(logits: Tensor, values: Tensor) -> Tensor:
    """Mean of `values` [V + 1] under logits [..., V + 1]."""
    # Not a matrix product: that may round a row differently with the number of rows.
    return (logits.softmax(dim=-1) * values).sum(dim=-1)


def keep_stopped(candidates: Tensor, scores: Tensor, stopped: Tensor) -> Tensor:
    """Scores [E, B, n] in which a stopped beam's first copy keeps its old score and the others are out."""
    frozen = torch.full_like(candidates, float("-inf"))
    frozen[..., 0] = scores
    return torch.where(stopped[..., None], frozen, candidates)
