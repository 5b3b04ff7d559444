"""Where a trained model looks: its attention by layer and head, and how Markovian or striated each head is.

Shape letters: L layers, h heads, b windows, T tokens of a window (its goal's included), D slots.

A token predicts the next one, its target: a slot of a transition. Both scores ask what becomes of the
attention of the queries whose target has at least three transitions before it:

- Markovian: the mass on the target's transition and the one before it;
- striated: the mass on the target's own slot in the transitions before its own. Queries whose target is a
  value do not count: value columns are hidden. How much of that mass lies beyond the previous transition
  tells one stripe, which is Markovian too, from several.

    score = (mass - uniform) / (1 - uniform)

where both masses are means over the queries and `uniform` is that of a head which looks at all visible keys
alike. 1: all of the mass lies there; 0: no more than by chance; below 0: less. A ratio of the two would have
no fixed top: that depends on the place in the window and on D, so the latest queries would decide it, and
models of different tasks could not be set side by side.

The control is the same score of models that have learned nothing, on the same windows: freshly initialised
ones, whose attention is almost uniform, and ones with the trained model's own numbers shuffled within each
tensor, whose attention is as sharp as the trained one's. A score says something where it is above the
largest that any head of any of them has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.data.tokens import Kind, TokenLayout
from tt_ray.data.windows import WindowSet, goals_of_windows
from tt_ray.errors import UserError
from tt_ray.model.transformer import Attention, TrajectoryTransformer

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SCORES = ("markovian", "striated")
PAST = 3
"""Transitions that a query's target needs before it: with fewer, little else is there to be looked at."""
CONTROL_SEEDS = 5
CHUNK = 2**24
"""Attention weights of one layer that are held at once."""


@dataclass(frozen=True)
class Scores:
    """One score of every head."""

    mass: Floats
    """Mean mass on the score's keys, [L, h]."""
    uniform: float
    """The same of a head that looks at all visible keys alike."""

    @property
    def values(self) -> Floats:
        """The score of each head, [L, h], at most 1."""
        return (self.mass - self.uniform) / (1.0 - self.uniform)

    @property
    def best(self) -> tuple[int, int]:
        """Layer and head, from 0, of the largest score."""
        layer, head = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(layer), int(head)


@dataclass(frozen=True)
class AttentionStudy:
    """A model's attention on real windows, its scores, and those of models that have learned nothing."""

    maps: Floats
    """Attention of queries (rows) to keys, the mean over the windows: [L, h, T, T]."""
    visible: Flags
    """Whether a query may see a key, [T, T]."""
    layout: TokenLayout
    windows: int
    scores: dict[str, Scores]
    """By name, `SCORES`."""
    beyond: Floats
    """Share of the mass on the striated score's keys that lies beyond the previous transition, [L, h]."""
    control: dict[str, dict[str, Floats]]
    """By score and by kind of control: the score of each head, [seeds, L, h]."""

    def line(self, name: str) -> float:
        """What a score has to beat: the largest that any head of any control has."""
        return max(float(values.max()) for values in self.control[name].values())

    def heads(self) -> list[dict[str, float]]:
        """A row for each head, counted from 1: both scores, the masses that they come from, `beyond`."""
        layers, heads = self.beyond.shape
        columns = {name: self.scores[name].values for name in SCORES}
        columns |= {f"{name}_mass": self.scores[name].mass for name in SCORES} | {"beyond": self.beyond}
        return [
            {"layer": layer + 1, "head": head + 1}
            | {name: float(values[layer, head]) for name, values in columns.items()}
            for layer in range(layers)
            for head in range(heads)
        ]

    def to_json(self) -> dict[str, Any]:
        """All but the maps, as plain data."""
        found = {}
        for name in SCORES:
            layer, head = self.scores[name].best
            score, line = float(self.scores[name].values[layer, head]), self.line(name)
            best = {"layer": layer + 1, "head": head + 1, "score": score}
            largest = {kind: float(values.max()) for kind, values in self.control[name].items()}
            found[name] = best | {
                "uniform_mass": self.scores[name].uniform,
                "control": line,
                "control_largest": largest,
                "above_control": score > line,
            }
        seeds = len(next(iter(self.control[SCORES[0]].values())))
        return {"windows": self.windows, "control_seeds": seeds, **found, "heads": self.heads()}


def study_attention(
    model: TrajectoryTransformer, tokens: Tensor, control_seeds: int = CONTROL_SEEDS
) -> AttentionStudy:
    """Maps and scores of a model on the windows `tokens` [b, T], and the scores of its controls.

    `UserError` where the windows are too short for the scores.
    """
    layout, length = model.layout, tokens.shape[1]
    scored_keys(layout, length)  # refuses windows that are too short, before the work
    visible = model.visible[:length, :length].cpu().numpy()
    maps = mean_attention(model, tokens)
    control: dict[str, dict[str, list[Floats]]] = {name: {} for name in SCORES}
    for kind, make in (("fresh", fresh), ("shuffled", shuffled)):
        for seed in range(control_seeds):
            found = head_scores(mean_attention(make(model, seed), tokens), visible, layout)
            for name in SCORES:
                control[name].setdefault(kind, []).append(found[name].values)
    stacked = {
        name: {kind: np.stack(seeds) for kind, seeds in kinds.items()} for name, kinds in control.items()
    }
    scores, beyond = head_scores(maps, visible, layout), share_beyond(maps, layout)
    return AttentionStudy(maps, visible, layout, len(tokens), scores, beyond, stacked)


