"""A sweep on disk: its trials, what of them is done, and what is still to do."""

from __future__ import annotations

import itertools
import math
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tt_ray.config import ExperimentConfig, GoalConfig, ResourcesConfig
from tt_ray.data.d4rl_names import resolve_id
from tt_ray.data.episodes import Episodes, best_tenth
from tt_ray.distributed.scoring import evaluation_key, missing
from tt_ray.distributed.stages import Stage, StageStore
from tt_ray.distributed.sweeps.cells import Record, cell_folder, read_record
from tt_ray.distributed.train import steps_done
from tt_ray.errors import UserError
from tt_ray.evaluation.scores import normalized_score
from tt_ray.fingerprints import critic_fingerprint, model_fingerprint, tokens_fingerprint
from tt_ray.model.checkpoint import best_checkpoint, last_checkpoint
from tt_ray.planning.objectives import find_objective
from tt_ray.search import Space, Values, safe_name
from tt_ray.sweep_file import Sweep, Trial

DRAWS = 1_000
"""Settings that are tried before Optuna's space counts as one in which nothing goes together."""
TOKEN_KEYS = (
    *("discretizer.strategy", "discretizer.num_bins"),
    *("dataset.discount", "dataset.terminal_penalty", "dataset.delayed_rewards", "dataset.hidden_fraction"),
)
"""Settings that tokens depend on, besides the data."""
DATA_KEYS = ("dataset.id", "dataset.observation_dims", "dataset.observation_keys")
"""Settings that decide which data is read."""

DataKey = tuple[str, int | None, tuple[str, ...] | None, GoalConfig | None]
"""Resolved id of a data set, what is kept of its observations, and what of them are goals."""


@dataclass(frozen=True)
class DataFacts:
    """What a table says of a data set beside its planners; returns are means over episodes."""

    name: str
    episodes: int
    transitions: int
    mean: float
    best_tenth: float
    scores: tuple[float, float] | None
    """Both returns normalised, where the data set has reference scores."""
    best: float = math.nan
    """Return of the best episode."""

    @classmethod
    def of(cls, episodes: Episodes) -> DataFacts:
        """The facts of a data set in memory."""
        spec, returns = episodes.spec, np.sort(episodes.returns)
        mean, best = float(returns.mean()), float(best_tenth(returns).mean())
        scores = normalized_score([mean, best], spec.ref_min_score, spec.ref_max_score)
        pair = None if scores is None else (float(scores[0]), float(scores[1]))
        size = int(episodes.offsets[-1])
        return cls(spec.dataset_id, len(returns), size, mean, best, pair, float(returns[-1]))

    @property
    def profile(self) -> dict[str, int]:
        """How much is in it, as MLflow shows it."""
        return {"episodes": self.episodes, "transitions": self.transitions}

    def __str__(self) -> str:
        mean, best = ("", "") if self.scores is None else (f" (score {score:.3g})" for score in self.scores)
        returns = f"mean return {self.mean:.4g}{mean}, best tenth {self.best_tenth:.4g}{best}"
        returns += f", best {self.best:.4g}" if self.best == self.best else ""
        return f"{self.name}: {self.episodes} episodes, {returns}"


@dataclass(frozen=True)
class Forecast:
    """What of a trial is in the store already; None: not known before its data is here."""

    tokens: bool | None = None
    models: int | None = None
    """Training seeds whose model is there."""
    steps: int = 0
    """Training steps done of models that were begun."""
    episodes: int | None = None
    """Episodes played, of all training seeds."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each of those stages took, by its key: trials share them."""


