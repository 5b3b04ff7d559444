"""What a search maximises: how candidates are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """How the search scores its candidates once a transition is complete."""

    def accumulate(self, rewards: Tensor, reward: Tensor, step: int) -> Tensor:
        """Rewards up to and with step `step` (from 0) of the plan, given those before it."""
        ...

    def score(self, rewards: Tensor, value: Tensor, step: int) -> Tensor:
        """Score of plans that have collected `rewards` up to `step` and expect `value` after it."""
        ...


@dataclass(frozen=True)
class Return:
    """Discounted return: the plan's rewards, then the value of the rest (Janner et al. 2021, section 3.2)."""

    discount: float

    def accumulate(self, rewards: Tensor, reward: Tensor, step: int) -> Tensor:
        """sum_{i<=t} discount^i r_i."""
        return rewards + self.discount**step * reward

    def score(self, rewards: Tensor, value: Tensor, step: int) -> Tensor:
        """sum_{i<=t} discount^i r_i + discount^{t+1} V_t: V_t excludes the present reward."""
        return rewards + self.discount ** (step + 1) * value
