"""Experiment files with a `search` section: one file becomes a sweep, and the sweep its trials.

As in `experiment_file.py`, whatever is wrong becomes one `UserError` line with the file and line, or the
override, at fault.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from tt_ray import strict_yaml
from tt_ray.config import ExperimentConfig, require, to_dict
from tt_ray.errors import UserError
from tt_ray.experiment_file import Draft, Fault, dotted, dump_yaml, listed, parse_draft, read_text
from tt_ray.fingerprints import fingerprint, plain_settings
from tt_ray.search import SearchConfig, Values, check_name
from tt_ray.search_section import read_search
from tt_ray.strict_yaml import KeyPath

_NO_IDENTITY = ("name", "question", "seeds", "resources", "tracking")
_FROM_FILE_ONLY = ("parameters", "cases")
_FIT = ("training.steps", "evaluation.episodes", "dataset.validation_fraction")
"""What `_check_fit` looks at."""


@dataclass(frozen=True)
class Places:
    """Where the keys of a file's search were written, under their dotted names."""

    source: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """`file:line`, or the override, of `key` or else of the nearest section around it."""
        while key and key not in self.texts:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.texts.get(key, self.source)

    def fault(self, error: UserError) -> UserError:
        """`error`, which begins with a key, after that key's place."""
        place = self.of(str(error).partition(": ")[0])
        return UserError(f"{place}: {error}" if place else str(error))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration of a sweep; its seeds are repetitions."""

    index: int
    name: str
    """The case and the searched settings, such as `walker, horizon=5`; of one line."""
    case: str | None
    settings: Mapping[str, Any]
    """Value of each searched `section.key`."""
    config: ExperimentConfig

    @property
    def fingerprint(self) -> str:
        """Identity: what is computed for a seed; not the names, the seeds, or where and how it runs."""
        config = plain_settings(self.config, *_NO_IDENTITY)
        for section, name in (("evaluation", "baselines"), ("critic", "inverse_temperature")):
            (config[section] or {}).pop(name, None)  # of what stands beside it
        return fingerprint("sweep trial", config)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """An experiment and what is varied in it; without parameters and cases, a single trial."""

    base: ExperimentConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    source: str = ""
    """Text of the file, as it was read (without overrides)."""
    overrides: tuple[str, ...] = ()
    """What was laid over it."""
    places: Places = field(default_factory=Places, repr=False, compare=False)

    @property
    def case_names(self) -> list[str | None]:
        """What `trial` takes as a case: None alone, where the file has no cases."""
        return [case.name for case in self.search.cases] or [None]

    def trials(self) -> list[Trial]:
        """Every trial of a grid or a random search, the cases outermost.

        Raises:
            UserError: names the trial whose settings do not go together, or that equals another one.
        """
        try:
            drawn = list(self.search.settings())
            crossed = [(settings, case) for case in self.case_names for settings in drawn]
            trials = [self._trial(settings, case, i) for i, (settings, case) in enumerate(crossed)]
            seen: dict[str, Trial] = {}
            for trial in trials:
                twin = seen.setdefault(trial.fingerprint, trial)
                same = f"trial {trial.name!r} has the same settings as {twin.name!r}; remove one of them"
                require(twin is trial, f"search.cases[{trial.index // len(drawn)}]", same)
        except UserError as error:
            raise self.places.fault(error) from None
        return trials

    def trial(self, settings: Mapping[str, Any], case: str | None = None, index: int = 0) -> Trial:
        """The trial with one value for each parameter, in the case of that name.

        Values from a range are made whole or rounded to six digits, as the range has it.

        Raises:
            UserError: names the trial, if its settings do not go together.
        """
        if settings.keys() != self.search.parameters.keys():
            raise ValueError(f"expected settings for {list(self.search.parameters)}, not {list(settings)}")
        if case not in self.case_names:
            raise ValueError(f"there is no case {case!r}")
        try:
            return self._trial(settings, case, index)
        except UserError as error:
            raise self.places.fault(error) from None

    def _trial(self, settings: Mapping[str, Any], case: str | None, index: int) -> Trial:
        """`trial`, with errors that start with the key at fault."""
        settings = {key: space.tidy(settings[key]) for key, space in self.search.parameters.items()}
        changes, places = dict(settings), {key: f"search.parameters.{key}" for key in settings}
        for number, one in enumerate(self.search.cases):
            if one.name == case:
                changes = {**one.settings, **settings}
                places |= {key: f"search.cases[{number}].{key}" for key in one.settings}
        name = self.name_of(settings, case)
        config = _attempt(self.base, changes)
        if not isinstance(config, ExperimentConfig):
            fault = config[0]
            keys = [dotted(path) for path in (fault.path, *fault.others)]
            key = next((places[key] for key in keys if key in places), "search")
            raise UserError(f"{key}: trial {name!r}: {keys[0]}: {fault.message}")
        _check_fit(self.search, config, f" in trial {name!r}")
        return Trial(index=index, name=name, case=case, settings=settings, config=config)

    def name_of(self, settings: Mapping[str, Any], case: str | None) -> str:
        """A trial's name, by some or all of its searched settings."""
        short = [key.partition(".")[2] for key in self.search.parameters]
        parts = [] if case is None else [case]
        for key, value in settings.items():
            name = key.partition(".")[2]
            parts.append(f"{name if short.count(name) == 1 else key}={_shown(value)}")
        return ", ".join(parts) or self.base.name


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`, with overrides of its settings and of `search.key` laid over it.

    All of a search but its parameters and cases can be overridden. Every trial of a grid or a random search,
    and every value by itself, has been checked when this returns.

    Raises:
        UserError: one line with the file and line, or the override, that is at fault.
    """
    text = read_text(path)
    draft = parse_draft(text, path)
    data = draft.data.pop("search", None)
    texts = {key: f"{path}:{line}" for key, line in _search_lines(text)}
    for override in overrides:
        if override.partition("=")[0].split(".")[0].strip() == "search":
            data = _override_search(data, override, texts)
        else:
            draft.override(override)
    base = draft.build()
    texts["name"] = draft.places[("name",)].text
    places = Places(source=str(path), texts=texts)
    try:
        check_name(base.name)
        search = SearchConfig() if data is None else read_search(data)
        _check_alone(search, base)
    except UserError as error:
        raise places.fault(error) from None
    sweep = Sweep(base=base, search=search, source=text, overrides=tuple(overrides), places=places)
    if search.method != "optuna":
        sweep.trials()
    return sweep


def dump_trial(trial: Trial) -> str:
    """A ready-to-run experiment file, without a search, that is read back as the trial's configuration."""
    return f"# trial: {trial.name}\n{dump_yaml(trial.config)}"


def _search_lines(text: str) -> Iterator[tuple[str, int]]:
    """Every key and list item from `search` down, and its line; `text` has been found to be proper YAML."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == "search":
                yield "search", key.start_mark.line + 1
                yield from _lines_below(value, ("search",))


def _lines_below(node: yaml.Node, path: KeyPath) -> Iterator[tuple[str, int]]:
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    for name, at, child in children:
        yield dotted((*path, name)), at.start_mark.line + 1
        yield from _lines_below(child, (*path, name))


def _override_search(data: Any, override: str, texts: dict[str, str]) -> Any:
    """The search with one `search.key=value` laid over it, and the override's place noted in `texts`."""
    where = f"override {override!r}"
    name, equals, value = override.partition("=")
    path = [part.strip() for part in name.split(".")]
    known = [item.name for item in fields(SearchConfig) if item.name not in _FROM_FILE_ONLY]
    if not equals or len(path) != 2 or path[1] not in known:
        close = difflib.get_close_matches(path[1], known, 1) if len(path) > 1 else []
        meant = f"did you mean search.{close[0]}?" if close else f"can be overridden: {listed(known)}"
        raise UserError(f"{where}: write it as search.key=value; {meant}")
    if data is None:
        raise UserError(f"{where}: the file has no search section")
    if isinstance(data, dict):  # if not, it is refused for what it is
        parsed, _ = strict_yaml.parse(value, lambda line: where)
        key = f"search.{path[1]}"
        for inner in [text for text in texts if text.startswith(f"{key}.")]:
            del texts[inner]
        texts[key] = where
        return {**data, path[1]: parsed}
    return data


def _attempt(base: ExperimentConfig, settings: Mapping[str, Any]) -> ExperimentConfig | list[Fault]:
    """`base` with some settings changed, or what is wrong with it."""
    draft = Draft(data=to_dict(base))
    for key, value in settings.items():
        draft.put(tuple(key.split(".")), value)
    return draft.attempt()


def _check_alone(search: SearchConfig, base: ExperimentConfig) -> None:
    """`UserError` for a value, a bound or a case that cannot be in the base.

    Where another searched key has a part in the fault, the combination decides, and the trial is named.
    """
    varied = {*search.parameters, *(key for case in search.cases for key in case.settings)}
    for key, space in search.parameters.items():
        named: dict[str, Any] = {}
        if isinstance(space, Values):
            named = {f"values[{index}]": value for index, value in enumerate(space.values)}
        else:
            named = {"min": space.tidy(space.min), "max": space.tidy(space.max)}
        for name, value in named.items():
            _check_change(base, {key: value}, varied - {key}, f"search.parameters.{key}.{name}")
    for index, case in enumerate(search.cases):
        _check_change(base, case.settings, varied - case.settings.keys(), f"search.cases[{index}]")
    if varied.isdisjoint(_FIT):
        _check_fit(search, base)


def _check_change(base: ExperimentConfig, change: Mapping[str, Any], varied: set[str], key: str) -> None:
    result = _attempt(base, change)
    for fault in result if isinstance(result, list) else []:
        if varied.isdisjoint(map(dotted, (fault.path, *fault.others))):
            name = dotted(fault.path)
            if key.startswith("search.cases"):
                raise UserError(f"{key}.{name}: {fault.message}")
            raise UserError(f"{key}: {'' if name in change else f'{name}: '}{fault.message}")


def _check_fit(search: SearchConfig, config: ExperimentConfig, whose: str = "") -> None:
    """`UserError` where `config` ends before the scheduler's first rung, or does not report the metric."""
    if search.scheduler is not None:
        counts = {"training_steps": ("training.steps", config.training.steps)}
        counts["episodes"] = ("evaluation.episodes", config.evaluation.episodes)
        name, most = counts[search.scheduler.rung]
        late = f"{search.scheduler.grace} is more than {name} = {most}{whose}"
        require(search.scheduler.grace <= most, "search.scheduler.grace", late)
    metric = search.metric.name
    unseen = f"{metric} is not reported with dataset.validation_fraction = 0{whose}"
    reported = config.dataset.validation_fraction > 0 or not metric.startswith("val/")
    require(reported, "search.metric.name", unseen)


def _shown(value: Any) -> str:
    """A setting's value in a trial's name: of one line."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)
