"""Episodes of planners and other policies in an experiment's environment, each kept in the stage store."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tt_ray.config import ExperimentConfig, PlannerConfig, to_dict
from tt_ray.distributed.evaluate import (
    EpisodeFile,
    Planner,
    Row,
    Worker,
    evaluate,
    read_episodes,
)
from tt_ray.distributed.line import Line
from tt_ray.distributed.stages import Input, Stage
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import summarize, with_scores
from tt_ray.fingerprints import evaluation_fingerprint, fingerprint
from tt_ray.model.checkpoint import CHECKSUMS

PLANNER = "planner"
"""What the planner's own rows are called, among those of the baselines."""


def episode_seeds(line: Line, episodes: int | None = None) -> list[int]:
    """Seeds of the experiment's episodes, or of the first so many of them."""
    evaluation = line.config.evaluation
    return list(range(evaluation.first_seed, evaluation.first_seed + (episodes or evaluation.episodes)))


def planner_of(line: Line, checkpoint: Path, planner: PlannerConfig, seed: int | None) -> Planner:
    """What makes the planner of a checkpoint in the process that will use it."""
    resources = line.config.resources
    slots, critic = resources.episodes_per_actor, line.critic_for(planner, seed)
    return Planner(checkpoint, planner, line.config.dataset.discount, slots, resources.decoder, critic)


def score_planner(
    line: Line,
    checkpoint: Path,
    planner: PlannerConfig,
    policy: str,
    seed: int | None,
    seeds: Sequence[int] | None = None,
) -> Row:
    """Episodes of the planner on a checkpoint, for `seeds` or else the experiment's own."""
    worker = planner_of(line, checkpoint, planner, seed)
    key = evaluation_key(line.config, planner, checkpoint, worker.critic)
    inputs = made_by(line, checkpoint, worker.critic)
    return play(line, policy, seed, worker, key, seeds, worker.slots, inputs)


def run_params(config: ExperimentConfig, seed: int) -> dict[str, Any]:
    """The settings of one training seed's run, as MLflow shows them."""
    left_out = ("seeds", "resources", "tracking", "question")
    return {key: value for key, value in to_dict(config).items() if key not in left_out} | {"seed": seed}


def made_by(line: Line, *checkpoints: Path | None) -> list[Input]:
    """The stages of this storage that have made `checkpoints`, of which there may be none."""
    made = [path.parent.parent for path in checkpoints if path is not None]
    return [(path.parent.name, path.name) for path in made if path.parent.parent == line.storage]


def evaluation_key(
    config: ExperimentConfig, planner: PlannerConfig, checkpoint: Path, critic: Path | None = None
) -> str:
    """Key of the planner's episodes with a checkpoint, and a critic's where one scores the plans."""
    scorer = None if critic is None else checkpoint_identity(critic)
    return evaluation_fingerprint(config, planner, checkpoint_identity(checkpoint), scorer)


def checkpoint_identity(checkpoint: Path) -> str:
    """Identity of a checkpoint by its contents, wherever it lies."""
    return fingerprint((checkpoint / CHECKSUMS).read_text())


def make_row(line: Line, policy: str, seed: int | None, results: list[EpisodeResult]) -> Row:
    """Episodes with their scores and what they say."""
    evaluation, low, high = line.config.evaluation, line.spec.ref_min_score, line.spec.ref_max_score
    summary = summarize(results, low, high, evaluation.confidence, evaluation.bootstrap_samples)
    return Row(policy, seed, summary, with_scores(results, low, high))


def play(
    line: Line,
    policy: str,
    seed: int | None,
    make: Callable[[], Any],
    key: str,
    seeds: Sequence[int] | None = None,
    slots: int = 1,
    inputs: Sequence[Input] = (),
) -> Row:
    """Episodes of one policy; those that are in the store already are taken from there."""
    wanted = list(seeds) if seeds is not None else episode_seeds(line)
    folder, title = line.store.path("evaluations", key), policy if seed is None else f"{policy}, seed {seed}"

    def enough(stage: Stage) -> bool:
        return not missing(stage.path, wanted)

    def share(stage: Stage) -> float:
        played = read_episodes(stage.path)
        return sum(number in played for number in wanted) / max(1, len(played))

    stage_of = functools.partial(line.stage, "evaluations", key, work="evaluation", inputs=inputs)
    name = f"{len(wanted)} episodes ({title})"
    with stage_of(name, enough=enough, share=share, count=len(wanted)) as stage:
        if stage.held:
            if there := len(wanted) - len(missing(folder, wanted)):
                name = f"{there} episodes ({title})"
                line.usage.reuse("evaluations", name, share(stage) * stage.seconds, there)
            evaluation = line.config.evaluation
            worker = Worker(make, line.played, evaluation.max_steps, evaluation.record)
            _play_missing(line, title, wanted, worker, stage, slots)
            stage.publish({"policy": policy, "episodes": len(read_episodes(folder))})
    found = read_episodes(folder)
    return make_row(line, policy, seed, [found[number] for number in wanted])


def _play_missing(
    line: Line, title: str, seeds: Sequence[int], worker: Worker, stage: Stage, slots: int
) -> None:
    file, done = EpisodeFile(stage.path), list[float]()
    to_play = [seed for seed in seeds if seed not in file.results]
    with line.progress.stage(f"{title}: episodes", len(to_play)) as update:

        def on_result(result: EpisodeResult) -> None:
            file.append(result)
            done.append(result.episode_return)
            update(len(done), f"mean return {sum(done) / len(done):.0f}")

        evaluate(
            worker,
            to_play,
            line.allocation,
            slots=slots,
            max_tries=1 + line.config.resources.max_failures,
            on_result=on_result,
            on_steps=lambda steps: update(len(done), f"{steps} steps"),
        )
        update(len(to_play), "")


def missing(folder: Path, seeds: Sequence[int]) -> list[int]:
    """Those of `seeds` whose episodes are not in the evaluation's folder."""
    there = read_episodes(folder)
    return [seed for seed in seeds if seed not in there]


def writable(storage: Path) -> Path:
    """The storage folder, made where it is missing; `UserError` unless files can be written in it."""
    probe = storage / f".writable-{os.getpid()}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"resources.storage: cannot write in {storage}: {error.strerror}") from error
    return storage
