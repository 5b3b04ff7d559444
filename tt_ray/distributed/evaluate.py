"""Scores of a planner or a baseline on the pool of evaluation actors; finished episodes are kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from tt_ray.config import DecoderName, PlannerConfig
from tt_ray.data.episodes import DataSpec
from tt_ray.distributed.cluster import Allocation, room_for_actors
from tt_ray.distributed.rollouts import evaluate_seeds
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import check_compatible, make_environment
from tt_ray.evaluation.paths import PathRecorder
from tt_ray.evaluation.policies import LinearPolicy, RandomPolicy
from tt_ray.evaluation.rollout import (
    EpisodeResult,
    Policy,
    run_episodes,
)
from tt_ray.evaluation.scores import ScoreSummary
from tt_ray.model.checkpoint import load_checkpoint
from tt_ray.model.critic import load_critic
from tt_ray.plain import MALFORMED
from tt_ray.planning.engine import PlanningEngine

GREEDY = PlannerConfig(horizon=1, beam_width=1, n_expand=1, k_act=1, cdf_act=None)
"""No search: every token the likeliest, one transition ahead."""


@dataclass(frozen=True)
class Planner:
    """Makes the planning engine of a checkpoint, inside the actor that will use it."""

    checkpoint: Path
    settings: PlannerConfig
    discount: float
    slots: int
    decoder: DecoderName = "auto"
    critic: Path | None = None

    def __call__(self) -> Policy:
        """The engine, on the actor's GPU where it has one."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return PlanningEngine(
            load_checkpoint(self.checkpoint, device),
            self.settings,
            discount=self.discount,
            slots=self.slots,
            decoder=self.decoder,
            critic=None if self.critic is None else load_critic(self.critic, device),
        )


@dataclass(frozen=True)
class RandomBaseline:
    """Makes a uniformly random policy."""

    spec: DataSpec

    def __call__(self) -> Policy:
        """The policy."""
        return RandomPolicy(self.spec.action_low, self.spec.action_high)


@dataclass(frozen=True)
class LinearBaseline:
    """Makes the linear policy that collected a data set, as the data set's metadata holds it."""

    policy: Mapping[str, Any]

    def __call__(self) -> Policy:
        """The policy, without exploration."""
        weights, mean, std = (np.asarray(self.policy[key]) for key in ("weights", "mean", "std"))
        return LinearPolicy(weights, mean, std)


@dataclass(frozen=True)
class Worker:
    """What an evaluation actor is given: how to make its policy and its environments."""

    policy: Callable[[], Policy]
    spec: DataSpec
    max_steps: int | None
    record: tuple[int, ...] = ()
    """EvaluationConfig.record."""

    def __call__(self) -> tuple[Policy, Callable[[], gym.Env]]:
        """Called once in each actor."""
        return self.policy(), self.environment

    def environment(self) -> gym.Env:
        """One environment, its paths kept where that is asked for."""
        env = spec_environment(self.spec, self.max_steps)
        return PathRecorder(env, self.record, self.spec.goal_dim) if self.record else env


@dataclass(frozen=True)
class Row:
    """One line of a result table: episodes of one policy, for one training seed or none."""

    policy: str
    seed: int | None
    summary: ScoreSummary
    results: list[EpisodeResult]

    @property
    def returns(self) -> list[float]:
        """Undiscounted returns, one for each episode."""
        return [result.episode_return for result in self.results]

    def speed(self) -> dict[str, float]:
        """One actor's decisions a second, a decision's latency in milliseconds, and how idle its slots were.

        The latency percentiles are means over the episodes' own. Empty for policies without a model.
        """
        planning = sum(result.planning_seconds for result in self.results)
        decisions = sum(result.decisions for result in self.results)
        if self.seed is None or not planning:
            return {}
        return {
            "speed/decisions_per_second": decisions / planning,
            "speed/latency_p50_ms": 1000 * float(np.mean([result.latency_p50 for result in self.results])),
            "speed/latency_p95_ms": 1000 * float(np.mean([result.latency_p95 for result in self.results])),
            "speed/idle_slot_share": self._idle_share(),
        }

    def _idle_share(self) -> float:
        """Share of the slots' time in which they stood empty while seeds were waiting."""
        idle = sum(result.idle_seconds for result in self.results)
        busy = sum(result.slot_seconds for result in self.results)
        return idle / (idle + busy) if idle + busy else 0.0

    def cells(self) -> list[str]:
        """The row as text: policy, seed, episodes, return, interval, score, interval, length, decisions/s."""
        returns, score, length = self.summary.returns, self.summary.score, self.summary.length_mean
        scores = (
            ["-", "-"] if score is None else [f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}"]
        )
        speed = self.speed().get("speed/decisions_per_second")
        return [
            self.policy,
            "" if self.seed is None else str(self.seed),
            str(self.summary.episodes),
            f"{returns.value:.1f}",
            f"{returns.low:.1f} to {returns.high:.1f}",
            *scores,
            f"{length:.0f}" if length else "-",
            f"{speed:.1f}" if speed else "-",
        ]


