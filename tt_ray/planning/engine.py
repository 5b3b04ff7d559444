"""Planning for many episodes at once: slots, contexts of different lengths in one batch, one search for all.

Every episode draws from its own random stream, and what a search computes for it does not depend on the
others: on the native decoder because rows are independent, on the others, with one thread, because a batch
always has the same shape. So on one decoder and kind of processor, what an episode does depends on the
checkpoint, the settings and its seed alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tt_ray.config import DecoderName, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.critic import CriticCheckpoint, require_same_data
from tt_ray.planning.beam import Plans
from tt_ray.planning.decoders import make_searcher
from tt_ray.planning.expansions import Uniforms
from tt_ray.planning.goals import Goals
from tt_ray.planning.objectives import Objective, Parts, planned_objective
from tt_ray.planning.sampling import EpisodeStream


@dataclass
class Slot:
    """One live episode: its past as tokens, and what is left of its plan."""

    episode: int
    stream: EpisodeStream
    goal: NDArray[np.int64]
    """Tokens [G]."""
    observation: NDArray[np.float32]
    past: deque[NDArray[np.int64]]
    """Whole transitions [D], at most max_context_transitions - 1."""
    decisions: int = 0
    plan: deque[NDArray[np.float32]] = field(default_factory=deque)
    """Actions still to be taken from the last plan."""


class PlanningEngine:
    """Beam search behind `add`, `act`, `observe`, `remove`, for up to `slots` episodes at once.

    `decoder` is ResourcesConfig's. The objective q needs a critic. Where a goal model's environment asks for
    a goal, observations are [goal, observation], [G + N]. `UserError` where model, objective and critic do
    not belong together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        planner: PlannerConfig,
        *,
        discount: float,
        slots: int,
        decoder: DecoderName = "auto",
        critic: CriticCheckpoint | None = None,
    ) -> None:
        model = checkpoint.model
        self.slots, self.planner, self.plan_every = slots, planner, planner.plan_every
        self.discretizer: Discretizer = checkpoint.discretizer
        self.layout: TokenLayout = model.layout
        self.low = np.asarray(checkpoint.spec.action_low, dtype=np.float32)
        self.high = np.asarray(checkpoint.spec.action_high, dtype=np.float32)
        self.device, self.dtype = model.head.device, model.head.dtype
        self.goals = Goals(checkpoint, planner.goal)
        values = self._tensor(np.pad(self.discretizer.representatives, ((0, 0), (0, 1))))
        objective = self._objective(checkpoint, discount, values, critic)
        of_actions = values[self.layout.observation_dim : -2, :-1] if planner.execute == "means" else None
        self.searcher = make_searcher(
            model,
            planner,
            objective,
            values[-2],
            values[-1],
            action_values=of_actions,
            episodes=slots,
            decoder=decoder,
        )
        past = planner.max_context_transitions - 1
        self.context_length = self.layout.goal_dim + past * self.layout.slots + self.layout.observation_dim
        self.live: dict[int, Slot] = {}
        self.on_plan: Callable[[int, NDArray[np.float32]], None] | None = None
        """Told of every plan that is made: the episode, and the best plan's transitions [H, D] as the values
        that their tokens stand for, NaN from where the plan stops. For those who watch; changes nothing."""

    @property
    def splits(self) -> bool:
        """Whether planning for some of the live episodes costs less than planning for all."""
        return self.searcher.flexible

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start `episode` in a free slot with observation [N]; `seed` fixes its random numbers.

        `ValueError` where no slot is free.
        """
        if len(self.live) == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        past: deque[NDArray[np.int64]] = deque(maxlen=self.planner.max_context_transitions - 1)
        goal, present = self.goals.split(observation)
        self.live[episode] = Slot(episode, EpisodeStream(seed), goal, present, past)

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        del self.live[episode]

    def act(self, episodes: Collection[int] | None = None) -> dict[int, NDArray[np.float32]]:
        """The next action [M] of `episodes`, or of all; plans for those whose last plan is used up."""
        chosen = [self.live[episode] for episode in (self.live if episodes is None else episodes)]
        due = [slot for slot in chosen if not slot.plan]
        if due:
            self._plan(due)
        return {slot.episode: slot.plan.popleft() for slot in chosen}

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Append an action [M] and what came of it, with observation [N], to the episode's context."""
        slot = self.live[episode]
        value = 0.0  # hidden from every query, so any value will do
        row = np.concatenate([slot.observation, action, [reward, value]]).astype(np.float32)
        slot.past.append(self.discretizer.encode(row).astype(np.int64))
        slot.goal, slot.observation = self.goals.split(next_observation)

    def search_plans(self, due: list[Slot]) -> Plans:
        """Search for the episodes `due`; row e of the result is due[e]'s, rows after those mean nothing."""
        rows = len(due) if self.searcher.flexible else self.slots
        tokens = np.zeros((rows, self.context_length), dtype=np.int64)
        past = [0] * rows
        actions, observations = self._random_numbers(rows, due)
        for row, slot in enumerate(due):
            flat = np.concatenate([*slot.past, self.discretizer.encode(slot.observation)])
            tokens[row, : self.layout.goal_dim] = slot.goal
            tokens[row, -len(flat) :], past[row] = flat, len(slot.past)
            slot.decisions += 1
        noise = Uniforms(self._tensor(actions), None if observations is None else self._tensor(observations))
        with torch.inference_mode():
            return self.searcher.run(torch.from_numpy(tokens).to(self.device), past, noise)

    def _random_numbers(
        self, rows: int, due: list[Slot]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Each episode's own numbers for its next decision, as `Uniforms` has them."""
        planner, layout = self.planner, self.layout
        shape = (planner.horizon, layout.action_dim, planner.beam_width, planner.n_expand)
        seen = (planner.horizon - 1, layout.observation_dim, planner.beam_width)
        actions = np.zeros((rows, *shape), dtype=np.float32)
        observations = np.zeros((rows, *seen), dtype=np.float32) if planner.k_obs > 1 else None
        size = actions[0].size
        for row, slot in enumerate(due):
            extra = 0 if observations is None else observations[0].size
            uniforms = slot.stream.uniforms(slot.decisions, (size + extra,))
            actions[row] = uniforms[:size].reshape(shape)
            if observations is not None:
                observations[row] = uniforms[size:].reshape(seen)
        return actions, observations

    def _plan(self, due: list[Slot]) -> None:
        plans = self.search_plans(due)
        layout, steps = self.layout, self.planner.plan_every
        best = plans.tokens[:, 0, :steps, layout.observation_dim : layout.reward_slot].cpu().numpy()
        # Where a plan stops early its actions end and the next decision plans anew; until they are cut off,
        # any bin may stand for the stop token.
        actions = self.discretizer.decode(np.minimum(best, layout.num_bins - 1), first=layout.observation_dim)
        if plans.actions is not None:
            actions = plans.actions[:, 0, :steps].float().cpu().numpy()
        for row, slot in enumerate(due):
            lived = best[row, :, 0] != layout.stop_token
            slot.plan.extend(np.clip(actions[row][lived], self.low, self.high))
        if self.on_plan is not None:
            whole = plans.tokens[: len(due), 0].cpu().numpy()  # [e, H, D]
            values = self.discretizer.decode(np.minimum(whole, layout.num_bins - 1)).astype(np.float32)
            values[whole[..., 0] == layout.stop_token] = np.nan
            for row, slot in enumerate(due):
                self.on_plan(slot.episode, values[row])

    def _objective(
        self, checkpoint: Checkpoint, discount: float, values: torch.Tensor, critic: CriticCheckpoint | None
    ) -> Objective:
        kind, target = planned_objective(self.planner), self.planner.target
        if kind.uses_goal and not self.layout.goal_dim:
            raise UserError(
                f"planner.objective {self.planner.objective} needs a model that was trained with goals, and "
                "this one was not: add a `goal` section and train again"
            )
        if not kind.uses_critic or critic is None:
            return kind.make(Parts(discount, values, target=target))
        require_same_data(critic, checkpoint.spec)
        network = critic.critic.to(self.device, self.dtype)
        return kind.make(Parts(discount, values, network, critic.config, target))

    def _tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)
