from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.cache import SearchCache
from tt_ray.model.native import NativeCache, NativeUnavailableError, build
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.expansions import SearchSettings, Transitionwise

LAYOUT = TokenLayout(observation_dim=5, action_dim=3, num_bins=20)
GOALS = TokenLayout(5, 3, num_bins=20, goal_slots=(4, 0, 1), partial=True)
SIZES = {"beams": 6, "copies": 2, "horizon": 3, "max_context_transitions": 3, "window": 6, "keep": 2}
REWARDS, VALUES = torch.linspace(-1, 2, 21), torch.linspace(3, -3, 21)
Trace = list[Tensor]


def make_model(
    width: int = 64,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.2,
    layout: TokenLayout = LAYOUT,
) -> TrajectoryTransformer:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=3, num_heads=heads, embed_dim=width, context_transitions=6)
    model = TrajectoryTransformer(config, layout).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model.to(dtype)


def contexts(past: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    places = 2 * LAYOUT.slots + LAYOUT.observation_dim
    return torch.randint(0, LAYOUT.num_bins, (len(past), places), generator=generator)


def goal_contexts(past: list[int]) -> Tensor:
    """Goals and contexts, some of the observations hidden."""
    tokens, generator = contexts(past), torch.Generator().manual_seed(4)
    hidden = (torch.rand(tokens.shape, generator=generator) < 0.3) & (torch.arange(25) % 10 < 5)
    goals = torch.randint(0, 20, (len(past), 3), generator=generator)
    return torch.cat([goals, tokens.masked_fill(hidden, GOALS.hidden_token)], dim=1)


def native(model: TrajectoryTransformer, episodes: int, **filters: Any) -> NativeCache:
    return NativeCache(
        model, episodes=episodes, **SIZES, **filters, reward_values=REWARDS, value_values=VALUES
    )


def tokenwise(model: TrajectoryTransformer, episodes: int, **filters: Any) -> Transitionwise:
    rewards, values = (bins.to(model.head.dtype) for bins in (REWARDS, VALUES))
    settings = SearchSettings(SIZES["horizon"], SIZES["beams"], SIZES["copies"], **filters)
    return Transitionwise(
        SearchCache(model, episodes=episodes, **SIZES), settings, model.layout, rewards, values
    )


def walk(decoder: NativeCache | Transitionwise, tokens: Tensor, past: list[int], dtype: torch.dtype) -> Trace:
    """What two transitions of a search give, with beams chosen by chance, the same for every episode."""
    generator = torch.Generator().manual_seed(2)
    episodes = len(past)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype).expand(episodes, *shape)

    decoder.open(tokens, past)
    trace: Trace = []
    for _ in range(2):
        reward, value, value_tokens = decoder.expand(draw(3, 6, 2))
        parents = torch.randperm(12, generator=generator)[:6].expand(episodes, 6).contiguous()
        decoder.select(parents)
        chosen = value_tokens.flatten(1).gather(1, parents)
        stopped = decoder.observe(chosen, torch.zeros(episodes, 6, dtype=torch.bool), draw(5, 6))
        trace += [reward, value, value_tokens, stopped]
    decoder.expand(draw(3, 6, 2))
    decoder.select(torch.arange(6).expand(episodes, 6).contiguous())
    return [*trace, decoder.finish(chosen)]


FILTERS = [
    {},
    {"k_act": 5},
    {"cdf_act": 0.6},
    {"k_act": 7, "cdf_act": 0.3},
    {"cdf_act": 0.0},
    {"cdf_act": 1.0},
    {"k_act": 40, "k_obs": 40},
    {"k_act": 1},
    {"k_act": 3, "cdf_act": 0.99, "k_obs": 4},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.2, 0.6])
