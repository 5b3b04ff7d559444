"""A sweep made so small that all of it runs in seconds: the same study on tiny data sets that it collects.

Every size has a largest value here, and these are chosen so that settings which go together still do: where
one setting may not be larger than another (`planner.keep` < `planner.window` <= `model.context_transitions`),
its smaller value here is no larger than the other's.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tt_ray.config import CollectConfig, ExperimentConfig, flatten, to_dict
from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS
from tt_ray.errors import UserError
from tt_ray.experiment_file import Draft, experiment_from_dict
from tt_ray.fingerprints import fingerprint
from tt_ray.search import Case, SchedulerConfig, SearchConfig, Space, Values
from tt_ray.sweep_file import Sweep

MOST_CASES, MOST_VALUES, MOST_SEEDS, MOST_TRIALS = 12, 2, 2, 3

_SIZES: Mapping[str, tuple[Any, Any]] = {
    "discretizer.num_bins": (50, 100),
    "model.num_layers": (1, 2),
    "model.num_heads": (1, 2),
    "model.embed_dim": (16, 32),  # multiples of 16, which the native code needs
    "model.context_transitions": (4, 5),
    "training.steps": (6, 8),
    "training.batch_size": (4, 8),
    "training.warmup_steps": (1, 2),
    "training.log_every": (1, 2),
    "training.validate_every": (2, 4),
    "training.validation_windows": (32, 64),
    "planner.horizon": (2, 3),
    "planner.beam_width": (2, 4),
    "planner.n_expand": (1, 2),
    "planner.plan_every": (1, 2),
    "planner.window": (3, 4),
    "planner.max_context_transitions": (2, 3),
    "planner.keep": (1, 2),
    "evaluation.episodes": (1, 2),
    "evaluation.max_steps": (5, 10),
    "evaluation.bootstrap_samples": (100, 200),
    "critic.hidden": ((8,), (16,)),
    "critic.steps": (6, 8),
    "critic.batch_size": (4, 8),
    "critic.log_every": (1, 2),
    "critic.checkpoint_every": (2, 4),
    "ensemble.members": (2, 3),
    "ensemble.hidden": ((8,), (16,)),
    "ensemble.steps": (6, 8),
    "ensemble.batch_size": (4, 8),
    "ensemble.log_every": (1, 2),
    "ensemble.checkpoint_every": (2, 4),
    "prediction.rollouts": (2, 4),
    "prediction.horizon": (2, 3),
    "prediction.starts": (1, 2),
    "prediction.context": (2, 3),
    "collect.steps": (200, 400),
    "collect.directions": (2, 4),
    "collect.top_directions": (1, 2),
    "collect.max_steps": (20, 40),
    "collect.final_episodes": (1, 2),
    "resources.workers": (1, 2),
    "resources.evaluation_actors": (1, 2),
    "resources.episodes_per_actor": (1, 2),
}
"""Largest value of each size, after a smaller one for searches that would otherwise have it twice."""
_EXACTLY = {
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "critic.hidden": [16],
    "ensemble.hidden": [16],
    "tracking.films": 0,
}
"""Sizes that do not depend on what the file has: a width must be divisible by one head and by two."""
_NO_LIMIT = {"evaluation.max_steps", "collect.max_steps"}
"""Sizes of which None is the largest."""
_MAZES = {"pointmaze": "PointMaze_UMaze-v3", "antmaze": "AntMaze_UMaze-v5"}
"""The smallest maze of each robot: observations and goals are the same in all."""
_FIRST_RUNG = {"episodes": 1, "training_steps": 4}


def smoke(sweep: Sweep) -> Sweep:
    """The same study, small: every case (up to 12), two values of each parameter, two seeds, two episodes.

    Each data set becomes one of some hundred steps, `smoke/...-v0`, which the sweep collects. Method, metric
    and scheduler stay; a sweep with nothing to search stays one.

    Raises:
        UserError: one line, where the environment of a data set cannot be told.
    """
    whole = sweep.search
    cases = whole.cases[:MOST_CASES]
    laid = [_put(to_dict(sweep.base), case.settings) for case in cases] or [to_dict(sweep.base)]
    sources = [_source(data, whole) for data in laid]
    base = _small_base(sweep.base, sources[0])
    parameters = {key: _small_space(key, space) for key, space in whole.parameters.items()}
    if "dataset.id" in parameters:
        parameters["dataset.id"] = Values(values=tuple(_tiny(i, sources[0]) for i in _ids(laid[0], whole)))
    tries = None if whole.num_trials is None else _num_trials(whole.num_trials, parameters)
    search = replace(
        whole,
        parameters=parameters,
        cases=_small_cases(base, cases, sources, whole.parameters.keys()),
        num_trials=tries,
        scheduler=None if whole.scheduler is None else _small_scheduler(whole.scheduler),
        confirm_episodes=2,
    )
    small = Sweep(base=base, search=search, source=sweep.source, places=sweep.places)
    _check(small)
    return small


def _put(data: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's plain data, changed."""
    draft = Draft(data=data)
    for key, value in settings.items():
        draft.put(tuple(key.split(".")), value)
    return draft.data


def _ids(data: Mapping[str, Any], search: SearchConfig) -> list[str]:
    """The data sets that are used with the plain data of a case, or of the base."""
    searched = search.parameters.get("dataset.id")
    return list(searched.values[:MOST_VALUES]) if isinstance(searched, Values) else [data["dataset"]["id"]]


