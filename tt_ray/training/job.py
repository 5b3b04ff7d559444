"""From a tokenised data set and an experiment's settings to a training job."""

from __future__ import annotations

from tt_ray.config import ExperimentConfig, to_dict
from tt_ray.data.token_store import TokenSet
from tt_ray.data.windows import WindowSet, split_episodes
from tt_ray.training.loop import TrainingJob


def make_job(config: ExperimentConfig, tokens: TokenSet, seed: int) -> TrainingJob:
    """Training windows, held-out windows and settings for one training seed."""
    dataset, window = config.dataset, config.model.context_transitions
    count, relabel = len(tokens.offsets) - 1, "last" if config.goal is None else config.goal.relabel
    split = split_episodes(count, dataset.validation_fraction, dataset.split_seed, dataset.fraction)
    train, validation = (
        WindowSet.build(
            tokens.tokens, tokens.offsets, tokens.terminated, chosen, window, tokens.layout, relabel
        )
        for chosen in split
    )
    return TrainingJob(
        model=config.model,
        training=config.training,
        layout=tokens.layout,
        discretizer=tokens.discretizer,
        spec=tokens.spec,
        train=train,
        validation=validation,
        experiment={**to_dict(config), "seed": seed},
        seed=seed,
    )
