"""What can be refused before a sweep starts anything, and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tt_ray.config import ExperimentConfig
from tt_ray.data.episodes import DataSpec
from tt_ray.distributed import cluster
from tt_ray.distributed.line import Line, Progress, check_data, check_objective, collect_data
from tt_ray.distributed.sweeps.ownership import require_own
from tt_ray.distributed.sweeps.proposals import import_optuna
from tt_ray.distributed.sweeps.study import DataKey, Study, by_data
from tt_ray.errors import UserError
from tt_ray.fingerprints import tokens_fingerprint
from tt_ray.locks import is_held
from tt_ray.sweep_file import Sweep


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How a sweep is taken up."""

    resume: bool = False
    """Go on with one that was interrupted."""
    only_failed: bool = False
    """Run the cells that have failed once more, and nothing else."""
    dry_run: bool = False
    """Only look: data that is not here stays unknown."""


def check_sweep(sweep: Sweep, flags: Flags) -> Study:
    """The study, with all refused that can be known before anything is started or written."""
    study = Study(with_absolute_storage(sweep))
    if not flags.dry_run:
        refuse_running(study)
        require_own(study.folder)
    if study.by_optuna:
        import_optuna()
    _check_scheduler(sweep)
    for trial in study.samples():
        check_objective(trial.config)
    begun = study.interrupted()
    if begun and not (flags.resume or flags.only_failed or flags.dry_run):
        raise UserError(
            f"sweep {sweep.base.name!r} was interrupted with {begun} cells unfinished; add --resume to go on "
            f"from there, or remove {study.folder} to begin again"
        )
    if flags.only_failed and not any(study.to_do(trial, only_failed=True) for trial in study.trials):
        raise UserError(f"sweep {sweep.base.name!r} has no failed trials to run again")
    for key, trials in by_data(study.samples()).items():
        try:
            _check_data(study, key, trials[0].config)
        except UserError:
            if not flags.dry_run:
                raise
    return study


def refuse_running(study: Study) -> None:
    """`UserError` where another process runs the sweep."""
    if is_held(study.folder):
        raise UserError(running(study))


def running(study: Study) -> str:
    """What is said of a sweep that is running."""
    follow, cancel = study.commands
    return f"sweep {study.sweep.base.name!r} is running already; `{follow}` shows it, `{cancel}` ends it"


def _check_data(study: Study, key: DataKey, config: ExperimentConfig) -> None:
    """Note what the data set is, if it is here; `UserError` where it cannot be used."""
    if check_data(config):
        line = Line(config, Silent())
        line.use(line.episodes.spec)
        _check_metric(study.sweep, line.spec)
        study.has_read(key, line.episodes)


def with_absolute_storage(sweep: Sweep) -> Sweep:
    """The same sweep for processes in other working folders."""
    resources = sweep.base.resources
    absolute = replace(resources, storage=str(Path(resources.storage).resolve()))
    return replace(sweep, base=replace(sweep.base, resources=absolute))


def prepare_data(study: Study, progress: Progress) -> None:
    """Every data set, collected where that is to do, and the tokens that the known trials need."""
    for key, trials in by_data(study.samples()).items():
        config = trials[0].config
        if key not in study.data:
            collect_data(config, progress, cluster.resolve(config.resources, cluster.offer()))
        episodes = None
        if key not in study.data:
            line = Line(config, progress)
            episodes = line.episodes
            line.use(episodes.spec)
            _check_metric(study.sweep, episodes.spec)
            study.has_read(key, episodes)
        fingerprint = study.data[key]
        for one in {tokens_fingerprint(c, fingerprint): c for c in study.token_configs(trials)}.values():
            line = Line(one, progress)
            if episodes is not None:
                line.episodes = episodes
            line.locate(fingerprint)
            line.make_tokens()


def _check_scheduler(sweep: Sweep) -> None:
    """`UserError` where the scheduler cannot see into the training."""
    how, workers = sweep.search.scheduler, sweep.base.resources.workers
    if how is not None and how.rung == "training_steps" and workers not in ("auto", 1):
        key = "search.scheduler.rung"
        raise UserError(
            f"{sweep.places.of(key)}: {key}: training_steps needs the trial to train in its own process; "
            f"resources.workers must be 1 or auto, not {workers}"
        )


def _check_metric(sweep: Sweep, spec: DataSpec) -> None:
    """`UserError` where trials are compared by scores that the data set has no references for."""
    metric = sweep.search.metric.name
    if sweep.search.count > 1 and metric.startswith("score/") and spec.ref_min_score is None:
        raise sweep.places.fault(
            UserError(
                f"search.metric.name: {metric} is not reported, because {spec.dataset_id} has no reference "
                "scores; compare by return/mean"
            )
        )


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """As `Progress.stage`."""
        yield lambda done, message: None

    def note(self, message: str) -> None:
        """Nothing."""
