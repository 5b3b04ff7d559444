"""Optuna's proposals: which settings to try next, given how those before have ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from tt_ray.distributed.sweeps.halving import VALUE, Past, mode
from tt_ray.errors import UserError
from tt_ray.search import Range, SearchConfig, Space

INDEX = "index"
"""A trial's number, beside the parameters that Optuna chooses."""
TRIES = 100
"""Proposals that may be of no use before the space counts as used up."""

Usable = Callable[[Mapping[str, Any]], bool]
"""Whether settings go together; called once for each proposal."""


def optuna_search(
    search: SearchConfig, past: Sequence[Past], first: int = 0, usable: Usable = lambda settings: True
) -> Any:
    """Optuna's sampler over the search's parameters, which knows how earlier trials have ended.

    What it suggests is numbered from `first` on. It suggests nothing twice, and nothing that is not usable.
    """
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {key: _distribution(optuna, space) for key, space in search.parameters.items()}
    known = [trial for trial in past if _teaches(search, trial)]
    options: dict[str, Any] = {}
    if known:
        options["points_to_evaluate"] = [_encoded(search, trial.settings) for trial in known]
        options["evaluated_rewards"] = [trial.value for trial in known]
    seed = search.seed + len(past)  # going on with the same seed would propose what it began with again
    seen = {_text(trial.settings) for trial in past}
    numbers = itertools.count(first)

    def fresh(settings: Mapping[str, Any]) -> bool:
        text = _text(settings)
        if text in seen:
            return False
        seen.add(text)
        return usable(settings)

    class Numbered(OptunaSearch):
        def suggest(self, trial_id: str) -> Any:
            for _ in range(TRIES):
                suggested = super().suggest(trial_id)
                if not isinstance(suggested, dict):
                    return suggested
                if fresh(decoded(search, suggested)):
                    return {**suggested, INDEX: next(numbers)}
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.PRUNED)
            return self.FINISHED

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()  # Tune wants a file; what is done is in the cells' records

        def __reduce__(self) -> Any:
            return dict, ()

    return Numbered(space=space, metric=VALUE, mode=mode(search), seed=seed, **options)


def import_optuna() -> Any:
    """The optional package; `UserError` where it is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "search.method: optuna is not installed; `pip install 'tt-ray[optuna]'`, or use method: random"
        ) from None
    return optuna


def decoded(search: SearchConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's choices as the values that the search names."""
    settings = {}
    for key, space in search.parameters.items():
        value = config[key]
        if not isinstance(space, Range):
            value = next(choice for choice in space.values if _choice(choice) == value)
        settings[key] = space.tidy(value)
    return settings


def _teaches(search: SearchConfig, trial: Past) -> bool:
    """Whether Optuna can take the trial in: it has a figure, and the spaces still hold its settings."""
    known = trial.value is not None and math.isfinite(trial.value)
    return known and all(space.holds(trial.settings[key]) for key, space in search.parameters.items())


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _distribution(optuna: Any, space: Space) -> Any:
    distributions = optuna.distributions
    if not isinstance(space, Range):
        return distributions.CategoricalDistribution([_choice(value) for value in space.values])
    if space.whole:
        return distributions.IntDistribution(int(space.min), int(space.max), log=space.log)
    return distributions.FloatDistribution(space.min, space.max, log=space.log)


def _choice(value: Any) -> Any:
    """A choice as Optuna can hold it: lists and the like are none."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _encoded(search: SearchConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    spaces = search.parameters
    return {k: v if isinstance(spaces[k], Range) else _choice(v) for k, v in settings.items()}
