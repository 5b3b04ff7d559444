"""Checks and times planning and training on a GPU: python analysis/gpu_checks.py [--json FILE] [--tiny]

Needs torch and numpy alone. Without a GPU it says so and runs the same checks, tiny, on the CPU. Models and
data are random: plans mean nothing but cost what real ones cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where tt-ray is not installed

from tt_ray.config import ModelConfig, TrainingConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet, batch_of_step
from tt_ray.model.cache import CompiledStep, SearchCache
from tt_ray.model.loss import kind_weights, loss_sums, target_kinds
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.expansions import SearchSettings, Uniforms
from tt_ray.planning.graphs import CudaCapture, GraphedSearch
from tt_ray.planning.objectives import Return
from tt_ray.training.optimizer import build_optimizer

MAX_CONTEXT = 5
HOPPER = TokenLayout(observation_dim=11, action_dim=3, num_bins=100)
PAPER = ModelConfig()
AUTHORS = SearchSettings(horizon=15, beam_width=128, n_expand=2, cdf_act=0.6)
TARGETS = {
    "latency/eager/one_episode": "at most 20",
    "latency/compiled/one_episode": "at most 10",
    "latency/graphed/one_episode": "at most 8",
    "latency/graphed/32_against_one": "at most 8",
    "waiting/host_synchronisations": "0",
    "training/ratio": "at least 10",
}
Report = Callable[[str, object, str], None]


@dataclass(frozen=True)
class Sizes:
    """What is run, and how often."""

    model: ModelConfig = PAPER
    layout: TokenLayout = HOPPER
    settings: SearchSettings = AUTHORS
    many: int = 32
    """Episodes of the batched search."""
    parity: int = 8
    """Contexts whose plans are compared."""
    repeats: int = 20
    batch: int = 256
    """Training windows a step."""


TINY = Sizes(
    model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16),
    layout=TokenLayout(observation_dim=3, action_dim=2, num_bins=9),
    settings=SearchSettings(horizon=3, beam_width=4, n_expand=2, cdf_act=0.6),
    many=3,
    parity=2,
    repeats=2,
    batch=4,
)


class DirectCapture:
    """In place of CUDA graphs on the CPU: replays by running again."""

    def __call__(self, work: Callable[[], Plans]) -> tuple[Plans, Callable[[], None]]:
        """As `Capture`."""
        plans = work()

        def replay() -> None:
            fresh = work()
            plans.tokens.copy_(fresh.tokens)
            plans.scores.copy_(fresh.scores)

        return plans, replay


class Planner:
    """Searches from E random contexts with full pasts; `run` is one decision."""

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        dtype: torch.dtype,
        *,
        episodes: int = 1,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        self.sizes, self.device, self.episodes, layout = sizes, device, episodes, sizes.layout
        settings = sizes.settings
        torch.manual_seed(0)
        model = TrajectoryTransformer(sizes.model, layout).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)  # away from the nearly uniform distributions of a fresh model
        self.cache = SearchCache(
            model.to(device, dtype),
            episodes=episodes,
            beams=settings.beam_width,
            copies=settings.n_expand,
            horizon=settings.horizon,
            max_context_transitions=MAX_CONTEXT,
            window=sizes.model.context_transitions,
            keep=MAX_CONTEXT - 1,
            compiled=compiled,
        )
        values = torch.linspace(-1.0, 1.0, layout.num_bins + 1, device=device, dtype=self.cache.score_dtype)
        self.search = BeamSearch(layout, settings, Return(0.99), values, values)
        capture = CudaCapture if device.type == "cuda" else DirectCapture
        self.graphed = GraphedSearch(self.search, self.cache, capture=capture()) if graphed else None

    def inputs(self, seed: int) -> tuple[Tensor, list[int], Uniforms]:
        """Contexts, pasts and random numbers of one decision, on the device."""
        layout, settings, generator = (
            self.sizes.layout,
            self.sizes.settings,
            torch.Generator().manual_seed(seed),
        )
        shape = (self.episodes, self.cache.prefix_length)
        tokens = torch.randint(0, layout.num_bins, shape, generator=generator).to(self.device)
        sampled = (settings.horizon, layout.action_dim, settings.beam_width, settings.n_expand)
        actions = torch.rand(self.episodes, *sampled, generator=generator).to(self.device)
        return tokens, [MAX_CONTEXT - 1] * self.episodes, Uniforms(actions, None)

    @torch.inference_mode()
    def run(self, seed: int = 0) -> Plans:
        """Plans of one decision."""
        inputs = self.inputs(seed)
        return self.graphed.run(*inputs) if self.graphed else self.search.run(self.cache, *inputs)


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work` once it has run often enough to be compiled and captured."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def check_parity(sizes: Sizes, device: torch.device, report: Report) -> None:
    """Best plans of the device against those of the CPU in float32."""
    wanted = [Planner(sizes, torch.device("cpu"), torch.float32).run(seed) for seed in range(sizes.parity)]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        planner = Planner(sizes, device, dtype, compiled=True)
        found = [planner.run(seed) for seed in range(sizes.parity)]
        pairs = list(zip(found, wanted, strict=True))
        best = [torch.equal(f.tokens[0, 0].cpu(), w.tokens[0, 0]) for f, w in pairs]
        every = [torch.equal(f.tokens.cpu(), w.tokens) for f, w in pairs]
        gap = max(float((f.scores[0, 0].cpu() - w.scores[0, 0]).abs()) for f, w in pairs)
        report(f"parity/{name}/equal_best_plans", float(np.mean(best)), "share of decisions")
        report(f"parity/{name}/equal_searches", float(np.mean(every)), "share of decisions, all beams")
        report(f"parity/{name}/best_score_gap", gap, "largest difference of best scores")


def check_latency(sizes: Sizes, device: torch.device, report: Report) -> None:
    """Milliseconds a decision, one episode and many, and what a batch of many costs against one."""
    ways = {"eager": {}, "compiled": {"compiled": True}, "graphed": {"compiled": True, "graphed": True}}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plans, one = {}, {}
    for name, way in ways.items():
        planner = Planner(sizes, device, dtype, **way)
        begun = time.perf_counter()
        plans[name] = planner.run()
        wait(device)
        report(f"latency/{name}/first", time.perf_counter() - begun, "s, with compilation")
        one[name] = seconds(planner.run, device, sizes.repeats)
        report(f"latency/{name}/one_episode", 1e3 * one[name], "ms a decision")
        if isinstance(planner.cache.step, CompiledStep):
            report(f"latency/{name}/really_compiled", planner.cache.step.works, "")
        if planner.graphed:
            report("latency/graphed/really_captured", len(planner.graphed.graphs) == 1, "")
            again = planner.run()
            report("latency/graphed/replay_is_exact", torch.equal(again.tokens, plans[name].tokens), "")
    many = Planner(sizes, device, dtype, episodes=sizes.many, compiled=True, graphed=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch = seconds(many.run, device, max(2, sizes.repeats // 2))
    report(f"latency/graphed/{sizes.many}_episodes", 1e3 * batch, "ms for all")
    report(f"latency/graphed/{sizes.many}_against_one", batch / one["graphed"], "times")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        report(f"memory/{sizes.many}_episodes", peak, "MiB at the peak, all captured graphs included")


def check_waiting(sizes: Sizes, device: torch.device, report: Report) -> None:
    """Host synchronisations in one eager decision, as CUDA's debug mode counts them."""
    if device.type != "cuda":
        report("waiting/host_synchronisations", None, "not counted without CUDA")
        return
    planner = Planner(sizes, device, torch.float32)
    planner.run()
    inputs = planner.inputs(0)  # copying these to the device waits for it
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        planner.search.run(planner.cache, *inputs)
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    report("waiting/host_synchronisations", len(messages), "a decision")


