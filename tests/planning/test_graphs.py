from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_beam import CASES, DISCOUNT, LAYOUT, bin_values, random_contexts, random_model, random_uniforms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tt_ray.model.cache import SearchCache
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.expansions import Uniforms
from tt_ray.planning.graphs import GraphedSearch
from tt_ray.planning.objectives import Return

NAMES = ("slides each transition", "sampled observations", "wide window")


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Operations(TorchDispatchMode):
    """Notes every operation with the very tensors it read and wrote, as a CUDA graph notes addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.notes:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            fresh = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(fresh), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor done in place
                    old.copy_(new)


class FakeCapture:
    """Replays the operations on the same memory and runs none of the search's Python, like a CUDA graph."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Callable[[], Plans]) -> tuple[Plans, Callable[[], None]]:
        self.captures += 1
        with Operations() as operations:
            plans = work()
        plans.tokens.fill_(-1)
        plans.scores.fill_(float("nan"))
        return plans, operations.replay


class Setting:
    """A search of one of the cases, with inputs by seed."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.settings, window, keep, self.max_context = CASES[name]
        self.cache = SearchCache(
            random_model(0).to(device),
            episodes=3,
            beams=self.settings.beam_width,
            copies=self.settings.n_expand,
            horizon=self.settings.horizon,
            max_context_transitions=self.max_context,
            window=window,
            keep=keep,
        )
        values = bin_values().to(device)
        self.search = BeamSearch(LAYOUT, self.settings, Return(DISCOUNT), values, values)

    def inputs(self, seed: int) -> tuple[Tensor, Uniforms]:
        contexts = random_contexts([0, 0, 0], self.cache.prefix_length, seed)
        return contexts, random_uniforms(self.settings, 3, seed)

    def direct(self, past: Sequence[int], seed: int) -> Plans:
        contexts, uniforms = self.inputs(seed)
        with torch.inference_mode():
            return self.search.run(self.cache, contexts, past, uniforms)


def assert_equal(plans: Plans, expected: Plans) -> None:
    assert torch.equal(plans.tokens, expected.tokens)
    assert torch.equal(plans.scores, expected.scores)


@pytest.mark.parametrize("name", NAMES)
def test_replays_equal_direct_runs_whatever_ran_in_between(name: str) -> None:
    setting, fake = Setting(name), FakeCapture()
    graphed = GraphedSearch(setting.search, setting.cache, capture=fake)
    most = setting.max_context - 1
    # Odd and even numbers of reorderings, and other patterns, between the replays of one.
    patterns = [(most, most, most), (0, most, 1), (most, most, most), (most, most, most), (0, most, 1)]
    for seed, past in enumerate([*patterns, (1, 1, 0), *patterns]):
        contexts, uniforms = setting.inputs(seed)
        assert_equal(graphed.run(contexts, past, uniforms), setting.direct(past, seed))
    assert fake.captures == 2
    assert list(graphed.graphs) == [(most, most, most), (0, most, 1)]


def test_plans_outlive_the_next_replay() -> None:
    setting = Setting(NAMES[0])
    graphed = GraphedSearch(setting.search, setting.cache, capture=FakeCapture())
    past = (1, 1, 1)
    kept = []
    for seed in range(4):
        contexts, uniforms = setting.inputs(seed)
        kept.append(graphed.run(contexts, past, uniforms))
        contexts.fill_(0)  # the caller may use its own tensors again
        uniforms.actions.fill_(0.5)
    for seed, plans in enumerate(kept):
        assert_equal(plans, setting.direct(past, seed))


def test_only_what_comes_again_is_captured_and_the_least_used_goes() -> None:
    setting, fake = Setting(NAMES[0]), FakeCapture()
    graphed = GraphedSearch(setting.search, setting.cache, capture=fake, max_graphs=2)

    def run(*counts: int) -> list[int]:
        """Captures so far, after searches with every episode's past as given."""
        return [run_one(count) for count in counts]

    def run_one(count: int) -> int:
        past = (count,) * 3
        contexts, uniforms = setting.inputs(count)
        assert_equal(graphed.run(contexts, past, uniforms), setting.direct(past, count))
        return fake.captures

    assert run(0, 1, 2) == [0, 0, 0]
    assert run(0, 0, 1, 0) == [1, 1, 2, 2]
    assert run(2, 0) == [3, 3]  # takes the place of 1
    assert list(graphed.graphs) == [(2, 2, 2), (0, 0, 0)]
    assert run(1, 1, 2) == [3, 4, 4]
    assert list(graphed.graphs) == [(0, 0, 0), (1, 1, 1)]


def test_a_capture_that_fails_leaves_direct_runs(caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    def fail(work: Callable[[], Plans]) -> tuple[Plans, Callable[[], None]]:
        attempts.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    setting = Setting(NAMES[0])
    graphed = GraphedSearch(setting.search, setting.cache, capture=fail)
    for seed in range(4):
        contexts, uniforms = setting.inputs(seed)
        assert_equal(graphed.run(contexts, (1, 1, 1), uniforms), setting.direct((1, 1, 1), seed))
    assert len(attempts) == len(caplog.records) == 1
    assert "not permitted when stream is capturing" in caplog.text


class Watch(TorchDispatchMode):
    """Fails where an operation waits for the device, or takes a tensor there from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        places = {tensor.device.type for tensor in tensors((args, kwargs))}
        assert places <= {"meta"}, f"{func} reads {places}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_a_search_neither_waits_for_the_device_nor_copies_to_it(name: str) -> None:
    """On the meta device nothing can be read back: `item`, `bool` and boolean indexing raise."""
    setting = Setting(name, device="meta")
    contexts, uniforms = setting.inputs(0)
    contexts, actions = contexts.to("meta"), uniforms.actions.to("meta")
    noise = None if uniforms.observations is None else uniforms.observations.to("meta")
    past = [0, setting.max_context - 1, setting.max_context - 1]
    with torch.inference_mode(), Watch() as watch:
        plans = setting.search.run(setting.cache, contexts, past, Uniforms(actions, noise))
    assert plans.tokens.device.type == "meta"
    assert watch.count > 100


def test_the_watch_sees_what_it_should() -> None:
    tensor = torch.ones(3, device="meta")
    for act in (
        lambda: bool(tensor.sum() > 0),
        lambda: tensor[tensor > 0],
        lambda: tensor[0].item(),
        lambda: tensor * torch.tensor([1.0, 2.0, 3.0]).to("meta"),
    ):
        with pytest.raises((RuntimeError, AssertionError)), Watch():
            act()
