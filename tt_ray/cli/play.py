"""`tt-ray play`: one episode with its plans, live in the terminal, and as a video and a figure at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tt_ray.cli.arguments import Critic, Model, settings
from tt_ray.cli.play_view import LivePlay
from tt_ray.cli.session import find_checkpoint
from tt_ray.cli.view import Bars, console, duration, made_folder, show_line, waiting
from tt_ray.texts import number_text

if TYPE_CHECKING:
    from tt_ray.config import ExperimentConfig
    from tt_ray.data.episodes import DataSpec
    from tt_ray.distributed.evaluate import Worker
    from tt_ray.evaluation.replay import Recording


def play(
    model: Model,
    overrides: Annotated[list[str] | None, settings("planner.horizon=5")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The episode's seed; evaluation.first_seed by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the video and the figure; runs/play/NAME by default.")
    ] = None,
    video: Annotated[bool, typer.Option("--video/--no-video", help="Whether to make a video.")] = True,
    critic: Critic = None,
) -> None:
    """Watch one episode of a trained planner: the very one that `evaluate` plays for that seed.

    Ctrl-C ends the episode; what there is of it is still drawn.
    """
    import torch

    from tt_ray.evaluation.replay import record_episode
    from tt_ray.search import safe_name

    torch.set_num_threads(1)  # as in an evaluation's actor, so that sums are added up in the same order
    config, spec, worker = _prepare(find_checkpoint(model, overrides or []), overrides or [], critic)
    seed = config.evaluation.first_seed if seed is None else seed
    folder = made_folder(out or Path(config.resources.storage) / "play" / safe_name(config.name), "--out")
    with waiting("loading the model"):
        policy, make = worker()
        env = make()
    title = f"{config.name} in {spec.environment.get('id')}, episode {seed}"
    with LivePlay(title, config.evaluation.max_steps or _limit(env)) as view:
        recording = record_episode(policy, env, seed, view.show)
    _say(recording, spec)
    _draw(recording, spec, config, folder / f"episode-{seed}", video)


def _prepare(
    path: Path, overrides: list[str], critic: Path | None
) -> tuple[ExperimentConfig, DataSpec, Worker]:
    """The settings, the data's description, and what plays, as `evaluate` has them."""
    from tt_ray.distributed.checkpoints import find_critic, load_for_evaluation
    from tt_ray.distributed.evaluate import Worker
    from tt_ray.distributed.line import Line, check_objective
    from tt_ray.distributed.scoring import planner_of

    scorer = None if critic is None else find_critic(critic)
    config, spec, seed = load_for_evaluation(path, overrides, scorer)
    line = Line(config, Bars())
    line.use(spec)
    line.locate(spec.fingerprint)
    line.given_critic = scorer
    check_objective(config)
    planner = planner_of(line, path, config.planner, seed)
    return config, line.played, Worker(planner, line.played, config.evaluation.max_steps)


def _limit(env: object) -> int | None:
    """Steps after which the environment ends an episode, where it says so."""
    limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
    return limit if isinstance(limit, int) else None


def _say(recording: Recording, spec: DataSpec) -> None:
    """How the episode went, in a line."""
    from tt_ray.evaluation.scores import normalized_score

    result, steps = recording.result, len(recording.rewards)
    score = normalized_score([recording.episode_return], spec.ref_min_score, spec.ref_max_score)
    scored = "" if score is None else f" (score {number_text(float(score[0]))})"
    how = "broken off" if result is None else "terminated" if result.terminated else "out of time"
    took = duration(float(recording.latency.sum()))
    text = f"return {recording.episode_return:.2f}{scored}, {steps} steps, {how}; deciding took {took}"
    console.print(text, soft_wrap=True)


def _draw(recording: Recording, spec: DataSpec, config: ExperimentConfig, stem: Path, video: bool) -> None:
    """The figure and, where it is asked for and can be drawn, the video."""
    from tt_ray.evaluation.camera import NoVideoError, make_video
    from tt_ray.evaluation.plan_figures import plan_figure

    title = f"{config.name}, episode {recording.seed}: return {recording.episode_return:.1f}"
    places, problem = [("figure", stem.with_suffix(".png"))], ""
    with waiting("drawing"):
        plan_figure(recording, places[0][1], title)
        if video:
            try:
                make_video(recording, spec, config.evaluation.max_steps, stem.with_suffix(".mp4"))
                places.append(("video", stem.with_suffix(".mp4")))
            except NoVideoError as error:
                problem = str(error)
    if problem:
        console.print(problem, style="yellow", soft_wrap=True)
    for name, place in places:
        show_line(name, place)
