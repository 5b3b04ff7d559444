"""Watched episodes are those that are evaluated; their plans are the ones acted on; they are drawn."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from toy_spec import toy_spec

from tt_ray.config import ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.evaluation.camera import NoVideoError, make_video
from tt_ray.evaluation.environments import FlatEnvironment, make_environment
from tt_ray.evaluation.plan_figures import plan_figure
from tt_ray.evaluation.policies import RandomPolicy
from tt_ray.evaluation.replay import Recorder, Recording, record_episode
from tt_ray.evaluation.rollout import EpisodeResult, run_episodes
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.engine import PlanningEngine

pytest.importorskip("mujoco")
SPEC = toy_spec(4, 1, environment={"id": "InvertedPendulum-v5"}, action_low=(-3.0,), action_high=(3.0,))
STEPS, HORIZON, EVERY, SEED = 12, 3, 2, 7


def environment() -> FlatEnvironment:
    return make_environment(SPEC.environment, max_steps=STEPS)


@pytest.fixture(scope="module")
def engine() -> PlanningEngine:
    """A planner with random weights."""
    torch.manual_seed(0)
    layout = TokenLayout(observation_dim=4, action_dim=1, num_bins=16)
    values = np.random.default_rng(0).uniform(-1, 1, (300, layout.slots)).astype(np.float32)
    config = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, context_transitions=4, dropout=0.0)
    bins = Discretizer.fit(values, strategy="uniform", num_bins=16)
    checkpoint = Checkpoint(TrajectoryTransformer(config, layout).eval(), bins, SPEC, {}, 1, {})
    planner = PlannerConfig(horizon=HORIZON, beam_width=4, plan_every=EVERY, max_context_transitions=2)
    return PlanningEngine(checkpoint, planner, discount=0.99, slots=2)


def evaluated(engine: PlanningEngine) -> EpisodeResult:
    seeds = iter([SEED])
    (result,) = run_episodes(engine, environment, lambda: next(seeds, None))
    return result


@pytest.fixture(scope="module")
def recording(engine: PlanningEngine) -> Recording:
    return record_episode(engine, environment(), SEED)


def test_watching_changes_nothing(engine: PlanningEngine, recording: Recording) -> None:
    result = evaluated(engine)
    assert recording.result == result
    assert recording.episode_return == result.episode_return
    assert len(recording.rewards) == len(recording.actions) == len(recording.latency) == result.length
    assert len(recording.observations) == result.length + 1


def test_the_plans_are_those_that_are_acted_on(engine: PlanningEngine, recording: Recording) -> None:
    """A plan starts at what was observed, as its bins tell it, and its first actions are the ones taken."""
    lived = np.isfinite(recording.plans[:, :EVERY, 0]).sum(axis=1)  # a plan may stop before the second step
    assert recording.planned_at.tolist() == [0, *np.cumsum(lived)[:-1]]
    assert len(lived) > 1
    assert recording.plans.shape == (len(recording.planned_at), HORIZON, engine.layout.slots)
    discretizer = engine.discretizer
    for step, plan in zip(recording.planned_at, recording.plans, strict=True):
        seen = discretizer.decode(discretizer.encode(recording.observations[step]))
        assert np.allclose(plan[0, :4], seen, atol=1e-6)
        planned = plan[:EVERY, 4:5][np.isfinite(plan[:EVERY, 0])]
        taken = recording.actions[step : step + len(planned)]
        assert len(taken) > 0
        assert np.allclose(planned[: len(taken)], taken, atol=1e-6)


def test_a_recording_comes_back_and_a_damaged_one_is_named(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "a.npz")
    again = Recording.load(tmp_path / "a.npz")
    assert again.result == recording.result
    assert np.array_equal(again.plans, recording.plans, equal_nan=True)
    assert os.listdir(tmp_path) == ["a.npz"]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a\.npz: no recording"):
        Recording.load(tmp_path / "a.npz")


def test_ctrl_c_ends_an_episode_and_keeps_what_there_is(engine: PlanningEngine, tmp_path: Path) -> None:
    def watch(recorder: Recorder) -> None:
        if len(recorder.rewards) == 3:
            raise KeyboardInterrupt

    broken = record_episode(engine, environment(), SEED, watch)
    assert broken.result is None
    assert len(broken.rewards) == len(broken.actions) == 3
    assert len(broken.observations) == 4
    plan_figure(broken, tmp_path / "plan.png", "broken off")
    assert not engine.live
    assert engine.on_plan is None


@pytest.mark.parametrize("planned", [True, False])
def test_the_figure(recording: Recording, tmp_path: Path, planned: bool) -> None:
    shown = recording if planned else record_episode(RandomPolicy([-3.0], [3.0]), environment(), SEED)
    plan_figure(shown, tmp_path / "plan.png", "a $title$")
    picture = imread(tmp_path / "plan.png")
    assert picture.shape[0] > (700 if planned else 200)
    assert picture[..., :3].std() > 0.02


@pytest.fixture(scope="module")
def film(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "episode.mp4"
    try:
        make_video(recording, SPEC, STEPS, path)
    except NoVideoError as error:
        pytest.skip(str(error))
    return path


def test_the_film_shows_the_episode(film: Path, recording: Recording) -> None:
    frames = [np.asarray(frame) for frame in imageio.mimread(film)]
    assert len(frames) == len(recording.rewards) + 1  # slow enough to show every step
    assert frames[0].shape[1] == 320
    assert frames[0][:320].std() > 10
    assert np.abs(frames[0][:320].astype(int) - frames[-1][:320]).max() > 50
    assert os.listdir(film.parent) == [film.name]


def test_no_film_of_another_episode(film: Path, recording: Recording, tmp_path: Path) -> None:
    """The actions must give the rewards that were recorded, or else it would be another episode."""
    other = replace(recording, rewards=recording.rewards + 1)
    with pytest.raises(NoVideoError, match="gave another reward at step 1"):
        make_video(other, SPEC, STEPS, tmp_path / "other.mp4")
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_drawn(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "chalk")
    with pytest.raises(NoVideoError) as error:
        make_video(recording, SPEC, STEPS, tmp_path / "film.mp4")
    assert str(error.value).startswith("no video of InvertedPendulum-v5: it cannot be drawn here (chalk: ")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
