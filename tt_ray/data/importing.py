"""Files of one's own as Minari data sets: D4RL's flat HDF5, CSV, Parquet, NumPy; examined, then written."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS, D4RLEnvironment, reference_scores
from tt_ray.data.log_checks import Target
from tt_ray.data.log_files import Progress, find_files, is_hdf5, read_files
from tt_ray.data.log_layout import Columns
from tt_ray.data.log_report import Report, examine
from tt_ray.data.log_rows import Cut, Log, join
from tt_ray.data.minari_folder import check_new_id
from tt_ray.data.minari_writer import RecordedEpisode, write_dataset
from tt_ray.errors import UserError

Make = Callable[[str], gym.Env]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says of the files."""

    environment: str | None = None
    """Id that `make` understands; None: none, or for HDF5 D4RL's own where the names speak of one."""
    reference_scores: tuple[float, float] | None = None
    """Returns that score 0 and 100; None: D4RL's where they are known."""
    columns: Columns = field(default_factory=Columns)
    joined: bool = False
    """Whether the files are parts of one log: an episode may go on in the next one."""
    drop_incomplete: bool = False
    """Leave out episodes with missing numbers, contradictory times or rows after their end."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is in the files, ready to be written unless its report has errors."""

    log: Log
    cut: Cut
    report: Report
    environment: Mapping[str, Any] | str
    action_space: gym.spaces.Box
    references: tuple[float | None, float | None]
    metadata: Mapping[str, Any]

    def refuse_errors(self) -> None:
        """`UserError` with the first error of the report, if there is one."""
        for error in self.report.of_level("error"):
            raise UserError(error)


def import_files(
    files: Path | Sequence[Path],
    dataset_id: str,
    options: ImportOptions | None = None,
    *,
    overwrite: bool = False,
    make: Make = gym.make,
) -> Report:
    """Examine the files and write the data set; `UserError` for what `find` and `write` refuse."""
    check_new_id(dataset_id, overwrite)
    found = find(
        [files] if isinstance(files, Path) else files, dataset_id, options or ImportOptions(), make=make
    )
    write(found, dataset_id, overwrite=overwrite)
    return found.report


def find(
    files: Sequence[Path],
    dataset_id: str,
    options: ImportOptions,
    *,
    make: Make = gym.make,
    progress: Progress = lambda done, total: None,
) -> Found:
    """Read the files, which make one data set, and say what is in them; nothing is written.

    A folder stands for the tables in it, or for one table where it holds .npy files. `UserError`: no such
    file, none of these formats, not readable, columns that cannot be told, an environment that cannot be
    made. What is wrong with the numbers stands in the report.
    """
    paths = find_files(files)
    known = _spoken_of(paths[0], dataset_id) if options.environment is None and is_hdf5(paths[0]) else None
    target = _target(options.environment, known, make)
    references = _references(options.reference_scores, target.environment)
    crop = {"recorded_dim": known.recorded_dims, "observation_dim": known.observation_dim} if known else {}
    parts = read_files(paths, options.columns, crop, progress)
    log = join(parts, options.joined)
    cut, report = examine(log, target, options.drop_incomplete)
    return Found(
        log=log,
        cut=cut,
        report=report,
        environment=known.description() if known else target.environment or {"id": ""},
        action_space=target.action_space or _space_of(log),
        references=references,
        metadata=parts[0].metadata,
    )


def write(
    found: Found,
    dataset_id: str,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write what was found as the Minari data set `dataset_id`, with its report; returns its folder.

    `UserError`: the report has errors, the id is malformed or taken, the folder cannot be written.
    """
    found.refuse_errors()
    log = found.log
    names = [path.name for path in log.files]
    described = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
    return write_dataset(
        dataset_id,
        _episodes(log, found.cut, progress),
        environment=found.environment,
        observation_space=gym.spaces.Box(-np.inf, np.inf, log.observations.shape[1:], np.float32),
        action_space=found.action_space,
        ref_min_score=found.references[0],
        ref_max_score=found.references[1],
        algorithm_name=str(found.metadata.get("algorithm", "unknown")),
        description=f"Imported from {described}",
        metadata={
            "source": names[0] if len(names) == 1 else names,
            "next_observations": log.next_observations is not None,
            **({"source_metadata": dict(found.metadata)} if found.metadata else {}),
            "report": found.report.to_json(),
        },
        overwrite=overwrite,
    )


def _episodes(log: Log, cut: Cut, progress: Progress) -> Iterator[RecordedEpisode]:
    terminated, truncated = log.terminated, log.truncated
    for index in range(len(cut)):
        rows = cut.rows[cut.offsets[index] : cut.offsets[index + 1]]
        final = int(cut.finals[index])
        terminations, truncations = terminated[rows], truncated[rows]
        if final >= 0:
            terminations[-1] |= terminated[final]
        truncations[-1] |= not terminations[-1]
        file = log.files[int(np.searchsorted(log.starts, rows[0], side="right")) - 1]
        yield RecordedEpisode(
            observations=np.concatenate([log.observations[rows], _final(log, int(rows[-1]), final)]),
            actions=log.actions[rows],
            rewards=log.rewards[rows],
            terminations=terminations,
            truncations=truncations,
            behavior_policy=file.stem,
        )
        progress(index + 1, len(cut))


def _final(log: Log, last: int, final: int) -> Any:
    """The observation after an episode's last action, [1, N]; unknown, it repeats the one before."""
    if final >= 0:
        return log.observations[[final]]
    if log.next_observations is not None and np.isfinite(log.next_observations[last]).all():
        return log.next_observations[[last]]
    return log.observations[[last]]


def _spoken_of(path: Path, dataset_id: str) -> D4RLEnvironment | None:
    """The D4RL environment that the data set's id or the file's name speaks of; None for none or several."""
    words = re.split(r"[/_-]", f"{dataset_id}/{path.stem}".lower())
    named = {word for word in words if word in D4RL_ENVIRONMENTS}
    return D4RL_ENVIRONMENTS[named.pop()] if len(named) == 1 else None


def _target(environment: str | None, known: D4RLEnvironment | None, make: Make) -> Target:
    """What the rows are to fit: D4RL's environment, or the spaces of one that `make` makes."""
    if known is not None:
        space = gym.spaces.Box(-1.0, 1.0, (known.action_dim,), np.float32)
        return Target(known.id, known.observation_dim, space)
    if environment is None:
        return Target()
    try:
        env = make(environment)
    except (ImportError, gym.error.Error, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"environment {environment} cannot be made: {reason}") from error
    try:
        for word, space in (("observation", env.observation_space), ("action", env.action_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise UserError(f"environment {environment}: its {word} space {space} is not a flat Box")
        return Target(environment, env.observation_space.shape[0], env.action_space)
    finally:
        env.close()


def _references(
    said: tuple[float, float] | None, environment: str
) -> tuple[float, float] | tuple[None, None]:
    """The returns that score 0 and 100: as the user says, or D4RL's."""
    if said is None:
        return reference_scores(environment)
    if not (np.isfinite(said).all() and said[0] < said[1]):
        raise UserError(f"--reference-scores {said[0]:g} {said[1]:g}: the first must be less than the second")
    return said


def _space_of(log: Log) -> gym.spaces.Box:
    """Bounds of the actions where no environment says them: the least and the largest that occur."""
    actions = np.where(np.isfinite(log.actions), log.actions, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column of NaN alone, which the report tells
        low, high = np.nan_to_num(np.nanmin(actions, axis=0)), np.nan_to_num(np.nanmax(actions, axis=0))
    return gym.spaces.Box(low, high, dtype=np.float32)
