"""How a trained model is used: planning, evaluation, long-horizon prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tt_ray.config.rules import at_least, each, fraction, require

BaselineName = Literal["random", "data", "behaviour", "greedy", "iql", "return-conditioned"]


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """Beam search; the defaults are the authors' for Hopper and Walker2d."""

    objective: str = "return"
    """What the search maximises: return, likelihood, goal, q, return-conditioned, or a `module:name`."""
    goal: tuple[float, ...] | None = None
    """Goal observation of the objective `goal`; None: the one that the environment asks for."""
    target: float | None = None
    """Discounted return from now on that the objective `return-conditioned` conditions on; None: what the
    best tenth of the futures that the model expects would reach."""
    horizon: int = 15
    """Transitions that a plan looks ahead."""
    beam_width: int = 128
    """Plans that are kept at each step of the search."""
    n_expand: int = 2
    """Copies of each beam that draw an action (objectives that expand whole transitions)."""
    k_act: int | None = None
    """Sample each action token among the k most likely; None: all; 1: greedy."""
    cdf_act: float | None = 0.6
    """Drop the least likely action tokens that together hold less than this mass; None keeps all."""
    k_obs: int = 1
    """Sample each observation token among the k most likely; 1: greedy."""
    plan_every: int = 1
    """Environment steps taken from one plan."""
    execute: Literal["bins", "means"] = "bins"
    """What is done of a plan: what its action tokens stand for, or the means of the distributions that these
    were chosen from (objectives that choose single tokens: likelihood and goal)."""
    max_context_transitions: int = 5
    """Transitions given to the search: the past ones and the present, partial one."""
    window: int | None = None
    """Most transitions that the model sees during the search; None: what it was trained on."""
    keep: int | None = None
    """Whole transitions that stay when the window is full; None: max_context_transitions - 1."""

    def __post_init__(self) -> None:
        at_least(1, "planner", self, "horizon beam_width n_expand k_act k_obs plan_every")
        at_least(1, "planner", self, "max_context_transitions")
        fraction("planner", self, "cdf_act")
        each("planner", self, "target", math.isfinite, "be finite")
        short = f"{self.plan_every} steps cannot come from a plan of planner.horizon = {self.horizon}"
        require(self.plan_every <= self.horizon, "planner.plan_every", short)

    def resolve_window(self, context_transitions: int) -> tuple[int, int]:
        """Window and keep for a model trained on `context_transitions`; `UserError` where they cannot be."""
        window = context_transitions if self.window is None else self.window
        default_keep = max(1, min(self.max_context_transitions - 1, window - 1))
        keep = default_keep if self.keep is None else self.keep
        require(
            window <= context_transitions,
            "planner.window",
            f"{window} is larger than the model's context of {context_transitions} transitions "
            "(model.context_transitions)",
        )
        require(window >= 2, "planner.window", f"must be at least 2, not {window}")
        between = f"must lie between 1 and planner.window - 1 = {window - 1}"
        require(1 <= keep < window, "planner.keep", f"{between}, not {keep}")
        require(
            self.max_context_transitions <= window,
            "planner.max_context_transitions",
            f"{self.max_context_transitions} is larger than the window of {window} transitions "
            "(planner.window, or else model.context_transitions)",
        )
        return window, keep


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Closed-loop episodes and how their scores are summarised."""

    episodes: int = 20
    """Episodes for each training seed."""
    first_seed: int = 10_000
    """Episode i is reset with seed first_seed + i: the same starts for every planner compared."""
    max_steps: int | None = None
    """Cut episodes after so many steps; None: the environment's own limit."""
    environment: str | None = None
    """Play in this environment (`id` or `module:id`), such as the same maze with other starts; None: the one
    that the data is from, whose score references hold either way."""
    record: tuple[int, ...] = ()
    """Observation dimensions to keep of every step, such as a position: the episodes' paths."""
    baselines: tuple[BaselineName, ...] = ("data", "greedy")
    """What stands beside the planner in every table, on the same episodes: random actions, statistics of the
    data, the policy that collected it at its end (where that is known), greedy decoding of the same model
    (behaviour cloning), IQL's own policy (needs `critic`), return-conditioned actions of the same model."""
    confidence: float = 0.95
    """Of all intervals: 0.95 is 95 %."""
    bootstrap_samples: int = 10_000
    """Resamples that an interval is made from."""

    def __post_init__(self) -> None:
        at_least(1, "evaluation", self, "episodes bootstrap_samples max_steps")
        at_least(0, "evaluation", self, "first_seed")
        alone = "names none: data costs nothing, and greedy little beside the planner"
        require(len(self.baselines) >= 1, "evaluation.baselines", alone)
        require(len(set(self.baselines)) == len(self.baselines), "evaluation.baselines", "names one twice")
        each("evaluation", self, "confidence", lambda value: 0 < value < 1, "lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Long-horizon prediction without an environment, from held-out starts (`tt-ray predict`)."""

    rollouts: int = 1_000
    """Rollouts sampled from each start."""
    horizon: int = 50
    """Steps predicted."""
    starts: int = 20
    """Places in held-out episodes to start from."""
    context: int = 5
    """Transitions that a rollout starts from: the past ones and the present, partial one."""
    floor: float = 1e-3
    """Probability that is spread evenly over all bins before a logarithm is taken."""
    seed: int = 0
    """Of the rollouts and the choice of starts."""

    def __post_init__(self) -> None:
        at_least(1, "prediction", self, "rollouts horizon starts context")
        each("prediction", self, "floor", lambda value: 0 < value < 1, "lie between 0 and 1")
