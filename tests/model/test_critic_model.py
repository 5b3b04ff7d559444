from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_spec import toy_spec

from tt_ray.errors import UserError
from tt_ray.model.critic import Critic, CriticCheckpoint, load_critic, save_critic

SPEC = toy_spec(3, 2)


def random_critic() -> Critic:
    torch.manual_seed(0)
    critic = Critic(3, 2, (8, 4))
    critic.normalise_by(5 + 2 * torch.randn(50, 3), torch.randn(50, 2))
    return critic


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A critic saved as a folder."""
    checkpoint = CriticCheckpoint(random_critic(), SPEC, {"discount": 0.9, "seed": 0}, 7, {"loss/v": 0.5})
    save_critic(tmp_path / "critic", checkpoint, {"moment": torch.ones(2)})
    return tmp_path / "critic"


def test_normalisation_is_part_of_the_module() -> None:
    """A critic of scaled data is that of the plain data, and a constant dimension is only centred."""
    torch.manual_seed(0)
    observations, actions = torch.randn(200, 3), torch.randn(200, 2)
    plain, scaled = Critic(3, 2, (8,)), Critic(3, 2, (8,))
    scaled.load_state_dict(plain.state_dict())
    plain.normalise_by(observations, actions)
    shift, factor = torch.tensor([100.0, -3.0, 0.0]), torch.tensor([50.0, 0.1, 1.0])
    scaled.normalise_by(observations * factor + shift, 7 * actions)
    expected = plain.q_values(observations, actions)
    torch.testing.assert_close(
        scaled.q_values(observations * factor + shift, 7 * actions), expected, rtol=1e-3, atol=1e-4
    )
    plain.normalise_by(torch.full((200, 3), 4.0), actions)
    assert plain.observation_std.tolist() == [1.0, 1.0, 1.0]
    assert plain.observation_mean.tolist() == [4.0, 4.0, 4.0]


def test_q_is_the_smaller_of_two_and_takes_any_leading_dimensions() -> None:
    critic = random_critic()
    observations, actions = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    both = critic.q_values(observations, actions)
    assert both.shape == (2, 4, 5)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(critic.q(observations, actions), torch.minimum(both[0], both[1]))
    assert critic.v(observations).shape == (4, 5)


def test_a_saved_critic_comes_back(folder: Path) -> None:
    checkpoint = load_critic(folder, spec=SPEC)
    assert (checkpoint.step, checkpoint.metrics) == (7, {"loss/v": 0.5})
    assert (checkpoint.spec, checkpoint.settings) == (SPEC, {"discount": 0.9, "seed": 0})
    assert not checkpoint.critic.training
    expected, found = random_critic().state_dict(), checkpoint.critic.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [path.name for path in folder.parent.iterdir()] == ["critic"]


@pytest.mark.parametrize("change", [{"observation_dim": 11}, {"action_dim": 3}])
def test_a_critic_for_other_dimensions_is_refused(folder: Path, change: dict[str, int]) -> None:
    spec = replace(SPEC, dataset_id="hopper", **change)
    dims = rf"where hopper has {spec.observation_dim} and {spec.action_dim}; use one"
    with pytest.raises(UserError, match=rf"for 3 observation and 2 action dimensions, {dims}") as refused:
        load_critic(folder, spec=spec)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training_state.safetensors"])
def test_a_damaged_critic_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{name}: damaged or truncated"):
        load_critic(folder)