def full_windows(windows: WindowSet, count: int) -> Tensor:
    """Inputs of up to `count` windows without padding, evenly spread over those of the set: [b, T].

    `UserError` where there is none.
    """
    whole = torch.nonzero(windows.starts + windows.window <= windows.ends).flatten()
    if len(whole) == 0:
        raise UserError(
            f"no held-out episode has the {windows.window} transitions of the model's window: "
            "attention is looked at on whole windows of episodes that were not trained on"
        )
    places = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(np.int64)
    chosen = whole[torch.from_numpy(places)]
    goals = torch.from_numpy(goals_of_windows(len(windows)))
    return windows.gather(chosen, goals[chosen])[0]


def attention_weights(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    """The weights [b, h, T, T] with which the module mixes its values, for its input x [b, T, d] and mask."""
    query, key, _ = (part.transpose(1, 2) for part in attention.split(x))
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


@torch.no_grad()
def mean_attention(model: TrajectoryTransformer, tokens: Tensor) -> Floats:
    """Attention of each layer and head, the mean over the windows `tokens` [b, T]: [L, h, T, T]."""
    length, heads = tokens.shape[1], model.config.num_heads
    total = torch.zeros(len(model.blocks), heads, length, length, dtype=torch.float64)
    model.eval()
    with _watched(model, total):
        for chunk in tokens.split(max(1, CHUNK // (heads * length**2))):
            model(chunk)
    return (total / len(tokens)).numpy()


@contextmanager
def _watched(model: TrajectoryTransformer, total: Tensor) -> Iterator[None]:
    """Add up the weights of all that passes through the model's attention, without changing the model."""

    def watch(layer: int, attention: Attention) -> torch.utils.hooks.RemovableHandle:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            total[layer] += attention_weights(attention, *inputs).sum(0).double().cpu()

        return attention.register_forward_pre_hook(add)

    modules = [module for module in model.modules() if isinstance(module, Attention)]
    handles = [watch(layer, attention) for layer, attention in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_scores(maps: Floats, visible: Flags, layout: TokenLayout) -> dict[str, Scores]:
    """Both scores of maps [L, h, T, T]; `UserError` where no target has enough transitions before it."""
    return {name: _score(maps, visible, keys) for name, keys in scored_keys(layout, len(visible)).items()}


def scored_keys(layout: TokenLayout, length: int) -> dict[str, Flags]:
    """Keys [T, T] whose mass each score counts, by query; a query without any does not count.

    `UserError` where the T = `length` tokens are too few transitions for any.
    """
    place, slots = np.arange(length) - layout.goal_dim, layout.slots
    back, own_slot = _transitions_back(layout, length), place % slots
    counts = ((place + 1) // slots >= PAST)[:, None]
    if not counts.any():
        raise UserError(
            f"a window of {(length - layout.goal_dim + 1) // slots} transitions is too short to tell how far "
            f"back a head looks: at least {PAST + 1} are needed (model.context_transitions)"
        )
    near = (back == 0) | (back == 1)
    same = (own_slot[None, :] == ((place + 1) % slots)[:, None]) & (own_slot != layout.value_slot)[None, :]
    return {"markovian": counts & near, "striated": counts & same & (back > 0)}


def share_beyond(maps: Floats, layout: TokenLayout) -> Floats:
    """Share of the mass on the striated score's keys that lies two or more transitions back, [L, h]."""
    keys = scored_keys(layout, maps.shape[-1])["striated"]
    far = keys & (_transitions_back(layout, len(keys)) >= 2)
    mass = maps[..., keys].sum(axis=-1)
    return np.divide(maps[..., far].sum(axis=-1), mass, out=np.zeros_like(mass), where=mass > 0)


def _transitions_back(layout: TokenLayout, length: int) -> NDArray[np.int64]:
    """How many transitions a key lies before the query's target, [T, T]; -1 and less: in none of them."""
    place = np.arange(length) - layout.goal_dim
    back = ((place + 1) // layout.slots)[:, None] - (place // layout.slots)[None, :]
    return np.where(place[None, :] >= 0, back, -1)  # a goal's token is in no transition


def _score(maps: Floats, visible: Flags, keys: Flags) -> Scores:
    keys = keys & visible
    counts = keys.any(axis=1)
    uniform = keys[counts].sum(axis=1) / visible[counts].sum(axis=1)
    mass = np.where(keys, maps, 0.0)[..., counts, :].sum(axis=-1)
    return Scores(mass.mean(axis=-1), float(uniform.mean()))


def fresh(model: TrajectoryTransformer, seed: int) -> TrajectoryTransformer:
    """A newly initialised model of the same size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TrajectoryTransformer(model.config, model.layout).to(model.head.device)


@torch.no_grad()
def shuffled(model: TrajectoryTransformer, seed: int) -> TrajectoryTransformer:
    """A copy of the model, the numbers of each of its tensors in random order."""
    random, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in other.parameters():
        order = torch.randperm(parameter.numel(), generator=random).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def token_kinds(layout: TokenLayout, length: int) -> list[Kind | None]:
    """Kind of each token of a window, [T]; None for a goal's."""
    kinds = [layout.kinds[place % layout.slots] for place in range(length - layout.goal_dim)]
    return [None] * layout.goal_dim + kinds
