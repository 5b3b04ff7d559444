"""Published results, and which of their tasks a case or a data set is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALIASES = {"walker": "walker2d", "cheetah": "halfcheetah"}


@dataclass(frozen=True)
class Group:
    """Tasks that were published together."""

    name: str
    source: str
    methods: list[str]
    tasks: dict[str, list[Any]]
    """For each task, each method's mean or [mean, standard error]."""
    later: dict[str, float]
    measure: str = "score"
    """What the figures are: normalised scores, or `rewarded`, per cent of the episodes that were rewarded."""

    def published(self, task: str, method: str) -> tuple[float, float]:
        """Mean and standard error; NaN for what is not known."""
        cells = self.tasks.get(task)
        cell = cells[self.methods.index(method)] if cells else math.nan
        return (cell[0], cell[1]) if isinstance(cell, list) else (cell, math.nan)


def read_published() -> list[Group]:
    """The groups of `published.yaml`, in order."""
    data = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return [Group(**{"later": {}, **group}) for group in data["groups"]]


def task_name(text: str, groups: Sequence[Group]) -> str | None:
    """The published task that a case or a data set's id names: `mujoco/hopper/medium-v0` is Hopper medium."""
    words = _words(text)
    tasks = [task for group in groups for task in group.tasks]
    fitting = [task for task in tasks if words[-len(_words(task)) :] == _words(task)]
    return max(fitting, key=len, default=None)


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower().replace("half-cheetah", "halfcheetah"))
    return [ALIASES.get(word, word) for word in words if not re.fullmatch(r"v\d+", word)]
