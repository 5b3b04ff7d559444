"""Operations that planning needs, counted: multiplications and additions of matrix products, nothing else.

One token through the model takes, in its linear layers, 2 * 12 * width^2 operations a layer (query, key,
value and projection 4 width^2, the feed-forward part 8 width^2), 4 * width a layer for every key that it
attends to, and 2 * width * (bins + 1) where its logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from tt_ray.config import ModelConfig, PlannerConfig
from tt_ray.data.tokens import TokenLayout


@dataclass(frozen=True)
class Work:
    """Counts operations for one model and one search."""

    model: ModelConfig
    layout: TokenLayout
    planner: PlannerConfig

    def tokens(self, count: float, keys: float, logits: bool = True) -> float:
        """Operations of `count` tokens that see `keys` keys each."""
        width, layers = self.model.embed_dim, self.model.num_layers
        head = 2 * width * (self.layout.num_bins + 1) if logits else 0
        return count * (layers * (24 * width**2 + 4 * width * keys) + head)

    @property
    def context(self) -> int:
        """Tokens of a full context that somebody sees: value tokens are hidden."""
        past = self.planner.max_context_transitions - 1
        return past * (self.layout.slots - 1) + self.layout.observation_dim

    def decision(self, slid_tokens: float = 0.0) -> float:
        """Operations of one cached search from a full context, every token once.

        `slid_tokens` are those that had to be fed again because the window was full; they are taken to see
        half of what was kept.
        """
        planner, layout = self.planner, self.layout
        beams, candidates = planner.beam_width, planner.beam_width * planner.n_expand
        total = self.tokens(self.context, (self.context + 1) / 2, logits=False)
        for step in range(planner.horizon):
            seen = self._visible(step)
            for j in range(layout.action_dim + 1):
                total += self.tokens(candidates, seen + j + 1)
            if step < planner.horizon - 1:
                for i in range(layout.observation_dim + 1):  # the value token does not see itself
                    total += self.tokens(beams, seen + layout.action_dim + 1 + i)
        keep = planner.resolve_window(self.model.context_transitions)[1]
        return total + self.tokens(slid_tokens, keep * (layout.slots - 1) / 2, logits=False)

    def reference_transition(self, step: int) -> float:
        """Operations of planned transition `step` (from 0) without a cache: a window for every token."""
        planner = self.planner
        beams, candidates = planner.beam_width, planner.beam_width * planner.n_expand
        total = 0.0
        for length in self.candidate_lengths(step):
            total += self.window(candidates, length)
        if step < planner.horizon - 1:
            for length in self.beam_lengths(step):
                total += self.window(beams, length)
        return total

    def candidate_lengths(self, step: int) -> list[int]:
        """Window lengths of the passes that give a transition's later actions, its reward and its value."""
        first = self._window_tokens(step)
        return [first + j + 1 for j in range(self.layout.action_dim + 1)]

    def beam_lengths(self, step: int) -> list[int]:
        """Window lengths of the passes that give the next observation and the first action after it."""
        whole = self._window_tokens(step + 1) - self.layout.observation_dim
        return [whole + i for i in range(self.layout.observation_dim + 1)]

    def window(self, rows: int, length: int) -> float:
        """Operations of `rows` windows of `length` tokens, with logits for each one's last token."""
        body = self.tokens(rows * length, (length + 1) / 2, logits=False)
        return body + rows * 2 * self.model.embed_dim * (self.layout.num_bins + 1)

    def _window_tokens(self, step: int) -> int:
        """Tokens in the window, hidden ones included, when planned transition `step` begins."""
        past = self._whole(step)
        return past * self.layout.slots + self.layout.observation_dim

    def _visible(self, step: int) -> int:
        """Keys seen when planned transition `step` begins."""
        past = self._whole(step)
        return past * (self.layout.slots - 1) + self.layout.observation_dim

    def _whole(self, step: int) -> int:
        """Whole transitions in the window when planned transition `step` begins."""
        window, keep = self.planner.resolve_window(self.model.context_transitions)
        whole = self.planner.max_context_transitions - 1
        for _ in range(step):
            whole = keep if whole + 1 >= window else whole + 1
        return whole
