"""The stages of one experiment: data, tokens, training, evaluation; each is computed once and then reused.

`experiment.py` puts them in order for one experiment, `trial.py` for one of a sweep's; `scoring.py` plays the
episodes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from tt_ray.config import ExperimentConfig, PlannerConfig
from tt_ray.data.d4rl_names import resolve_id
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.minari_folder import dataset_folder
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.token_store import TokenSet, read_spec
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.collect import ActorMap
from tt_ray.distributed.evaluate import check_environment
from tt_ray.distributed.following import Update, following, replay
from tt_ray.distributed.holders import Holder
from tt_ray.distributed.stages import Input, Stage, StageStore
from tt_ray.distributed.train import OnPoint, steps_done, train_critic, train_model
from tt_ray.distributed.usage import Usage
from tt_ray.errors import UserError
from tt_ray.evaluation.collect import collect, method_of
from tt_ray.fingerprints import critic_fingerprint, model_fingerprint, tokens_fingerprint
from tt_ray.model.checkpoint import best_checkpoint, checkpoint_metrics, damaged_checkpoints, last_checkpoint
from tt_ray.planning.objectives import find_objective, planned_objective
from tt_ray.tracking import Run

FEW_STEPS = 20_000
"""Environment steps that are collected before actors would have started."""


class Progress(Protocol):
    """How a stage shows itself; the command line draws bars."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Update]:
        """A stage of `total` steps for the duration of a block."""
        ...

    def note(self, message: str) -> None:
        """Say that something is as it is, such as waiting for another process."""
        ...


