from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_training import SPEC, Curve, Curves

from tt_ray.data.episodes import Episodes
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import checkpoint_folders, last_checkpoint, load_training_state
from tt_ray.model.critic import load_critic
from tt_ray.training.critic import (
    CriticConfig,
    CriticJob,
    CriticTrainer,
    Transitions,
    expectile_loss,
    fit_critic,
    policy_loss,
    q_goal,
)

CELLS, GOAL, DISCOUNT = 6, 5, 0.8
CHAIN = replace(SPEC, dataset_id="chain", observation_dim=CELLS, fingerprint="chain")
SMALL = CriticConfig(steps=12, batch_size=8, hidden=(8,), log_every=1, checkpoint_every=4, target_rate=0.1)


def move(cell: int, action: int) -> tuple[int, float]:
    """A step left (-1) or right (+1) along the chain costs 0.1; the last cell pays 1 and is the end."""
    following = min(max(cell + action, 0), GOAL)
    return following, 1.0 if following == GOAL else -0.1


def chain_episodes(count: int = 60, limit: int = 12) -> Episodes:
    """A behaviour that steps right with probability 0.6, from anywhere, cut after `limit` steps."""
    random = np.random.default_rng(0)
    walks = []
    for _ in range(count):
        cell, walk = int(random.integers(GOAL)), []
        while cell != GOAL and len(walk) < limit:
            action = 1 if random.random() < 0.6 else -1
            following, reward = move(cell, action)
            walk.append((cell, action, reward, following == GOAL))
            cell = following
        walks.append(walk)
    return episodes_of(walks)


def episodes_of(walks: list[list[tuple[int, int, float, bool]]]) -> Episodes:
    """Episodes of (cell, action, reward, terminated), the observation one-hot."""
    steps = [step for walk in walks for step in walk]
    cells, actions, rewards, terminated = (np.array(column) for column in zip(*steps, strict=True))
    offsets = np.cumsum([0, *(len(walk) for walk in walks)])
    truncated = np.zeros(len(cells), dtype=bool)
    truncated[offsets[1:] - 1] = ~terminated[offsets[1:] - 1]
    return Episodes(
        np.eye(CELLS, dtype=np.float32)[cells],
        actions[:, None].astype(np.float32),
        rewards.astype(np.float32),
        terminated,
        truncated,
        offsets,
        CHAIN,
    )


def tabular_q(counts: NDArray[np.float64], expectile: float, shift: float = 0.0) -> NDArray[np.float64]:
    """Q [cell, left or right] where V is the expectile of Q over the actions' counts; 1: their maximum."""
    q = np.zeros((CELLS, 2))
    for _ in range(200):
        v = np.array([expectile_of(q[cell], counts[cell], expectile) for cell in range(CELLS)])
        v[GOAL] = 0.0
        for cell in range(GOAL):
            for column, action in enumerate((-1, 1)):
                following, reward = move(cell, action)
                q[cell, column] = reward + shift + DISCOUNT * v[following]
    return q


def expectile_of(values: NDArray[np.float64], counts: NDArray[np.float64], expectile: float) -> float:
    """Where the weighted pull from above and below is the same, found by repeated weighted means."""
    seen = counts > 0
    if not seen.any() or expectile == 1:
        return float(values[seen].max(initial=-np.inf)) if seen.any() else 0.0
    value = float(values[seen].mean())
    for _ in range(100):
        weights = counts * np.where(values > value, expectile, 1 - expectile)
        value = float((weights * values).sum() / weights.sum())
    return value


def counts_of(episodes: Episodes) -> NDArray[np.float64]:
    """How often each action is learned from in each cell."""
    rows = Transitions.of(episodes).rows.numpy()
    counts = np.zeros((CELLS, 2))
    right = episodes.actions[rows, 0] > 0
    np.add.at(counts, (episodes.observations[rows].argmax(axis=1), right.astype(int)), 1)
    return counts


def job_of(episodes: Episodes, seed: int = 0, policy: bool = False, **settings: Any) -> CriticJob:
    return CriticJob(replace(SMALL, **settings), Transitions.of(episodes), episodes.spec, seed, policy)


def no_log(metrics: Mapping[str, float], step: int) -> None:
    """Curves that nobody looks at."""


