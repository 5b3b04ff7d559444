"""What makes two stages the same: a hash of exactly the settings and inputs that each depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tt_ray.config import ExperimentConfig, PlannerConfig, to_dict


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that identify JSON data; equal settings give equal fingerprints on every machine."""
    same = json.loads(json.dumps(parts), parse_float=_number)  # 1.0 is 1, whoever wrote it
    canonical = json.dumps(same, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def tokens_fingerprint(config: ExperimentConfig, data_fingerprint: str) -> str:
    """Identity of the token array: the data, what is done to it, and the bins."""
    data, goal = config.dataset, config.goal
    treated = (data_fingerprint, data.discount, data.terminal_penalty, data.observation_dims)
    added = {
        **_kept_and_paid(config),
        "hidden": (data.hidden_fraction, data.split_seed) if data.hidden_fraction else None,
        "goal": None if goal is None else {"dims": goal.dims},
    }
    return fingerprint("tokens", treated, to_dict(config.discretizer), *_given(added))


def model_fingerprint(config: ExperimentConfig, tokens: str, seed: int) -> str:
    """Identity of a trained model: tokens, episodes, size, training, seed; not how often curves are drawn."""
    relabel = None if config.goal is None or config.goal.relabel == "last" else config.goal.relabel
    return fingerprint(
        "model",
        tokens,
        _episodes(config),
        to_dict(config.model),
        _without(config.training, "log_every", "bin_smoothing"),
        seed,
        *_given({"relabel": relabel, "bin_smoothing": config.training.bin_smoothing or None}),
    )


def critic_fingerprint(config: ExperimentConfig, data_fingerprint: str, seed: int) -> str:
    """Identity of a trained critic: data, what is done to it, episodes, training, seed; not the bins."""
    assert config.critic is not None, "the experiment has no critic"
    data = config.dataset
    treated = (data_fingerprint, data.terminal_penalty, data.observation_dims, config.goal is not None)
    settings = _without(config.critic, "log_every", "checkpoint_every", "inverse_temperature")
    policy = config.critic.inverse_temperature if config.extracts_policy else None
    added = {**_kept_and_paid(config), "policy": policy}
    return fingerprint("critic", treated, _episodes(config), settings, seed, *_given(added))


def plain_settings(config: ExperimentConfig, *left_out: str) -> dict[str, Any]:
    """An experiment's settings as the identity of a run or trial has them, without the sections `left_out`.

    Settings that are younger than runs in users' folders are there only where they are not as usual.
    """
    plain = {key: value for key, value in to_dict(config).items() if key not in left_out}
    for section, name in _LATER:
        given = getattr(config, section)
        if given is not None and getattr(given, name) == getattr(type(given)(), name):
            del plain[section][name]
    return plain


_LATER = (
    ("planner", "target"),
    ("evaluation", "environment"),
    ("evaluation", "baselines"),
    ("critic", "inverse_temperature"),
)


def dynamics_fingerprint(config: ExperimentConfig, tokens: str, seed: int) -> str:
    """Identity of a trained ensemble: tokens, episodes, training, seed; not how often curves are drawn."""
    return fingerprint("dynamics", tokens, _episodes(config), _without(config.ensemble, "log_every"), seed)


def evaluation_fingerprint(
    config: ExperimentConfig, planner: PlannerConfig, model: str, critic: str | None = None
) -> str:
    """Identity of evaluated episodes: the models, the planner, the episodes' length and the batch's shape.

    Each seed is a row. The number of episodes at once and the decoder are part of it: the latency depends on
    them, and on some hardware the last digits of what the model says. `critic` is the identity of the critic
    whose values the search maximises, if any.
    """
    resources = (config.resources.episodes_per_actor, config.resources.decoder)
    later = {"goal": None, "execute": "bins", "target": None}
    search = _without(planner, *(name for name, usual in later.items() if getattr(planner, name) == usual))
    evaluation = config.evaluation
    added = {"critic": critic, "record": evaluation.record or None, "environment": evaluation.environment}
    return fingerprint("evaluation", model, search, evaluation.max_steps, resources, *_given(added))


def _episodes(config: ExperimentConfig) -> tuple[float, int, float]:
    """Which episodes are learned from."""
    data = config.dataset
    return data.validation_fraction, data.split_seed, data.fraction


def _kept_and_paid(config: ExperimentConfig) -> dict[str, Any]:
    """Later settings of what is done to the data, None where they leave it as it is."""
    data = config.dataset
    keys = None if data.observation_keys is None else sorted(data.observation_keys)
    return {"keys": keys, "delayed": data.delayed_rewards or None}


def _given(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings younger than the stores they must not make useless: a part of a fingerprint only if given."""
    given = {key: value for key, value in settings.items() if value is not None}
    return [given] if given else []


def _without(section: Any, *names: str) -> dict[str, Any]:
    """A section of the configuration as plain data, but for some settings."""
    return {key: value for key, value in to_dict(section).items() if key not in names}