def spec_environment(spec: DataSpec, max_steps: int | None = None) -> gym.Env:
    """The environment that a data set was recorded in, with the observations as the model saw them."""
    return make_environment(
        spec.environment,
        observation_keys=spec.observation_keys,
        observation_dim=spec.observation_dim if spec.cropped else None,
        goal_keys=spec.goal_keys,
        max_steps=max_steps,
    )


def check_environment(spec: DataSpec) -> None:
    """`UserError` unless the environment can be made here and fits the data."""
    env = spec_environment(spec)
    try:
        check_compatible(spec, env)
    finally:
        env.close()


def read_episodes(folder: Path) -> dict[int, EpisodeResult]:
    """The finished episodes in an evaluation's folder by seed; a last line that is not whole is left out.

    `UserError` where another line is damaged.
    """
    path = folder / "episodes.jsonl"
    text = path.read_bytes() if path.exists() else b""
    results = []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            results.append(EpisodeResult.from_json(json.loads(line)))
        except MALFORMED as error:
            reason = " ".join(str(error).split())
            advice = "remove the file, and its episodes are run again"
            raise UserError(f"{path}:{number}: damaged ({reason}); {advice}") from error
    return {result.seed: result for result in results}


class EpisodeFile:
    """Finished episodes, one JSON line each, appended as they come by whoever holds the evaluation."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder, and cuts off the torn last line of a process that was killed while it wrote."""
        self.path = folder / "episodes.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                whole = self.path.read_bytes()
                os.truncate(self.path, whole.rfind(b"\n") + 1)
        except OSError as error:
            raise UserError(f"{folder}: cannot write there: {error.strerror}") from error
        self.results = read_episodes(folder)

    def append(self, result: EpisodeResult) -> None:
        """Keep one more episode; it survives this process being killed from now on."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(result.to_json()) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot keep an episode: {error.strerror}") from error
        self.results[result.seed] = result


def episodes_here(
    worker: Worker, seeds: Sequence[int], on_steps: Callable[[int], None] | None = None
) -> Iterator[EpisodeResult]:
    """Results as they finish of one episode for each of `seeds`, run in this process.

    `on_steps` is told how many environment steps have been taken so far.
    """
    if not seeds:
        return
    waiting, taken = iter(seeds), 0
    policy, make = worker()

    def count(steps: int) -> None:
        nonlocal taken
        taken += steps
        if on_steps is not None:
            on_steps(taken)

    yield from run_episodes(policy, make, lambda: next(waiting, None), on_steps=count)


def evaluate(
    worker: Worker,
    seeds: Sequence[int],
    allocation: Allocation,
    *,
    on_result: Callable[[EpisodeResult], None],
    slots: int = 1,
    max_tries: int = 3,
    on_steps: Callable[[int], None] | None = None,
) -> None:
    """Play one episode for each of `seeds`; `on_result` gets each as it finishes.

    An allocation without evaluation actors runs them in this process.
    """
    if allocation.evaluation_actors == 0:
        for result in episodes_here(worker, seeds, on_steps):
            on_result(result)
        return
    evaluate_seeds(
        seeds,
        worker,
        actors=partial(room_for_actors, allocation) if allocation.elastic else allocation.evaluation_actors,
        slots=slots,
        cpus_per_actor=allocation.cpus_per_actor,
        gpus_per_actor=allocation.gpus_per_actor,
        reserved=allocation.reserved,
        max_tries=max_tries,
        on_result=on_result,
        on_steps=on_steps,
    )
