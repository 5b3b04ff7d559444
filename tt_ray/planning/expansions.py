"""One expansion of a search: a whole transition, drawn and predicted, or a single token of all that may be.

Shape letters: E episodes, B beams, n candidates of a beam, H horizon, D slots, N observation, M action,
V bins, G goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tt_ray.data.tokens import Kind, TokenLayout
from tt_ray.planning.objectives import TokenCandidates, TransitionCandidates
from tt_ray.planning.sampling import sample


class Decoder(Protocol):
    """The model as the search sees it, a transition at a time; `tt_ray.model.native.NativeCache` is one."""

    slid_tokens: int
    """Tokens fed again so far because a window was full."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> object:
        """Begin from contexts [E, G + P]: the goal, past[e] whole transitions and the present observation."""
        ...

    def expand(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw every candidate's actions with numbers [E, M, B, n].

        Gives [E, B, n] each: the mean reward, the mean value, and the likeliest value token.
        """
        ...

    @property
    def candidate_actions(self) -> Tensor:
        """Action tokens [E, B, n, M] of what `expand` has drawn."""
        ...

    @property
    def present_observations(self) -> Tensor:
        """Tokens [E, B, N] of the observation that each beam has reached."""
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


class TokenDecoder(Protocol):
    """The model as the search sees it, a token at a time; `tt_ray.model.native.NativeTokenCache` is one."""

    slid_tokens: int
    """Tokens fed again so far because a window was full."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> Tensor:
        """Contexts [E, G + P] as `Decoder.open` takes them -> logits [E, V + 1] of the first action token."""
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


@runtime_checkable
class CandidateDecoder(TokenDecoder, Protocol):
    """One that tries several copies of a beam before it chooses; `tt_ray.model.cache.SearchCache` is one."""

    def extend_candidates(self, tokens: Tensor) -> Tensor:
        """Each candidate's next token [E, B, n] -> logits [E, B, n, V + 1] of the one after."""
        ...

    @property
    def candidate_actions(self) -> Tensor:
        """Action tokens [E, B, n, M] that the candidates have been extended by."""
        ...

    @property
    def present_observations(self) -> Tensor:
        """Tokens [E, B, N] of the observation that each beam has reached."""
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


class ByTransition:
    """Every beam is copied n times, each copy draws its actions, and its reward and value are predicted."""

    def __init__(self, decoder: Decoder, settings: SearchSettings) -> None:
        self.decoder, self.settings = decoder, settings
        self.step = 0
        self.value_tokens: Tensor
        """[E, B, n] of the candidates, and once chosen [E, B] of the beams."""

    def open(self, tokens: Tensor, past: Sequence[int], uniforms: Uniforms) -> Tensor:
        """Begin; the totals [E, B] that the beams start with."""
        self.uniforms = uniforms
        self.decoder.open(tokens, past)
        return uniforms.actions.new_zeros(len(past), self.settings.beam_width)

    def expand(self) -> TransitionCandidates | None:
        """What the beams may become; None at the horizon."""
        if self.step == self.settings.horizon:
            return None
        reward, value, self.value_tokens = self.decoder.expand(self.uniforms.actions[:, self.step])
        return TransitionCandidates(self.step, reward, value, self.decoder)

    def select(self, parents: Tensor, stopped: Tensor) -> Tensor:
        """The candidates [E, B] become the beams and observe; who has stopped, before and after, [E, B]."""
        self.decoder.select(parents)
        self.value_tokens = self.value_tokens.flatten(1).gather(1, parents)
        stopped = stopped.gather(1, parents // self.settings.n_expand)
        if self.step < self.settings.horizon - 1:
            drawn = self.uniforms.observations
            noise = None if drawn is None else drawn[:, self.step]
            stopped = self.decoder.observe(self.value_tokens, stopped, noise)
        self.step += 1
        return stopped

    def finish(self) -> Tensor:
        """Tokens [E, B, H, D] of every beam's plan."""
        return self.decoder.finish(self.value_tokens)


class ByToken:
    """Every beam may go on with any token: V + 1 candidates; stop only where a transition begins."""

    def __init__(
        self,
        decoder: TokenDecoder,
        settings: SearchSettings,
        layout: TokenLayout,
        action_values: Tensor | None = None,
    ) -> None:
        self.decoder, self.settings, self.layout = decoder, settings, layout
        self.action_values = action_values
        self.means: list[Tensor] = []
        """[E, B] of each of the beams' action tokens so far, where there are `action_values` [M, V]."""
        self.place = layout.observation_dim
        """Index of the next token in the plan [H * D]."""
        self.logits: Tensor
        self.tokens: Tensor
        """[E, B] fed last."""

    def open(self, tokens: Tensor, past: Sequence[int], uniforms: Uniforms) -> Tensor:
        """Begin; the totals [E, B]: beams that are all the same count once."""
        beams = self.settings.beam_width
        self.logits = self.decoder.open(tokens, past)[:, None].expand(-1, beams, -1)
        self.tokens = tokens[:, -1:].expand(-1, beams)
        totals = self.logits.new_full((len(past), beams), float("-inf"))
        totals[:, 0] = 0.0
        return totals

    def expand(self) -> TokenCandidates | None:
        """What the beams may become; None at the horizon."""
        step, slot = divmod(self.place, self.layout.slots)
        if step == self.settings.horizon:
            return None
        log_probs = self.logits.log_softmax(dim=-1)
        if slot > 0:  # an episode ends between transitions
            log_probs = self.logits[..., : self.layout.stop_token].log_softmax(dim=-1)
            log_probs = torch.nn.functional.pad(log_probs, (0, 1), value=float("-inf"))
        return TokenCandidates(step, slot, self.layout.kinds[slot], log_probs, self.tokens)

    def select(self, parents: Tensor, stopped: Tensor) -> Tensor:
        """The candidates [E, B] become the beams and are fed; who has stopped, before and after, [E, B]."""
        beams, tokens = parents // (self.layout.num_bins + 1), parents % (self.layout.num_bins + 1)
        stop = self.layout.stop_token
        stopped = stopped.gather(1, beams) | (tokens == stop)
        self.decoder.select(beams)
        self._remember_means(beams)
        self.tokens, self.place = tokens.masked_fill(stopped, stop), self.place + 1
        if self.place < self.settings.horizon * self.layout.slots:
            self.logits = self.decoder.extend_beams(self.tokens)
        return stopped

    def _remember_means(self, beams: Tensor) -> None:
        """Those of `beams` [E, B], which are the new ones, and of the action token that is being chosen."""
        if self.action_values is None:
            return
        self.means = [mean.gather(1, beams) for mean in self.means]
        slot = self.place % self.layout.slots
        if self.layout.kinds[slot] is Kind.ACTION:
            values = self.action_values[slot - self.layout.observation_dim]
            mean = _expectation(self.logits[..., : self.layout.num_bins], values)
            self.means.append(mean.gather(1, beams))

    def finish(self) -> Tensor:
        """Tokens [E, B, H, D] of every beam's plan."""
        return self.decoder.finish(self.tokens)

    def mean_actions(self) -> Tensor | None:
        """Means [E, B, H, M] of what every plan's action tokens were chosen from, if they were asked for."""
        if self.action_values is None:
            return None
        return torch.stack(self.means, dim=-1).unflatten(-1, (self.settings.horizon, -1))


class Transitionwise:
    """A `Decoder` made of a `CandidateDecoder`, for the settings of a search."""

    def __init__(
        self,
        tokens: CandidateDecoder,
        settings: SearchSettings,
        layout: TokenLayout,
        reward_values: Tensor,
        value_values: Tensor,
    ) -> None:
        self.tokens, self.settings, self.layout = tokens, settings, layout
        self.reward_values, self.value_values = reward_values, value_values
        self.select, self.finish = tokens.select, tokens.finish
        self.slid_tokens = 0  # the token decoder counts its own
        self.logits: Tensor
        """[E, B, V + 1] of the action token that comes next."""

    @property
    def candidate_actions(self) -> Tensor:
        """See `Decoder`."""
        return self.tokens.candidate_actions

    @property
    def present_observations(self) -> Tensor:
        """See `Decoder`."""
        return self.tokens.present_observations

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
    """Mean of `values` [K] under logits [..., K]."""
    # Not a matrix product: that may round a row differently with the number of rows.
    return (logits.softmax(dim=-1) * values).sum(dim=-1)
