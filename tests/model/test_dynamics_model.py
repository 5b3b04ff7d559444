from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_spec import toy_spec

from tt_ray.errors import UserError
from tt_ray.model.dynamics import Ensemble, EnsembleCheckpoint, Pairs, load_ensemble, save_ensemble

SPEC = toy_spec(3, 2)


def random_ensemble(partial: bool = False, members: int = 4) -> Ensemble:
    torch.manual_seed(0)
    ensemble = Ensemble(members, 3, 2, (8, 4), partial)
    for name, buffer in ensemble.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("std") else 0.0))
    return ensemble


def random_pairs(members: int = 4, rows: int = 6, hidden: bool = False) -> Pairs:
    torch.manual_seed(1)
    numbers = [torch.randn(members, rows, size) for size in (3, 2, 3)]
    masks = [torch.rand(members, rows, 3) < 0.5 for _ in range(2)] if hidden else [None, None]
    return Pairs(*numbers, *masks)


def test_members_are_networks_of_their_own() -> None:
    """One product for all members is each member's own: a member alone gives the same."""
    ensemble, pairs = random_ensemble(), random_pairs()
    mean, std = ensemble.next_observation(pairs.observations, pairs.actions)
    for k in range(4):
        alone = Ensemble(1, 3, 2, (8, 4))
        state = {
            name: value[k : k + 1] if ".weights." in name or ".biases." in name else value
            for name, value in ensemble.state_dict().items()
        }
        alone.load_state_dict(state)
        its_mean, its_std = alone.next_observation(pairs.observations[k : k + 1], pairs.actions[k : k + 1])
        torch.testing.assert_close(its_mean[0], mean[k])
        torch.testing.assert_close(its_std[0], std[k])


@pytest.mark.parametrize("hidden", [False, True])
def test_the_losses_are_gaussian_log_likelihoods(hidden: bool) -> None:
    """Against torch's own Normal, in the normalised units that the losses are in."""
    ensemble, pairs = random_ensemble(partial=hidden), random_pairs(hidden=hidden)
    mean, std = ensemble.next_observation(pairs.observations, pairs.actions, pairs.hidden)
    unit = ensemble.change_std.expand_as(mean)
    if pairs.hidden is not None:
        unit = torch.where(pairs.hidden, ensemble.observation_std, unit)
    log_density = torch.distributions.Normal(mean, std).log_prob(pairs.following) + unit.log()
    if pairs.following_hidden is not None:
        log_density = log_density.masked_fill(pairs.following_hidden, 0.0)
    dynamics, behaviour = ensemble.losses(pairs)
    torch.testing.assert_close(dynamics, -log_density.sum(-1).mean())
    mean, std = ensemble.next_action(pairs.observations, pairs.hidden)
    log_density = torch.distributions.Normal(mean, std).log_prob(pairs.actions) + ensemble.action_std.log()
    torch.testing.assert_close(behaviour, -log_density.sum(-1).mean())


def test_hidden_observations_are_not_seen() -> None:
    """Whatever number stands in a hidden place, nothing changes; that it is hidden does change something."""
    ensemble, pairs = random_ensemble(partial=True), random_pairs(hidden=True)
    assert pairs.hidden is not None
    nonsense = pairs.observations.masked_fill(pairs.hidden, 1e3)
    for method in (
        lambda seen, hidden: ensemble.next_observation(seen, pairs.actions, hidden),
        lambda seen, hidden: ensemble.next_action(seen, hidden),
    ):
        torch.testing.assert_close(method(nonsense, pairs.hidden), method(pairs.observations, pairs.hidden))
        assert not torch.allclose(method(pairs.observations, None)[0], method(nonsense, pairs.hidden)[0])
    every = [replace(pairs, following=pairs.following.masked_fill(pairs.following_hidden, x)) for x in (0, 9)]
    assert torch.equal(ensemble.losses(every[0])[0], ensemble.losses(every[1])[0])


def test_variances_stay_within_their_bounds() -> None:
    ensemble = random_ensemble()
    with torch.no_grad():
        for bias, value in zip(ensemble.dynamics.biases, (0.0, 0.0, 1e4), strict=True):
            bias += value
    far = 1e4 * random_pairs().observations
    _, std = ensemble.next_observation(far, random_pairs().actions)
    largest = ensemble.change_std * math.exp(0.5 * 0.5)
    torch.testing.assert_close(std, largest.expand_as(std), rtol=1e-3, atol=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ensemble saved as a folder."""
    checkpoint = EnsembleCheckpoint(random_ensemble(), SPEC, {"members": 4, "seed": 0}, 7, {"val/loss": 0.5})
    save_ensemble(tmp_path / "ensemble", checkpoint, {"moment": torch.ones(2)})
    return tmp_path / "ensemble"


def test_a_saved_ensemble_comes_back(folder: Path) -> None:
    checkpoint = load_ensemble(folder, spec=SPEC)
    assert (checkpoint.step, checkpoint.metrics) == (7, {"val/loss": 0.5})
    assert (checkpoint.spec, checkpoint.settings) == (SPEC, {"members": 4, "seed": 0})
    pairs = random_pairs()
    expected = random_ensemble().next_observation(pairs.observations, pairs.actions)
    torch.testing.assert_close(
        checkpoint.ensemble.next_observation(pairs.observations, pairs.actions), expected
    )
    assert not checkpoint.ensemble.training


@pytest.mark.parametrize("change", [{"observation_dim": 11}, {"action_dim": 3}])
def test_an_ensemble_for_other_dimensions_is_refused(folder: Path, change: dict[str, int]) -> None:
    spec = replace(SPEC, dataset_id="hopper", **change)
    dims = rf"where hopper has {spec.observation_dim} and {spec.action_dim}; use one"
    with pytest.raises(UserError, match=rf"for 3 observation and 2 action dimensions, {dims}") as refused:
        load_ensemble(folder, spec=spec)
    assert "\n" not in str(refused.value)


def test_an_ensemble_of_other_data_is_refused(folder: Path) -> None:
    spec = replace(SPEC, dataset_id="other", fingerprint="1")
    with pytest.raises(UserError, match=r"an ensemble of toy \(0\), not of other \(1\); use one"):
        load_ensemble(folder, spec=spec)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training_state.safetensors"])
def test_a_damaged_ensemble_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{name}: damaged or truncated"):
        load_ensemble(folder)


def test_a_folder_of_another_kind_is_refused(folder: Path) -> None:
    from tt_ray.model.folders import CHECKSUMS

    (folder / CHECKSUMS).write_text("{}")
    (folder / "config.json").write_text('{"critic": {}}')
    with pytest.raises(UserError, match="not an ensemble that this version can read"):
        load_ensemble(folder)
