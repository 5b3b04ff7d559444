"""What a search maximises. An objective is a class and one line that registers it under a name.

It says what one expansion of the search is (a whole transition, or a single token), and how what comes of it
is scored. Shape letters: E episodes, B beams, n candidates of a beam, N observation, M action, V bins.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tt_ray.config import PlannerConfig
from tt_ray.data.tokens import Kind
from tt_ray.errors import UserError

if TYPE_CHECKING:  # a search on a GPU machine needs torch and numpy alone (analysis/gpu_checks.py)
    from tt_ray.model.critic import Critic


class Reached(Protocol):
    """What a decoder knows of its beams and candidates."""

    @property
    def candidate_actions(self) -> Tensor:
        """Action tokens [E, B, n, M]."""
        ...

    @property
    def present_observations(self) -> Tensor:
        """Observation tokens [E, B, N]."""
        ...


@dataclass(frozen=True)
class TransitionCandidates:
    """Every beam's copies, each with actions of its own, one transition further."""

    step: int
    """Transition of the plan, from 0."""
    reward: Tensor
    """Mean of the model's reward, [E, B, n]."""
    value: Tensor
    """Mean of the model's reward-to-go without the present reward, [E, B, n]."""
    reached: Reached

    @property
    def actions(self) -> Tensor:
        """Action tokens [E, B, n, M]."""
        return self.reached.candidate_actions

    @property
    def observations(self) -> Tensor:
        """Tokens [E, B, N] of the observation that the actions are taken in."""
        return self.reached.present_observations


@dataclass(frozen=True)
class TokenCandidates:
    """Every beam, one token further: n = V + 1, and a candidate's number is its token."""

    step: int
    """Transition of the plan, from 0."""
    slot: int
    kind: Kind
    log_probs: Tensor
    """[E, B, V + 1]; minus infinity for what is not allowed."""
    previous: Tensor
    """[E, B] the token before, which each beam chose last."""


class Objective(Protocol):
    """How a search scores its candidates. A class that is registered has `make(parts)`, too."""

    expansion: ClassVar[Literal["transition", "token"]]

    def extend(self, totals: Tensor, candidates: Any) -> tuple[Tensor, Tensor]:
        """New totals and scores [E, B, n] of the candidates, from the beams' totals [E, B, 1].

        A total is what the objective wants to remember of a beam; they start at 0. The search keeps the
        candidates of the highest scores. `candidates` are TransitionCandidates or TokenCandidates.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """What an objective may be made from."""

    discount: float
    bin_values: Tensor
    """[D, V + 1] what a token of each slot stands for; 0 for the stop token."""
    critic: Critic | None = None
    critic_settings: Any = None
    """CriticConfig of the critic."""
    target: float | None = None
    """PlannerConfig.target."""


class Registered(Protocol):
    """A class of objectives that can be named in an experiment."""

    uses_critic: ClassVar[bool]
    uses_goal: ClassVar[bool]
    expansion: ClassVar[Literal["transition", "token"]]

    @classmethod
    def make(cls, parts: Parts) -> Objective:
        """The objective of a trained model."""
        ...


OBJECTIVES: dict[str, Any] = {}


def register(name: str) -> Callable[[type], type]:
    """Make a class of objectives known as `planner.objective: name`."""

    def add(kind: type) -> type:
        OBJECTIVES[name] = kind
        return kind

    return add


def find_objective(name: str) -> Registered:
    """The class registered as `name`, or as `module:name` by a module; `UserError` where there is none."""
    module, _, short = name.rpartition(":")
    if module:
        _import(module, name)
    if short not in OBJECTIVES:
        near = difflib.get_close_matches(short, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(OBJECTIVES))}"
        raise UserError(f"planner.objective: unknown objective {name!r}; {hint} (one's own: module:name)")
    return OBJECTIVES[short]


def planned_objective(planner: PlannerConfig) -> Registered:
    """The class that `planner` names; `UserError` where there is none, or means cannot be executed of it."""
    kind = find_objective(planner.objective)
    if planner.execute == "means" and kind.expansion != "token":
        raise UserError(
            f"planner.execute: means is for objectives that choose single tokens, and {planner.objective} "
            "draws whole actions to choose among: leave it at bins"
        )
    return kind


def _import(module: str, name: str) -> None:
    """Import `module`, from the working folder too (an installed command does not look there)."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:  # the module is the user's, and may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"planner.objective: {name}: {module} cannot be imported: {reason}") from error


class _Plain:
    """What most objectives do not use."""

    uses_critic: ClassVar[bool] = False
    uses_goal: ClassVar[bool] = False


@register("return")
@dataclass(frozen=True)
class Return(_Plain):
    """Discounted return: the plan's rewards, then the value of the rest (Janner et al. 2021, section 3.2)."""

    expansion: ClassVar[Literal["transition"]] = "transition"
    discount: float

    @classmethod
    def make(cls, parts: Parts) -> Return:
        """With the discount that the values were made with."""
        return cls(parts.discount)

    def extend(self, totals: Tensor, candidates: TransitionCandidates) -> tuple[Tensor, Tensor]:
        """Total: sum_{i<=t} discount^i r_i. Score: that plus discount^{t+1} V_t, which excludes r_t."""
        step = candidates.step
        totals = totals + self.discount**step * candidates.reward
        return totals, totals + self.discount ** (step + 1) * candidates.value