def learned_q(folder: Path, episodes: Episodes, **settings: Any) -> NDArray[np.float64]:
    """Q [cell, left or right] of a critic trained until it is settled."""
    full = {
        "steps": 1_500,
        "batch_size": 128,
        "hidden": (32, 32),
        "learning_rate": 1e-3,
        "target_rate": 0.05,
        "discount": DISCOUNT,
        "checkpoint_every": 1_500,
    }
    critic = fit_critic(job_of(episodes, **(full | settings)), folder, no_log)
    observations = torch.eye(CELLS)[:, None].expand(-1, 2, -1)
    actions = torch.tensor([[-1.0], [1.0]]).expand(CELLS, -1, -1)
    with torch.no_grad():
        return critic.q(observations, actions).double().numpy()


@pytest.mark.parametrize(("expectile", "shift"), [(0.5, 0.0), (0.9, -0.5), (0.99, 0.0)])
def test_q_is_the_tabular_one_on_the_data_support(tmp_path: Path, expectile: float, shift: float) -> None:
    """0.5: the behaviour's Q; 0.99: nearly the optimal one; in between: that of the expectile's operator."""
    episodes = chain_episodes()
    counts = counts_of(episodes)
    learned = learned_q(tmp_path, episodes, expectile=expectile, reward_shift=shift)
    seen = counts > 0
    assert seen[:GOAL].all()
    assert np.abs(learned - tabular_q(counts, expectile, shift))[seen].max() < 0.04
    if expectile == 0.99:
        assert np.abs(learned - tabular_q(counts, 1.0))[seen].max() < 0.08
        # A bound that tells the optimal Q from the behaviour's.
        assert np.abs(learned - tabular_q(counts, 0.5))[seen].max() > 0.3


def test_what_the_data_never_does_is_not_counted_on(tmp_path: Path) -> None:
    """Nobody steps right from cell 2, so that a high expectile finds no way to the goal from there."""
    walks = [[(0, 1, -0.1, False), (1, 1, -0.1, False), (2, -1, -0.1, False), (1, -1, -0.1, False)]]
    walks += [[(3, 1, -0.1, False), (4, 1, 1.0, True)], [(1, -1, -0.1, False), (0, 1, -0.1, False)]]
    episodes = episodes_of(walks)
    counts = counts_of(episodes)
    learned = learned_q(tmp_path, episodes, expectile=0.95, steps=1_000, batch_size=32)
    assert np.abs(learned - tabular_q(counts, 0.95))[counts > 0].max() < 0.05
    assert learned[1, 1] < 0 < learned[3, 1]


def tabular_policy(
    counts: NDArray[np.float64], expectile: float, inverse_temperature: float
) -> NDArray[np.float64]:
    """Mean action [cell] of weighted regression on the tabular Q and V, over the actions' counts."""
    q = tabular_q(counts, expectile)[:GOAL]
    v = np.array([expectile_of(q[cell], counts[cell], expectile) for cell in range(GOAL)])
    weights = counts[:GOAL] * np.minimum(np.exp(inverse_temperature * (q - v[:, None])), 100.0)
    return (weights * [-1.0, 1.0]).sum(axis=1) / weights.sum(axis=1)


@pytest.mark.parametrize("inverse_temperature", [0.0, 3.0, 20.0])
def test_the_policy_is_the_tabular_weighted_regression(tmp_path: Path, inverse_temperature: float) -> None:
    """0 clones the behaviour, which steps right with 0.6; the larger, the surer the better action."""
    episodes = chain_episodes()
    settings = {"steps": 1_500, "batch_size": 128, "hidden": (32, 32), "learning_rate": 1e-3}
    settings |= {"target_rate": 0.05, "discount": DISCOUNT, "expectile": 0.7, "checkpoint_every": 1_500}
    job = job_of(episodes, policy=True, inverse_temperature=inverse_temperature, **settings)
    critic = fit_critic(job, tmp_path, no_log)
    with torch.no_grad():
        learned = critic.act(torch.eye(CELLS))[:GOAL, 0].double().numpy()
    expected = tabular_policy(counts_of(episodes), 0.7, inverse_temperature)
    assert np.abs(learned - expected).max() < 0.15
    if inverse_temperature == 0.0:
        assert (learned < 0.6).all()
    if inverse_temperature == 20.0:
        assert (learned > 0.7).all()


def test_a_policys_loss_is_its_weighted_log_likelihood() -> None:
    advantage, log_prob = torch.tensor([0.5, -0.5, 9.0]), torch.tensor([-1.0, -2.0, -3.0])
    expected = (np.exp(1.0) * 1 + np.exp(-1.0) * 2 + 100 * 3) / 3  # the last weight is cut off
    assert float(policy_loss(advantage, log_prob, 2.0)) == pytest.approx(expected)