def test_it_gives_what_the_torch_cache_gives(filters: dict[str, Any], scale: float) -> None:
    """From uniform distributions (scale 0), where the filters meet only ties, to peaked ones."""
    model, past = make_model(dtype=torch.float64, scale=scale), [2, 0, 1]
    with torch.inference_mode():
        ours = walk(native(model, 3, **filters), contexts(past), past, torch.float64)
        theirs = walk(tokenwise(model, 3, **filters), contexts(past), past, torch.float64)
    if scale == 0.0 and ("cdf_act" in filters or filters.get("k_act") not in (None, 40)):
        theirs, ours = theirs[:2], ours[:2]  # which of a hundred equal ones stay is a matter of rounding
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (32, 2), (64, 4), (96, 3), (128, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_width(width: int, heads: int, dtype: torch.dtype) -> None:
    model, past = make_model(width, heads, dtype), [2, 0, 1]
    with torch.inference_mode():
        ours = walk(native(model, 3, k_act=1), contexts(past), past, dtype)
        theirs = walk(tokenwise(model, 3, k_act=1), contexts(past), past, dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_depend_on_threads_or_neighbours(threads: int) -> None:
    """Bit for bit: blocks are cut differently for each number of threads and of episodes."""
    model, past, before = make_model(), [2, 0, 1, 2], torch.get_num_threads()
    tokens = contexts(past)
    with torch.inference_mode():
        alone = [walk(native(model, 1), tokens[e : e + 1], past[e : e + 1], torch.float32) for e in range(4)]
        torch.set_num_threads(threads)
        try:
            together = walk(native(model, 7), tokens, past, torch.float32)
        finally:
            torch.set_num_threads(before)
    for e in range(4):
        assert all(torch.equal(a[0], b[e]) for a, b in zip(alone[e], together, strict=True))


@pytest.mark.parametrize("sizes", [(6, 2), (3, 1), (4, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_after_a_goal_and_with_hidden_tokens(
    sizes: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the torch cache gives; and windows that slide leave rows alone, bit for bit."""
    monkeypatch.setitem(SIZES, "window", sizes[0])
    monkeypatch.setitem(SIZES, "keep", sizes[1])
    model, past = make_model(dtype=dtype, layout=GOALS), [2, 0, 1, 2]
    tokens = goal_contexts(past)
    with torch.inference_mode():
        ours = walk(native(model, 4, k_act=1), tokens, past, dtype)
        theirs = walk(tokenwise(model, 4, k_act=1), tokens, past, dtype)
        alone = [walk(native(model, 1, k_act=1), tokens[e : e + 1], past[e : e + 1], dtype) for e in range(4)]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)
    for e in range(4):
        assert all(torch.equal(a[0], b[e]) for a, b in zip(alone[e], ours, strict=True))


def test_a_cache_can_be_used_again() -> None:
    model = make_model()
    cache = native(model, 3)
    with torch.inference_mode():
        fresh = walk(native(model, 2), contexts([1, 2]), [1, 2], torch.float32)
        walk(cache, contexts([2, 2, 2]), [2, 2, 2], torch.float32)
        again = walk(cache, contexts([1, 2]), [1, 2], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_weights_are_its_own() -> None:
    model = make_model()
    cache = native(model, 1)
    with torch.inference_mode():
        before = walk(cache, contexts([1]), [1], torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with torch.inference_mode():
        after = walk(cache, contexts([1]), [1], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_ends_its_search(value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.head[:, 3] = value
    with torch.inference_mode():
        tokens = walk(native(model, 2, cdf_act=0.6, k_act=5), contexts([1, 2]), [1, 2], torch.float32)[-1]
    assert tokens.min() >= 0
    assert tokens.max() <= LAYOUT.stop_token


def test_too_many_slots_are_one_line() -> None:
    with pytest.raises(UserError, match="no memory to plan for 10000000 episodes"):
        native(make_model(), 10_000_000)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NativeUnavailableError, match="XDG_CACHE_HOME"):
        build._cache_folder()


def test_what_it_cannot_compute_is_refused() -> None:
    with pytest.raises(NativeUnavailableError, match="bfloat16"):
        native(make_model(dtype=torch.bfloat16), 1)
    with pytest.raises(NativeUnavailableError, match="embed_dim = 10"):
        native(make_model(width=10, heads=2), 1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_narrower_vectors_give_the_same(
    march: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if march == "haswell" and "avx2" not in build._processor():
        pytest.skip("this processor has no AVX2")
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", tuple(flags))
    assert build.load_library().tt_ray_vector_bytes() == {"x86-64": 16, "haswell": 32}[march]
    test_any_width(96, 3, torch.float32)
    test_it_gives_what_the_torch_cache_gives({"k_act": 7, "cdf_act": 0.3}, 0.6)


def test_the_library_is_compiled_once(empty_cache: Path) -> None:
    build.load_library()
    (library,) = empty_cache.iterdir()
    made = library.stat().st_mtime_ns
    build.load_library.cache_clear()
    build.load_library()
    assert [path.stat().st_mtime_ns for path in empty_cache.iterdir()] == [made]


def test_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeUnavailableError, match="no C\\+\\+ compiler"):
        build.load_library()


def test_a_compiler_that_fails_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-DkTileRows=error"))
    with pytest.raises(NativeUnavailableError, match=r"failed: .*error"):
        build.load_library()
    assert list(empty_cache.iterdir()) == []


def test_a_damaged_library_is_named(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load_library()
    (library,) = empty_cache.iterdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tt-ray").mkdir(parents=True)
    (elsewhere / "tt-ray" / library.name).write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    build.load_library.cache_clear()
    with pytest.raises(NativeUnavailableError, match=library.name):
        build.load_library()


@pytest.mark.parametrize("make", [native, tokenwise])
def test_what_candidates_do_and_where_they_do_it(make: Any) -> None:
    """Actions and observations that the last plans hold, told at every transition before."""
    model, past = make_model(), [2, 0, 1]
    decoder, tokens = make(model, 3, k_act=5), contexts(past)
    cache = decoder.tokens if isinstance(decoder, Transitionwise) else decoder
    generator = torch.Generator().manual_seed(2)
    observations, actions = [], []
    with torch.inference_mode():
        decoder.open(tokens, past)
        for step in range(3):
            _, _, value_tokens = decoder.expand(torch.rand(3, 3, 6, 2, generator=generator))
            seen, done = cache.present_observations.clone(), cache.candidate_actions.clone()
            assert seen.shape == (3, 6, 5)
            assert done.shape == (3, 6, 2, 3)
            parents = torch.randint(12, (3, 6), generator=generator)
            decoder.select(parents)
            beam = (parents // 2)[..., None]
            assert torch.equal(cache.present_observations, seen.gather(1, beam.expand(-1, -1, 5)))
            observations = [part.gather(1, beam.expand(-1, -1, 5)) for part in [*observations, seen]]
            actions = [part.gather(1, beam.expand(-1, -1, 3)) for part in actions]
            actions.append(done.flatten(1, 2).gather(1, parents[..., None].expand(-1, -1, 3)))
            values = value_tokens.flatten(1).gather(1, parents)
            if step < 2:
                decoder.observe(values, torch.zeros(3, 6, dtype=torch.bool), None)
        plans = decoder.finish(values)
    assert torch.equal(plans[..., :5], torch.stack(observations, dim=2))
    assert torch.equal(plans[..., 5:8], torch.stack(actions, dim=2))
    assert len({tuple(row) for row in plans[..., 1, :8].flatten(0, 1).tolist()}) > 3
