"""Experiment files: YAML and `section.key=value` overrides become a validated `ExperimentConfig`, and back.

Two gates. pydantic compares keys and types with the dataclasses of `config.py`; the dataclasses' own rules
then see the values. Whatever is wrong becomes one `UserError` line that names the file and line, or the
override, at fault.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic

from tt_ray import strict_yaml
from tt_ray.config import ExperimentConfig, to_dict
from tt_ray.errors import UserError
from tt_ray.strict_yaml import KeyPath

_HINTS: dict[str, Any] = get_type_hints(ExperimentConfig)
SECTIONS: dict[str, type] = {
    name: kind
    for name, hint in _HINTS.items()
    for kind in (hint, *get_args(hint))
    if isinstance(kind, type) and is_dataclass(kind)
}
"""The dataclass of each section."""
_SECTION_HINTS: dict[str, dict[str, Any]] = {name: get_type_hints(kind) for name, kind in SECTIONS.items()}
_DOTTED_KEYS = [f"{section}.{key}" for section, hints in _SECTION_HINTS.items() for key in hints]
_REQUIRED = {
    item.name for item in fields(ExperimentConfig) if item.default is item.default_factory is MISSING
}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}
_OPTIONAL = {*SECTIONS, "search"}
"""Keys that may be null, as if they were absent."""
_SWEEP = "this file is a sweep: run it with `tt-ray sweep FILE`, or remove this section"
MISSING_KEY = "this key is required"
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment in the YAML file `path`, with `section.key=value` overrides laid over it.

    Raises:
        UserError: one line with the file and line, or the override, that is at fault.
    """
    draft = parse_draft(read_text(path), path)
    for override in overrides:
        draft.override(override)
    return draft.build()


def apply_overrides(
    config: ExperimentConfig, overrides: Sequence[str], sections: Sequence[str] | None = None
) -> ExperimentConfig:
    """`config` with `section.key=value` overrides laid over it; only those in `sections`, where given.

    Raises:
        UserError: names the override that is at fault.
    """
    draft = Draft(data=to_dict(config))
    for override in overrides:
        draft.override(override, sections)
    return draft.build()


def experiment_from_dict(data: Mapping[str, Any], source: str = "configuration") -> ExperimentConfig:
    """The experiment in plain JSON data, as `config.to_dict` gives it; `source` names it in errors.

    Raises:
        UserError: starts with `source`.
    """
    return Draft(data=json.loads(json.dumps(data)), source=source).build()


def dump_yaml(config: ExperimentConfig) -> str:
    """All of `config`, defaults included, as text that `load_experiment` reads back as an equal one."""
    return strict_yaml.dump(to_dict(config))


@dataclass(frozen=True)
class Place:
    """Where a key was written; overrides come after every line, and what is nowhere comes last."""

    text: str
    order: float


@dataclass(frozen=True)
class Fault:
    """Something wrong with the key `path`; `others` are further keys that have a part in it."""

    path: KeyPath
    message: str
    others: tuple[KeyPath, ...] = ()
    missing: bool = False


@dataclass
class Draft:
    """Plain data on its way to a configuration, and where each of its keys was written."""

    data: dict[str, Any]
    source: str = ""
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def override(self, text: str, sections: Sequence[str] | None = None) -> None:
        """Lay one `section.key=value` over the data."""
        where = f"override {text!r}"
        name, equals, value = text.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        if not equals or not all(path):
            raise UserError(f"{where}: write it as section.key=value")
        if not _is_key(path):
            raise UserError(f"{where}: {unknown_setting(path)}")
        if sections is not None and path[0] not in sections:
            raise UserError(f"{where}: {path[0]} is settled here; only {listed(sections)} can be overridden")
        parsed, _ = strict_yaml.parse(value, lambda line: where)
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = Place(where, math.inf)
        if len(path) == 2 and self.data.get(path[0]) is None:
            self.places.setdefault(path[:1], self.places[path])
        self.put(path, parsed)

    def put(self, path: tuple[str, ...], value: Any) -> None:
        """Set the top-level key or the section's key that `path` leads to."""
        if len(path) == 1:
            self.data[path[0]] = value
            return
        if self.data.get(path[0]) is None:
            self.data[path[0]] = {}
        if isinstance(self.data[path[0]], dict):  # if not, build() says that the file has no section there
            self.data[path[0]][path[1]] = value

    def build(self) -> ExperimentConfig:
        """The configuration; or `UserError` with its first fault, and how many more there are."""
        result = self.attempt()
        if isinstance(result, ExperimentConfig):
            return result
        raise UserError(self._report(result))

    def attempt(self) -> ExperimentConfig | list[Fault]:
        """The configuration, or all that is wrong with it."""
        data = {key: value for key, value in self.data.items() if value is not None or key not in _OPTIONAL}
        for name in _REQUIRED & SECTIONS.keys():
            data.setdefault(name, {})  # so that the keys missing in it are named
        faults = [Fault((name,), MISSING_KEY, missing=True) for name in _REQUIRED - data.keys()]
        values: dict[str, Any] = {}
        for name, value in data.items():
            try:
                if name in _HINTS:
                    values[name] = _checked(_HINTS[name], value)
                else:
                    faults.append(Fault((name,), _unknown_key((name,))))
            except pydantic.ValidationError as error:
                faults.extend(_type_faults(name, value, error))
            except UserError as error:
                faults.append(_rule_fault(error))
        if not faults:
            try:
                return ExperimentConfig(**values)
            except UserError as error:
                faults.append(_rule_fault(error))
        return faults

    def _report(self, faults: Sequence[Fault]) -> str:
        first = min(faults, key=lambda fault: (fault.missing, self._place(fault).order))
        where = self._place(first).text
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return f"{where}{': ' if where else ''}{dotted(first.path)}: {first.message}{more}"

    def _place(self, fault: Fault) -> Place:
        exact = [self.places[path] for path in (fault.path, *fault.others) if path in self.places]
        if exact:  # of the keys that do not go together, an override is to blame: it came last
            return next((place for place in exact if place.order == math.inf), exact[0])
        return self.places.get(fault.path[:1], Place(self.source, math.inf))