@dataclass
class Study:
    """A sweep, its folder, and what is known of its data sets."""

    sweep: Sweep
    data: dict[DataKey, str] = field(default_factory=dict)
    """Fingerprint of each data set that is here."""
    facts: dict[DataKey, DataFacts] = field(default_factory=dict)

    @property
    def commands(self) -> tuple[str, str]:
        """How to see the sweep from elsewhere, and how to end it."""
        base = self.sweep.base
        shown = shlex.quote(base.tracking.experiment or base.name)
        cancel = f"tt-ray cancel {shlex.quote(base.name)}"
        if self.storage != Path(ResourcesConfig().storage).resolve():
            cancel = f"{cancel} --storage {shlex.quote(str(self.storage))}"
        return f"tt-ray results {shown} --follow", cancel

    def has_read(self, key: DataKey, episodes: Episodes) -> None:
        """Note what a data set is."""
        self.data[key] = episodes.spec.fingerprint
        self.facts[key] = DataFacts.of(episodes)

    @property
    def storage(self) -> Path:
        """Where everything is kept."""
        return Path(self.sweep.base.resources.storage).resolve()

    @property
    def folder(self) -> Path:
        """Where the sweep's own files are."""
        return sweep_folder(self.storage, self.sweep.base.name)

    @cached_property
    def store(self) -> StageStore:
        """The store that all sweeps share."""
        return StageStore(self.storage)

    @property
    def by_optuna(self) -> bool:
        """Whether trials are made one by one."""
        return self.sweep.search.method == "optuna"

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials of a grid or random search; those of Optuna that have been begun."""
        return self._proposed() if self.by_optuna else self.sweep.trials()

    def samples(self) -> list[Trial]:
        """Trials that between them use every data set of the sweep."""
        if not self.by_optuna:
            return self.trials
        searched = [key for key in DATA_KEYS if key in self.sweep.search.parameters]
        if searched:
            key = f"search.parameters.{searched[0]}"
            advice = "optuna cannot choose the data; make a case for each data set"
            raise UserError(f"{self.sweep.places.of(key)}: {key}: {advice}")
        return [self._any_trial(case) for case in self.sweep.case_names]

    def _any_trial(self, case: str | None) -> Trial:
        """A trial of Optuna's space in which everything goes together."""
        draws, spaces = random.Random(0), self.sweep.search.parameters.items()
        for attempt in range(DRAWS):
            settings = {key: space.at(draws.random()) for key, space in spaces}
            try:
                return self.sweep.trial(settings, case)
            except UserError:
                if attempt == DRAWS - 1:
                    raise
        raise AssertionError("there is at least one draw")

    def token_configs(self, trials: Sequence[Trial]) -> list[ExperimentConfig]:
        """Configurations that between them have all tokens of `trials`, and of what Optuna may make of them.

        Of a range, which has too many, only what the trials have.
        """
        configs = [trial.config for trial in trials]
        if not self.by_optuna:
            return configs
        spaces = self.sweep.search.parameters
        keys = [key for key in TOKEN_KEYS if isinstance(spaces.get(key), Values)]
        choices = [space.values for key in keys if isinstance(space := spaces[key], Values)]
        changes = [dict(zip(keys, values, strict=True)) for values in itertools.product(*choices)]
        return [with_settings(config, change) for config in configs for change in changes]

    def records(self, trial: Trial, *, begun: bool = True) -> list[Record]:
        """Records of the trial's cells that have been begun, under its present name and number.

        With `begun` false, those of all its cells. What was computed from other data does not count.
        """
        data, records = self.fingerprint_of(trial.config), []
        for seed in trial.config.seeds:
            record = read_record(cell_folder(self.folder, trial, seed))
            if record is not None and data is not None and record.data not in ("", data):
                record = None
            if record is not None or not begun:
                records.append((record or Record.of(trial, seed)).renamed(trial))
        return records

    def to_do(self, trial: Trial, *, only_failed: bool = False) -> list[int]:
        """Training seeds that are not finished: without those that failed, or only those.

        What a scheduler has stopped is over, unless the file has none any more.
        """
        status = {record.seed: record.status for record in self.records(trial)}
        wanted = {"failed"} if only_failed else {"running"}
        if self.sweep.search.scheduler is None and not only_failed:
            wanted.add("stopped")
        return [seed for seed in trial.config.seeds if status.get(seed, "running") in wanted]

    def reopen(self, trial: Trial, seeds: Sequence[int]) -> None:
        """Let cells that have ended be done again."""
        for record in self.records(trial):
            if record.seed in seeds and record.ended:
                record.status, record.cause = "running", ""
                record.save(cell_folder(self.folder, trial, record.seed))

    def refresh(self) -> None:
        """Find the trials that Optuna has made since."""
        self.__dict__.pop("trials", None)

    def interrupted(self) -> int:
        """How many cells have been begun and have not ended."""
        return sum(not record.ended for trial in self.trials for record in self.records(trial))

    def fingerprint_of(self, config: ExperimentConfig) -> str | None:
        """Fingerprint of the experiment's data, where it is here."""
        return self.data.get(data_key(config))

    def model_key(self, config: ExperimentConfig, seed: int) -> str | None:
        """Key of a model in the store, where the data is here."""
        data = self.fingerprint_of(config)
        return None if data is None else model_fingerprint(config, tokens_fingerprint(config, data), seed)

    def forecast(self, trial: Trial) -> Forecast:
        """What of the trial need not be computed."""
        config, data = trial.config, self.fingerprint_of(trial.config)
        if data is None:
            return Forecast()
        tokens = self.store.find("tokens", tokens_fingerprint(config, data))
        seconds = {tokens.key: tokens.seconds} if tokens is not None else {}
        models, steps, episodes = 0, 0, 0
        for seed in config.seeds:
            key = self.model_key(config, seed)
            assert key is not None
            model = self.store.find("models", key)
            if model is None:
                steps += steps_done(self.store.path("models", key))
                continue
            models, seconds[key] = models + 1, model.seconds
            played, evaluation = self._played(trial, model.path, seed)
            episodes += played
            if evaluation is not None and played:
                seconds[evaluation.key] = evaluation.seconds
        return Forecast(tokens is not None, models, steps, episodes, seconds)

    def _played(self, trial: Trial, model: Path, seed: int) -> tuple[int, Stage | None]:
        """Episodes of the trial that a model has played, and the stage that holds them."""
        config, checkpoint = trial.config, best_checkpoint(model)
        critic, first = self._critic(config, seed), config.evaluation.first_seed
        if checkpoint is None or (critic is None and find_objective(config.planner.objective).uses_critic):
            return 0, None
        key = evaluation_key(config, config.planner, checkpoint, critic)
        wanted = range(first, first + config.evaluation.episodes)
        absent = missing(self.store.path("evaluations", key), wanted)
        return len(wanted) - len(absent), self.store.find("evaluations", key)

    def _critic(self, config: ExperimentConfig, seed: int) -> Path | None:
        """Checkpoint of the critic that the trial's objective asks for, where there is one."""
        data = self.fingerprint_of(config)
        if data is None or config.critic is None or not find_objective(config.planner.objective).uses_critic:
            return None
        return last_checkpoint(self.store.path("critics", critic_fingerprint(config, data, seed)))

    def in_order(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials in the order to run them: the first ones train different models, so that none waits."""
        seen: dict[Any, int] = {}

        def rank(trial: Trial) -> int:
            key = self.model_key(trial.config, trial.config.seeds[0])
            seen[key] = seen.get(key, -1) + 1
            return seen[key]

        return sorted(trials, key=rank)

    def leaders(self, trials: Sequence[Trial]) -> list[Trial]:
        """The first of `trials` to need each model that is not in the store."""
        needed: dict[str, Trial] = {}
        for trial in trials:
            for seed in trial.config.seeds:
                key = self.model_key(trial.config, seed)
                if key is not None and self.store.find("models", key) is None:
                    needed.setdefault(key, trial)
        return list({trial.fingerprint: trial for trial in needed.values()}.values())

    def _proposed(self) -> list[Trial]:
        """Optuna's trials so far, by their records."""
        found: dict[str, Trial] = {}
        for record in self._all_records():
            case, spaces = record.case or None, self.sweep.search.parameters
            known = record.settings.keys() == spaces.keys() and case in self.sweep.case_names
            if record.trial in found or not known or not _within(spaces, record.settings):
                continue
            trial = self.sweep.trial(record.settings, case, record.index)
            if trial.fingerprint == record.trial:
                found[record.trial] = trial
        return sorted(found.values(), key=lambda trial: trial.index)

    def _all_records(self) -> Iterator[Record]:
        for folder in sorted((self.folder / "cells").glob("*")):
            record = read_record(folder)
            if record is not None:
                yield record


def _within(spaces: Mapping[str, Space], settings: Mapping[str, Any]) -> bool:
    """Whether the space still has these settings, which an earlier version of the file had."""
    return all(spaces[key].holds(value) for key, value in settings.items())


def with_settings(config: ExperimentConfig, settings: Mapping[str, Any]) -> ExperimentConfig:
    """`config` with some `section.key` replaced, which are known to be valid."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def data_key(config: ExperimentConfig) -> DataKey:
    """What data an experiment reads."""
    data = config.dataset
    return resolve_id(data.id), data.observation_dims, data.observation_keys, config.goal


def by_data(trials: Sequence[Trial]) -> Mapping[DataKey, list[Trial]]:
    """Trials by the data that they read; `UserError` where two would collect the same set differently."""
    groups: dict[DataKey, list[Trial]] = {}
    for trial in trials:
        group = groups.setdefault(data_key(trial.config), [])
        if group and group[0].config.collect != trial.config.collect:
            raise UserError(
                f"collect: trials {group[0].name!r} and {trial.name!r} make {trial.config.dataset.id} in "
                "different ways; give each its own dataset.id"
            )
        group.append(trial)
    return groups


def sweep_folder(storage: Path, name: str) -> Path:
    """Folder of the sweep of that name; any printable name has one of its own."""
    return storage / "sweeps" / safe_name(name)
