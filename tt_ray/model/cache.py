"""Static key/value cache of a search: one prefix an episode, one suffix a beam, one tail a candidate.

Shape letters: L layers, E episodes, B beams, n copies of a beam, h heads, w width of a head, d embed_dim,
P prefix places, S suffix places, D slots, N observation, M action, V bins.

Places. A context is aligned to the right in P = (max_context_transitions - 1) * D + N places, so every
episode's present observation ends the prefix and a place has the same slot in every episode, however long
its past is. The suffix goes on at place P with the first action token. `start` [E] is the place of an
episode's first visible token; a token at place g has position g - start. When the window is full only
`start` moves, and the keys and values of the kept transitions are computed again, with their new positions,
where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tt_ray.model.transformer import Block, TrajectoryTransformer


class SearchCache:
    """Keys, values and tokens of E searches that advance together, a token at a time.

    `open` gives the logits of the first action token. Each transition of the search is then
    `extend_candidates` for its M action tokens and its reward token, `select`, and `extend_beams` for its
    value token and the N observation tokens of the next one; after the last `select` comes `finish`. `window`
    and `keep` are PlannerConfig's.
    """

    def __init__(
        self,
        model: TrajectoryTransformer,
        *,
        episodes: int,
        beams: int,
        copies: int,
        horizon: int,
        max_context_transitions: int,
        window: int,
        keep: int,
    ) -> None:
        layout, config = model.layout, model.config
        self.model, self.layout, self.window, self.keep = model, layout, window, keep
        self.beams, self.copies, self.horizon = beams, copies, horizon
        device = model.head.device
        self.prefix_length = (max_context_transitions - 1) * layout.slots + layout.observation_dim
        # Nothing attends to the last transition once it is scored.
        suffix_length = (horizon - 1) * layout.slots
        tail_length = layout.action_dim + 1

        def pair(*rows: int, length: int) -> Tensor:
            """Keys and values: [L, 2, *rows, h, length, w]."""
            width = config.embed_dim // config.num_heads
            shape = (config.num_layers, 2, *rows, config.num_heads, length, width)
            return torch.zeros(shape, dtype=model.head.dtype, device=device)

        self.prefix = pair(episodes, length=self.prefix_length)
        self.suffix = pair(episodes, beams, length=suffix_length)
        self.tail = pair(episodes, beams, copies, length=tail_length)
        self.prefix_tokens = torch.zeros(episodes, self.prefix_length, dtype=torch.int64, device=device)
        plan_length = horizon * layout.slots
        self.suffix_tokens = torch.zeros(episodes, beams, plan_length, dtype=torch.int64, device=device)
        self.tail_tokens = torch.zeros(episodes, beams, copies, tail_length, dtype=torch.int64, device=device)
        self.places = torch.arange(self.prefix_length + suffix_length, device=device)
        self.slots = (self.places - self.prefix_length + layout.observation_dim) % layout.slots
        self.whole: list[int] = []
        """Whole transitions that each episode's model sees."""
        self.used = self.tail_used = 0

    def open(self, tokens: Tensor, past: Sequence[int]) -> Tensor:
        """Begin new searches; logits [E, V + 1] of the first action token.

        tokens [E, P] are the contexts, aligned to the right: past[e] whole transitions and the observation.
        """
        self.used = self.tail_used = 0
        self.whole = list(past)
        lengths = torch.tensor(past, device=tokens.device) * self.layout.slots + self.layout.observation_dim
        self.start = self.prefix_length - lengths
        self.prefix_tokens.copy_(tokens)
        places, slots = self.places[: self.prefix_length], self.slots[: self.prefix_length]
        inside = places >= self.start[:, None]
        causal = places[:, None] >= places[None, :]
        mask = causal & (inside & (slots != self.layout.value_slot))[:, None, :]
        # Padding sees itself: no empty softmax.
        mask |= (places[:, None] == places[None, :]) & ~inside[:, :, None]
        positions = (places - self.start[:, None]).clamp(min=0)
        hidden, cache = self.model.encode(tokens, positions, slots, mask[:, None])
        for layer, (key, value) in enumerate(cache):
            self.prefix[layer, 0], self.prefix[layer, 1] = key, value
        self._update_visibility()
        return self.model.logits_at(hidden[:, -1], self.layout.observation_dim - 1)

    def extend_candidates(self, tokens: Tensor) -> Tensor:
        """Feed every candidate its next token [E, B, n]; logits [E, B, n, V + 1] of the one after."""
        self.tail_tokens[..., self.tail_used] = tokens
        self.tail_used += 1
        place = self.used + self.tail_used - 1
        tail, suffix = self.tail[..., : self.tail_used, :], self.suffix[..., : self.used, :]
        return self._forward(tokens, place, tail, suffix)

    def select(self, parents: Tensor) -> None:
        """Make the candidates numbered `parents` [E, B], each beam * n + copy, the new beams."""
        episodes = torch.arange(len(parents), device=parents.device)[:, None]
        beam, copy = parents // self.copies, parents % self.copies
        start, end = self.used, self.used + self.tail_used
        if end <= self.suffix.shape[-2]:
            self.suffix[..., :start, :] = self.suffix[..., :start, :][:, :, episodes, beam]
            self.suffix[..., start:end, :] = self.tail[:, :, episodes, beam, copy]
        self.suffix_tokens[..., :start] = self.suffix_tokens[..., :start][episodes, beam]
        self.suffix_tokens[..., start:end] = self.tail_tokens[episodes, beam, copy]
        self.used, self.tail_used = end, 0

    def extend_beams(self, tokens: Tensor) -> Tensor:
        """Feed every beam its next token [E, B]; logits [E, B, V + 1] of the one after.

        A value token completes a transition: where that fills the window, the window slides first.
        """
        if self._slot(self.used) == self.layout.value_slot:
            self.whole = [count + 1 for count in self.whole]
            full = [e for e, count in enumerate(self.whole) if count >= self.window]
            if full:
                self._slide(full)
        self.suffix_tokens[..., self.used] = tokens
        self.used += 1
        suffix = self.suffix[..., : self.used, :]
        return self._forward(tokens[..., None], self.used - 1, None, suffix)[:, :, 0]

    def finish(self, tokens: Tensor) -> Tensor:
        """Note the last value tokens [E, B]; the tokens [E, B, H, D] of every beam's plan."""
        self.suffix_tokens[..., self.used] = tokens
        observation = self.prefix_tokens[:, None, -self.layout.observation_dim :].expand(-1, self.beams, -1)
        whole = self.suffix_tokens[..., : self.used + 1]
        return torch.cat([observation, whole], dim=-1).unflatten(-1, (self.horizon, self.layout.slots))

    def _forward(self, tokens: Tensor, index: int, tail: Tensor | None, suffix: Tensor) -> Tensor:
        """Logits [E, B, n, V + 1] after tokens [E, B, n] at suffix place `index`, which they fill.

        With a tail, the new token is the tail's last place; without, n is 1 and it is the suffix's last.
        """
        slot = self._slot(index)
        positions = (self.prefix_length + index - self.start)[:, None, None]
        x = self.model.embed(tokens, torch.tensor(slot, device=tokens.device), positions)
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            query, key, value = block.attention.split(block.ln1(x))
            own = suffix[layer] if tail is None else tail[layer]
            own[0, ..., -1, :] = key if tail is not None else key[:, :, 0]
            own[1, ..., -1, :] = value if tail is not None else value[:, :, 0]
            mixed = self._attend(query, layer, suffix[layer], None if tail is None else tail[layer])
            x = x + block.attention.proj(mixed)
            x = x + block.mlp(block.ln2(x))
        return self.model.logits_at(self.model.final_norm(x), slot)

    def _attend(self, query: Tensor, layer: int, suffix: Tensor, tail: Tensor | None) -> Tensor:
        """Attention of query [E, B, n, h, w] over prefix, suffix and tail as one softmax; [E, B, n, d].

        Copies of a beam share its suffix and all beams their episode's prefix: those are read once for all.
        """
        _, beams, copies, _, width = query.shape
        by_head = (query * width**-0.5).transpose(2, 3)  # [E, B, h, n, w]
        prefix_key, prefix_value = self.prefix[layer]
        shared = by_head.transpose(1, 2).flatten(2, 3) @ prefix_key.transpose(-1, -2)  # [E, h, B * n, P]
        shared = shared.unflatten(2, (beams, copies)).transpose(1, 2) + self.prefix_bias
        used = suffix.shape[-2]
        scores = [shared, by_head @ suffix[0].transpose(-1, -2) + self.suffix_bias[..., :used]]
        if tail is not None:
            own = query.unsqueeze(-2) * width**-0.5 @ tail[0].transpose(-1, -2)  # [E, B, n, h, 1, t]
            scores.append(own.squeeze(-2).transpose(2, 3))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        parts = weights.split([score.shape[-1] for score in scores], dim=-1)
        mixed = parts[0].transpose(1, 2).flatten(2, 3) @ prefix_value
        mixed = mixed.unflatten(2, (beams, copies)).transpose(1, 2) + parts[1] @ suffix[1]
        mixed = mixed.transpose(2, 3)  # [E, B, n, h, w]
        if tail is not None:
            mixed = mixed + (parts[2].transpose(2, 3).unsqueeze(-2) @ tail[1]).squeeze(-2)
        return mixed.flatten(-2)

    def _slide(self, full: list[int]) -> None:
        """Leave the last `keep` whole transitions of the episodes `full`, at positions from 0.

        Their last token is the value token about to be fed: all others are computed anew.
        """
        count = self.keep * self.layout.slots - 1
        first = self.prefix_length + self.used - count
        chosen = torch.tensor(full, device=self.start.device)
        in_prefix = max(0, self.prefix_length - first)
        past = self.prefix_tokens[chosen, None, self.prefix_length - in_prefix :].expand(-1, self.beams, -1)
        ahead = self.suffix_tokens[chosen, :, self.used - (count - in_prefix) : self.used]
        _, cache = self.model.encode(torch.cat([past, ahead], dim=-1).flatten(0, 1))
        for layer, pair in enumerate(cache):
            for part, tensor in enumerate(pair):
                rows = tensor.unflatten(0, (len(full), self.beams))
                if in_prefix:  # tokens that all beams share: any beam's will do
                    self.prefix[layer, part, chosen, :, -in_prefix:] = rows[:, 0, :, :in_prefix]
                self.suffix[layer, part, chosen, :, :, self.used - (count - in_prefix) : self.used] = rows[
                    :, :, :, in_prefix:
                ]
        self.start[chosen] = first
        for e in full:
            self.whole[e] = self.keep
        self._update_visibility()

    def _update_visibility(self) -> None:
        """Additive masks [E, 1, 1, 1, P or S] of prefix and suffix: no value column, none before start."""
        hidden = (self.places < self.start[:, None]) | (self.slots == self.layout.value_slot)
        bias = torch.zeros(hidden.shape, dtype=self.prefix.dtype, device=hidden.device)
        bias = bias.masked_fill(hidden, float("-inf"))[:, None, None, None]
        self.prefix_bias, self.suffix_bias = bias[..., : self.prefix_length], bias[..., self.prefix_length :]

    def _slot(self, index: int) -> int:
        """Slot of suffix place `index`."""
        return (index + self.layout.observation_dim) % self.layout.slots
