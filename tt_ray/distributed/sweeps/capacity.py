"""What each trial of a sweep may use, and how many run at once, so that none waits for what others hold.

A trial is one process. Left to `auto`, it trains and plays in that process, which Ray Tune starts only where
a CPU (and a GPU) is free: nothing can block. A trial that is told to use several training workers or
evaluation actors asks Ray for them itself, beside Tune's accounts; then so few trials run at once that all of
them fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tt_ray.config import ResourcesConfig, require
from tt_ray.distributed.cluster import ACTORS_PER_GPU, Allocation, Offer, resolve

NO_CPU = {"memory": 1_000_000.0}
"""What a process reserves that only waits for its workers: Ray Tune takes no trial that needs nothing."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How a cluster is shared out among trials."""

    allocation: Allocation
    """What one trial has."""
    bundle: dict[str, float]
    """What Ray reserves for its process."""
    actor_bundles: tuple[dict[str, float], ...] = ()
    """What it reserves with that, so that no trial holds a place while it waits for its actors."""
    concurrent: int
    """Trials at once, at most."""


def share_out(resources: ResourcesConfig, offered: Offer, trials: int) -> Capacity:
    """The capacity for up to `trials` at once; `UserError` where not even one fits."""
    workers = 1 if resources.workers == "auto" else resources.workers
    actors = 0 if resources.evaluation_actors == "auto" else resources.evaluation_actors
    known = replace(resources, workers=workers, evaluation_actors=max(1, actors))
    gpus = resolve(known, offered).gpus_per_worker
    if workers > 1 and resources.evaluation_actors == "auto":
        actors = workers  # in their places: training is over by then
    if workers == 1 and actors == 0:
        return _alone(offered, gpus, trials)
    return _spread(offered, workers, gpus, actors, trials)


def _alone(offered: Offer, gpus: float, trials: int) -> Capacity:
    """Everything in the trial's process; the CPUs of a host are shared out evenly."""
    places = int(offered.gpus / gpus) if gpus else offered.cpus
    at_once = max(1, min(trials, places))
    hosts = max(1, offered.hosts)
    cpus = max(1, offered.cpus // hosts // math.ceil(at_once / hosts))
    allocation = Allocation(cpus_per_worker=cpus, gpus_per_worker=gpus)
    bundle = {"CPU": float(cpus), "GPU": gpus} if gpus else {"CPU": float(cpus)}
    return Capacity(allocation=allocation, bundle=bundle, concurrent=max(1, trials))


def _spread(offered: Offer, workers: int, gpus: float, actors: int, trials: int) -> Capacity:
    """Workers and actors of their own for each trial: so many trials as have room for either at any time."""
    here = workers == 1
    gpus_per_actor = 1 / ACTORS_PER_GPU if offered.gpus else 0.0
    cpus = 1 + actors if here else max(workers, actors)
    most_gpus = max(workers * gpus, (gpus if here else 0) + actors * gpus_per_actor)
    fitting = [_fitting("CPUs", cpus, offered.cpus, here, actors)]
    if most_gpus:
        fitting.append(_fitting("GPUs", most_gpus, offered.gpus, here, actors))
    allocation = Allocation(
        workers=workers,
        gpus_per_worker=gpus,
        in_process=here,
        evaluation_actors=actors,
        gpus_per_actor=gpus_per_actor,
        reserved=here,
    )
    bundle = {"CPU": 1.0} | ({"GPU": gpus} if gpus else {}) if here else NO_CPU
    for_actor = {"CPU": 1.0} | ({"GPU": gpus_per_actor} if gpus_per_actor else {})
    return Capacity(
        allocation=allocation,
        bundle=bundle,
        actor_bundles=actors * (for_actor,) if here else (),
        concurrent=max(1, min(trials, *fitting)),
    )


def _fitting(what: str, needed: float, there: int, here: bool, actors: int) -> int:
    """How many trials find what they need; `UserError` where there is not enough for one."""
    beside = " beside the process that trains" if here else ""
    require(
        needed <= there,
        "resources.evaluation_actors",
        f"a trial with {actors} actors{beside} needs {needed:g} {what}, but Ray has {there}; "
        "lower it, or leave it at auto",
    )
    return int(there / needed)
