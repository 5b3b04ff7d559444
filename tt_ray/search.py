"""What a sweep varies and how: the `search` section of an experiment file as frozen dataclasses.

Plain dataclasses and their rules, like `config.py`; reading them from a file and making trials of them is
`sweep_file.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tt_ray.config import require
from tt_ray.errors import UserError

MAX_TRIALS = 10_000
"""More trials than this are a slip of the pen."""

METRICS = (
    *(f"score/{name}" for name in ("mean", "ci_low", "ci_high", "iqm", "iqm_ci_low", "iqm_ci_high")),
    *(f"return/{name}" for name in ("mean", "ci_low", "ci_high", "std", "iqm")),
    *("episodes/length", "episodes/terminated"),
    *(f"val/loss{part}" for part in ("", "_observation", "_action", "_reward", "_value")),
    *("speed/decisions_per_second", "speed/latency_p50_ms", "speed/latency_p95_ms"),
    *("speed/idle_slot_share", "speed/tokens_per_second"),
)
"""What a trial reports, and may be searched for."""

_HASHED = re.compile(r"-[0-9a-f]{12}$")

Distribution = Literal["uniform", "log_uniform", "int", "log_int"]
Goal = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class Values:
    """A parameter's choices."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        """How many choices there are."""
        return len(self.values)

    def at(self, u: float) -> Any:
        """The choice at `u` in [0, 1): all are equally likely for an even `u`."""
        return self.values[int(u * len(self.values))]

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of the choices."""
        return value in self.values

    def tidy(self, value: Any) -> Any:
        """`value`, as it is."""
        return value


@dataclass(frozen=True, kw_only=True)
class Range:
    """A parameter's range for random and optuna; int and log_int include both ends."""

    min: float
    max: float
    distribution: Distribution = "uniform"

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return self.distribution in ("int", "log_int")

    @property
    def log(self) -> bool:
        """Whether equal ratios are equally likely, rather than equal differences."""
        return self.distribution in ("log_uniform", "log_int")

    @property
    def size(self) -> float:
        """How many values there are; infinite where fractions count."""
        return int(self.max) - int(self.min) + 1 if self.whole else math.inf

    def at(self, u: float) -> int | float:
        """The value at `u` in [0, 1), so that an even `u` gives the range's distribution."""
        margin = 0.5 if self.whole else 0.0  # each whole number has the unit around it
        low, high = self.min - margin, self.max + margin
        if self.log:
            return self.tidy(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))
        return self.tidy(low + u * (high - low))

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.min <= value <= self.max

    def tidy(self, value: float) -> int | float:
        """`value` inside the range: whole, or of six digits, which is what a table can show."""
        if self.whole:
            return min(max(math.floor(value + 0.5), int(self.min)), int(self.max))
        return min(max(float(f"{value:.6g}"), self.min), self.max)


