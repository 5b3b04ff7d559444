import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from tt_ray.data.observations import flatten_observation, observation_keys
from tt_ray.errors import UserError

NESTED = Dict(
    {
        "z": Box(-1, 1, (2,)),
        "inner": Dict({"b": Box(-1, 1, (2, 2)), "a": Box(-1, 1, ())}),
    }
)


def test_a_box_has_no_keys_and_is_raveled() -> None:
    assert observation_keys(Box(-1, 1, (2, 3))) == ()
    flat = flatten_observation(np.arange(6.0).reshape(2, 3), ())
    assert flat.dtype == np.float32
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]


def test_leaves_are_joined_in_the_order_of_their_paths() -> None:
    keys = observation_keys(NESTED)
    assert keys == ("inner/a", "inner/b", "z")
    observation = {"z": [6, 7], "inner": {"b": [[2, 3], [4, 5]], "a": 1}}
    assert flatten_observation(observation, keys).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_batch_axes_are_kept() -> None:
    keys = observation_keys(NESTED)
    batch = {"z": np.ones((5, 2)), "inner": {"b": np.zeros((5, 2, 2)), "a": np.full(5, 3.0)}}
    flat = flatten_observation(batch, keys, batch_dims=1)
    assert flat.shape == (5, 7)
    assert flat[4].tolist() == [3, 0, 0, 0, 0, 1, 1]


def test_batched_and_single_agree() -> None:
    keys = observation_keys(NESTED)
    NESTED.seed(0)
    samples = [NESTED.sample() for _ in range(3)]
    batch = {
        "z": np.stack([sample["z"] for sample in samples]),
        "inner": {leaf: np.stack([sample["inner"][leaf] for sample in samples]) for leaf in ("a", "b")},
    }
    singly = np.stack([flatten_observation(sample, keys) for sample in samples])
    np.testing.assert_array_equal(flatten_observation(batch, keys, batch_dims=1), singly)


@pytest.mark.parametrize(
    "space",
    [Discrete(3), Dict({"a": Discrete(2)}), Dict({}), Dict({"a": Dict({})}), Dict({"a/b": Box(-1, 1, (1,))})],
    ids=["discrete", "discrete leaf", "empty", "empty inside", "slash in a key"],
)
def test_other_spaces_are_refused(space: gym.Space) -> None:
    with pytest.raises(UserError):
        observation_keys(space)
