"""Whole searches as CUDA graphs: one launch for what would be tens of thousands.

What a search does on the device depends on the host through `past` alone, so a graph belongs to one `past`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.expansions import TokenDecoder, Uniforms

logger = logging.getLogger(__name__)

SEEN = 1024  # patterns of `past` that are remembered as having occurred once


class Capture(Protocol):
    """Records work on a device."""

    def __call__(self, work: Callable[[], Plans]) -> tuple[Plans, Callable[[], None]]:
        """The tensors that `work` returns, and a function that does its device work again, into them.

        They hold nothing before the first replay.
        """
        ...


class CudaCapture:
    """Captures CUDA graphs that share one memory pool: only one may run at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Plans]) -> tuple[Plans, Callable[[], None]]:
        """As `Capture`; runs `work` once before, since libraries allocate their workspaces at first use."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            plans = work()
        return plans, graph.replay


@dataclass(frozen=True)
class Recorded:
    """One captured search."""

    plans: Plans
    replay: Callable[[], None]


class GraphedSearch:
    """`BeamSearch.run` with a fixed decoder and batch size, replayed from a graph where `past` is usual.

    A pattern of `past` runs directly when it first occurs and is captured when it comes again; the
    `max_graphs` patterns used last are kept, others start anew. Where a capture fails, a warning says so and
    all searches run directly.
    """

    def __init__(
        self,
        search: BeamSearch,
        decoder: TokenDecoder,
        *,
        max_graphs: int = 8,
        capture: Capture | None = None,
    ) -> None:
        self.search, self.decoder, self.max_graphs = search, decoder, max_graphs
        self.capture: Capture | None = capture or CudaCapture()
        self.graphs: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self.seen: deque[tuple[int, ...]] = deque(maxlen=SEEN)
        self.inputs: list[Tensor] = []

    @torch.inference_mode()
    def run(self, tokens: Tensor, past: Sequence[int], uniforms: Uniforms) -> Plans:
        """As `BeamSearch.run`; the plans are the caller's own."""
        key, given = tuple(past), _tensors(tokens, uniforms)
        if key not in self.graphs and not self._record(key, given):
            return self.search.run(self.decoder, tokens, past, uniforms)
        self.graphs.move_to_end(key)
        for buffer, tensor in zip(self.inputs, given, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        recorded = self.graphs[key]
        recorded.replay()
        plans = recorded.plans
        means = None if plans.actions is None else plans.actions.clone()
        return Plans(plans.tokens.clone(), plans.scores.clone(), means)

    def _record(self, key: tuple[int, ...], given: list[Tensor]) -> bool:
        """Capture the search of pattern `key` if it has occurred before; whether there is a graph now."""
        if self.capture is None or key not in self.seen:
            self.seen.append(key)
            return False
        self.seen.remove(key)
        if not self.inputs:
            self.inputs = [tensor.clone() for tensor in given]
        tokens, actions, *observations = self.inputs
        noise = Uniforms(actions, observations[0] if observations else None)
        while len(self.graphs) >= self.max_graphs:
            self.graphs.popitem(last=False)
        try:
            recorded = self.capture(lambda: self.search.run(self.decoder, tokens, key, noise))
        except RuntimeError as error:
            logger.warning("the search cannot be captured as a graph, it runs without: %s", error)
            self.capture = None
            return False
        self.graphs[key] = Recorded(*recorded)
        return True


def _tensors(tokens: Tensor, uniforms: Uniforms) -> list[Tensor]:
    drawn = [] if uniforms.observations is None else [uniforms.observations]
    return [tokens, uniforms.actions, *drawn]
