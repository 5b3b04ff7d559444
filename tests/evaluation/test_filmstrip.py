from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from toy_spec import toy_spec

from tt_ray.data.episodes import DataSpec
from tt_ray.evaluation.environments import make_environment
from tt_ray.evaluation.filmstrip import StateRenderer, film, film_strip, state_strip


def spec_of(environment: str) -> DataSpec:
    env = make_environment({"id": environment})
    try:
        return toy_spec(
            env.observation_space.shape[0], env.action_space.shape[0], environment={"id": environment}
        )
    finally:
        env.close()


@pytest.fixture(scope="module")
def hopper() -> Iterator[StateRenderer]:
    """A renderer of Hopper's states."""
    pytest.importorskip("mujoco")
    renderer = StateRenderer.of(spec_of("Hopper-v5"))
    if renderer is None:
        pytest.skip("no OpenGL here (MUJOCO_GL=egl or osmesa)")
    yield renderer
    renderer.close()


def test_states_of_hopper_are_set_and_rendered(hopper: StateRenderer) -> None:
    """A recorded trajectory gives back the simulator's own states, x within what a step's velocity leaves."""
    env = make_environment({"id": "Hopper-v5"})
    states = [env.reset(seed=1)[0]]
    positions = [env.unwrapped.data.qpos.copy()]
    for _ in range(5):
        states.append(env.step(np.full(3, 0.5, dtype=np.float32))[0])
        positions.append(env.unwrapped.data.qpos.copy())
    env.close()
    frames = hopper.frames(np.array(states))
    assert len(frames) == 6
    assert frames[0].ndim == 3
    assert not np.array_equal(frames[0], frames[-1])
    found = hopper.body.data.qpos
    assert np.allclose(found[1:], positions[-1][1:], atol=1e-5)
    assert abs(found[0] - (positions[-1][0] - positions[0][0])) < 0.02


def test_frames_end_where_a_rollout_does(hopper: StateRenderer) -> None:
    states = np.zeros((4, 11), dtype=np.float32)
    states[:, 0] = 1.25
    states[2:] = np.nan
    assert len(hopper.frames(states)) == 2


def test_an_environment_whose_state_does_not_follow(caplog: pytest.LogCaptureFixture) -> None:
    assert StateRenderer.of(spec_of("Pendulum-v1")) is None
    assert "no film strip of Pendulum-v1" in caplog.text


def test_pictures_and_film(tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), 40 * i, dtype=np.uint8) for i in range(5)]
    rows = {"what followed": frames, "Transformer": frames[:2]}
    film_strip(rows, [0, 2, 4], tmp_path / "film.png")
    film(rows, tmp_path / "film.mp4")
    assert (tmp_path / "film.png").read_bytes().startswith(b"\x89PNG")
    shown = imageio.mimread(tmp_path / "film.mp4")
    assert len(shown) == 5
    assert shown[0].shape == (32, 96, 3)
    assert shown[4][:, :48].mean() > 100
    assert shown[4][:, 48:].mean() < 20  # ended
    state_strip(
        np.zeros((4, 3), dtype=np.float32),
        {"Transformer": np.random.default_rng(0).normal(size=(9, 4, 3)).astype(np.float32)},
        tmp_path / "states.png",
        ["a", "b", "c"],
    )
    assert sorted(os.listdir(tmp_path)) == ["film.mp4", "film.png", "states.png"]