Space = Values | Range


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings that go together under a name, crossed with the parameters."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Value of each `section.key` that the case changes; `collect: None` takes that section away."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """What makes a trial better than another."""

    name: str = "score/mean"
    goal: Goal = "maximize"

    def __post_init__(self) -> None:
        close = [name for name in METRICS if self.name in name.split("/")]
        close = close or difflib.get_close_matches(self.name, METRICS, 1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(METRICS)}"
        shown = json.dumps(self.name, ensure_ascii=not self.name.isprintable())
        require(self.name in METRICS, "search.metric.name", f"no trial reports {shown}; {meant}")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Successive halving: at each rung only the best go on."""

    type: Literal["asha"]
    rung: Literal["episodes", "training_steps"]
    """What a rung counts: evaluated episodes (compared by score) or training steps (by validation loss)."""
    grace: int
    """The first rung; no trial stops before it."""
    reduction: int = 3
    """One in so many goes on from a rung, and the next rung is so many times as far."""

    def __post_init__(self) -> None:
        require(self.grace >= 1, "search.scheduler.grace", f"must be at least 1, not {self.grace}")
        few = f"must be at least 2, not {self.reduction}"
        require(self.reduction >= 2, "search.scheduler.reduction", few)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A sweep: parameters crossed with cases, and how the trials are chosen, compared and run.

    A grid has every combination of the parameters' values. Random search and optuna try `num_trials`
    settings of the parameters, in each of the cases.
    """

    parameters: Mapping[str, Space] = field(default_factory=dict)
    """Space of each searched `section.key`."""
    cases: tuple[Case, ...] = ()
    method: Literal["grid", "random", "optuna"] = "grid"
    num_trials: int | None = None
    """Settings that random and optuna try, in each case; a grid has no need of it."""
    seed: int = 0
    """Seed of random search and optuna; no training seed."""
    metric: MetricConfig = field(default_factory=MetricConfig)
    scheduler: SchedulerConfig | None = None
    max_concurrent_trials: int = 4
    confirm_episodes: int = 0
    """Fresh episodes on which the winner is scored again; 0: as many as evaluation.episodes."""

    def __post_init__(self) -> None:
        for name, least in (("num_trials", 1), ("seed", 0), ("max_concurrent_trials", 1)):
            value = getattr(self, name)
            fine = value is None or value >= least
            require(fine, f"search.{name}", f"must be at least {least}, not {value}")
        few = f"must be at least 0 (0: as many as evaluation.episodes), not {self.confirm_episodes}"
        require(self.confirm_episodes >= 0, "search.confirm_episodes", few)
        for key, space in self.parameters.items():
            _check_space(f"search.parameters.{key}", space, self.method)
        self._check_cases()
        if self.scheduler is not None:
            _check_rungs(self.scheduler.rung, self.metric)
        self._check_count()

    @property
    def count(self) -> int:
        """How many trials the whole sweep has, or may have where a scheduler or optuna ends it early."""
        settings = math.prod(int(space.size) for space in self._values()) if self.method == "grid" else None
        return (self.num_trials or 1 if settings is None else settings) * max(1, len(self.cases))

    def settings(self) -> Iterator[dict[str, Any]]:
        """The parameters' settings of a grid or a random search, in order.

        Grid: the last parameter changes fastest. Random: every parameter draws from a stream of its own, so
        that another one beside it, a new case, or more trials leave the draws before as they were; settings
        drawn before are drawn anew.
        """
        if self.method == "optuna":
            raise ValueError("optuna makes its settings one by one")
        return _product(self.parameters) if self.method == "grid" else self._draws()

    def _values(self) -> list[Values]:
        return [space for space in self.parameters.values() if isinstance(space, Values)]

    def _check_cases(self) -> None:
        names = [case.name for case in self.cases]
        for index, case in enumerate(self.cases):
            key = f"search.cases[{index}]"
            check_name(case.name, f"{key}.name")
            require(case.name not in names[:index], f"{key}.name", f"{case.name} names another case already")
            for setting in case.settings:
                twice = f"is searched already: see search.parameters.{setting}"
                require(setting not in self.parameters, f"{key}.{setting}", twice)

    def _check_count(self) -> None:
        if self.method == "grid":
            wrong = "is for random and optuna; a grid has every combination"
            require(self.num_trials is None, "search.num_trials", wrong)
        else:
            empty = f"is empty, so that {self.method} has nothing to choose"
            require(bool(self.parameters), "search.parameters", empty)
            need = f"{self.method} needs search.num_trials: how many settings to try"
            require(self.num_trials is not None, "search.method", need)
        size = math.prod(space.size for space in self.parameters.values())
        many = f"there are only {size:.0f} settings to draw {self.num_trials} from; lower it, or use a grid"
        enough = self.method != "random" or self.num_trials is None or size >= self.num_trials
        require(enough, "search.num_trials", many)
        key = "search.parameters" if self.method == "grid" else "search.num_trials"
        require(
            self.count <= MAX_TRIALS, key, f"makes {self.count} trials; at most {MAX_TRIALS} are possible"
        )

    def _draws(self) -> Iterator[dict[str, Any]]:
        wanted, seen = self.num_trials or 0, set[str]()
        streams = {key: random.Random(f"{self.seed} {key}") for key in self.parameters}
        for _ in range(1_000 * wanted):
            drawn = {key: space.at(streams[key].random()) for key, space in self.parameters.items()}
            text = json.dumps(drawn, sort_keys=True)
            if text not in seen:
                seen.add(text)
                yield drawn
            if len(seen) == wanted:
                return
        raise UserError(
            f"search.num_trials: only {len(seen)} different settings came up in {1_000 * wanted} draws; "
            "lower it, or use a grid"
        )


