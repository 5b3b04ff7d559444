"""The search's cache on CPU, its steps in C++: a tree of keys and values that is never reordered.

Shape letters: L layers, E episodes, B beams, n copies of a beam, h heads, w width of a head, D slots,
N observation, M action, V bins, H horizon, G goal. A goal and a context, aligned to the right, have P places,
as in `tt_ray.model.cache`; there, value columns count as places, here they have none, since nobody sees them.

Each transition of the search makes a node for every beam: its action and reward tokens, then the observation
that follows. A node stays where it was made, and a beam knows its past by `ancestors` [E, H, B]: the node at
every transition. Beams that share a past so share its memory, and rows are sorted by their past, so that what
one row has read is still in the core's cache for the next. Tokens of candidates are `tails` until `select`
makes some of them nodes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.errors import UserError
from tt_ray.model.native.build import load_library
from tt_ray.model.native.weights import Cache, Choice, Filter, Rows, pack_model, round_up
from tt_ray.model.transformer import TrajectoryTransformer

Ints = NDArray[np.int64]


class NativeCache:
    """A search's decoder, a transition at a time, for any number of episodes up to `episodes`.

    `open` takes the contexts. Each transition of the search is then `expand` for its actions, reward and
    value, `select`, and `observe` for the observation that follows; after the last `select` comes `finish`.
    What a row computes does not depend on the other rows, bit for bit. Settings are PlannerConfig's;
    `reward_values` and `value_values` [V + 1] are what tokens of those slots stand for.
    `NativeUnavailableError` where it cannot run.
    """

    unseen = 1
    """Transitions at the search's end that nobody attends to."""

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
        reward_values: Tensor,
        value_values: Tensor,
        k_act: int | None = None,
        cdf_act: float | None = None,
        k_obs: int = 1,
    ) -> None:
        layout = model.layout
        self.layout, self.window, self.keep = layout, window, keep
        self.beams, self.copies, self.horizon = beams, copies, horizon
        self.packed, self.dtype = pack_model(model), model.head.dtype
        self.goal, past = layout.goal_dim, max_context_transitions - 1
        self.prefix_length = self.goal + past * layout.slots + layout.observation_dim
        self.node = layout.slots - 1
        self.prefix_places = self.goal + past * self.node + layout.observation_dim
        self.tail_length = layout.action_dim + 1
        context = np.arange(self.prefix_length - self.goal) % layout.slots != layout.value_slot
        places = np.append(np.arange(self.goal), self.goal + np.flatnonzero(context))
        self._visible_places = torch.from_numpy(places)
        self._bin_values = [values.to(self.dtype).contiguous() for values in (reward_values, value_values)]
        self._choice = Choice(
            actions=Filter(top_k=k_act or 0, cdf=-1.0 if cdf_act is None else cdf_act),
            observations=Filter(top_k=k_obs, cdf=-1.0),
            reward_values=self._bin_values[0].data_ptr(),
            value_values=self._bin_values[1].data_ptr(),
        )
        self.slid_tokens = 0
        """Tokens fed again so far because a window was full."""
        try:
            self._allocate(episodes)
        except MemoryError as error:
            raise UserError(
                f"no memory to plan for {episodes} episodes at once; lower resources.episodes_per_actor"
            ) from error

    def open(self, tokens: Tensor, past: Sequence[int]) -> Tensor:
        """Begin new searches from [E, P]: goal, past[e] whole transitions and the present observation.

        Gives the logits [E, V + 1] of the first action token.
        """
        self.used, self.whole, self.active = 0, list(past), len(past)
        self.prefix_tokens = tokens
        present, seen = self.layout.observation_dim, np.array(past)
        self.first_place = self.prefix_length - seen * self.layout.slots - present - self.goal
        self.start[: self.active] = self.prefix_places - seen * self.node - present
        self.first_node[: self.active], self.first_whole[: self.active] = 0, True
        self.ranks = np.broadcast_to(np.arange(self.beams), (self.active, self.beams))
        self._order_rows()
        self._encode_prefix(np.arange(self.active))
        return self._arrays["pending"][: self.active, 0].clone()

    def expand(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw every candidate's actions with numbers [E, M, B, n].

        Gives [E, B, n] each: the mean reward, the mean value, and the likeliest value token.
        """
        uniforms = uniforms.to(self.dtype)
        shape = (self.active, self.beams, self.copies)
        rewards, values = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
        value_tokens = torch.empty(shape, dtype=torch.int64)
        numbers, stride = self._strided(uniforms)
        self._call(
            "expand",
            self._rows(self.candidate_rows, self.used),
            ctypes.byref(self._choice),
            ctypes.c_int64(self._transition),
            numbers,
            stride,
            *(pointer(tensor) for tensor in (self.tail_tokens, rewards, values, value_tokens)),
        )
        return rewards, values, value_tokens

    def select(self, parents: Tensor) -> None:
        """Make the candidates numbered `parents` [E, B], each beam * n + copy, the new beams."""
        beam, transition = parents // self.copies, self._transition
        episodes = torch.arange(self.active)[:, None]
        chosen, end = self.suffix_tokens[: self.active], self.used + self.tail_length
        chosen[..., : self.used] = chosen[..., : self.used][episodes, beam]
        chosen[..., self.used : end] = self.tail_tokens[episodes, parents]
        self.used = end
        if transition < self.nodes:
            self._adopt(transition, parents, beam.numpy())

    def observe(self, value_tokens: Tensor, stopped: Tensor, uniforms: Tensor | None) -> Tensor:
        """Feed the beams their value tokens [E, B] and decode the next observation; who has stopped, [E, B].

        `uniforms` [E, N, B] are for sampled observations. Where the finished transition fills the window, the
        window slides first.
        """
        transition = self._transition
        self._complete(transition)
        self.suffix_tokens[: self.active, :, self.used] = value_tokens
        stopped = stopped.clone(memory_format=torch.contiguous_format)
        noise = None if uniforms is None else uniforms.to(self.dtype)
        numbers, stride = (None, ctypes.c_int64(0)) if noise is None else self._strided(noise)
        self._call(
            "observe",
            self._rows(self.beam_rows, self.used),
            ctypes.byref(self._choice),
            ctypes.c_int64(transition),
            numbers,
            stride,
            *self._suffix_at(self.used),
            pointer(stopped),
        )
        self.used += 1 + self.layout.observation_dim
        return stopped

    def finish(self, value_tokens: Tensor) -> Tensor:
        """Note the last value tokens [E, B]; the tokens [E, B, H, D] of every beam's plan."""
        self.suffix_tokens[: self.active, :, self.used] = value_tokens
        observation = self.prefix_tokens[:, None, -self.layout.observation_dim :].expand(-1, self.beams, -1)
        whole = self.suffix_tokens[: self.active, :, : self.used + 1]
        return torch.cat([observation, whole], dim=-1).unflatten(-1, (self.horizon, self.layout.slots))

    @property
    def candidate_actions(self) -> Tensor:
        """Action tokens [E, B, n, M] that the last `expand` drew."""
        tails = self.tail_tokens[: self.active, :, : self.layout.action_dim]
        return tails.unflatten(1, (self.beams, self.copies))

    @property
    def present_observations(self) -> Tensor:
        """Tokens [E, B, N] of the observation from which each beam acts, in the beams' present order."""
        length, begun = self.layout.observation_dim, self._transition * self.layout.slots
        if begun == 0:
            return self.prefix_tokens[:, None, -length:].expand(-1, self.beams, -1)
        return self.suffix_tokens[: self.active, :, begun - length : begun]

    @property
    def _transition(self) -> int:
        return self.used // self.layout.slots

    def _allocate(self, episodes: int) -> None:
        network, lanes = self.packed.network, self.packed.lanes
        layers, heads, width = network.layers, network.heads, network.head_padded
        self.nodes = self.horizon - self.unseen
        held = max(1, self.nodes)
        prefix, node = round_up(self.prefix_places, lanes), round_up(self.node, lanes)
        candidates = self.beams * self.copies
        shapes = {
            "prefix_keys": (layers, episodes, heads, width, prefix),
            "prefix_values": (layers, episodes, heads, prefix, width),
            "node_keys": (layers, episodes, held, self.beams, heads, width, node),
            "node_values": (layers, episodes, held, self.beams, heads, self.node, width),
            "tails": (layers, episodes, candidates, 2, self.tail_length, heads, width),
            "pending": (episodes, self.beams, network.outputs),
        }
        self._arrays = {name: _zeros(shape, self.dtype) for name, shape in shapes.items()}
        self.suffix_tokens = torch.zeros(
            episodes, self.beams, self.horizon * self.layout.slots, dtype=torch.int64
        )
        self.tail_tokens = torch.zeros(episodes, candidates, self.tail_length, dtype=torch.int64)
        self.ancestors = np.zeros((episodes, held, self.beams), dtype=np.int32)
        self.start = np.zeros(episodes, dtype=np.int64)
        self.first_node = np.zeros(episodes, dtype=np.int64)
        self.first_whole = np.ones(episodes, dtype=np.bool_)
        notes = ("ancestors", "start", "first_node", "first_whole")
        self._cache = Cache(
            episodes=episodes,
            beams=self.beams,
            copies=self.copies,
            horizon=held,
            observation=self.layout.observation_dim,
            action=self.layout.action_dim,
            prefix=self.prefix_places,
            prefix_padded=prefix,
            node=self.node,
            node_padded=node,
            **{name: tensor.data_ptr() for name, tensor in self._arrays.items()},
            **{name: getattr(self, name).ctypes.data for name in notes},
        )

    def _adopt(self, transition: int, candidates: Tensor, parents: Ints) -> None:
        """Give the new beams their parents' past, and nodes of their own for the tokens that chose them."""
        self._inherit(transition, parents)
        self.ancestors[: self.active, transition] = np.arange(self.beams)
        candidates = candidates.contiguous()
        rows = self._rows(self.beam_rows, self.used)
        self._call("keep_tails", rows, ctypes.c_int64(transition), pointer(candidates))

    def _inherit(self, transition: int, parents: Ints) -> None:
        """Give the new beams their parents' past before `transition`."""
        past = self.ancestors[: self.active, :transition]
        past[:] = np.take_along_axis(past, parents[:, None], axis=2)
        self.ranks = np.take_along_axis(self.ranks, parents, axis=1)
        self._order_rows()

    def _complete(self, transition: int) -> None:
        """Count a transition that is whole with its value token; where that fills the window, slide it."""
        self.whole = [count + 1 for count in self.whole]
        full = [e for e, count in enumerate(self.whole) if count >= self.window]
        if full:
            self._slide(np.array(full), transition)

    def _order_rows(self) -> None:
        """Sort rows so that beams with a common past are neighbours."""
        self.beam_rows = np.argsort(self.ranks, axis=1, kind="stable")
        self.ranks = np.argsort(self.beam_rows, axis=1)
        copies = self.beam_rows[..., None] * self.copies + np.arange(self.copies)
        self.candidate_rows = np.ascontiguousarray(copies.reshape(self.active, -1))

    def _slide(self, full: Ints, transition: int) -> None:
        """Leave the last `keep` whole transitions of the episodes `full`, at positions from G.

        Their last token is the value token about to be fed: all others are computed anew where they are, once
        for all beams that share them.
        """
        layout = self.layout
        kept_from = transition + 1 - self.keep  # the transition of the search that begins the window
        seen = layout.observation_dim
        self.first_place[full] = self.prefix_length - self.goal + kept_from * layout.slots - seen
        inside = kept_from <= 0  # it lies in the prefix
        self.start[full] = self.prefix_places + (kept_from * self.node - seen if inside else 0)
        self.first_node[full], self.first_whole[full] = max(0, kept_from - 1), inside
        for e in full:
            self.whole[e] = self.keep
        if inside:
            self.slid_tokens += self._encode_prefix(full)
        for past in range(max(0, kept_from - 1), transition + 1):
            first = 0 if inside or past >= kept_from else self.tail_length
            last = self.tail_length if past == transition else self.node
            self.slid_tokens += self._encode_nodes(full, past, first, last)

    def _encode_prefix(self, chosen: Ints) -> int:
        """Compute the goals and visible contexts of the episodes `chosen`; how many tokens that are."""
        numbers = np.tile(np.arange(self.prefix_places), (self.active, 1))
        places, shift = self.prefix_places - self.goal, self.start[: self.active, None] - self.goal
        # The visible places of contexts are the last ones: they go to the front of each episode's list.
        numbers[:, self.goal :] = (numbers[:, :places] + shift) % places + self.goal
        counts = np.zeros(self.active, dtype=np.int64)
        counts[chosen] = self.prefix_places - self.start[chosen] + self.goal
        tokens = self.prefix_tokens[:, self._visible_places].contiguous()
        self._call("encode_prefix", self._rows(numbers, 0, counts), pointer(tokens))
        return int(counts.sum())

    def _encode_nodes(self, chosen: Ints, transition: int, first: int, last: int) -> int:
        """Compute places `first` to before `last` of a transition's nodes anew; how many tokens that are.

        Each node is computed by the first beam that comes of it.
        """
        numbers = np.zeros((self.active, self.beams), dtype=np.int64)
        counts = np.zeros(self.active, dtype=np.int64)
        for e in chosen:
            beams = np.sort(np.unique(self.ancestors[e, transition], return_index=True)[1])
            counts[e] = len(beams)
            numbers[e, : len(beams)] = beams
        token = transition * self.layout.slots + first + (first >= self.tail_length)
        self._call(
            "encode_nodes",
            self._rows(numbers, token, counts),
            *(ctypes.c_int64(number) for number in (transition, first, last)),
            *self._suffix_at(token),
        )
        return int(counts.sum()) * (last - first)

    def _rows(self, numbers: Ints, token: int, counts: Ints | None = None) -> Rows:
        """The rows [E, R] that are fed, the first time with the search's token number `token`."""
        if counts is None:
            counts = np.full(self.active, numbers.shape[1], dtype=np.int64)
        positions = self.prefix_length + token - self.first_place
        rows = Rows(self.active, numbers.shape[1], torch.get_num_threads())
        rows.numbers, rows.counts, rows.positions = (a.ctypes.data for a in (numbers, counts, positions))
        rows.arrays = (numbers, counts, positions)  # what it points to lives as long as it does
        return rows

    def _suffix_at(self, token: int) -> tuple[Any, ...]:
        """The search's tokens [E, B, length], that length, and where to begin."""
        length = self.suffix_tokens.shape[-1]
        return pointer(self.suffix_tokens), ctypes.c_int64(length), ctypes.c_int64(token)

    def _strided(self, uniforms: Tensor) -> tuple[Any, Any]:
        """Random numbers that are contiguous for each episode, and how far episodes lie apart."""
        if not uniforms[0].is_contiguous():
            uniforms = uniforms.contiguous()
        self._held = uniforms
        return pointer(uniforms), ctypes.c_int64(uniforms.stride(0))

    def _call(self, name: str, rows: Rows, *arguments: Any) -> None:
        function = getattr(load_library(), f"tt_ray_{name}_{str(self.dtype).removeprefix('torch.')}")
        function(*(ctypes.byref(item) for item in (self.packed.network, self._cache, rows)), *arguments)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where the numbers of `tensor` lie."""
    return ctypes.c_void_p(tensor.data_ptr())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that begin at a cache line. NumPy's allocator asks for huge pages; torch's does not."""
    line, size = 64, int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + line, dtype=np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
