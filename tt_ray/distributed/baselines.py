"""What stands beside a planner in every table: `evaluation.baselines`, on the same episodes as the planner.

Those that need no model (`data_baselines`) are played once for each data set, those of a model or its critic
(`model_baselines`) once for each of these: every one is an evaluation of its own in the stage store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tt_ray.config import BaselineName, PlannerConfig
from tt_ray.data.d4rl_names import resolve_id
from tt_ray.data.episodes import best_tenth
from tt_ray.data.minari_folder import dataset_folder
from tt_ray.data.minari_reader import own_metadata
from tt_ray.distributed.evaluate import GREEDY, LinearBaseline, RandomBaseline, Row
from tt_ray.distributed.line import Line
from tt_ray.distributed.scoring import checkpoint_identity, made_by, make_row, play, score_planner
from tt_ray.errors import UserError
from tt_ray.evaluation.critic_policy import CriticPolicy
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.fingerprints import fingerprint
from tt_ray.model.critic import load_critic

TITLES: dict[BaselineName, str] = {
    "random": "random policy",
    "data": "data set",
    "behaviour": "final behaviour policy",
    "greedy": "greedy decoding",
    "iql": "IQL's own policy",
    "return-conditioned": "return-conditioned",
}
"""Names in the tables, in the order of their rows."""
OF_MODELS = ("greedy", "iql", "return-conditioned")
"""Those that a training seed has its own of."""
CANDIDATES = 128
"""Likeliest actions that the return-conditioned one is chosen from."""


@dataclass(frozen=True)
class IqlBaseline:
    """Makes the policy that was extracted with a critic."""

    critic: Path

    def __call__(self) -> CriticPolicy:
        """The policy, on a CPU: its network is small."""
        return CriticPolicy(load_critic(self.critic))


def metric_name(policy: str) -> str:
    """What a row's figures are filed under in MLflow: short names for those of a model."""
    short = {TITLES[name]: name for name in TITLES if name in OF_MODELS}
    return short.get(policy, policy.replace(", ", " "))


def data_baselines(line: Line, wanted: Sequence[BaselineName] | None = None) -> list[Row]:
    """Rows of those of `evaluation.baselines` that no model is needed for."""
    asked = line.config.evaluation.baselines if wanted is None else wanted
    spec = line.played
    identity = fingerprint(spec.to_json(), line.config.evaluation.max_steps)
    rows = []
    if "random" in asked:
        rows.append(play(line, TITLES["random"], None, RandomBaseline(spec), f"random-{identity}"))
    if "data" in asked:
        rows += data_rows(line)
    if "behaviour" in asked and not spec.cropped and dataset_folder(spec.dataset_id).exists():
        policy = own_metadata(spec.dataset_id).get("final_policy")
        if policy is not None:
            worker = LinearBaseline(policy)
            rows.append(play(line, TITLES["behaviour"], None, worker, f"behaviour-{identity}"))
    return rows


def model_baselines(
    line: Line, checkpoint: Path, seed: int, wanted: Sequence[BaselineName] | None = None
) -> list[Row]:
    """Rows of those of `evaluation.baselines` that belong to a model and its critic."""
    asked = line.config.evaluation.baselines if wanted is None else wanted
    rows = []
    if "greedy" in asked:
        rows.append(score_planner(line, checkpoint, greedy(line.config.planner), TITLES["greedy"], seed))
    if "iql" in asked:
        rows.append(_iql(line, seed))
    if "return-conditioned" in asked:
        planner = return_conditioned(line.config.planner)
        rows.append(score_planner(line, checkpoint, planner, TITLES["return-conditioned"], seed))
    return rows


def greedy(planner: PlannerConfig) -> PlannerConfig:
    """Greedy decoding with the planner's context and goal: behaviour cloning by the same model."""
    return replace(GREEDY, max_context_transitions=planner.max_context_transitions, goal=planner.goal)


def return_conditioned(planner: PlannerConfig) -> PlannerConfig:
    """Return-conditioned actions with the planner's context, goal and target."""
    return PlannerConfig(
        objective="return-conditioned",
        horizon=1,
        beam_width=CANDIDATES,
        n_expand=1,
        cdf_act=None,
        max_context_transitions=planner.max_context_transitions,
        goal=planner.goal,
        target=planner.target,
    )


def require_policy(line: Line, seed: int) -> Path | None:
    """The critic whose policy the baseline iql plays, None without it; `UserError` where it has none."""
    if "iql" not in line.config.evaluation.baselines:
        return None
    critic = line.critic_of(seed, "evaluation.baselines: iql")
    if load_critic(critic).critic.policy is None:
        raise UserError(
            f"{critic}: this critic has no policy for evaluation.baselines: iql; name iql in the file that "
            "trains it and run that again, or leave iql out"
        )
    return critic


def _iql(line: Line, seed: int) -> Row:
    critic = require_policy(line, seed)
    assert critic is not None
    evaluation = line.config.evaluation
    played = (line.played.to_json(), evaluation.max_steps, evaluation.record)
    key = f"iql-{fingerprint(checkpoint_identity(critic), *played)}"
    return play(line, TITLES["iql"], seed, IqlBaseline(critic), key, inputs=made_by(line, critic))


def data_rows(line: Line) -> list[Row]:
    """The data's own episodes, the best tenth of them, and the best one; none where the data is not here."""
    spec = line.spec
    if not dataset_folder(resolve_id(line.config.dataset.id)).exists():
        line.progress.note(f"the data set {spec.dataset_id} is not here, so the table has no row of it")
        return []
    episodes = line.episodes
    if episodes.spec.fingerprint != spec.fingerprint:
        line.progress.note(f"{spec.dataset_id} is not the data of this model: the table has no row of it")
        return []
    returns = np.sort(episodes.returns)
    title = TITLES["data"]
    parts = {title: returns, f"{title}, best tenth": best_tenth(returns)}
    parts[f"{title}, best episode"] = returns[-1:]
    return [_data_row(line, policy, list(values)) for policy, values in parts.items()]


def _data_row(line: Line, policy: str, returns: Sequence[float]) -> Row:
    nothing = {"length": 0, "terminated": False, "decisions": 0}
    times = {"environment_seconds": 0.0, "planning_seconds": 0.0}
    results = [
        EpisodeResult(seed=i, episode_return=float(value), **nothing, **times)  # type: ignore[arg-type]
        for i, value in enumerate(returns)
    ]
    return make_row(line, policy, None, results)