def test_q_and_v_are_bit_equal_with_a_policy_and_without(tmp_path: Path) -> None:
    episodes = chain_episodes(8)
    plain = fit_critic(job_of(episodes), tmp_path / "plain", no_log).state_dict()
    other = fit_critic(job_of(episodes, policy=True), tmp_path / "policy", no_log).state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert {name.partition(".")[0] for name in other.keys() - plain.keys()} == {"policy", "log_std"}


def test_a_critic_without_a_policy_is_what_it_was(tmp_path: Path) -> None:
    """Folders from before there were policies: no word of one in them, and a training goes on from them."""
    fit_critic(job_of(chain_episodes(8), steps=4), tmp_path, no_log)
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    assert not {"policy", "inverse_temperature"} & {*config["critic"], *config["settings"]}
    assert load_critic(folder).config == replace(SMALL, steps=4)
    assert load_critic(folder).critic.policy is None
    fit_critic(job_of(chain_episodes(8), inverse_temperature=9.0), tmp_path, no_log)
    with pytest.raises(UserError, match="was trained with policy = False, not True"):
        fit_critic(job_of(chain_episodes(8), policy=True), tmp_path, no_log)


def test_rows_without_a_known_successor_are_left_out() -> None:
    ends = [(3, 1, -0.1, False), (4, 1, 1.0, True)]
    cut = [(0, 1, -0.1, False), (1, 1, -0.1, False)]
    episodes = episodes_of([cut, ends, cut, ends])
    transitions = Transitions.of(episodes)
    assert transitions.rows.tolist() == [0, 2, 3, 4, 6, 7]
    batch = transitions.gather(torch.arange(len(transitions)))
    assert batch.observations.argmax(dim=1).tolist() == [0, 3, 4, 0, 3, 4]
    assert batch.terminated.tolist() == [False, False, True, False, False, True]
    assert batch.next_observations.argmax(dim=1)[~batch.terminated].tolist() == [1, 4, 1, 4]
    assert Transitions.of(episodes, np.array([2, 1])).rows.tolist() == [2, 3, 4]


def test_only_a_termination_ends_the_future() -> None:
    episodes = episodes_of(
        [[(0, 1, -0.1, False), (1, 1, 2.0, False)], [(3, 1, 3.0, False), (4, 1, 1.0, True)]]
    )
    batch = Transitions.of(episodes).gather(torch.arange(3))
    config = CriticConfig(discount=0.5, reward_shift=-1.0)
    goal = q_goal(batch, torch.tensor([10.0, 20.0, torch.nan]), config)
    torch.testing.assert_close(goal, torch.tensor([-0.1 - 1 + 5, 3.0 - 1 + 10, 1.0 - 1]))


def test_episodes_that_all_end_after_one_unfinished_step_are_refused() -> None:
    with pytest.raises(UserError, match="chain: no transition with a known successor among 2 episodes"):
        Transitions.of(episodes_of([[(0, 1, -0.1, False)], [(1, 1, -0.1, False)]]))


def test_expectile_loss_pulls_up_more_than_down() -> None:
    loss = expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9)
    assert float(loss) == pytest.approx((0.9 * 4 + 0.1 * 4) / 3)


def test_targets_follow_the_q_networks(tmp_path: Path) -> None:
    trainer = CriticTrainer(job_of(chain_episodes(8)), tmp_path, no_log, torch.device("cpu"))
    before = [p.clone() for p in trainer.target.q_networks.parameters()]
    trainer.update(0)
    after, online = (list(c.q_networks.parameters()) for c in (trainer.target, trainer.critic))
    for old, new, goal in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + SMALL.target_rate * (goal - old))
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_curves_are_those_of_the_batch(tmp_path: Path) -> None:
    curve = Curve()
    fit_critic(job_of(chain_episodes(8), log_every=5), tmp_path, curve)
    assert sorted(curve.points) == [4, 5, 8, 10, 12]
    names = {"loss/v", "loss/q", "mean/v", "mean/q", "mean/advantage"}
    assert all(
        set(point) == names and np.isfinite([*point.values()]).all() for point in curve.points.values()
    )
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    assert load_critic(folder).metrics == curve.points[12]


class CrashError(Exception):
    pass