def _source(data: Mapping[str, Any], search: SearchConfig) -> dict[str, Any]:
    """The `dataset.id` and the `collect` settings of the tiny data set in place of that in `data`."""
    ids = _ids(data, search)
    given = data["collect"] or {}
    environments = {given.get("environment") or _guess_environment(dataset_id) for dataset_id in ids}
    if len(environments) > 1:
        raise UserError(
            "search.parameters.dataset.id: a smoke run collects all of its data in one environment, not in "
            f"{' and '.join(sorted(environments))}: write them as search.cases"
        )
    collect = to_dict(CollectConfig(**given | {"environment": environments.pop()}))
    collect["seed"] = zlib.crc32(ids[0].encode()) % 10_000
    settings = {f"collect.{key}": _small(f"collect.{key}", value) for key, value in collect.items()}
    return {**settings, "dataset.id": _tiny(ids[0], settings)}


def _tiny(dataset_id: str, settings: Mapping[str, Any]) -> str:
    """Id of the tiny data set; how it is collected is part of it, so that no other one is in the way."""
    collect = sorted((key, value) for key, value in settings.items() if key.startswith("collect."))
    readable = re.sub(r"[^a-z0-9]+", "-", dataset_id.lower())[:40].strip("-")
    return f"smoke/{readable or 'x'}-{fingerprint(dataset_id, collect)[:8]}-v0"


def _guess_environment(dataset_id: str) -> str:
    """The environment that the id of a data set speaks of."""
    for word in re.split(r"[^a-z0-9]+", dataset_id.lower()):
        if word in D4RL_ENVIRONMENTS:
            return D4RL_ENVIRONMENTS[word].id
        if word in _MAZES:
            return _MAZES[word]
    raise UserError(
        f"dataset.id: a smoke run collects its own data, and cannot tell the environment of {dataset_id}: "
        "give the file a section collect: {environment: ...}"
    )


def _small_base(base: ExperimentConfig, source: Mapping[str, Any]) -> ExperimentConfig:
    whole, experiment = to_dict(base), base.tracking.experiment
    small = {key: _small(key, value) for key, value in flatten(whole).items()} | {
        **source,
        "name": f"{base.name} smoke",
        "seeds": list(base.seeds[:MOST_SEEDS]),
        "resources.gpus_per_worker": "auto",
        "tracking.experiment": None if experiment is None else f"{experiment} smoke",
    }
    return experiment_from_dict(_put(whole, small), base.name)


def _small_cases(
    base: ExperimentConfig,
    cases: Sequence[Case],
    sources: Sequence[Mapping[str, Any]],
    searched: Collection[str],
) -> tuple[Case, ...]:
    """The cases made small; those that have become equal differ in how often their scores are resampled."""
    small: list[Case] = []
    seen: list[dict[str, Any]] = []
    for case, source in zip(cases, sources, strict=False):  # without cases, the one source is the base's
        settings = {key: _small(key, value) for key, value in case.settings.items()}
        settings.pop("collect", None)
        settings |= {key: value for key, value in source.items() if key not in searched}
        whole = flatten(to_dict(base)) | settings
        if whole in seen and "evaluation.bootstrap_samples" not in searched:
            settings["evaluation.bootstrap_samples"] = _SIZES["evaluation.bootstrap_samples"][1] + len(seen)
        seen.append(whole)
        small.append(Case(name=case.name, settings=settings))
    return tuple(small)


def _small(key: str, value: Any) -> Any:
    """The value in place of one that the file gives."""
    if key in _EXACTLY:
        return _EXACTLY[key]
    if key not in _SIZES or isinstance(value, str):  # auto
        return value
    if value is None:
        return _SIZES[key][1] if key in _NO_LIMIT else None
    return min(value, _SIZES[key][1])


def _small_space(key: str, space: Space) -> Space:
    if isinstance(space, Values):
        return Values(values=_small_values(key, space.values[:MOST_VALUES]))
    if key not in _SIZES:
        return space
    less, most = _SIZES[key]
    if key in _EXACTLY:
        return replace(space, min=less, max=most)
    return replace(space, min=min(space.min, less), max=min(space.max, most))


def _small_values(key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """As many values, still different, and in the same order."""
    small = tuple(_small(key, value) for value in values)
    if len(values) < 2 or small[0] != small[1]:
        return small
    less, most = _SIZES[key]
    first, second = (math.inf if value is None else value for value in values)
    return (less, most) if first < second else (most, less)


def _num_trials(wanted: int, parameters: Mapping[str, Space]) -> int:
    size = math.prod(space.size for space in parameters.values())
    return int(min(wanted, MOST_TRIALS, size))


def _small_scheduler(scheduler: SchedulerConfig) -> SchedulerConfig:
    return replace(scheduler, grace=min(scheduler.grace, _FIRST_RUNG[scheduler.rung]), reduction=2)


def _check(sweep: Sweep) -> None:
    """`UserError` unless all trials are valid, or, where they are not settled, those at the spaces' ends."""
    if sweep.search.method != "optuna":
        sweep.trials()
        return
    for case in sweep.case_names:
        for end in (0.0, math.nextafter(1.0, 0.0)):
            sweep.trial({key: space.at(end) for key, space in sweep.search.parameters.items()}, case)
