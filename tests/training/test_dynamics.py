from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_training import SPEC, Curve

from tt_ray.config import EnsembleConfig
from tt_ray.data.episodes import Episodes
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import best_checkpoint, checkpoint_folders, checkpoint_metrics, last_checkpoint
from tt_ray.model.dynamics import Ensemble, load_ensemble
from tt_ray.planning.open_loop import ensemble_rollouts
from tt_ray.training.dynamics import EnsembleJob, PairSet, fit_ensemble

A = np.array([[0.9, 0.3], [-0.2, 0.8]])
B = np.array([0.0, 0.5])
NOISE = np.array([0.05, 0.2])
ACTION_NOISE = 0.3
LINEAR = replace(
    SPEC, dataset_id="linear", observation_dim=2, action_dim=1, action_low=(-3.0,), action_high=(3.0,)
)
SMALL = EnsembleConfig(
    members=3, hidden=(8,), steps=12, batch_size=8, log_every=1, checkpoint_every=4, learning_rate=1e-2
)


def policy(state: NDArray[np.float64]) -> Any:
    """Mean action of the behaviour."""
    return -0.6 * state[..., 0]


def linear_episodes(count: int = 40, length: int = 50) -> Episodes:
    """x' = A x + B a + noise, a = policy(x) + noise."""
    random = np.random.default_rng(0)
    state, states, actions = random.normal(size=(count, 2)), [], []
    for _ in range(length):
        action = policy(state) + ACTION_NOISE * random.normal(size=count)
        states.append(state)
        actions.append(action)
        state = state @ A.T + action[:, None] * B + NOISE * random.normal(size=(count, 2))
    ended = np.tile(np.arange(length) == length - 1, count)
    return Episodes(
        np.stack(states, axis=1).reshape(-1, 2).astype(np.float32),
        np.stack(actions, axis=1).reshape(-1, 1).astype(np.float32),
        np.zeros(count * length, dtype=np.float32),
        np.zeros(count * length, dtype=bool),
        ended,
        np.arange(count + 1) * length,
        LINEAR,
    )


def job_of(
    episodes: Episodes, seed: int = 0, unseen: NDArray[np.bool_] | None = None, **settings: Any
) -> EnsembleJob:
    """All but the last fifth of the episodes to learn from, and that to validate on."""
    cut = len(episodes) * 4 // 5
    sets = [PairSet.of(episodes, np.arange(*span), unseen) for span in ((0, cut), (cut, len(episodes)))]
    return EnsembleJob(replace(SMALL, **settings), *sets, episodes.spec, seed)


def trained(folder: Path, job: EnsembleJob) -> Ensemble:
    fit_ensemble(job, folder, lambda metrics, step: None)
    best = best_checkpoint(folder)
    assert best is not None
    return load_ensemble(best, spec=job.spec).ensemble


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    """An ensemble trained on the linear system until it is settled."""
    long = {"steps": 800, "batch_size": 128, "hidden": (32,), "checkpoint_every": 200, "log_every": 400}
    return trained(tmp_path_factory.mktemp("learned"), job_of(linear_episodes(), **long))


def test_a_linear_systems_mean_and_variance_are_learned(learned: Ensemble) -> None:
    random = np.random.default_rng(1)
    states = random.normal(scale=0.5, size=(200, 2))
    actions = policy(states) + ACTION_NOISE * random.normal(size=200)
    inputs = [torch.from_numpy(x.astype(np.float32)).expand(3, -1, -1) for x in (states, actions[:, None])]
    with torch.no_grad():
        mean, std = learned.next_observation(*inputs)
        action_mean, action_std = learned.next_action(inputs[0])
    right = states @ A.T + actions[:, None] * B
    assert np.abs(mean.numpy() - right).mean(axis=(0, 1)).max() < 0.05
    assert np.abs(std.numpy().mean(axis=(0, 1)) / NOISE - 1).max() < 0.2
    assert np.abs(action_mean.numpy()[..., 0] - policy(states)).mean() < 0.06
    assert abs(action_std.numpy().mean() / ACTION_NOISE - 1) < 0.2


def test_rollouts_have_the_systems_marginals(learned: Ensemble) -> None:
    """Mean and spread after five steps, by own actions and by given ones, against the linear system's own."""
    start, steps, random = np.array([0.8, -0.5]), 5, np.random.default_rng(2)
    for given in (None, np.linspace(-0.5, 0.5, steps)[:, None]):
        state = np.tile(start, (4_000, 1))
        for h in range(steps):
            action = policy(state) + ACTION_NOISE * random.normal(size=4_000) if given is None else given[h]
            state = state @ A.T + np.reshape(action, (-1, 1)) * B + NOISE * random.normal(size=(4_000, 2))
        drawn = ensemble_rollouts(
            learned,
            start.astype(np.float32),
            horizon=steps,
            rollouts=1_000,
            seed=0,
            actions=None if given is None else given.astype(np.float32),
        )
        assert drawn.shape == (1_000, steps, 2)
        assert np.abs(drawn[:, -1].mean(axis=0) - state.mean(axis=0)).max() < 0.12
        assert np.abs(drawn[:, -1].std(axis=0) / state.std(axis=0) - 1).max() < 0.25


