"""Ray Train around the training loop: every batch is shared out over the workers, nothing else changes."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tt_ray.config import ExperimentConfig, to_dict
from tt_ray.data.episodes import Episodes, treat_rewards
from tt_ray.data.token_store import TokenSet
from tt_ray.data.windows import split_episodes
from tt_ray.distributed.cluster import Allocation
from tt_ray.errors import UserError
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.model.checkpoint import (
    checkpoint_folders,
    damaged_checkpoints,
    last_checkpoint,
    prune_checkpoints,
)
from tt_ray.model.folders import remove_folder
from tt_ray.tracking import Journal
from tt_ray.training.critic import CriticJob, Transitions, fit_critic
from tt_ray.training.job import make_job
from tt_ray.training.loop import Workers, fit

logger = logging.getLogger(__name__)

RAY = "ray"  # Ray Train's own folder; nothing of ours is in there

OnPoint = Callable[[Mapping[str, float], int], None]
"""`on_point(metrics, step)` of a point of the training curves."""

# Ray Train's own lines would bury the progress bar; its one known false alarm comes from the watcher.
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}


def steps_done(folder: Path) -> int:
    """Updates in the last checkpoint of `folder`."""
    last = last_checkpoint(folder)
    return int(last.name.partition("-")[2]) if last is not None else 0


def train_model(
    config: ExperimentConfig,
    tokens: Path,
    folder: Path,
    seed: int,
    allocation: Allocation,
    on_point: OnPoint | None = None,
) -> None:
    """Train the model of `seed` in `folder`, from its last whole checkpoint if it has one, to the end.

    One worker runs the loop in this process where that has what it needs, else Ray Train runs the workers:
    one that dies is replaced and all go on from the last checkpoint, resources.max_failures times. `on_point`
    is called in this process, if the loop runs here.
    """
    settings = {
        "config": to_dict(config),
        "tokens": str(tokens),
        "folder": str(folder),
        "seed": seed,
        "cuda": allocation.gpus_per_worker > 0,
    }
    damaged = damaged_checkpoints(folder)
    for reason in damaged.values():
        what = reason.rpartition("; ")[0]  # it goes on with what the user should do
        logger.warning("%s; it is removed, and training goes on from an earlier one", what)
    # With those after it: a damaged one may be the best, which only the same updates make again.
    for path in checkpoint_folders(folder):
        if damaged and path >= min(damaged):
            remove_folder(path)
    if steps_done(folder) == config.training.steps:
        pass  # killed after the last step
    elif allocation.workers == 1 and allocation.in_process:
        _train(settings, Workers(), "cuda" if settings["cuda"] else "cpu", on_point)
    else:
        _train_with_ray(settings, allocation, config.resources.max_failures)
    prune_checkpoints(folder)  # what a kill during or after the last checkpoint has left
    shutil.rmtree(folder / RAY, ignore_errors=True)


def train_critic(config: ExperimentConfig, episodes: Episodes, folder: Path, seed: int) -> None:
    """Train the critic of `seed` in `folder`, from its last checkpoint if it has one, to the end.

    On the model's training episodes, in this process: its networks are small. Its curves go to a journal in
    `folder`.
    """
    import torch

    data, critic = config.dataset, config.critic
    assert critic is not None
    chosen, _ = split_episodes(len(episodes), data.validation_fraction, data.split_seed, data.fraction)
    transitions = Transitions.of(treat_rewards(episodes, data), chosen)
    job = CriticJob(critic, transitions, episodes.spec, seed, config.extracts_policy)
    journal = Journal(folder)

    def log(metrics: Mapping[str, float], step: int) -> None:
        journal.append({f"critic/{name}": value for name, value in metrics.items()}, step)

    fit_critic(job, folder, log, "cuda" if torch.cuda.is_available() else "cpu")


def _train(settings: dict[str, Any], workers: Workers, device: str, on_point: OnPoint | None = None) -> None:
    config = experiment_from_dict(settings["config"])
    job = make_job(config, TokenSet.load(Path(settings["tokens"])), settings["seed"])
    folder = Path(settings["folder"])
    journal = Journal(folder)

    def log(metrics: Mapping[str, float], step: int) -> None:
        journal.append(metrics, step)
        if on_point is not None:
            on_point(metrics, step)

    fit(job, folder, log, workers, device)


def _train_with_ray(settings: dict[str, Any], allocation: Allocation, max_failures: int) -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's own would end this process without a word, and stay on after the training."""

    folder = Path(settings["folder"])
    resources = {"CPU": allocation.cpus_per_worker, "GPU": allocation.gpus_per_worker}
    trainer = Trainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=allocation.workers, use_gpu=settings["cuda"], resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder / RAY),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise UserError(_cause(error)) from error


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import torch.distributed
    from ray.train.torch import get_device

    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size(), torch.distributed.all_reduce)
    _train(settings, workers, str(get_device()))


def _cause(error: Exception) -> str:
    """The last line of what a worker raised, behind Ray's frame around it."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [str(failure).strip().splitlines()[-1] for failure in failures.values() if str(failure).strip()]
    reason = causes[0] if causes else str(error).strip().splitlines()[-1]
    return f"training failed: {reason}; the last checkpoint is kept, --resume goes on from it"
