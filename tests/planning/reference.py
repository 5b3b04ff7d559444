"""An uncached, unbatched search: a beam at a time, the whole window through the model at every token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.expansions import SearchSettings


@dataclass(frozen=True)
class Beam:
    visible: tuple[int, ...]  # tokens that the model sees
    plan: tuple[int, ...]  # tokens since the present observation began
    rewards: float = 0.0
    score: float = 0.0
    stopped: bool = False


def draw(logits: Tensor, u: float, k: int | None, cdf: float | None) -> int:
    if k == 1:
        return int(logits.argmax())
    p = logits.softmax(0)
    kept = sorted(range(len(p)), key=lambda i: -float(p[i]))[: k or len(p)]
    if cdf is not None:
        total, dropped = sum(float(p[i]) for i in kept), 0.0
        while len(kept) > 1 and dropped + float(p[kept[-1]]) < cdf * total:
            dropped += float(p[kept[-1]])
            kept.pop()
    running, total = 0.0, sum(float(p[i]) for i in kept)
    for i in sorted(kept):
        running += float(p[i])
        if running > u * total:
            return i
    return max(kept)


class ReferenceSearch:
    def __init__(
        self,
        model: TrajectoryTransformer,
        settings: SearchSettings,
        window: int,
        keep: int,
        discount: float,
        reward_values: Tensor,
        value_values: Tensor,
    ) -> None:
        self.model, self.settings, self.window, self.keep, self.discount = (
            model,
            settings,
            window,
            keep,
            discount,
        )
        self.reward_values, self.value_values = reward_values, value_values
        self.slots, self.bins = model.layout.slots, model.layout.num_bins

    def feed(self, beam: Beam, token: int) -> Beam:
        visible = (*beam.visible, token)
        if len(visible) == self.window * self.slots:
            visible = visible[-self.keep * self.slots :]
        return replace(beam, visible=visible, plan=(*beam.plan, token))

    @torch.no_grad()
    def logits(self, beam: Beam) -> Tensor:
        return self.model(torch.tensor([beam.visible]))[0, -1]

    def run(self, context: list[int], u_actions: Tensor, u_observations: Tensor | None) -> list[Beam]:
        s, layout = self.settings, self.model.layout
        beams = [Beam(tuple(context), tuple(context[-layout.observation_dim :]))] * s.beam_width
        for step in range(s.horizon):
            candidates = []
            for b, beam in enumerate(beams):
                for copy in range(s.n_expand):
                    candidates.append(self.expand(beam, u_actions[step, :, b, copy], step, copy))
            order = sorted(range(len(candidates)), key=lambda i: -candidates[i].score)
            beams = [candidates[i] for i in order[: s.beam_width]]
            if step < s.horizon - 1:
                noise = None if u_observations is None else u_observations[step]
                beams = [self.observe(beam, b, noise) for b, beam in enumerate(beams)]
        return [replace(beam, plan=self.blank_after_stop(beam.plan)) for beam in beams]

    def blank_after_stop(self, plan: tuple[int, ...]) -> tuple[int, ...]:
        for t in range(0, len(plan), self.slots):
            if plan[t] == self.bins:
                return plan[:t] + (self.bins,) * (len(plan) - t)
        return plan

    def expand(self, beam: Beam, u: Tensor, step: int, copy: int) -> Beam:
        s = self.settings
        score = beam.score if copy == 0 else float("-inf")
        new = beam
        for j in range(self.model.layout.action_dim):
            new = self.feed(new, draw(self.logits(new)[: self.bins], float(u[j]), s.k_act, s.cdf_act))
        reward_logits = self.logits(new)
        rewards = new.rewards + self.discount**step * float(reward_logits.softmax(0) @ self.reward_values)
        new = self.feed(new, int(reward_logits[: self.bins].argmax()))
        value_logits = self.logits(new)
        if not beam.stopped:
            score = rewards + self.discount ** (step + 1) * float(value_logits.softmax(0) @ self.value_values)
        new = self.feed(new, int(value_logits[: self.bins].argmax()))
        return replace(new, rewards=rewards, score=score)

    def observe(self, beam: Beam, b: int, u: Tensor | None) -> Beam:
        for i in range(self.model.layout.observation_dim):
            logits = self.logits(beam)
            choice = logits if i == 0 else logits[: self.bins]
            k = 1 if u is None else self.settings.k_obs
            token = draw(choice, 0.0 if u is None else float(u[i, b]), k, None)
            stopped = beam.stopped or (i == 0 and token == self.bins)
            beam = self.feed(replace(beam, stopped=stopped), self.bins if stopped else token)
        return beam
