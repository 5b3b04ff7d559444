"""Spot instances with a fall-back: what Ray's autoscaler asks which kind of node to start next.

Ray's own answer starts the same kind again and again while the cloud has none of it. Here a kind that could
not be had in the last half hour comes after all others. A spot kind and its on-demand twin in cluster.yaml
differ in one resource that nobody asks for, which puts the twin second as long as spot is to be had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """How well a node of that type would serve the demands, or None; Ray starts the one with the largest.

    Ray reads the name of this function from RAY_AUTOSCALER_UTILIZATION_SCORER.
    """
    usual = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if usual is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return (record is None or record.is_available, *usual)
