"""How the model decodes: in C++ on a CPU, in compiled steps and captured graphs on a GPU, or in PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tt_ray.config import DecoderName, PlannerConfig
from tt_ray.model.cache import SearchCache
from tt_ray.model.native import NativeCache, NativeTokenCache, NativeUnavailableError
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.expansions import Decoder, SearchSettings, TokenDecoder, Uniforms
from tt_ray.planning.graphs import GraphedSearch
from tt_ray.planning.objectives import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Searcher:
    """A search bound to the decoder that it runs on."""

    name: Literal["native", "graphs", "compiled", "eager"]
    decoder: Decoder | TokenDecoder
    run: Callable[[Tensor, Sequence[int], Uniforms], Plans]
    """(contexts [E, P], whole past transitions of each, random numbers) -> plans."""
    flexible: bool
    """Takes any number of episodes, with results equal bit for bit; else as many as it has room for."""


def make_searcher(
    model: TrajectoryTransformer,
    planner: PlannerConfig,
    objective: Objective,
    reward_values: Tensor,
    value_values: Tensor,
    *,
    action_values: Tensor | None = None,
    episodes: int,
    decoder: DecoderName = "auto",
) -> Searcher:
    """The fastest search that runs here, for up to `episodes` at once; `decoder` asks for a certain one.

    What the bins stand for is given as to `BeamSearch`.

    auto is native on a CPU and graphs on a GPU. Where that cannot be had, one logged line says why, and what
    runs in its place.
    """
    window, keep = planner.resolve_window(model.config.context_transitions)
    sizes: dict[str, Any] = {
        "episodes": episodes,
        "beams": planner.beam_width,
        "horizon": planner.horizon,
        "max_context_transitions": planner.max_context_transitions,
        "window": window,
        "keep": keep,
    }
    filters: dict[str, Any] = {"k_act": planner.k_act, "cdf_act": planner.cdf_act, "k_obs": planner.k_obs}
    settings = SearchSettings(planner.horizon, planner.beam_width, planner.n_expand, **filters)
    search = BeamSearch(model.layout, settings, objective, reward_values, value_values, action_values)
    on_gpu, by_token = model.head.device.type == "cuda", objective.expansion == "token"
    if decoder == "native" or (decoder == "auto" and not on_gpu):
        try:
            if by_token:
                return _bind("native", search, NativeTokenCache(model, **sizes))
            bin_values: dict[str, Any] = {"reward_values": reward_values, "value_values": value_values}
            cache = NativeCache(model, copies=planner.n_expand, **sizes, **filters, **bin_values)
            return _bind("native", search, cache)
        except NativeUnavailableError as reason:
            logger.warning("planning runs in plain PyTorch, several times slower: %s", reason)
            decoder = "eager"
    sizes |= {"copies": 1, "by_token": True} if by_token else {"copies": planner.n_expand}
    if decoder == "eager":
        return _bind("eager", search, SearchCache(model, **sizes))
    compiled = SearchCache(model, **sizes, compiled=True)
    if on_gpu and decoder != "compiled":
        return Searcher("graphs", compiled, GraphedSearch(search, compiled).run, flexible=False)
    return _bind("compiled", search, compiled)


def _bind(name: Any, search: BeamSearch, decoder: Decoder | TokenDecoder) -> Searcher:
    def run(tokens: Tensor, past: Sequence[int], uniforms: Uniforms) -> Plans:
        return search.run(decoder, tokens, past, uniforms)

    return Searcher(name, decoder, run, flexible=name == "native")