def check_reordering(sizes: Sizes, device: torch.device, report: Report) -> None:
    """Share of an eager decision that goes into making candidates beams."""
    planner, spent = Planner(sizes, device, torch.float32), [0.0]
    select = planner.cache.select

    def timed(parents: Tensor) -> None:
        wait(device)
        begun = time.perf_counter()
        select(parents)
        wait(device)
        spent[0] += time.perf_counter() - begun

    planner.cache.select = timed  # type: ignore[method-assign]
    planner.run()
    spent[0], begun = 0.0, time.perf_counter()
    planner.run()
    wait(device)
    report("reordering/share", spent[0] / (time.perf_counter() - begun), "of a decision")


class Training:
    """Updates on random windows: eager float32, or compiled and, on a GPU, bfloat16."""

    def __init__(self, sizes: Sizes, device: torch.device, *, fast: bool) -> None:
        torch.manual_seed(0)
        self.sizes, self.device, self.step, layout = sizes, device, 0, sizes.layout
        self.training = TrainingConfig(batch_size=sizes.batch)
        self.model = TrajectoryTransformer(sizes.model, layout).to(device)
        self.optimizer = build_optimizer(self.model, self.training)
        rows = np.random.default_rng(0).integers(0, layout.num_bins, (20_000, layout.slots), dtype=np.uint8)
        ended = np.zeros(len(rows), dtype=bool)
        edges, window = np.array([0, len(rows)]), sizes.model.context_transitions
        windows = WindowSet.build(rows, edges, ended, np.array([0]), window, layout)
        self.windows = windows.to(device)
        self.kinds = target_kinds(layout, self.model.max_tokens, device)
        self.weights = kind_weights(self.training, device)
        half = fast and device.type == "cuda"
        self.autocast = lambda: torch.autocast("cuda", torch.bfloat16) if half else nullcontext()
        self.loss = torch.compile(self._loss) if fast else self._loss

    def _loss(self, indices: Tensor) -> Tensor:
        inputs, targets, mask = self.windows.gather(indices)
        with self.autocast():
            logits = self.model(inputs)
        return loss_sums(logits, targets, mask, self.kinds, self.weights).weighted / mask.sum()

    def update(self) -> None:
        """One step of the optimizer."""
        batch = batch_of_step(0, self.step, self.training.batch_size, len(self.windows))
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(torch.from_numpy(batch).to(self.device)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        self.step += 1


def check_training(sizes: Sizes, device: torch.device, report: Report) -> None:
    """Tokens a second of the plain and of the fast step."""
    rates = {}
    for name, fast in (("plain", False), ("fast", True)):
        training = Training(sizes, device, fast=fast)
        taken = seconds(training.update, device, sizes.repeats)
        rates[name] = sizes.batch * training.model.max_tokens / taken
        report(f"training/{name}", rates[name], "tokens/s")
    report("training/ratio", rates["fast"] / rates["plain"], "times")


CHECKS = (check_parity, check_latency, check_waiting, check_reordering, check_training)


def main() -> None:
    """Run all checks; a line each, and JSON where asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes that take seconds and say nothing of speed"
    )
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    tiny = options.tiny or device.type == "cpu"
    if device.type == "cpu":
        print("No GPU here: the same checks, tiny, on the CPU. The times say nothing about a GPU.")
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "tiny": tiny}

    def report(key: str, value: object, unit: str) -> None:
        figures[key] = value
        shown = f"{value:12.4g}" if isinstance(value, float) else f"{value!s:>12}"
        target = f" (target: {TARGETS[key]})" if key in TARGETS and not tiny else ""
        print(f"{key:40} {shown}  {unit}{target}", flush=True)

    for check in CHECKS:
        check(TINY if tiny else Sizes(), device, report)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
