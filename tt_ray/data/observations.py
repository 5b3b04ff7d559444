"""Dict observations as flat vectors, in one order: leaves sorted by their path (`achieved_goal`, `a/b`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError


def observation_keys(space: gym.Space) -> tuple[str, ...]:
    """Paths of a Dict space's leaves in flattening order; empty for a Box. `UserError` for others."""
    if isinstance(space, gym.spaces.Box):
        return ()
    if not isinstance(space, gym.spaces.Dict) or not space.spaces:
        raise UserError(f"observation space {space} is not supported: it must be a Box or a Dict of Boxes")
    if any("/" in key for key in space.spaces):
        raise UserError(f"observation space {space} is not supported: its keys must not contain a slash")
    paths: list[str] = []
    for key, child in space.spaces.items():
        leaves = observation_keys(child)
        paths.extend(f"{key}/{leaf}" for leaf in leaves) if leaves else paths.append(str(key))
    return tuple(sorted(paths))


def observation_leaves(space: gym.Space) -> tuple[tuple[str, int], ...]:
    """Path ("" for a Box) and size of each part of a flat observation, in order."""
    leaves = []
    for key in observation_keys(space) or ("",):
        leaf: Any = space
        for part in filter(None, key.split("/")):
            leaf = leaf[part]
        leaves.append((key, math.prod(leaf.shape)))
    return tuple(leaves)


def flatten_observation(observation: Any, keys: Sequence[str], batch_dims: int = 0) -> NDArray[np.float32]:
    """Flat float32 vector(s) [..., N] of a Box array (`keys` empty) or a nested mapping of arrays.

    The first `batch_dims` axes are kept; the rest of every leaf is raveled, and the leaves are joined in
    the order of `keys`.
    """
    if not keys:
        leaves = [observation]
    else:
        leaves = [_leaf(observation, key) for key in keys]
    arrays = [np.asarray(leaf, dtype=np.float32) for leaf in leaves]
    return np.concatenate([array.reshape(*array.shape[:batch_dims], -1) for array in arrays], axis=-1)


def _leaf(observation: Mapping[str, Any], path: str) -> Any:
    node: Any = observation
    for part in path.split("/"):
        node = node[part]
    return node