def test_a_rollout_is_one_members_and_its_seeds(learned: Ensemble) -> None:
    start = np.array([0.8, -0.5], dtype=np.float32)

    def draw(ensemble: Ensemble, rollouts: int, seed: int = 0) -> NDArray[np.float32]:
        return ensemble_rollouts(ensemble, start, horizon=3, rollouts=rollouts, seed=seed)

    first = draw(learned, 7)
    assert first.shape == (7, 3, 2)
    assert np.array_equal(first, draw(learned, 7))
    assert not np.array_equal(first, draw(learned, 7, seed=1))
    moved = Ensemble(**learned.sizes())
    moved.load_state_dict(learned.state_dict())
    with torch.no_grad():
        moved.dynamics.biases[-1][1] += 1.0  # member 1 alone
    changed = (draw(moved, 7) != first).any(axis=(1, 2))
    assert changed.tolist() == [False, True, False, False, True, False, False]


def test_rollouts_stay_within_the_datas_range(learned: Ensemble) -> None:
    wild = Ensemble(**learned.sizes())
    wild.load_state_dict(learned.state_dict())
    with torch.no_grad():
        wild.dynamics.biases[-1] += 1e3
    drawn = ensemble_rollouts(wild, np.zeros(2, dtype=np.float32), horizon=2, rollouts=3, seed=0)
    high = linear_episodes().observations.max(axis=0)
    assert (drawn <= high + 1e-6).all()
    assert np.allclose(drawn, wild.observation_high.numpy())


def test_hidden_dimensions_teach_nothing(tmp_path: Path) -> None:
    """Numbers in hidden places leave no trace, in the weights or the normalisation."""
    episodes = linear_episodes(10, 20)
    hidden = np.random.default_rng(3).random(episodes.observations.shape) < 0.5
    other = replace(episodes, observations=np.where(hidden, np.float32(77.0), episodes.observations))
    first = trained(tmp_path / "a", job_of(episodes, unseen=hidden))
    second = trained(tmp_path / "b", job_of(other, unseen=hidden))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.partial


def test_pairs_are_rows_of_one_episode(tmp_path: Path) -> None:
    episodes = linear_episodes(3, 5)
    pairs = PairSet.of(episodes, np.array([0, 2]))
    assert pairs.rows.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    single = replace(episodes, offsets=np.arange(16))
    with pytest.raises(UserError, match="no two rows follow each other in the training episodes"):
        fit_ensemble(job_of(single), tmp_path, lambda metrics, step: None)


@pytest.mark.parametrize("stop", [4, 8])
def test_resumption_is_exact(tmp_path: Path, stop: int) -> None:
    """Interrupted after any checkpoint, the rest is as if it had not been."""
    episodes = linear_episodes(10, 20)
    whole, halves = Curve(), Curve()
    fit_ensemble(job_of(episodes), tmp_path / "whole", whole)
    fit_ensemble(job_of(episodes, steps=stop), tmp_path / "halves", halves)
    fit_ensemble(job_of(episodes), tmp_path / "halves", halves)
    assert whole.points == halves.points
    ensembles = []
    for name in ("whole", "halves"):
        last = last_checkpoint(tmp_path / name)
        assert last is not None
        assert last.name == "step-00000012"
        ensembles.append(load_ensemble(last).ensemble.state_dict())
    assert all(torch.equal(value, ensembles[1][name]) for name, value in ensembles[0].items())


def test_the_best_by_held_out_likelihood_and_the_last_are_kept(tmp_path: Path) -> None:
    curve = Curve()
    fit_ensemble(job_of(linear_episodes(10, 20), learning_rate=0.3, steps=40), tmp_path, curve)
    losses = {step: point["val/loss"] for step, point in curve.points.items() if "val/loss" in point}
    best = min(losses, key=losses.__getitem__)
    kept = [int(path.name.partition("-")[2]) for path in checkpoint_folders(tmp_path)]
    assert kept == sorted({best, 40})
    folder = best_checkpoint(tmp_path)
    assert folder is not None
    assert checkpoint_metrics(folder)["val/loss"] == losses[best]


def test_members_learn_from_bootstraps_of_their_own(tmp_path: Path) -> None:
    """From equal weights members drift apart, as they see other rows."""
    from tt_ray.training.dynamics import EnsembleTrainer

    trainer = EnsembleTrainer(
        job_of(linear_episodes(10, 20)), tmp_path, lambda metrics, step: None, torch.device("cpu")
    )
    assert trainer.bootstraps.shape == (3, 8 * 19)
    assert all(len(row.unique()) < 8 * 19 for row in trainer.bootstraps)
    with torch.no_grad():
        for parameter in trainer.ensemble.parameters():
            if parameter.ndim == 3:
                parameter.copy_(parameter[:1].expand_as(parameter))
    trainer.update(0)
    weights = trainer.ensemble.dynamics.weights[0]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    episodes = linear_episodes(10, 20)
    fit_ensemble(job_of(episodes), tmp_path, lambda metrics, step: None)
    with pytest.raises(UserError, match=r"was trained with batch_size = 8, not 4"):
        fit_ensemble(job_of(episodes, batch_size=4), tmp_path, lambda metrics, step: None)
    other = replace(episodes, spec=replace(LINEAR, fingerprint="other"))
    with pytest.raises(UserError, match=r"an ensemble of linear \(0\), not of linear \(other\)"):
        fit_ensemble(job_of(other), tmp_path, lambda metrics, step: None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("members", 0), ("hidden", ()), ("hidden", (8, 0)), ("steps", 0), ("learning_rate", 0.0),
     ("weight_decay", -1.0), ("log_every", 0), ("checkpoint_every", 0), ("batch_size", 0)],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^ensemble\.{name}: must"):
        EnsembleConfig(**{name: value})
