"""Pictures of what a command has computed: curves, returns beside the data's, films, plans.

Nothing that counts depends on them, and what cannot be drawn is a line on the screen.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray

from tt_ray.config import ExperimentConfig
from tt_ray.data.minari_folder import dataset_folder
from tt_ray.distributed.baselines import data_rows
from tt_ray.distributed.evaluate import Row, Worker
from tt_ray.distributed.line import Line
from tt_ray.distributed.scoring import evaluation_key, planner_of
from tt_ray.errors import UserError
from tt_ray.evaluation.camera import NoVideoError, make_video
from tt_ray.evaluation.figures import Points, return_figure, training_figure
from tt_ray.evaluation.maze_figures import maze_map_of, paths_figure
from tt_ray.evaluation.mazes import Grid
from tt_ray.evaluation.plan_figures import plan_figure
from tt_ray.evaluation.replay import Recording, record_episode
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.texts import number_text
from tt_ray.tracking import read

logger = logging.getLogger(__name__)

FIGURES = "figures"
"""Folder of the pictures, in a run's folder and among its artifacts."""


def training_picture(model: Path, path: Path, title: str) -> list[Path]:
    """The curves in a model's folder, drawn to `path`; nothing where it has none."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for record, _ in read(model / "journal.jsonl"):
        for name, value in record.get("metrics", {}).items():
            steps, values = points.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    if not points:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Points] = dict(points)
    training_figure(curves, path, title)
    return [path]


def returns_picture(line: Line, rows: Sequence[Row], path: Path) -> Path:
    """The rows' returns; below those of the data, where it is here and not among the rows."""
    shown = list(rows) if any(row.seed is None for row in rows) else [*rows, *_data_here(line)]
    labels = [row.policy if row.seed is None else f"{row.policy}, seed {row.seed}" for row in shown]
    drawn = [(name, row.returns, row.summary.returns) for name, row in zip(labels, shown, strict=True)]
    return_figure(drawn, path)
    return path


def _data_here(line: Line) -> list[Row]:
    try:
        if not dataset_folder(line.spec.dataset_id).exists():
            return []
        same = line.episodes.spec.fingerprint == line.spec.fingerprint
        return data_rows(line)[:1] if same else []
    except UserError as error:  # the episodes do not need it
        logger.warning("returns are shown without the data's: %s", error)
        return []


def paths_picture(line: Line, results: Sequence[EpisodeResult], path: Path) -> list[Path]:
    """Where the episodes went in a maze; nothing without evaluation.record, or where it is no maze."""
    maze = maze_map_of(line.played.environment)
    known = [result for result in results if result.path and len(result.path[0]) >= 2]
    if maze is None or not known:
        return []
    cells = Grid(maze).goals
    if len(cells) != 1 and not all(len(result.goal) >= 2 for result in known):
        return []  # nothing says where they were to go
    goals = [np.array(result.goal[:2] if result.goal else Grid(maze).center(cells[0])) for result in known]
    ways = [np.array(result.path)[:, :2] for result in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    paths_figure(maze, ways, goals, [result.episode_return > 0 for result in known], path)
    return [path]


def film(
    line: Line, checkpoint: Path, seed: int | None, results: Sequence[EpisodeResult], folder: Path, stem: str
) -> list[Path]:
    """Videos and plans of the first `tracking.films` of the planner's `results`, in `folder`.

    Each episode is played once more and watched; what an earlier command has drawn of it is taken as it is.
    `stem`: what the files' names begin with. A video that cannot be drawn is a line on the screen.
    """
    chosen, files = results[: line.config.tracking.films], list[Path]()
    if not chosen:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    critic = line.critic_for(line.config.planner, seed)
    key = evaluation_key(line.config, line.config.planner, checkpoint, critic)
    planner = planner_of(line, checkpoint, line.config.planner, seed)
    worker = Worker(planner, line.played, line.config.evaluation.max_steps)
    with line.usage.timed("filming"), line.progress.stage("filming: episodes", len(chosen)) as update:
        for done, result in enumerate(chosen):
            kept = folder / f"{stem}-{result.seed}-{key}.npz"
            try:
                recording = Recording.load(kept) if kept.exists() else _watched(line, worker, result)
                files += _drawn(line.config, worker, recording, folder / f"{stem}-{result.seed}", kept)
            except (UserError, ray.exceptions.RayError) as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                line.progress.note(f"no film of episode {result.seed}: {' '.join(str(cause).split())}")
            update(done + 1, "")
    return files


def _watched(line: Line, worker: Worker, result: EpisodeResult) -> Recording:
    """The episode once more, where an actor would play it."""
    have = line.allocation
    alone = have.evaluation_actors == 0
    gpus = have.gpus_per_worker if alone else have.gpus_per_actor
    task = ray.remote(watch_episode).options(num_cpus=1, num_gpus=gpus, max_retries=1)
    recording: Recording = ray.get(task.remote(worker, result.seed))
    if recording.episode_return != result.episode_return:
        line.progress.note(
            f"episode {result.seed} went otherwise when it was filmed: return "
            f"{number_text(recording.episode_return)}, not {number_text(result.episode_return)} "
            "(other hardware, or a decoder that rounds otherwise)"
        )
    return recording


def watch_episode(worker: Worker, seed: int) -> Recording:
    """One episode of a worker's policy, recorded in this process."""
    policy, make = worker()
    return record_episode(policy, make(), seed)


def _drawn(
    config: ExperimentConfig, worker: Worker, recording: Recording, stem: Path, kept: Path
) -> list[Path]:
    """The figure and the video of an episode, drawn unless they are there; the recording is kept last.

    They belong to the one recording beside them: that of another model or planner goes first.
    """
    for other in stem.parent.glob(f"{glob.escape(stem.name)}-*.npz"):
        if other != kept:
            other.unlink()
    figure, video = stem.with_suffix(".png"), stem.with_suffix(".mp4")
    if not (kept.exists() and figure.exists()):
        title = f"{config.name}, episode {recording.seed}: return {number_text(recording.episode_return)}"
        plan_figure(recording, figure, title)
    problem: NoVideoError | None = None
    if not (kept.exists() and video.exists()):
        video.unlink(missing_ok=True)
        try:
            make_video(recording, worker.spec, worker.max_steps, video)
        except NoVideoError as error:
            problem = error
    if not kept.exists():
        recording.save(kept)
    if problem is not None:
        logger.warning("%s", problem)
        return [figure]
    return [figure, video]
