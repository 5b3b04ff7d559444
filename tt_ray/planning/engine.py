"""Planning for many episodes at once: slots, contexts of different lengths in one batch, one search for all.

Batches always have the same shape, whoever is in them, and every episode draws from its own random stream:
what an episode does depends on the checkpoint, the settings and its seed alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tt_ray.config import PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.cache import SearchCache
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.planning.beam import BeamSearch, Plans, SearchSettings, Uniforms
from tt_ray.planning.objectives import Return
from tt_ray.planning.sampling import EpisodeStream


@dataclass
class Slot:
    """One live episode: its past as tokens, and what is left of its plan."""

    episode: int
    stream: EpisodeStream
    observation: NDArray[np.float32]
    past: deque[NDArray[np.int64]]
    """Whole transitions [D], at most max_context_transitions - 1."""
    decisions: int = 0
    plan: deque[NDArray[np.float32]] = field(default_factory=deque)
    """Actions still to be taken from the last plan."""


class PlanningEngine:
    """Beam search behind `add`, `act`, `observe`, `remove`, for up to `slots` episodes at once."""

    def __init__(
        self, checkpoint: Checkpoint, planner: PlannerConfig, *, discount: float, slots: int
    ) -> None:
        model = checkpoint.model
        self.slots, self.planner, self.plan_every = slots, planner, planner.plan_every
        self.discretizer: Discretizer = checkpoint.discretizer
        self.layout: TokenLayout = model.layout
        self.low = np.asarray(checkpoint.spec.action_low, dtype=np.float32)
        self.high = np.asarray(checkpoint.spec.action_high, dtype=np.float32)
        window, keep = planner.resolve_window(model.config.context_transitions)
        self.cache = SearchCache(
            model,
            episodes=slots,
            beams=planner.beam_width,
            copies=planner.n_expand,
            horizon=planner.horizon,
            max_context_transitions=planner.max_context_transitions,
            window=window,
            keep=keep,
        )
        settings = SearchSettings(
            horizon=planner.horizon,
            beam_width=planner.beam_width,
            n_expand=planner.n_expand,
            k_act=planner.k_act,
            cdf_act=planner.cdf_act,
            k_obs=planner.k_obs,
        )
        self.device, self.dtype = model.head.device, model.head.dtype
        reward, value = (self._bin_values(slot) for slot in (self.layout.reward_slot, self.layout.value_slot))
        self.search = BeamSearch(self.layout, settings, Return(discount), reward, value)
        self.live: dict[int, Slot] = {}
        self.rows: list[int | None] = [None] * slots

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start `episode` in a free slot with its first observation [N]; `seed` fixes its random numbers."""
        if None not in self.rows:
            raise ValueError(f"all {self.slots} slots are taken")
        self.rows[self.rows.index(None)] = episode
        past: deque[NDArray[np.int64]] = deque(maxlen=self.planner.max_context_transitions - 1)
        self.live[episode] = Slot(episode, EpisodeStream(seed), np.array(observation), past)

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        self.rows[self.rows.index(episode)] = None
        del self.live[episode]

    def act(self) -> dict[int, NDArray[np.float32]]:
        """The next action [M] of every live episode; plans for those whose last plan is used up."""
        due = [slot for slot in self.live.values() if not slot.plan]
        if due:
            self._plan(due)
        return {episode: slot.plan.popleft() for episode, slot in self.live.items()}

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Append what came of an action to the episode's context."""
        slot = self.live[episode]
        value = 0.0  # hidden from every query, so any value will do
        row = np.concatenate([slot.observation, action, [reward, value]]).astype(np.float32)
        slot.past.append(self.discretizer.encode(row).astype(np.int64))
        slot.observation = np.array(next_observation)  # an environment may write all into one array

    def search_plans(self, due: list[Slot]) -> Plans:
        """Search for the episodes `due`; row e of the result belongs to `rows[e]`, others mean nothing."""
        layout, settings = self.layout, self.search.settings
        tokens = np.zeros((self.slots, self.cache.prefix_length), dtype=np.int64)
        past = [0] * self.slots
        shape = (settings.horizon, layout.action_dim, settings.beam_width, settings.n_expand)
        seen = (settings.horizon - 1, layout.observation_dim, settings.beam_width)
        actions = np.zeros((self.slots, *shape), dtype=np.float32)
        observations = np.zeros((self.slots, *seen), dtype=np.float32)
        drawn = settings.k_obs > 1
        for slot in due:
            row = self.rows.index(slot.episode)
            context = [*slot.past, self.discretizer.encode(slot.observation)]
            flat = np.concatenate(context)
            tokens[row, -len(flat) :], past[row] = flat, len(slot.past)
            size = np.prod(shape, dtype=int)
            uniforms = slot.stream.uniforms(slot.decisions, (size + drawn * np.prod(seen, dtype=int),))
            actions[row] = uniforms[:size].reshape(shape)
            if drawn:
                observations[row] = uniforms[size:].reshape(seen)
            slot.decisions += 1
        noise = Uniforms(self._tensor(actions), self._tensor(observations) if drawn else None)
        with torch.inference_mode():
            return self.search.run(self.cache, torch.from_numpy(tokens).to(self.device), past, noise)

    def _plan(self, due: list[Slot]) -> None:
        plans = self.search_plans(due)
        layout, steps = self.layout, self.planner.plan_every
        best = plans.tokens[:, 0, :steps, layout.observation_dim : layout.reward_slot].cpu().numpy()
        # Where a plan stops early its actions end and the next decision plans anew; until they are cut off,
        # any bin may stand for the stop token.
        actions = self.discretizer.decode(np.minimum(best, layout.num_bins - 1), first=layout.observation_dim)
        for slot in due:
            row = self.rows.index(slot.episode)
            lived = best[row, :, 0] != layout.stop_token
            slot.plan.extend(np.clip(actions[row][lived], self.low, self.high))

    def _bin_values(self, slot: int) -> torch.Tensor:
        return self._tensor(np.append(self.discretizer.representatives[slot], np.float32(0)))

    def _tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)