def crash_at(points: Curve, step: int) -> Any:
    """A log that crashes in place of the point after `step` updates."""

    def log(metrics: Mapping[str, float], done: int) -> None:
        if done == step:
            raise CrashError
        points(metrics, done)

    return log


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, of which there is one alone."""
    (last,) = checkpoint_folders(folder)
    return {**load_critic(last).critic.state_dict(), **load_training_state(last)}


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("crashes", [[2], [4], [5], [3, 7, 12]])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, crashes: Iterable[int], policy: bool
) -> None:
    job = job_of(chain_episodes(8), policy=policy)
    straight, crashed = Curve(), Curve()
    fit_critic(job, tmp_path / "straight", straight)
    for step in crashes:
        with pytest.raises(CrashError):
            fit_critic(job, tmp_path / "crashed", crash_at(crashed, step))
        torch.rand(step)  # nothing may hang on the global stream
    critic = fit_critic(job, tmp_path / "crashed", crashed)
    assert crashed.points == straight.points
    expected, found = state_of(tmp_path / "straight"), state_of(tmp_path / "crashed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {"target.0.0.weight", "v_network.0.weight.exp_avg", "q_networks.1.0.bias.step"} <= found.keys()
    assert ({"policy.0.weight.exp_avg", "log_std.exp_avg"} <= found.keys()) == policy
    assert all(torch.equal(critic.state_dict()[name], found[name]) for name in critic.state_dict())


def test_a_run_goes_on_to_more_steps_and_a_finished_one_does_nothing(tmp_path: Path) -> None:
    episodes = chain_episodes(8)
    fit_critic(job_of(episodes, steps=8), tmp_path / "longer", no_log)
    fit_critic(job_of(episodes, steps=12), tmp_path / "longer", no_log)
    fit_critic(job_of(episodes, steps=12), tmp_path / "straight", no_log)
    expected, found = state_of(tmp_path / "straight"), state_of(tmp_path / "longer")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again: Curves = {}
    fit_critic(
        job_of(episodes, steps=12), tmp_path / "longer", lambda metrics, step: again.update({step: {}})
    )
    assert again == {}


def test_seeds_differ(tmp_path: Path) -> None:
    one, other = (
        fit_critic(job_of(chain_episodes(8), seed), tmp_path / str(seed), no_log) for seed in (0, 1)
    )
    assert not torch.equal(one.v(torch.eye(CELLS)), other.v(torch.eye(CELLS)))


def test_another_jobs_checkpoint_is_refused(tmp_path: Path) -> None:
    episodes = chain_episodes(8)
    fit_critic(job_of(episodes), tmp_path, no_log)
    with pytest.raises(
        UserError, match=r"step-00000012: was trained with expectile = 0.7, not 0.9; train in"
    ):
        fit_critic(job_of(episodes, expectile=0.9), tmp_path, no_log)
    with pytest.raises(UserError, match=r"was trained with seed = 0, not 1"):
        fit_critic(job_of(episodes, 1), tmp_path, no_log)
    other = replace(episodes, spec=replace(CHAIN, fingerprint="other"))
    with pytest.raises(UserError, match=r"was trained with data = chain, not other"):
        fit_critic(job_of(other), tmp_path, no_log)
    wide = replace(
        episodes, observations=episodes.observations[:, :4], spec=replace(CHAIN, observation_dim=4)
    )
    with pytest.raises(UserError, match="for 6 observation and 1 action dimensions, where chain has 4 and 1"):
        fit_critic(job_of(wide), tmp_path, no_log)


def test_a_critic_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the critic"):
        fit_critic(job_of(chain_episodes(8)), tmp_path, no_log)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expectile", 1.0),
        ("discount", 0.0),
        ("target_rate", 1.5),
        ("reward_shift", float("nan")),
        ("learning_rate", 0.0),
        ("hidden", ()),
        ("hidden", (32, 0)),
        ("steps", 0),
        ("batch_size", 0),
        ("log_every", 0),
        ("checkpoint_every", 0),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^critic\.{name}: must"):
        CriticConfig(**{name: value})


def test_settings_are_kept_as_plain_data(tmp_path: Path) -> None:
    fit_critic(job_of(chain_episodes(8), expectile=0.9, reward_shift=-1.0), tmp_path, no_log)
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    checkpoint = load_critic(folder)
    settings = {**checkpoint.settings}
    assert settings.pop("seed") == 0
    rebuilt = CriticConfig(**{**settings, "hidden": tuple(settings["hidden"])})
    assert rebuilt == replace(SMALL, expectile=0.9, reward_shift=-1.0)
    assert checkpoint.spec == CHAIN
    assert json.loads((folder / "config.json").read_text())["step"] == checkpoint.step == 12
