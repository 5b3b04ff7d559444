"""D4RL's locomotion data sets: their names, the environments, their reference scores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym


@dataclass(frozen=True, kw_only=True)
class D4RLEnvironment:
    """One of D4RL v2's locomotion environments, as Gymnasium has it today."""

    id: str
    """Gymnasium's environment with the same physics and observations."""
    observation_dim: int
    """N that the environment returns."""
    recorded_dims: int
    """Observation dimensions in D4RL's files; those past `observation_dim` are dropped."""
    action_dim: int
    """M; every action lies in [-1, 1]."""
    ref_min_score: float
    """Mean return of a random policy."""
    ref_max_score: float
    """Mean return of D4RL's expert."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """Gymnasium's EnvSpec as JSON data."""
        return {**json.loads(gym.spec(self.id).to_json()), "kwargs": dict(self.kwargs)}


D4RL_ENVIRONMENTS: Mapping[str, D4RLEnvironment] = {
    "hopper": D4RLEnvironment(
        id="Hopper-v5",
        observation_dim=11,
        recorded_dims=11,
        action_dim=3,
        ref_min_score=-20.272305,
        ref_max_score=3234.3,
    ),
    "halfcheetah": D4RLEnvironment(
        id="HalfCheetah-v5",
        observation_dim=17,
        recorded_dims=17,
        action_dim=6,
        ref_min_score=-280.178953,
        ref_max_score=12135.0,
    ),
    # Version 5 of Walker2d changed the model (the friction of a foot); D4RL recorded the older one.
    "walker2d": D4RLEnvironment(
        id="Walker2d-v4",
        observation_dim=17,
        recorded_dims=17,
        action_dim=6,
        ref_min_score=1.629008,
        ref_max_score=4592.3,
    ),
    # D4RL's Ant also records 84 contact forces, nearly all of them zero.
    "ant": D4RLEnvironment(
        id="Ant-v5",
        observation_dim=27,
        recorded_dims=111,
        action_dim=8,
        ref_min_score=-325.6,
        ref_max_score=3879.7,
        kwargs={"include_cfrc_ext_in_observation": False},
    ),
}
D4RL_QUALITIES = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")

_D4RL_NAME = re.compile(rf"({'|'.join(D4RL_ENVIRONMENTS)})-({'|'.join(D4RL_QUALITIES)})-v2")
_D4RL_ENVIRONMENT_ID = re.compile(r"(?:.*[:/])?(hopper|halfcheetah|walker2d|ant)-v\d+", re.IGNORECASE)


def parse_d4rl_name(name: str) -> tuple[str, str] | None:
    """`("hopper", "medium-replay")` of `hopper-medium-replay-v2`; None for any other name."""
    match = _D4RL_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def resolve_id(name: str) -> str:
    """The Minari id (`d4rl/hopper/medium-replay-v2`) of a D4RL v2 name; other names unchanged."""
    parts = parse_d4rl_name(name)
    return f"d4rl/{parts[0]}/{parts[1]}-v2" if parts else name


def reference_scores(environment_id: str) -> tuple[float, float] | tuple[None, None]:
    """D4RL's random and expert returns for any version of its environments; (None, None) for others."""
    match = _D4RL_ENVIRONMENT_ID.fullmatch(environment_id)
    if not match:
        return None, None
    known = D4RL_ENVIRONMENTS[match[1].lower()]
    return known.ref_min_score, known.ref_max_score