@register("q")
class QValue(_Plain):
    """Rewards before the last transition, then the critic's Q of that one (Janner et al. 2021, section 3.3).

    Q(s_t, a_t) holds r_t: score = sum_{i<t} discount^i (r_i + shift) + discount^t min_j Q_j(s_t, a_t).
    """

    expansion: ClassVar[Literal["transition"]] = "transition"
    uses_critic: ClassVar[bool] = True

    def __init__(self, critic: Critic, discount: float, shift: float, bin_values: Tensor) -> None:
        self.critic, self.discount, self.shift = critic, discount, shift
        self.observation_values = bin_values[: critic.observation_dim]
        self.action_values = bin_values[critic.observation_dim : -2]

    @classmethod
    def make(cls, parts: Parts) -> QValue:
        """With the critic's own discount and reward shift; `UserError` where there is no critic."""
        critic, settings = parts.critic, parts.critic_settings
        if critic is None:
            raise UserError("planner.objective q needs a critic: add a `critic` section and run it again")
        return cls(critic, settings.discount, settings.reward_shift, parts.bin_values)

    def extend(self, totals: Tensor, candidates: TransitionCandidates) -> tuple[Tensor, Tensor]:
        """Total: sum_{i<=t} discount^i (r_i + shift). Score: as above."""
        scale = self.discount**candidates.step
        # An episode at a time: a product's rounding depends on its rows, and no result may on other episodes.
        rows = zip(candidates.observations, candidates.actions, strict=True)
        q = torch.stack([self._q(observations, actions) for observations, actions in rows])
        return totals + scale * (candidates.reward + self.shift), totals + scale * q

    def _q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[B, n] of observation tokens [B, N] and action tokens [B, n, M]."""
        states = _decoded(self.observation_values, observations)
        moves = _decoded(self.action_values, actions)
        return self.critic.q(states[:, None].expand(-1, actions.shape[1], -1), moves)


@register("likelihood")
class Likelihood(_Plain):
    """Imitation: the likeliest observations and actions (Janner et al. 2021, section 3.2).

    Rewards and values are no part of what is imitated: those tokens are the likeliest, and cost nothing.
    """

    expansion: ClassVar[Literal["token"]] = "token"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.OBSERVATION, Kind.ACTION})
    """What counts."""

    @classmethod
    def make(cls, parts: Parts) -> Likelihood:
        """Nothing is needed but the model."""
        return cls()

    def extend(self, totals: Tensor, candidates: TokenCandidates) -> tuple[Tensor, Tensor]:
        """Total and score: log-probability so far."""
        log_probs = candidates.log_probs
        if candidates.kind not in self.kinds:
            best = torch.full_like(log_probs, float("-inf"))
            log_probs = best.scatter(-1, log_probs.argmax(dim=-1, keepdim=True), 0.0)
        extended = totals + log_probs
        return extended, extended


@register("goal")
class Goal(Likelihood):
    """Goal-reaching: the likeliest way to the goal that stands before the trajectory."""

    uses_goal: ClassVar[bool] = True


@register("return-conditioned")
class ReturnConditioned(Likelihood):
    """Imitation of what leads to high returns: p(action | past, return >= target), by Bayes' rule.

    Decision Transformer (Chen et al. 2021) is told the return before it acts. Here the model says what return
    follows an action, so that of the likeliest actions, the beams, the best one has the highest
    log p(action | past) + log p(r + discount * V >= target | past, action), where r is what its likeliest
    reward token stands for and V is distributed as the value token is. Meant for a horizon of 1.
    """

    share: ClassVar[float] = 0.1
    """Without a target: that which so much of the expected futures reach, weighted by the actions' odds."""

    def __init__(self, discount: float, target: float | None, bin_values: Tensor) -> None:
        self.discount, self.target = discount, target
        self.reward_values, self.value_values = bin_values[-2], bin_values[-1, :-1]

    @classmethod
    def make(cls, parts: Parts) -> ReturnConditioned:
        """With the discount that the values were made with."""
        return cls(parts.discount, parts.target, parts.bin_values)

    def extend(self, totals: Tensor, candidates: TokenCandidates) -> tuple[Tensor, Tensor]:
        """Total and score: log-probability so far, and of reaching the target once the action is complete."""
        if candidates.kind is not Kind.VALUE:
            return super().extend(totals, candidates)
        log_probs = candidates.log_probs[..., :-1]
        rewards = self.reward_values[candidates.previous]
        returns = rewards[..., None] + self.discount * self.value_values  # [E, B, V]
        reaches = returns >= self._threshold(totals[..., 0], log_probs, returns)[..., None]
        log_odds = log_probs.masked_fill(~reaches, float("-inf")).logsumexp(dim=-1, keepdim=True)
        extended = torch.full_like(candidates.log_probs, float("-inf"))
        extended = extended.scatter(-1, log_probs.argmax(dim=-1, keepdim=True), totals + log_odds)
        return extended, extended

    def _threshold(self, totals: Tensor, log_probs: Tensor, returns: Tensor) -> Tensor:
        """The return to reach [E, 1]: the target, or the most that any beam can reach where that is less."""
        odds = totals.softmax(dim=-1)[..., None]
        if self.target is not None:
            most = returns.masked_fill(odds == 0, float("-inf")).amax(dim=(1, 2))
            return most.clamp(max=self.target)[:, None]
        falling, order = returns.flatten(1).sort(dim=-1, descending=True, stable=True)
        mass = (odds * log_probs.exp()).flatten(1).gather(1, order).cumsum(dim=-1)
        at = (mass < self.share * mass[:, -1:]).sum(dim=-1, keepdim=True)
        return falling.gather(1, at)


def _decoded(values: Tensor, tokens: Tensor) -> Tensor:
    """What tokens [..., K] of K slots stand for, by values [K, V + 1]."""
    return torch.stack([row[tokens[..., i]] for i, row in enumerate(values)], dim=-1)
