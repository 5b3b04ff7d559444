"""The `search` section of an experiment file: plain data becomes a `SearchConfig`, or one line of fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

from tt_ray.config import require
from tt_ray.errors import UserError
from tt_ray.experiment_file import (
    MISSING_KEY,
    SECTIONS,
    check_type,
    found,
    listed,
    setting_type,
    unknown_setting,
)
from tt_ray.search import (
    Case,
    MetricConfig,
    Range,
    SchedulerConfig,
    SearchConfig,
    Space,
    Values,
    default_goal,
)

Section = TypeVar("Section")

_WHOLE_SWEEP = {
    "seeds": "seeds are repetitions of every trial; list them under the file's own seeds",
    "name": "the name is the whole sweep's",
    "question": "the question is the whole sweep's",
    "resources": "resources are the whole sweep's and change no result",
    "tracking": "tracking is the whole sweep's and changes no result",
    "search": "a search cannot search itself",
}
"""Keys that neither a parameter nor a case may change, and why."""
_COMPARED_ON = ("evaluation.episodes", "evaluation.first_seed")
"""What decides the episodes on which trials are compared."""


def read_search(data: Any) -> SearchConfig:
    """The search in plain data; `UserError` starts with the key at fault."""
    data = _given(SearchConfig, data, "search")
    parameters, cases = data.pop("parameters", {}), data.pop("cases", [])
    no_section = f"expected a section (section.key: space), found {found(parameters)}"
    require(isinstance(parameters, dict), "search.parameters", no_section)
    require(isinstance(cases, list), "search.cases", f"expected a list, found {found(cases)}")
    nothing = "has no parameters and no cases; without this section, the file is a single run"
    require(bool(parameters or cases), "search", nothing)
    parts: dict[str, Any] = {
        "parameters": {key: _read_space(key, value) for key, value in parameters.items()},
        "cases": tuple(_read_case(case, f"search.cases[{index}]") for index, case in enumerate(cases)),
    }
    if "metric" in data:
        parts["metric"] = _read_metric(data.pop("metric"))
    if "scheduler" in data:
        parts["scheduler"] = _read(SchedulerConfig, data.pop("scheduler"), "search.scheduler")
    return _read(SearchConfig, data, "search", **parts)


def _given(kind: type, data: Any, key: str) -> dict[str, Any]:
    """The entries of a section for the dataclass `kind`, without those that are null."""
    require(isinstance(data, dict), key, f"expected a section (key: value), found {found(data)}")
    known = list(get_type_hints(kind))
    for name in data:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {close[0]}?" if close else f"known here: {listed(known)}"
            raise UserError(f"{_below(key, name)}: unknown key; {meant}")
    return {name: value for name, value in data.items() if value is not None}


def _read(kind: type[Section], data: Any, key: str, **parts: Any) -> Section:
    """The dataclass `kind` from a section's plain data, and from `parts` that have been read before."""
    hints = get_type_hints(kind)
    given = _given(kind, data, key)
    for item in fields(kind):  # type: ignore[arg-type]
        if item.default is item.default_factory is MISSING:
            require(item.name in given, f"{key}.{item.name}", MISSING_KEY)
    values = {name: check_type(hints[name], value, f"{key}.{name}") for name, value in given.items()}
    return kind(**values, **parts)


def _read_metric(data: Any) -> MetricConfig:
    """`{name, goal}`, or the name alone; the goal that is not given follows from the name."""
    data = _given(MetricConfig, {"name": data} if isinstance(data, str) else data, "search.metric")
    if isinstance(data.get("name"), str):
        data.setdefault("goal", default_goal(data["name"]))
    return _read(MetricConfig, data, "search.metric")


def _check_setting(name: str, key: str) -> None:
    """`UserError` unless `name` is a `section.key` that trials may differ in; `key` is where it stands."""
    require(name.isprintable(), key, "unknown key")
    section = name.partition(".")[0]
    if section in _WHOLE_SWEEP:
        raise UserError(f"{key}: cannot differ between trials: {_WHOLE_SWEEP[section]}")
    require(name not in SECTIONS, key, f"is a section; name one of its keys, as in {name}.key")
    require(setting_type(name) is not None, key, unknown_setting(tuple(name.split("."))))


def _read_space(name: str, data: Any) -> Space:
    key = _below("search.parameters", name)
    _check_setting(name, key)
    same = "cannot be searched: all trials are compared on the same episodes"
    require(name not in _COMPARED_ON, key, same)
    bounds = [bound for bound in ("min", "max", "distribution") if isinstance(data, dict) and bound in data]
    listing = isinstance(data, dict) and "values" in data
    shape = "expected {values: [...]} or {min: ..., max: ..., distribution: ...}"
    require(listing or bool(bounds), key, f"{shape}, found {found(data)}")
    require(not listing or not bounds, key, f"has both values and {listed(bounds)}; {shape}")
    return _read_values(name, data, key) if listing else _read_range(name, data, key)


def _read_values(name: str, data: dict[str, Any], key: str) -> Values:
    items = _read(Values, data if data["values"] is not None else data | {"values": []}, key).values
    hint = setting_type(name)
    typed = (check_type(hint, item, f"{key}.values[{index}]") for index, item in enumerate(items))
    return Values(values=tuple(typed))


def _read_range(name: str, data: dict[str, Any], key: str) -> Range:
    """A range; where it does not say so, it is one of whole numbers if the setting is one."""
    hint = setting_type(name)
    numbers = {int, float} & {hint, *get_args(hint)}
    require(bool(numbers), key, f"{name} is no number; expected {{values: [...]}}")
    default = {"distribution": "uniform" if float in numbers else "int"}
    space = _read(Range, default | _given(Range, data, key), key)
    whole = f"{name} is a whole number: write int or log_int, not {space.distribution}"
    require(float in numbers or space.whole, f"{key}.distribution", whole)
    return space


def _read_case(data: Any, key: str) -> Case:
    """A case: its name, and overrides as sections or as dotted keys."""
    require(isinstance(data, dict), key, f"expected a name and settings, found {found(data)}")
    require("name" in data, f"{key}.name", MISSING_KEY)
    settings: dict[str, Any] = {}
    for place, name, value in _case_entries(data, key):
        if name != "collect":
            _check_setting(name, place)
            value = check_type(setting_type(name), value, place)
        require(name not in settings, place, "is given twice")
        settings[name] = value
    return Case(name=check_type(str, data["name"], f"{key}.name"), settings=settings)


def _case_entries(data: Mapping[str, Any], key: str) -> Iterator[tuple[str, str, Any]]:
    """Place, `section.key` and value of each setting; a collection that is taken away is `collect`: None."""
    for name, value in data.items():
        place = _below(key, name)
        if name == "name":
            continue
        if name == "collect" and value is None:
            yield place, name, None
        elif name in SECTIONS and name not in _WHOLE_SWEEP:
            require(isinstance(value, dict), place, f"expected a section (key: value), found {found(value)}")
            for inner, item in value.items():
                yield _below(place, inner), f"{name}.{inner}", item
        else:
            yield place, name, value


def _below(key: str, name: str) -> str:
    """The key `name` in the section `key`; odd characters are escaped."""
    return f"{key}.{name}" if name.isprintable() else f"{key}.{name!a}"
