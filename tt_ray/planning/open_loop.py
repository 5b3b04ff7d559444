"""Rollouts without an environment: of the Transformer, through the search that plans, and of the ensemble.

Shape letters: E episodes, R rollouts, c transitions of the context, H steps, D slots, N observation,
M action, K members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.config import DecoderName, PlannerConfig
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.dynamics import Ensemble
from tt_ray.planning.decoders import make_searcher
from tt_ray.planning.expansions import Uniforms
from tt_ray.planning.objectives import TransitionCandidates
from tt_ray.planning.sampling import EpisodeStream

CHUNK = 250
"""Rollouts at once, by default: 250 of 50 Hopper steps take 0.8 GB in a model of 4 layers and width 128."""


class InOrder:
    """No preference, and every rollout keeps its place: its random numbers are its own all the way."""

    expansion: ClassVar[Literal["transition", "token"]] = "transition"

    def extend(self, totals: Tensor, candidates: TransitionCandidates) -> tuple[Tensor, Tensor]:
        """Total: 0. Score: the lower a beam's number, the higher."""
        zeros = torch.zeros_like(candidates.reward)
        places = torch.arange(zeros.shape[1], device=zeros.device, dtype=zeros.dtype)
        return zeros, zeros - places[:, None]


class RolloutSampler:
    """Draws futures of a model as it is: a search that is as wide as it has rollouts, and prunes nothing.

    Observations and actions are sampled without any filter; reward tokens are the likeliest, and nobody sees
    a value token. `context` is c, the most transitions that a rollout starts from, the present one counted;
    where the model's window is full, the last c - 1 stay. `chunk` is how many rollouts are computed at once.
    `UserError` where the context is longer than the model's, and for a model with goals.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        context: int,
        horizon: int,
        rollouts: int,
        decoder: DecoderName = "auto",
        chunk: int = CHUNK,
    ) -> None:
        model = checkpoint.model
        self.layout, self.horizon, self.rollouts = model.layout, horizon, rollouts
        self.device, self.dtype = model.head.device, model.head.dtype
        most = model.config.context_transitions
        if context > most:
            raise UserError(
                f"prediction.context: {context} transitions are more than the model's {most} "
                "(model.context_transitions)"
            )
        if self.layout.goal_dim:
            raise UserError("a model with goals cannot be rolled out: there is none to tell it")
        self.beams = math.ceil(rollouts / math.ceil(rollouts / chunk))
        planner = PlannerConfig(
            horizon=horizon + 1,  # the search's first transition is the present one
            beam_width=self.beams,
            n_expand=1,
            cdf_act=None,
            k_obs=self.layout.num_bins + 1,
            max_context_transitions=context,
        )
        # Nobody asks for the rewards and values that are predicted: any numbers may stand for their bins.
        zeros = torch.zeros(self.layout.num_bins + 1, device=self.device, dtype=self.dtype)
        self.searcher = make_searcher(model, planner, InOrder(), zeros, zeros, episodes=1, decoder=decoder)

    def __call__(self, context: Tensor, past: int, seed: int) -> Tensor:
        """Tokens [R, H, D] of one context's rollouts, as `sample_rollouts` gives them for several."""
        stream, parts = EpisodeStream(seed), []
        for first in range(0, self.rollouts, self.beams):
            noise = self._random_numbers(stream, first)
            with torch.inference_mode():
                plans = self.searcher.run(context[None].to(self.device), [past], noise)
            parts.append(plans.tokens[0, :, 1:].cpu())
        return torch.cat(parts)[: self.rollouts]

    def _random_numbers(self, stream: EpisodeStream, first: int) -> Uniforms:
        """Those of the rollouts numbered from `first`: each has its own, whatever else is computed."""
        action, observation = self.layout.action_dim, self.layout.observation_dim
        acted = (self.horizon + 1) * action
        size = acted + self.horizon * observation
        rows = np.stack([stream.uniforms(first + r, (size,)) for r in range(self.beams)])
        drawn = torch.from_numpy(rows).to(self.device, self.dtype)
        actions = drawn[:, :acted].unflatten(1, (self.horizon + 1, action))
        observations = drawn[:, acted:].unflatten(1, (self.horizon, observation))
        return Uniforms(
            actions.permute(1, 2, 0)[None, ..., None].contiguous(),
            observations.permute(1, 2, 0)[None].contiguous(),
        )


def sample_rollouts(
    checkpoint: Checkpoint,
    contexts: Tensor,
    past: Sequence[int],
    *,
    horizon: int,
    rollouts: int,
    seed: int,
    decoder: DecoderName = "auto",
    chunk: int = CHUNK,
) -> Tensor:
    """Tokens [E, R, H, D] of R futures of each context; transition h is h + 1 steps after the present one.

    `contexts` [E, (c - 1) * D + N] are aligned to the right: past[e] whole transitions, at most c - 1, and
    the present observation. From the step at which a rollout stops on, its tokens are stop tokens. A rollout
    depends on the checkpoint, its context, `seed`, its place in the result and the horizon, not on `chunk`.
    See `RolloutSampler` for the rest.
    """
    layout = checkpoint.model.layout
    context = (contexts.shape[1] - layout.observation_dim) // layout.slots + 1
    sampler = RolloutSampler(
        checkpoint, context=context, horizon=horizon, rollouts=rollouts, decoder=decoder, chunk=chunk
    )
    return torch.stack([sampler(contexts[e], count, stream_of(seed, e)) for e, count in enumerate(past)])


def ensemble_rollouts(
    ensemble: Ensemble,
    observation: NDArray[np.float32],
    *,
    horizon: int,
    rollouts: int,
    seed: int,
    hidden: NDArray[np.bool_] | None = None,
    actions: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Observations [R, H, N] of rollouts from the present one [N], in which `hidden` [N] are not seen.

    Rollout r belongs to member r % K from beginning to end (PETS's TS-infinity). Actions are the behaviour's,
    or the given ones [H, M]. As the Transformer's bins cannot, states do not leave the range of the data, and
    actions not theirs.
    """
    members, device = ensemble.members, ensemble.observation_mean.device
    each = math.ceil(rollouts / members)
    random = torch.Generator().manual_seed(seed % 2**63)

    def draw(moments: tuple[Tensor, Tensor]) -> Tensor:
        mean, std = moments
        return mean + std * torch.randn(mean.shape, generator=random).to(device)

    state = torch.from_numpy(observation).to(device).expand(members, each, -1)
    unseen = None if hidden is None else torch.from_numpy(hidden).to(device).expand(members, each, -1)
    given = None if actions is None else torch.from_numpy(actions).to(device)
    steps = []
    with torch.inference_mode():
        for h in range(horizon):
            if given is None:
                action = draw(ensemble.next_action(state, unseen))
            else:
                action = given[h].expand(members, each, -1)
            action = action.clamp(ensemble.action_low, ensemble.action_high)
            state = draw(ensemble.next_observation(state, action, unseen))
            state = state.clamp(ensemble.observation_low, ensemble.observation_high)
            unseen = None  # what a rollout has come to, it sees
            steps.append(state)
    stacked = torch.stack(steps, dim=2).transpose(0, 1).flatten(0, 1)  # rollout r: member r % K
    return stacked[:rollouts].cpu().numpy()


def stream_of(seed: int, number: int) -> int:
    """Seed of one of the independent streams that belong to `seed`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])
