"""Small Minari data sets for the tests."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

from tt_ray.data.minari_sets import (
    RecordedEpisode,
    write_dataset,
)
from tt_ray.errors import UserError

OBSERVATIONS = Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = Box(np.float32([-1, -2]), np.float32([1, 2]))
NESTED = Dict(
    {"position": Box(-9, 9, (2,)), "body": Dict({"spin": Box(-9, 9, (1,)), "mass": Box(0, 9, (2,))})}
)


def recorded(length: int, seed: int = 0, ending: str = "terminated", **changes: Any) -> RecordedEpisode:
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        "seed": seed,
        "behavior_policy": f"policy {seed % 2}",
        "observations": rng.normal(size=(length + 1, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(length, 2)).astype(np.float32),
        "rewards": rng.normal(size=length).astype(np.float32),
        "terminations": np.arange(length) == (length - 1 if ending == "terminated" else -1),
        "truncations": np.arange(length) == (length - 1 if ending == "truncated" else -1),
    }
    return RecordedEpisode(**{**fields, **changes})


def write(dataset_id: str = "test/box-v0", episodes: Any = None, **changes: Any) -> Path:
    arguments = {"environment": "Hopper-v5", "observation_space": OBSERVATIONS, "action_space": ACTIONS}
    chosen = [recorded(4, 0), recorded(1, 1, "truncated"), recorded(7, 2)] if episodes is None else episodes
    return write_dataset(dataset_id, chosen, **{**arguments, **changes})


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def shorten(group: h5py.Group, key: str, length: int) -> None:
    values = group[key][:length]
    del group[key]
    group[key] = values


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def minaris(
    dataset_id: str,
    episodes: list[RecordedEpisode],
    observation_space: gym.Space,
    data_format: str,
    action_space: gym.Space = ACTIONS,
) -> None:
    """A data set by Minari's own hand, without an environment."""
    buffers = [
        EpisodeBuffer(
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=episode.terminations,
            truncations=episode.truncations,
        )
        for episode in episodes
    ]
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        observation_space=observation_space,
        action_space=action_space,
        data_format=data_format,
    )


def change_metadata(dataset_id: str, **changes: Any) -> None:
    path = minari.storage.get_dataset_path(dataset_id) / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
