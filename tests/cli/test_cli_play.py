"""`tt-ray play` and the films of `tt-ray evaluate`, as a user has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from commands import Command, Refused, recorded, train_here, training_job, write_data

from tt_ray.cli import play, play_view
from tt_ray.cli.play_view import sparkline
from tt_ray.distributed.checkpoints import load_for_evaluation
from tt_ray.distributed.evaluate import Planner, Worker, episodes_here
from tt_ray.evaluation.rollout import EpisodeResult

pytest.importorskip("mujoco")
STEPS = 12


@pytest.fixture
def model(here: Path) -> Path:
    """A model of one step's training for InvertedPendulum."""
    bound = np.full(4, np.inf, dtype=np.float32)
    spaces = {
        "observation_space": gym.spaces.Box(-bound, bound, dtype=np.float32),
        "action_space": gym.spaces.Box(-3, 3, (1,), np.float32),
    }
    seen = np.random.default_rng(0).normal(0, 0.1, size=(12, 11, 4)).astype(np.float32)
    episodes = [recorded(10, i, observations=seen[i]) for i in range(12)]
    write_data(episodes, environment="InvertedPendulum-v5", **spaces)
    return train_here(training_job(evaluation={"episodes": 3, "max_steps": STEPS}), here / "model")


def evaluated(checkpoint: Path, seed: int) -> EpisodeResult:
    """The episode that `evaluate` plays."""
    config, spec, _ = load_for_evaluation(checkpoint, [])
    planner = Planner(
        checkpoint, config.planner, config.dataset.discount, config.resources.episodes_per_actor
    )
    (result,) = episodes_here(Worker(planner, spec, config.evaluation.max_steps), [seed])
    return result


def test_without_a_terminal(model: Path, here: Path, command: Command) -> None:
    """Plain lines, the very episode of an evaluation, and a figure; nothing else is written."""
    outcome = command("play", "model", "--seed", "31", "--no-video", "--out", "seen")
    assert outcome.code == 0, outcome.err
    result = evaluated(model, 31)
    assert f"return {result.episode_return:.2f}, {result.length} steps, " in outcome.out
    assert re.search(r"step 1/12, return \S+, reward \S+, value predicted \S+, decision \d+ ms", outcome.out)
    assert "\x1b" not in outcome.out
    assert [path.name for path in (here / "seen").iterdir()] == ["episode-31.png"]
    assert not (here / "mlflow.db").exists()
    assert not (here / "runs").exists()


def test_on_a_terminal(
    model: Path, command: Command, screen: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panel has the facts, the past and the plan."""
    console = screen(100, 40, terminal=True)
    for module in (play, play_view):
        monkeypatch.setattr(module, "console", console)
    assert command("play", "model", "--no-video").code == 0
    shown = console.file.getvalue()
    assert "tiny in InvertedPendulum-v5, episode 10000" in shown
    for part in ("return", "value predicted", "decision", "obs. 0", "obs. 3", "→"):
        assert part in shown
    assert f"return {evaluated(model, 10_000).episode_return:.2f}" in shown


def test_ctrl_c_still_draws(
    model: Path, here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = play_view.LivePlay.show

    def interrupted(self: play_view.LivePlay, recorder: object) -> None:
        show(self, recorder)  # type: ignore[arg-type]
        if len(recorder.rewards) == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    monkeypatch.setattr(play_view.LivePlay, "show", interrupted)
    outcome = command("play", "model", "--out", "seen")
    assert outcome.code == 0, outcome.err
    assert "2 steps, broken off" in outcome.out
    assert (here / "seen" / "episode-10000.png").exists()
    drawn = (here / "seen" / "episode-10000.mp4").exists()
    assert drawn or "no video of InvertedPendulum-v5: it cannot be drawn here" in outcome.out


def test_what_cannot_be_played(here: Path, refused: Refused) -> None:
    refused("play", "./nowhere", parts=("./nowhere: no such folder",))
    refused("play", "model", "--seed", "-1", parts=("--seed",))


def test_a_sparkline() -> None:
    assert sparkline([0.0, 1.0, float("nan"), 2.0], 0.0, 2.0) == "▁▅ █"
    assert sparkline([3.0, 3.0], 3.0, 3.0) == "▄▄"


@pytest.mark.ray
def test_an_evaluation_is_drawn(model: Path, here: Path, store: str, command: Command) -> None:
    """Its scores are those without a film, and a second command takes the film as it is."""
    settings = ("resources.evaluation_actors=1", f"tracking.uri={store}")
    plain = command("evaluate", "model", *settings)
    filmed = command("evaluate", "model", *settings, "tracking.films=1", "--figures", "drawn")
    assert plain.code == filmed.code == 0, plain.err + filmed.err
    (folder,) = (here / "runs" / "trials").iterdir()
    names = {path.name for path in (here / "drawn").iterdir()}
    assert {"returns.png", "episode-10000.png"} <= names
    assert names <= {"returns.png", "episode-10000.png", "episode-10000.mp4"}
    (kept,) = (folder / "figures").glob("*.npz")
    with np.load(kept) as recording:
        facts = json.loads(str(recording["facts"]))
    assert EpisodeResult.from_json(facts["result"]) == evaluated(model, 10_000)
    times = {path: path.stat().st_mtime_ns for path in (folder / "figures").iterdir()}
    again = command("evaluate", "model", *settings, "tracking.films=1")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in (folder / "figures").iterdir()} == times


@pytest.mark.usefixtures("model")
def test_figures_of_a_data_set(here: Path, command: Command) -> None:
    outcome = command("data", "show", "tiny/pendulum-v0", "--figures", "drawn/here")
    assert outcome.code == 0, outcome.err
    (picture,) = (here / "drawn" / "here").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"drawn/here: {picture.name}" in outcome.out
    (here / "file").touch()
    refusal = command("data", "show", "tiny/pendulum-v0", "--figures", "file/here")
    assert refusal.code == 2
    assert "--figures file/here: cannot be made: Not a directory" in refusal.err
