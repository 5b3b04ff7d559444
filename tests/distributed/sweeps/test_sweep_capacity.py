"""How a cluster is shared out: whatever runs at once fits, and none waits for what the others hold."""

import itertools
from typing import Any

import pytest

from tt_ray.config import ResourcesConfig
from tt_ray.distributed.cluster import Offer
from tt_ray.distributed.sweeps.capacity import Capacity, share_out
from tt_ray.errors import UserError


def share(offer: tuple[int, int, int], trials: int, **resources: Any) -> Capacity:
    return share_out(ResourcesConfig(**resources), Offer(*offer), trials)


def reserved(capacity: Capacity, name: str) -> float:
    """What Ray keeps for a trial, whatever it does."""
    return sum(bundle.get(name, 0.0) for bundle in (capacity.bundle, *capacity.actor_bundles))


def at_once(capacity: Capacity, offer: Offer, trials: int) -> int:
    """Trials that Ray and Tune let run at the same time."""
    limits = [trials, capacity.concurrent]
    for name, there in (("CPU", offer.cpus), ("GPU", offer.gpus)):
        if reserved(capacity, name):
            limits.append(int(there / reserved(capacity, name) + 1e-9))
    return min(limits)


def most(capacity: Capacity) -> tuple[float, float]:
    """CPUs and GPUs that one trial holds at the most: reserved ones, and its workers' or its actors'."""
    given = capacity.allocation
    workers = 0 if given.in_process else given.workers
    actors = 0 if given.reserved else given.evaluation_actors
    cpus = max(workers * given.cpus_per_worker, actors * given.cpus_per_actor)
    gpus = max(workers * given.gpus_per_worker, actors * given.gpus_per_actor)
    return reserved(capacity, "CPU") + cpus, reserved(capacity, "GPU") + gpus


@pytest.mark.parametrize(
    ("offer", "trials", "resources", "running", "cpus", "gpus"),
    [
        ((2, 0, 1), 1, {}, 1, 2, 0),
        ((2, 0, 1), 4, {}, 2, 1, 0),
        ((2, 0, 1), 4, {"workers": 2, "evaluation_actors": 2}, 1, 2, 0),
        ((2, 0, 1), 4, {"workers": 1, "evaluation_actors": 1}, 1, 2, 0),
        ((2, 0, 1), 4, {"workers": 2}, 1, 2, 0),
        ((16, 0, 1), 4, {}, 4, 4, 0),
        ((16, 0, 4), 1, {}, 1, 4, 0),  # of one host
        ((16, 0, 1), 4, {"workers": 2, "evaluation_actors": 4}, 4, 4, 0),
        ((16, 0, 1), 8, {"workers": 2, "evaluation_actors": 4}, 4, 4, 0),
        ((16, 0, 1), 8, {"workers": 1, "evaluation_actors": 3}, 4, 4, 0),
        ((16, 2, 1), 4, {}, 2, 8, 1),
        ((16, 2, 1), 4, {"gpus_per_worker": 0.5}, 4, 4, 0.5),
        ((16, 8, 2), 8, {"workers": 2}, 4, 2, 2),
        ((2, 1, 1), 4, {}, 1, 2, 1),
    ],
)
def test_what_a_trial_has_and_how_many_run(
    offer: tuple[int, int, int],
    trials: int,
    resources: dict[str, Any],
    running: int,
    cpus: float,
    gpus: float,
) -> None:
    capacity = share(offer, trials, **resources)
    assert at_once(capacity, Offer(*offer), trials) == running
    assert (max(most(capacity)[0], capacity.allocation.cpus_per_worker), most(capacity)[1]) == (cpus, gpus)


def test_all_that_runs_at_once_fits() -> None:
    fitting = 0
    for cpus, gpus, hosts, trials, workers, actors in itertools.product(
        (1, 2, 3, 8, 64), (0, 1, 4), (1, 2), (1, 3, 16), ("auto", 1, 2, 4), ("auto", 1, 2, 5)
    ):
        offer = Offer(cpus, gpus, hosts)
        try:
            capacity = share((cpus, gpus, hosts), trials, workers=workers, evaluation_actors=actors)
        except UserError:
            continue
        running = at_once(capacity, offer, trials)
        used_cpus, used_gpus = (running * used for used in most(capacity))
        assert running >= 1
        assert used_cpus <= cpus, (offer, trials, workers, actors, capacity)
        assert used_gpus <= gpus + 1e-9, (offer, trials, workers, actors, capacity)
        threads = capacity.allocation.cpus_per_worker
        if capacity.allocation.in_process:
            assert capacity.bundle["CPU"] >= threads
        fitting += 1
    assert fitting > 400


def test_a_trial_left_to_itself_needs_nothing_but_its_process() -> None:
    for offer in ((2, 0, 1), (64, 8, 4)):
        allocation = share(offer, 4).allocation
        assert (allocation.workers, allocation.in_process, allocation.evaluation_actors) == (1, True, 0)


@pytest.mark.parametrize(
    ("offer", "resources", "message"),
    [
        ((2, 0, 1), {"workers": 3}, "resources.workers: 3 workers need a CPU each, but Ray has 2"),
        (
            (2, 0, 1),
            {"gpus_per_worker": 1},
            "resources.workers: 1 workers with 1 GPUs each need 1, but Ray has 0",
        ),
        (
            (8, 2, 1),
            {"workers": 4, "gpus_per_worker": 1},
            "resources.workers: 4 workers with 1 GPUs each need 4",
        ),
        (
            (2, 0, 1),
            {"workers": 2, "evaluation_actors": 3},
            "resources.evaluation_actors: a trial with 3 actors needs 3 CPUs, but Ray has 2",
        ),
        (
            (2, 0, 1),
            {"workers": 1, "evaluation_actors": 2},
            "resources.evaluation_actors: a trial with 2 actors beside the process that trains needs 3 CPUs",
        ),
        ((1, 0, 1), {"evaluation_actors": 1}, "needs 2 CPUs, but Ray has 1"),
        ((64, 1, 1), {"evaluation_actors": 4}, "needs 2 GPUs, but Ray has 1"),
    ],
)
def test_what_does_not_fit_even_once_is_refused(
    offer: tuple[int, int, int], resources: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"^resources\.") as caught:
        share(offer, 4, **resources)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
