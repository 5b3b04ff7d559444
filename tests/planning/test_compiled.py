from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_beam import CASES, DISCOUNT, LAYOUT, bin_values, random_contexts, random_model, random_uniforms
from torch._dynamo.utils import counters

import tt_ray.model.cache as cache_module
from tt_ray.model.cache import SearchCache
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.objectives import Return

NAME = "wide window"  # seven transitions, with a slide
PAST = [0, 3, 2]


def make_cache(model: TrajectoryTransformer, compiled: bool) -> SearchCache:
    settings, window, keep, max_context = CASES[NAME]
    return SearchCache(
        model,
        episodes=len(PAST),
        beams=settings.beam_width,
        copies=settings.n_expand,
        horizon=settings.horizon,
        max_context_transitions=max_context,
        window=window,
        keep=keep,
        compiled=compiled,
    )


def run(cache: SearchCache, seed: int) -> Plans:
    settings = CASES[NAME][0]
    search = BeamSearch(LAYOUT, settings, Return(DISCOUNT), bin_values(), bin_values())
    contexts = random_contexts(PAST, cache.prefix_length, seed)
    with torch.inference_mode():
        return search.run(cache, contexts, PAST, random_uniforms(settings, len(PAST), seed))


def test_a_compiled_search_takes_two_programs_and_finds_the_same_plans() -> None:
    """Two, whatever the slot and however many tokens have gone before."""
    model = random_model(0)
    eager, compiled = make_cache(model, compiled=False), make_cache(model, compiled=True)
    before = counters["stats"]["unique_graphs"]
    for seed in range(3):
        plans, expected = run(compiled, seed), run(eager, seed)
        assert torch.equal(plans.tokens, expected.tokens)
        torch.testing.assert_close(plans.scores, expected.scores)
    assert compiled.step.works
    assert counters["stats"]["unique_graphs"] - before == 2


def test_compiled_logits_are_the_eager_ones_in_float32() -> None:
    model = random_model(1).float()
    eager, compiled = make_cache(model, compiled=False), make_cache(model, compiled=True)
    generator = torch.Generator().manual_seed(0)
    contexts = random_contexts(PAST, eager.prefix_length, 0)

    def draw(cache: SearchCache) -> torch.Tensor:
        return torch.randint(0, LAYOUT.num_bins, cache.tail_tokens.shape[:3], generator=generator)

    with torch.inference_mode():
        torch.testing.assert_close(compiled.open(contexts, PAST), eager.open(contexts, PAST))
        for _ in range(LAYOUT.action_dim + 1):
            tokens = draw(eager)
            torch.testing.assert_close(compiled.extend_candidates(tokens), eager.extend_candidates(tokens))
        parents = draw(eager)[..., 0]
        compiled.select(parents)
        eager.select(parents)
        for _ in range(LAYOUT.observation_dim + 1):
            tokens = draw(eager)[..., 0]
            torch.testing.assert_close(compiled.extend_beams(tokens), eager.extend_beams(tokens))
    assert compiled.step.works


def test_an_error_of_the_compiler_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        raise RuntimeError("no compiler at all\nand a long story")

    monkeypatch.setattr(cache_module, "compiled_decode_token", lambda: broken)
    model = random_model(2)
    with caplog.at_level(logging.WARNING):
        plans = run(make_cache(model, compiled=True), 0)
    assert torch.equal(plans.tokens, run(make_cache(model, compiled=False), 0).tokens)
    assert len(calls) == len(caplog.messages) == 1
    assert caplog.messages[0].endswith("decoding goes on without: no compiler at all")


WITHOUT_COMPILER = """
import logging, torch
from test_compiled import make_cache, random_model, run
logging.basicConfig(format="%(name)s: %(message)s")
plans = run(make_cache(random_model(0), compiled=True), 0)
assert torch.equal(plans.tokens, run(make_cache(random_model(0), compiled=False), 0).tokens)
print("the same plans")
"""


def test_without_a_cpp_compiler_the_search_goes_on(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PATH": str(tmp_path),
        "CXX": "",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same plans\n"
    assert done.stderr.count("tt_ray.model.cache: torch.compile does not work here") == 1