class Line:
    """One experiment under way: its stages in the store, its Ray allocation, and what it has cost."""

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.allocation: Allocation  # once Ray is up
        self.storage = Path(config.resources.storage).resolve()
        self.store = StageStore(self.storage)
        self.usage = Usage()
        self.spec: DataSpec
        self.tokens: Path
        self.models: dict[int, Path] = {}
        self.critics: dict[int, Path] = {}
        self.plays = True
        """Whether the environment is needed: for episodes, but not to train or predict on the data alone."""
        self.given_critic: Path | None = None
        """A critic's checkpoint that the user has named, in place of the store's."""

    @cached_property
    def episodes(self) -> Episodes:
        """The data set."""
        data = self.config.dataset
        return load_episodes(data.id, data.observation_dims, data.observation_keys, self.config.goal)

    def check(self, resume: bool) -> None:
        """`UserError` for all that can be known before anything is started or written."""
        check_objective(self.config)
        if check_data(self.config):
            if self.config.collect is not None:
                self.usage.reuse("data", "data set", 0.0)
            self._read()
            self.check_resume(resume)

    def prepare_data(self) -> None:
        """Collect the data set where that is still to do, read it unless `check` has, and make its tokens."""
        if not self.models:
            with self.usage.timed("collect"):
                collect_data(self.config, self.progress, self.allocation)
            self._read()
        spec = self.spec
        self.make_tokens()
        self.spec = spec  # not that of an equal set, whose scores may have other references

    def locate(self, data_fingerprint: str) -> None:
        """Where the tokens and models of data with this fingerprint belong."""
        identity = tokens_fingerprint(self.config, data_fingerprint)
        self.tokens = self.store.path("tokens", identity)
        for seed in self.config.seeds:
            self.models[seed] = self.store.path("models", model_fingerprint(self.config, identity, seed))
            if self.config.critic is not None:
                key = critic_fingerprint(self.config, data_fingerprint, seed)
                self.critics[seed] = self.store.path("critics", key)

    def make_tokens(self) -> None:
        """The tokens, made unless they are there; the data set is read only where it has to be."""
        with self.stage("tokens", self.tokens.name, "tokens", work="tokens") as stage:
            if stage.held:
                self._clear_leftovers()
                if not (self.tokens / "tokens.json").exists():  # else another was killed before publishing
                    config = self.config
                    tokens = TokenSet.build(self.episodes, config.dataset, config.discretizer, config.goal)
                    tokens.save(self.tokens)
                dataset, bins = self.config.dataset, self.config.discretizer
                description = {"dataset": dataset.id, "strategy": bins.strategy, "num_bins": bins.num_bins}
                stage.publish(description)
        self.spec = read_spec(self.tokens)

    def use(self, spec: DataSpec) -> None:
        """Evaluate in the environment of `spec`; `UserError` unless it can be made here and fits."""
        self.spec = spec
        check_environment(self.played)

    @property
    def played(self) -> DataSpec:
        """The data's description, with the environment that episodes are played in."""
        other = self.config.evaluation.environment
        return self.spec if other is None else replace(self.spec, environment={"id": other})

    def check_resume(self, resume: bool) -> None:
        """`UserError` when a model was begun and the user has not said to go on with it."""
        for seed, folder in self.models.items():
            unfinished = self.store.find("models", folder.name) is None
            if not unfinished or self.store.holder("models", folder.name) is not None:
                continue
            done = steps_done(folder)
            if done and not resume:
                raise UserError(
                    f"{folder}: training of seed {seed} stopped after {done} of {self.config.training.steps} "
                    "steps; add --resume to go on from there, or remove the folder to begin again"
                )

    def train(self, seed: int, run: Run, on_point: OnPoint | None = None) -> Path:
        """The best checkpoint of one training seed, trained unless it is there; its curves go to `run`.

        `on_point` is told of every point of the curves while this process trains.
        """
        folder, steps = self.models[seed], self.config.training.steps
        stage_of = partial(self.stage, "models", folder.name, inputs=[("tokens", self.tokens.name)])
        with stage_of(f"model {seed}", work="training", enough=_whole) as stage:
            if not stage.held:
                replay(folder / "journal.jsonl", run)
            else:
                with (
                    self.progress.stage(f"training, seed {seed}", steps) as update,
                    following(folder / "journal.jsonl", run, update),
                ):
                    train_model(self.config, self.tokens, folder, seed, self.allocation, on_point)
                stage.publish(self._model_description(folder, seed))
        checkpoint = best_checkpoint(folder)
        assert checkpoint is not None
        run.set_tags(
            {"checkpoint": str(checkpoint), "stage.tokens": self.tokens.name, "stage.model": folder.name}
        )
        return checkpoint

    def train_critic(self, seed: int, run: Run) -> None:
        """The critic of one training seed, where objective or baselines ask for it, unless it is there."""
        asked = find_objective(self.config.planner.objective).uses_critic or self.config.extracts_policy
        if not asked or self.given_critic is not None:
            return
        folder, config = self.critics[seed], self.config.critic
        assert config is not None
        with self.stage("critics", folder.name, f"critic {seed}", work="training") as stage:
            if not stage.held:
                replay(folder / "journal.jsonl", run)
            else:
                with (
                    self.progress.stage(f"critic, seed {seed}", config.steps) as update,
                    following(folder / "journal.jsonl", run, update),
                ):
                    train_critic(self.config, self.episodes, folder, seed)
                stage.publish({"dataset": self.config.dataset.id, "seed": seed, "steps": config.steps})
        run.set_tags({"stage.critic": folder.name})

    def critic_for(self, planner: PlannerConfig, seed: int | None) -> Path | None:
        """Checkpoint of the critic that the planner's objective asks for; None where it asks for none."""
        if not find_objective(planner.objective).uses_critic:
            return None
        return self.critic_of(seed, f"planner.objective {planner.objective}")

    def critic_of(self, seed: int | None, who: str) -> Path:
        """Checkpoint of the critic of a training seed, or the one the user has named; `UserError` for none.

        `who` needs it.
        """
        if self.given_critic is not None:
            return self.given_critic
        folder = None if seed is None else self.critics.get(seed)
        checkpoint = None if folder is None else last_checkpoint(folder)
        if checkpoint is None:
            raise UserError(
                f"{who} needs a critic, and {self.storage} has none of this experiment: run the whole "
                "experiment, or name one with --critic FOLDER"
            )
        return checkpoint

    @contextmanager
    def stage(
        self,
        kind: str,
        key: str,
        name: str,
        *,
        work: str,
        inputs: Sequence[Input] = (),
        enough: Callable[[Stage], bool] = lambda stage: True,
        share: Callable[[Stage], float] = lambda stage: 1.0,
        count: int = 1,
    ) -> Iterator[Stage]:
        """A stage of the store for the duration of a block, in which what is held is to be computed.

        `share`: how much of a complete one is used, and so saved; `count`: of how many things. Time spent
        waiting for another process is counted as that, the block's as `work`.
        """
        began, waited = time.perf_counter(), False

        def on_wait(seconds: float, holder: Holder | None) -> None:
            nonlocal waited
            if not waited:
                waited = True
                self.progress.note(f"waiting for {name}, which {holder or 'another process'} is computing")

        claim = self.store.claim(kind, key, inputs=inputs, enough=enough, on_wait=on_wait)
        with claim as stage:
            if waited:
                self.usage.add("waiting", time.perf_counter() - began)
            if stage.complete and not stage.held:
                self.usage.reuse(kind, name, share(stage) * stage.seconds, count)
            with self.usage.timed(work):
                yield stage

    def _read(self) -> None:
        """The data set, its environment checked, and where its tokens and models belong."""
        with self.usage.timed("tokens"):
            self.spec = self.episodes.spec
            if self.plays or self.played.environment["id"]:
                self.use(self.spec)
        self.locate(self.spec.fingerprint)

    def _clear_leftovers(self) -> None:
        """Remove what a process left that was killed while it wrote the tokens."""
        for leftover in self.tokens.parent.glob(f".{self.tokens.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _model_description(self, folder: Path, seed: int) -> dict[str, object]:
        config, best = self.config, best_checkpoint(folder)
        description = {
            "experiment": config.name,
            "dataset": config.dataset.id,
            "seed": seed,
            "steps": config.training.steps,
        }
        loss = checkpoint_metrics(best).get("val/loss") if best is not None else None
        return description if loss is None else {**description, "val/loss": loss}


def _whole(stage: Stage) -> bool:
    """Whether a model's checkpoints are as they were written; else it is trained again from one that is."""
    return not damaged_checkpoints(stage.path)


def check_objective(config: ExperimentConfig) -> None:
    """`UserError` unless the objective is known and the experiment has what it needs."""
    kind, name = planned_objective(config.planner), config.planner.objective
    for needs, section in ((kind.uses_goal, "goal"), (kind.uses_critic, "critic")):
        if needs and getattr(config, section) is None:
            raise UserError(f"{section}: planner.objective {name} needs this section, and it is missing")


def check_data(config: ExperimentConfig) -> bool:
    """Whether the data set is here; `UserError` where it cannot be collected, or was made otherwise."""
    dataset_id = resolve_id(config.dataset.id)
    if config.collect is None:
        return True  # or else reading it says how to get it
    if not dataset_folder(dataset_id).exists():
        method_of(config.collect)
        return False
    collect(dataset_id, config.collect)  # it is there: this only refuses one that was made otherwise
    return True


def collect_data(config: ExperimentConfig, progress: Progress, allocation: Allocation) -> None:
    """Collect the data set where the experiment says how: in actors, or here where it takes no time."""
    how, dataset_id = config.collect, resolve_id(config.dataset.id)
    if how is None:
        return
    with progress.stage(f"collecting {dataset_id}", how.steps) as update:

        def show(done: int, _: int, message: str) -> None:
            update(done, message)

        if allocation.evaluation_actors == 0 or how.steps <= FEW_STEPS:
            collect(dataset_id, how, progress=show)
            return
        with ActorMap(allocation.evaluation_actors, max_failures=config.resources.max_failures) as pool:
            collect(dataset_id, how, map=pool, progress=show)