def read_text(path: str | Path) -> str:
    """The text of the file `path`; `UserError` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: it is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_draft(text: str, path: str | Path) -> Draft:
    """A draft of what the file `path` says in `text`."""
    data, lines = strict_yaml.parse(text, lambda line: f"{path}:{line}")
    if data is None:
        raise UserError(f"{path}: is empty; an experiment has at least a name and a dataset.id")
    if not isinstance(data, dict):
        raise UserError(f"{path}:{lines[()]}: expected sections and keys (name: value), found {found(data)}")
    places = {keys: Place(f"{path}:{line}", line) for keys, line in lines.items()}
    return Draft(data=data, source=str(path), places=places)


def check_type(hint: Any, value: Any, key: str) -> Any:
    """Plain data as a value of the type `hint`; `UserError` in the words of `key` where it is none."""
    try:
        return _checked(hint, value)
    except pydantic.ValidationError:
        raise UserError(f"{key}: {_wrong_type(hint, value)}") from None


def setting_type(key: str) -> Any:
    """The type of the setting `section.key`; None where there is no such setting."""
    section, _, name = key.partition(".")
    return _SECTION_HINTS.get(section, {}).get(name)


def _checked(hint: Any, value: Any) -> Any:
    return _checker(hint).validate_json(json.dumps([value]))[0]


@functools.cache
def _checker(hint: Any) -> Any:
    """What checks a list of one value of the type `hint`.

    The list is there because pydantic hands its settings on to plain dataclasses inside another type, but
    takes none for a plain dataclass itself. Its JSON mode is the strict one that takes a mapping for one.
    """
    list_of_one: Any = types.GenericAlias(tuple, (hint,))
    return pydantic.TypeAdapter(list_of_one, config=_STRICT)


def _type_faults(name: str, value: Any, error: pydantic.ValidationError) -> list[Fault]:
    """One fault for each key below `name` that pydantic refuses, in our words."""
    faults: dict[KeyPath, Fault] = {}
    for detail in error.errors(include_url=False):
        path = (name, *detail["loc"][1:2])  # what lies deeper are the branches of a union
        if detail["type"] == "missing":
            faults[path] = Fault(path, MISSING_KEY, missing=True)
        elif detail["type"] == "unexpected_keyword_argument":
            faults[path] = Fault(path, _unknown_key(path))
        else:
            wrong = value[path[1]] if len(path) == 2 else value
            faults[path] = Fault(path, _wrong_type(_hint_at(path), wrong))
    return list(faults.values())


def _rule_fault(error: UserError) -> Fault:
    """The fault behind a dataclass's own refusal, `section.key: message`."""
    name, _, message = str(error).partition(": ")
    mentioned = (word for word in re.findall(r"[a-z]+\.\w+", message) if word in _DOTTED_KEYS)
    return Fault(tuple(name.split(".")), message, others=tuple(tuple(word.split(".")) for word in mentioned))


def _hint_at(path: KeyPath) -> Any:
    """The type of the top-level key, of the section's key, or of the list's items that `path` leads to."""
    section, key = str(path[0]), path[-1]
    if len(path) == 1:
        return _HINTS[section]
    return get_args(_HINTS[section])[0] if isinstance(key, int) else _SECTION_HINTS[section][key]


def _wrong_type(hint: Any, value: Any) -> str:
    """`expected a whole number, found text 'five'`."""
    literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"expected {_expected(hint)}, found {found(value)}{meant}"


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_expected(kind) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list like [0, 1]"
    return "a section (key: value)" if is_dataclass(hint) else _WORDS[hint]


def found(value: Any) -> str:
    """Plain data as an error shows it."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not finite"
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"text {shown}" if isinstance(value, str) else shown


def _unknown_key(path: KeyPath) -> str:
    """What is said of a file's unknown key."""
    if path == ("search",):
        return _SWEEP
    known = list(_HINTS) if len(path) == 1 else list(_SECTION_HINTS[str(path[0])])
    return f"unknown key; {_suggestion(str(path[-1]), known) or f'known here: {listed(known)}'}"


def unknown_setting(path: tuple[str, ...]) -> str:
    """What is said of an unknown key in an override, or in a search."""
    if path[0] == "search":
        return f"search: {_SWEEP}"
    section = _SECTION_HINTS.get(path[0])
    if section is None:
        meant = _suggestion(".".join(path), [*_HINTS, *_DOTTED_KEYS])
    else:
        meant = _suggestion(".".join(path[1:]), list(section), prefix=f"{path[0]}.")
    return f"unknown key {'.'.join(path)}; {meant or f'known here: {listed(list(section or _HINTS))}'}"


def _suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`did you mean x?`: a known name spelt much alike, a namesake in any section, or one a bit alike."""
    meant = (
        [prefix + key for key in difflib.get_close_matches(name, known, 1, cutoff=0.8)]
        or [key for key in _DOTTED_KEYS if key.partition(".")[2] == name.rpartition(".")[2]]
        or [prefix + key for key in difflib.get_close_matches(name, known, 1)]
    )
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def _is_key(path: tuple[str, ...]) -> bool:
    return path[0] in _HINTS if len(path) == 1 else ".".join(path) in _DOTTED_KEYS


def dotted(path: KeyPath) -> str:
    """`model.num_layers`, `seeds[1]`; odd characters of a file's key are escaped."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    return text if text.isprintable() else repr(text)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
