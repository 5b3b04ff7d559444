"""What tests know of a data set that they have made up."""

from typing import Any

from tt_ray.data.episodes import DataSpec


def toy_spec(observation_dim: int, action_dim: int, **changes: Any) -> DataSpec:
    """Actions within -1 and 1, no reference scores; `changes` of that."""
    plain: dict[str, Any] = {
        "dataset_id": "toy",
        "environment": {"id": "Toy-v0"},
        "observation_keys": (),
        "action_low": (-1.0,) * action_dim,
        "action_high": (1.0,) * action_dim,
        "ref_min_score": None,
        "ref_max_score": None,
        "fingerprint": "0",
    }
    return DataSpec(observation_dim=observation_dim, action_dim=action_dim, **plain | changes)
