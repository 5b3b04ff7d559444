"""The stages of one experiment: data, tokens, training, evaluation; each is computed once and then reused.

`experiment.py` puts them in order and logs what comes out.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tt_ray.config import (
    ExperimentConfig,
    PlannerConfig,
    evaluation_fingerprint,
    fingerprint,
    model_fingerprint,
    tokens_fingerprint,
)
from tt_ray.data.d4rl_names import resolve_id
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.minari_folder import dataset_folder
from tt_ray.data.minari_reader import load_episodes, own_metadata
from tt_ray.data.token_store import TokenSet
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.collect import ActorMap
from tt_ray.distributed.evaluate import (
    GREEDY,
    LinearBaseline,
    Planner,
    RandomBaseline,
    Row,
    Worker,
    check_environment,
    engine_slots,
    evaluate,
)
from tt_ray.distributed.train import is_trained, steps_done, train_model
from tt_ray.errors import UserError
from tt_ray.evaluation.collect import collect
from tt_ray.evaluation.random_search import environment
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import summarize, with_scores
from tt_ray.locks import exclusive
from tt_ray.model.checkpoint import CHECKSUMS, best_checkpoint
from tt_ray.tracking import Run, read

Update = Callable[[int, str], None]
"""`update(done, message)` of a stage under way."""

TRAINING = "another process is training this model"


class Progress(Protocol):
    """How a stage shows itself; the command line draws bars."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Update]:
        """A stage of `total` steps for the duration of a block."""
        ...


