"""Static key/value cache of a search: one prefix an episode, one suffix a beam, one tail a candidate.

Shape letters: L layers, E episodes, B beams, n copies of a beam, h heads, w width of a head, d embed_dim,
P prefix places, S suffix places, t tail places, D slots, N observation, M action, V bins, G goal.

Places. The goal's tokens are at places 0 to G - 1, their positions. A context is aligned to the right in the
other (max_context_transitions - 1) * D + N of the P places, so every episode's present observation ends the
prefix and a place has the same slot in every episode, however long its past is. The suffix goes on at place
P with the first action token. An episode's first visible token after the goal is at place start + G, `start`
[E]; a token at place g has position g - start. When the window is full only `start` moves, and the keys and
values of the kept transitions are computed again, with their new positions, where they are.

Nothing here waits for the device or copies to it: which episodes slide follows from `past`, which the host
knows, and single numbers reach the device as arguments of fills. So a search can be captured as a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_ray.model.transformer import Block, TrajectoryTransformer

logger = logging.getLogger(__name__)

Step = Callable[..., tuple[Tensor, Tensor]]
NEVER = float("-inf")


class SearchCache:
    """Keys, values and tokens of E searches that advance together, a token at a time.

    `open` gives the logits of the first action token. Each transition of the search is then
    `extend_candidates` for its M action tokens and its reward token, `select`, and `extend_beams` for its
    value token and the N observation tokens of the next one; after the last `select` comes `finish`. `window`
    and `keep` are PlannerConfig's. With `compiled` a token's step goes through torch.compile, if that works.
    `by_token`: `select` and `extend_beams` alone, for every token of the search (copies is 1).
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
        compiled: bool = False,
        by_token: bool = False,
    ) -> None:
        layout, config = model.layout, model.config
        self.model, self.layout, self.window, self.keep = model, layout, window, keep
        self.episodes, self.beams, self.copies, self.horizon = episodes, beams, copies, horizon
        self.score_dtype = torch.promote_types(model.head.dtype, torch.float32)
        self.step: Step = CompiledStep() if compiled else decode_token
        device = model.head.device
        goal, past = layout.goal_dim, (max_context_transitions - 1) * layout.slots
        self.prefix_length = goal + past + layout.observation_dim
        # Nothing attends to the last transition once it is scored, unless beams are chosen within it. With
        # two places more than that, steps see neither less than two nor all of them: lengths that
        # torch.compile would make extra programs for.
        last = layout.action_dim + 1 if by_token else 0
        self.kept_length = (horizon - 1) * layout.slots + last
        suffix_length = self.kept_length + 2
        tail_length = layout.action_dim + 1

        def pair(*rows: int, length: int) -> Tensor:
            """Keys and values: [L, 2, *rows, h, length, w]."""
            layers, heads, width = config.num_layers, config.num_heads, config.embed_dim
            shape = (layers, 2, *rows, heads, length, width // heads)
            return torch.zeros(shape, dtype=model.head.dtype, device=device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.prefix = pair(episodes, length=self.prefix_length)
        self.suffix = pair(episodes, beams, length=suffix_length)
        self.spare = torch.zeros_like(self.suffix)  # `select` reorders from the one into the other
        self.tail = pair(episodes, beams, copies, length=tail_length)
        self.prefix_tokens = numbers(episodes, self.prefix_length)
        self.suffix_tokens = numbers(episodes, beams, horizon * layout.slots)
        self.tail_tokens = numbers(episodes, beams, copies, tail_length)
        self.first_rows = torch.arange(episodes, device=device)[:, None] * beams
        self.start, self.place = numbers(episodes), numbers()
        self.places = torch.arange(self.prefix_length + suffix_length, device=device)
        self.slots = (self.places - self.prefix_length + layout.observation_dim) % layout.slots
        self.slots[:goal] = model.slots[:goal]
        # Additive masks: -inf where a place is before `start`, a value column, or not yet filled.
        self.bias = torch.zeros(episodes, len(self.places), dtype=model.head.dtype, device=device)
        self.tail_bias = torch.zeros(tail_length, dtype=model.head.dtype, device=device)
        self.whole: list[int] = []
        """Whole transitions that each episode's model sees."""
        self.used = self.tail_used = 0
        self.slid_tokens = 0
        """Tokens fed again so far because a window was full."""

    def open(self, tokens: Tensor, past: Sequence[int]) -> Tensor:
        """Begin new searches; logits [E, V + 1] of the first action token.

        tokens [E, P]: the goal; aligned to the right, past[e] whole transitions and the present observation.
        """
        goal, self.whole = self.layout.goal_dim, list(past)
        self.used = self.tail_used = 0
        for rows, count in runs(past):
            length = count * self.layout.slots + self.layout.observation_dim
            self.start[rows].fill_(self.prefix_length - length - goal)
        self.prefix_tokens.copy_(tokens)
        places, slots = self.places[: self.prefix_length], self.slots[: self.prefix_length]
        inside = (places >= self.start[:, None] + goal) | (places < goal)
        causal = places[:, None] >= places[None, :]
        visible = inside & (slots != self.layout.value_slot)
        # Padding sees itself: no empty softmax.
        mask = causal & visible[:, None, :] | (places[:, None] == places[None, :]) & ~inside[:, :, None]
        positions = torch.where(places < goal, places, (places - self.start[:, None]).clamp(min=0))
        hidden, cache = self.model.encode(tokens, positions, slots, mask[:, None])
        for layer, (key, value) in enumerate(cache):
            self.prefix[layer, 0], self.prefix[layer, 1] = key, value
        self.bias.fill_(NEVER)
        self.bias[:, : self.prefix_length].masked_fill_(visible, 0.0)
        self.tail_bias.fill_(NEVER)
        logits = self.model.logits_at(hidden[:, -1], self.layout.observation_dim - 1)
        return logits.to(self.score_dtype)

    def extend_candidates(self, tokens: Tensor) -> Tensor:
        """Feed every candidate its next token [E, B, n]; logits [E, B, n, V + 1] of the one after."""
        place = self.tail_used
        logits, pair = self._decode(tokens, self.used + place, self.tail)
        self.tail[..., place, :] = pair
        self.tail_tokens[..., place] = tokens
        self.tail_bias[place].fill_(0.0)
        self.tail_used += 1
        return logits

    def select(self, parents: Tensor) -> None:
        """Make the candidates numbered `parents` [E, B], each beam * n + copy, the new beams."""
        beams = (self.first_rows + parents // self.copies).flatten()
        candidates = (self.first_rows * self.copies + parents).flatten()
        start, end = self.used, self.used + self.tail_used
        tokens = self.suffix_tokens.flatten(0, 1)
        tokens[:, :start] = tokens[beams, :start]
        tokens[:, start:end] = self.tail_tokens.flatten(0, 2)[candidates, : self.tail_used]
        if end <= self.kept_length:
            old, new = self.suffix.flatten(2, 3), self.spare.flatten(2, 3)
            torch.index_select(old[..., :start, :], 2, beams, out=new[..., :start, :])
            if self.tail_used:
                tail = self.tail.flatten(2, 4)[..., : self.tail_used, :]
                torch.index_select(tail, 2, candidates, out=new[..., start:end, :])
            self.suffix, self.spare = self.spare, self.suffix
            self.bias[:, self.prefix_length + start : self.prefix_length + end].fill_(0.0)
            self.tail_bias.fill_(NEVER)
        self.used, self.tail_used = end, 0

    def extend_beams(self, tokens: Tensor) -> Tensor:
        """Feed every beam its next token [E, B]; logits [E, B, V + 1] of the one after.

        A value token completes a transition: where that fills the window, the window slides first.
        """
        place, is_value = self.used, self._slot(self.used) == self.layout.value_slot
        if is_value:
            self.whole = [count + 1 for count in self.whole]
            for rows, full in runs([count >= self.window for count in self.whole]):
                if full:
                    self._slide(rows)
        logits, pair = self._decode(tokens[..., None], place, None)
        self.suffix[..., place, :] = pair[:, :, :, :, 0]
        self.suffix_tokens[..., place] = tokens
        if not is_value:
            self.bias[:, self.prefix_length + place].fill_(0.0)
        self.used += 1
        return logits[:, :, 0]

    @property
    def candidate_actions(self) -> Tensor:
        """Action tokens [E, B, n, M] that the candidates have been fed since the last `select`."""
        return self.tail_tokens[..., : self.layout.action_dim]

    @property
    def present_observations(self) -> Tensor:
        """Tokens [E, B, N] of the observation from which each beam acts, in the beams' present order."""
        length, begun = self.layout.observation_dim, self.used // self.layout.slots * self.layout.slots
        if begun == 0:
            return self.prefix_tokens[:, None, -length:].expand(-1, self.beams, -1)
        return self.suffix_tokens[..., begun - length : begun]

    def finish(self, tokens: Tensor) -> Tensor:
        """Note the last value tokens [E, B]; the tokens [E, B, H, D] of every beam's plan."""
        self.suffix_tokens[..., self.used] = tokens
        observation = self.prefix_tokens[:, None, -self.layout.observation_dim :].expand(-1, self.beams, -1)
        whole = self.suffix_tokens[..., : self.used + 1]
        return torch.cat([observation, whole], dim=-1).unflatten(-1, (self.horizon, self.layout.slots))

    def _decode(self, tokens: Tensor, index: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits after tokens [E, B, n] at suffix place `index`, and their keys and values."""
        self.place.fill_(self.prefix_length + index)
        length = max(2, self.used)
        suffix, bias = self.suffix[..., :length, :], self.bias[:, : self.prefix_length + length]
        if isinstance(self.step, CompiledStep):
            torch._dynamo.mark_dynamic(suffix, 5)
            torch._dynamo.mark_dynamic(bias, 1)
        head = self.model.head_at(self._slot(index))
        logits, pair = self.step(
            self.model, head, tokens, self.place, self.start, self.prefix, suffix, bias, tail, self.tail_bias
        )
        return logits.to(self.score_dtype), pair

    def _slide(self, rows: slice) -> None:
        """Leave the last `keep` whole transitions of the episodes `rows`, at positions from G.

        Their last token is the value token about to be fed: all others are computed anew.
        """
        goal, count = self.layout.goal_dim, self.keep * self.layout.slots - 1
        first = self.prefix_length + self.used - count
        in_prefix = max(0, self.prefix_length - first)
        begin = self.used - (count - in_prefix)
        past = self.prefix_tokens[rows, None].expand(-1, self.beams, -1)
        parts = [past[..., :goal], past[..., self.prefix_length - in_prefix :]]
        tokens = torch.cat([*parts, self.suffix_tokens[rows, :, begin : self.used]], dim=-1)
        _, cache = self.model.encode(tokens.flatten(0, 1))
        self.slid_tokens += tokens.numel()
        for layer, pair in enumerate(cache):
            for part, tensor in enumerate(pair):
                kept = tensor[:, :, goal:].unflatten(0, (-1, self.beams))
                if in_prefix:  # tokens that all beams share: any beam's will do
                    self.prefix[layer, part, rows, :, -in_prefix:] = kept[:, 0, :, :in_prefix]
                self.suffix[layer, part, rows, :, :, begin : self.used] = kept[:, :, :, in_prefix:]
        self.start[rows].fill_(first - goal)
        self.bias[rows, goal:first].fill_(NEVER)
        for e in range(self.episodes)[rows]:
            self.whole[e] = self.keep

    def _slot(self, index: int) -> int:
        """Slot of suffix place `index`."""
        return (index + self.layout.observation_dim) % self.layout.slots


def decode_token(
    model: TrajectoryTransformer,
    head: tuple[Tensor, Tensor | None],
    tokens: Tensor,
    place: Tensor,
    start: Tensor,
    prefix: Tensor,
    suffix: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    tail_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits [E, B, n, V + 1] after tokens [E, B, n], and their keys and values [L, 2, E, B, n, h, w].

    place [] is where the tokens stand, head the model's at their slot, start [E] as in SearchCache. Keys and
    values: prefix [L, 2, E, h, P, w], suffix [L, 2, E, B, h, S, w], tail [L, 2, E, B, n, h, t, w]. Additive
    masks: bias [E, P + S], tail_bias [t]. Pure, and the same program for every place.
    """
    layout, length = model.layout, prefix.shape[-2]
    slot = (place - length + layout.observation_dim) % layout.slots
    x = model.embed(tokens, slot, (place - start)[:, None, None])
    masks = [part[:, None, None, None] for part in (bias[:, :length], bias[:, length:])]
    masks += [slot == layout.value_slot, tail_bias]
    pairs = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        query, key, value = block.attention.split(normed := block.ln1(x))
        own_tail = None if tail is None else tail[layer]
        mixed = attend(query, key, value, prefix[layer], suffix[layer], own_tail, masks)
        x = (normed if block.port else x) + block.attention.proj(mixed.flatten(-2))
        x = x + block.mlp(block.ln2(x))
        pairs += [key, value]
    return F.linear(model.final_norm(x), *head), torch.stack(pairs).unflatten(0, (-1, 2))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    suffix: Tensor,
    tail: Tensor | None,
    masks: Sequence[Tensor],
) -> Tensor:
    """Attention of query [E, B, n, h, w] over prefix, suffix, itself and tail as one softmax; same shape.

    Copies of a beam share its suffix and all beams their episode's prefix: those are read once for all.
    `masks` are additive but for the third, which is True where a token does not see itself.
    """
    rows = query.shape[1:3]
    query = query * query.shape[-1] ** -0.5
    by_head = query.transpose(2, 3)  # [E, B, h, n, w]
    shared = by_head.transpose(1, 2).flatten(2, 3) @ prefix[0].mT  # [E, h, B * n, P]
    itself = (query * key).sum(-1).masked_fill(masks[2], NEVER)  # [E, B, n, h]
    scores = [
        shared.unflatten(2, rows).transpose(1, 2) + masks[0],
        by_head @ suffix[0].mT + masks[1],
        itself.mT[..., None],
    ]
    if tail is not None:
        own = (query[..., None, :] * tail[0]).sum(-1) + masks[3]  # [E, B, n, h, t]
        scores.append(own.transpose(2, 3))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1)
    parts = weights.split([score.shape[-1] for score in scores], dim=-1)
    mixed = parts[0].transpose(1, 2).flatten(2, 3) @ prefix[1]
    mixed = mixed.unflatten(2, rows).transpose(1, 2) + parts[1] @ suffix[1]
    mixed = mixed.transpose(2, 3) + parts[2].transpose(2, 3) * value
    if tail is not None:
        mixed = mixed + (parts[3].transpose(2, 3)[..., None] * tail[1]).sum(-2)
    return mixed


@cache
def compiled_decode_token() -> Step:
    """`decode_token` through torch.compile: for each size of search one program with a tail, one without."""
    # Sizes are few, but their programs share one count, and above it torch.compile gives up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(decode_token, dynamic=False, fullgraph=True)


class CompiledStep:
    """`decode_token` compiled; where that does not work (no C++ compiler?), as it is after one warning."""

    def __init__(self) -> None:
        self.works = True

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As `decode_token`."""
        if self.works:
            try:
                return compiled_decode_token()(*arguments)
            except Exception as error:  # whatever a compiler may raise; the step is pure, so do it again
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("torch.compile does not work here, decoding goes on without: %s", reason)
                self.works = False
        return decode_token(*arguments)


def runs(values: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Slices of equal neighbours, each with its value."""
    start = 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        yield slice(start, stop), value
        start = stop
