from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tt_ray.bench.planning import Case, random_checkpoint, vary
from tt_ray.bench.work import Work
from tt_ray.config import ModelConfig
from tt_ray.model.native import NativeCache
from tt_ray.planning.engine import PlanningEngine

CPU = torch.device("cpu")
SMALL = Case(
    "small", 5, 3, horizon=4, beam_width=6, model=ModelConfig(num_layers=2, num_heads=2, embed_dim=32)
)


def test_a_window_costs_what_torch_counts() -> None:
    model, work, rows, length = random_checkpoint(SMALL, CPU).model, SMALL.work, 3, 37
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        hidden, _ = model.encode(torch.zeros(rows, length, dtype=torch.int64))
        model.logits_at(hidden[:, -1], 0)
    linear = counter.get_total_flops()  # it does not know the CPU's attention
    causal = work.model.num_layers * 4 * work.model.embed_dim * rows * length * (length + 1) / 2
    assert work.window(rows, length) == linear + causal


class Counting(NativeCache):
    """Adds up the tokens that are fed, and the keys that each of them sees."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokens, self.keys, self.with_logits = 0, 0, 0

    def _encode_prefix(self, chosen: Any) -> int:
        count = super()._encode_prefix(chosen)
        self.tokens += count
        self.keys += count * (count + 1) // 2
        return count

    def expand(self, uniforms: torch.Tensor) -> Any:
        seen = self.prefix_places - int(self.start[0]) + self.node * self._transition
        self._count(self.beams * self.copies, [seen + j + 1 for j in range(self.tail_length)])
        return super().expand(uniforms)

    def observe(self, *args: Any) -> torch.Tensor:
        seen = self.prefix_places - int(self.start[0]) + self.node * self._transition + self.tail_length
        self._count(self.beams, [seen + i for i in range(self.layout.observation_dim + 1)])
        return super().observe(*args)

    def _count(self, rows: int, keys: list[int]) -> None:
        self.tokens += rows * len(keys)
        self.with_logits += rows * len(keys)
        self.keys += rows * sum(keys)


@pytest.mark.parametrize(("horizon", "beams"), [(1, 1), (4, 6), (6, 3)])
def test_a_decision_costs_what_is_fed(horizon: int, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_ray.planning.decoders.NativeCache", Counting)
    case = replace(SMALL, horizon=horizon, beam_width=beams)
    engine = PlanningEngine(
        random_checkpoint(case, CPU), case.planner, discount=0.99, slots=1, decoder="native"
    )
    cache = engine.searcher.decoder
    assert isinstance(cache, Counting)
    engine.add(0, 0, torch.zeros(5).numpy())
    for _ in range(4):
        engine.observe(0, torch.zeros(3).numpy(), 0.0, torch.zeros(5).numpy())
    engine.act()
    model, work = case.model, case.work
    linear = cache.tokens * 24 * model.embed_dim**2 * model.num_layers
    head = cache.with_logits * 2 * model.embed_dim * (case.layout.num_bins + 1)
    attention = cache.keys * 4 * model.embed_dim * model.num_layers
    assert cache.slid_tokens == 0
    assert work.decision() == linear + head + attention


def test_tokens_fed_again_are_counted() -> None:
    case = vary(SMALL, window=6, horizon=6)
    engine = PlanningEngine(
        random_checkpoint(case, CPU), case.planner, discount=0.99, slots=1, decoder="native"
    )
    engine.add(0, 0, torch.zeros(5).numpy())
    for _ in range(2):
        engine.observe(0, torch.zeros(3).numpy(), 0.0, torch.zeros(5).numpy())
    engine.act()  # two past and four planned transitions fill a window of six
    slid = engine.searcher.decoder.slid_tokens
    kept = case.planner.resolve_window(6)[1]
    assert 0 < slid <= case.beam_width * kept * case.layout.slots
    assert case.work.decision(slid) > case.work.decision()


def test_the_window_slides_in_the_counts_as_in_the_search() -> None:
    work = Work(ModelConfig(context_transitions=6), SMALL.layout, replace(SMALL.planner, horizon=9))
    assert [work._whole(step) for step in range(7)] == [4, 5, 4, 5, 4, 5, 4]
    assert work.candidate_lengths(1)[-1] == 5 * SMALL.layout.slots + 5 + 4
    assert len(work.beam_lengths(0)) == SMALL.layout.observation_dim + 1


@pytest.mark.parametrize("slots", [16, 25, 37, 71])
def test_a_case_with_other_slots(slots: int) -> None:
    case = vary(SMALL, slots=slots)
    assert case.layout.slots == slots
    assert min(case.observation_dim, case.action_dim) >= 1