def default_goal(metric: str) -> Goal:
    """What is better of a metric: less of losses, latencies, idle time and spread, more of all else."""
    less = metric.startswith("val/loss") or any(word in metric for word in ("latency", "idle", "/std"))
    return "minimize" if less else "maximize"


def interval_names(metric: str) -> tuple[str, str] | None:
    """Names of the ends of a metric's interval, where it has one."""
    stem, _, name = metric.rpartition("/")
    prefix = {"mean": "ci", "iqm": "iqm_ci"}.get(name)
    if prefix is None or stem not in ("score", "return"):
        return None
    return f"{stem}/{prefix}_low", f"{stem}/{prefix}_high"


def check_name(name: str, key: str = "name") -> None:
    """`UserError` for an empty name, or one with characters that cannot be seen."""
    require(bool(name.strip()), key, "must not be empty")
    require(name.isprintable(), key, f"has characters that cannot be shown: {name!a}")


def safe_name(name: str) -> str:
    """A folder's name for any printable `name`: different names give different folders, on any file system.

    Lower-case letters, digits and `. _ -` stay as they are; a name with anything else, or a long one, becomes
    what can be kept of it and a part of its hash. `UserError` as of `check_name`.
    """
    check_name(name)
    kept = re.sub(
        r"[^a-z0-9._]+", "-", unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    )
    if name == kept and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}(?<!\.)", name) and not _HASHED.search(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{kept[:48].strip('-._') or 'x'}-{digest}"


def _product(parameters: Mapping[str, Space]) -> Iterator[dict[str, Any]]:
    choices = [space.values for space in parameters.values() if isinstance(space, Values)]
    for values in itertools.product(*choices):
        yield dict(zip(parameters, values, strict=True))


def _check_space(key: str, space: Space, method: str) -> None:
    if isinstance(space, Values):
        require(len(space.values) > 0, f"{key}.values", "is empty")
        seen: list[Any] = []
        for index, value in enumerate(space.values):
            again = f"{json.dumps(value, ensure_ascii=not str(value).isprintable())} is there already"
            require(value not in seen, f"{key}.values[{index}]", again)
            seen.append(value)
        return
    for name, bound in (("min", space.min), ("max", space.max)):
        require(math.isfinite(bound), f"{key}.{name}", f"must be finite, not {bound}")
        whole = f"must be a whole number for distribution {space.distribution}, not {bound}"
        require(not space.whole or float(bound).is_integer(), f"{key}.{name}", whole)
    require(space.min <= space.max, f"{key}.min", f"{space.min:g} is above max = {space.max:g}")
    single = f"{space.min:g} is also max; write values: [{space.min:g}]"
    require(space.min < space.max, f"{key}.min", single)
    zero = f"must be above 0 for distribution {space.distribution}, not {space.min:g}"
    require(not space.log or space.min > 0, f"{key}.min", zero)
    require(method != "grid", key, "a grid needs values: [...]; a range is for method random or optuna")


def _check_rungs(rung: str, metric: MetricConfig) -> None:
    prefixes = ("val/loss",) if rung == "training_steps" else ("score/", "return/")
    seen = "val/loss" if rung == "training_steps" else "score/... or return/..."
    wrong = f"at rungs of {rung} trials are compared by {seen}, not by search.metric.name = {metric.name}"
    require(metric.name.startswith(prefixes), "search.scheduler.rung", wrong)