class Line:
    """One experiment under way: its folders, its Ray allocation, and how long each stage took."""

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.allocation: Allocation  # once Ray is up
        self.storage = Path(config.resources.storage).resolve()
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.episodes: Episodes
        self.spec: DataSpec
        self.tokens: Path
        self.models: dict[int, Path] = {}

    def check(self, resume: bool) -> None:
        """`UserError` for all that can be known before anything is started or written."""
        config, dataset_id = self.config.collect, resolve_id(self.config.dataset.id)
        if config is not None and not dataset_folder(dataset_id).exists():
            environment(config).close()
            return
        if config is not None:
            collect(dataset_id, config)  # it is there: this only refuses one that was made otherwise
            self.reused.append("data set")
        self._read()
        self.check_resume(resume)

    def prepare_data(self) -> None:
        """Collect the data set where that is still to do, read it unless `check` has, and make its tokens."""
        if not self.models:
            with self._timed("collect"):
                self._collect()
            self._read()
        with self._timed("tokens"):
            if self.tokens.exists():
                self.reused.append("tokens")
            else:
                TokenSet.build(self.episodes, self.config.dataset, self.config.discretizer).save(self.tokens)
            for leftover in self.tokens.parent.glob(f".{self.tokens.name}.*"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a command that was killed while it wrote

    def use(self, spec: DataSpec) -> None:
        """Evaluate in the environment of `spec`; `UserError` unless it can be made here and fits."""
        check_environment(spec)
        self.spec = spec

    def check_resume(self, resume: bool) -> None:
        """`UserError` when a model was begun and the user has not said to go on with it."""
        for seed, folder in self.models.items():
            if is_trained(folder) or not folder.exists():
                continue
            with exclusive(folder, TRAINING):
                done = steps_done(folder)
            if done and not resume:
                raise UserError(
                    f"{folder}: training of seed {seed} stopped after {done} of {self.config.training.steps} "
                    "steps; add --resume to go on from there, or remove the folder to begin again"
                )

    def train(self, seed: int, run: Run) -> Path:
        """The best checkpoint of one training seed, trained unless it is there; its curves go to `run`."""
        folder, steps = self.models[seed], self.config.training.steps
        title = f"training, seed {seed}"
        done = is_trained(folder)
        if done:
            self.reused.append(f"model {seed}")
        with (
            self._timed("training"),
            self.progress.stage(title, steps) as update,
            exclusive(folder, TRAINING),
            following(folder / "journal.jsonl", run, update),
        ):
            train_model(self.config, self.tokens, folder, seed, self.allocation)
        checkpoint = best_checkpoint(folder)
        assert checkpoint is not None
        run.set_tags(
            {"checkpoint": str(checkpoint), "stage.tokens": self.tokens.name, "stage.model": folder.name}
        )
        return checkpoint

    def baselines(self) -> list[Row]:
        """Random actions, the data set itself, and the policy that collected it where that is known."""
        seeds, spec = self._seeds(), self.spec
        rows = [self._evaluate("random policy", None, RandomBaseline(spec), "random", seeds)]
        returns = self.episodes.returns
        best = sorted(returns)[-max(1, len(returns) // 10) :]
        rows += [self._data_row("data set", returns), self._data_row("data set, best tenth", best)]
        policy = own_metadata(spec.dataset_id).get("final_policy")
        if policy is not None and self.config.dataset.observation_dims is None:
            worker = LinearBaseline(policy)
            rows.append(self._evaluate("final behaviour policy", None, worker, "behaviour", seeds))
        return rows

    def evaluate_planner(
        self, checkpoint: Path, planner: PlannerConfig, policy: str, seed: int | None
    ) -> Row:
        """Episodes of the planner on a checkpoint."""
        evaluation, resources = self.config.evaluation, self.config.resources
        slots = engine_slots(evaluation.episodes, resources.episodes_per_actor)
        discount = self.config.dataset.discount
        worker = Planner(checkpoint, planner, discount, slots, resources.decoder)
        identity = evaluation_fingerprint(planner, evaluation.max_steps, checkpoint_identity(checkpoint))
        return self._evaluate(policy, seed, worker, identity, self._seeds(), slots)

    def greedy(self) -> PlannerConfig:
        """Greedy decoding with the experiment's context."""
        context = self.config.planner.max_context_transitions
        settings = {**vars(GREEDY), "max_context_transitions": context}
        return PlannerConfig(**settings)

    def _read(self) -> None:
        """The data set, its environment checked, and where its tokens and models belong."""
        with self._timed("tokens"):
            self.episodes = load_episodes(self.config.dataset.id, self.config.dataset.observation_dims)
            self.use(self.episodes.spec)
        identity = tokens_fingerprint(self.config, self.spec.fingerprint)
        self.tokens = self.storage / "tokens" / identity
        for seed in self.config.seeds:
            self.models[seed] = self.storage / "models" / model_fingerprint(self.config, identity, seed)

    def _collect(self) -> None:
        config = self.config.collect
        dataset_id = resolve_id(self.config.dataset.id)
        if config is None:
            return
        with (
            self.progress.stage(f"collecting {dataset_id}", config.steps) as update,
            ActorMap(
                self.allocation.evaluation_actors, max_failures=self.config.resources.max_failures
            ) as pool,
        ):
            collect(dataset_id, config, map=pool, progress=lambda done, _, message: update(done, message))

    def _evaluate(
        self,
        policy: str,
        seed: int | None,
        make: Callable[[], Any],
        identity: str,
        seeds: list[int],
        slots: int = 1,
    ) -> Row:
        """Episodes of one policy, those that are in the store already taken from there."""
        resources, evaluation = self.config.resources, self.config.evaluation
        if identity in ("random", "behaviour"):
            identity = f"{identity}-{fingerprint(self.spec.to_json(), evaluation.max_steps)}"
        title = policy if seed is None else f"{policy}, seed {seed}"
        with self._timed("evaluation"), self.progress.stage(f"{title}: episodes", len(seeds)) as update:
            done: list[float] = []

            def on_result(result: EpisodeResult) -> None:
                done.append(result.episode_return)
                update(len(done), f"mean return {sum(done) / len(done):.0f}")

            results, reused = evaluate(
                Worker(make, self.spec, evaluation.max_steps),
                seeds,
                self.storage / "evaluations" / identity,
                self.allocation,
                slots=slots,
                max_tries=1 + resources.max_failures,
                on_result=on_result,
                on_steps=lambda steps: update(len(done), f"{steps} steps"),
            )
            update(len(seeds), "")
        if reused:
            self.reused.append(f"{reused} episodes ({title})")
        return self._row(policy, seed, results)

    def _row(self, policy: str, seed: int | None, results: list[EpisodeResult]) -> Row:
        evaluation, low, high = self.config.evaluation, self.spec.ref_min_score, self.spec.ref_max_score
        summary = summarize(results, low, high, evaluation.confidence, evaluation.bootstrap_samples)
        return Row(policy, seed, summary, with_scores(results, low, high))

    def _data_row(self, policy: str, returns: Any) -> Row:
        results = [
            EpisodeResult(
                seed=i,
                episode_return=float(value),
                length=0,
                terminated=False,
                decisions=0,
                environment_seconds=0.0,
                planning_seconds=0.0,
            )
            for i, value in enumerate(returns)
        ]
        return self._row(policy, None, results)

    def _seeds(self) -> list[int]:
        first = self.config.evaluation.first_seed
        return list(range(first, first + self.config.evaluation.episodes))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def checkpoint_identity(checkpoint: Path) -> str:
    """Identity of a checkpoint by its contents, wherever it lies."""
    return fingerprint((checkpoint / CHECKSUMS).read_text())


def writable(storage: Path) -> Path:
    """The storage folder, made where it is missing; `UserError` unless files can be written in it."""
    probe = storage / f".writable-{os.getpid()}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"resources.storage: cannot write in {storage}: {error.strerror}") from error
    return storage


@contextmanager
def following(journal: Path, run: Run, update: Update) -> Iterator[None]:
    """Pass on the curves in a training job's journal, as they come, to `run` and a progress bar."""
    finished = threading.Event()
    offset = 0

    def catch_up() -> None:
        nonlocal offset
        for record, end in read(journal, offset):
            offset = end
            if "metrics" in record:
                run.journal.append(record["metrics"], record["step"], record["time"])
                loss = record["metrics"].get("train/loss")
                update(record["step"], "" if loss is None else f"loss {loss:.3f}")

    def work() -> None:
        while not finished.wait(0.5):
            catch_up()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        catch_up()
