"""What makes two stages the same: a hash of exactly the settings and inputs that each depends on."""

from __future__ import annotations

import hashlib
import json
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
    data = config.dataset
    treated = (data_fingerprint, data.discount, data.terminal_penalty, data.observation_dims)
    return fingerprint("tokens", treated, to_dict(config.discretizer))


def model_fingerprint(config: ExperimentConfig, tokens: str, seed: int) -> str:
    """Identity of a trained model: tokens, episodes, size, training, seed; not how often curves are drawn."""
    data = config.dataset
    episodes = (data.validation_fraction, data.split_seed, data.fraction)
    training = {key: value for key, value in to_dict(config.training).items() if key != "log_every"}
    return fingerprint("model", tokens, episodes, to_dict(config.model), training, seed)


def evaluation_fingerprint(config: ExperimentConfig, planner: PlannerConfig, model: str) -> str:
    """Identity of evaluated episodes: the model, the planner, the episodes' length and the batch's shape.

    Each seed is a row. The number of episodes at once and the decoder are part of it: the latency depends on
    them, and on some hardware the last digits of what the model says.
    """
    resources = (config.resources.episodes_per_actor, config.resources.decoder)
    return fingerprint("evaluation", model, to_dict(planner), config.evaluation.max_steps, resources)
