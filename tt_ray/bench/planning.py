"""Planning speed: the engine on random weights, and an uncached planner to compare it with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from tt_ray.bench.limit import synchronize
from tt_ray.bench.memory import peak_mebibytes, reset_peak
from tt_ray.bench.work import Work
from tt_ray.config import DecoderName, ModelConfig, PlannerConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.checkpoint import Checkpoint
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.engine import PlanningEngine
from tt_ray.training.speed import random_spec


@dataclass(frozen=True)
class Case:
    """A task's slots and the authors' search for it."""

    name: str
    observation_dim: int
    action_dim: int
    horizon: int
    beam_width: int
    model: ModelConfig = field(default_factory=ModelConfig)
    max_context_transitions: int = 5

    @property
    def layout(self) -> TokenLayout:
        """Slots, at 100 bins."""
        return TokenLayout(self.observation_dim, self.action_dim, num_bins=100)

    @property
    def planner(self) -> PlannerConfig:
        """Two copies of each beam, the least likely 60 % of actions dropped."""
        return PlannerConfig(
            horizon=self.horizon,
            beam_width=self.beam_width,
            n_expand=2,
            cdf_act=0.6,
            max_context_transitions=self.max_context_transitions,
        )

    @property
    def work(self) -> Work:
        """Its operations, counted."""
        return Work(self.model, self.layout, self.planner)


CASES = {
    case.name: case
    for case in (
        Case("halfcheetah", 17, 6, horizon=5, beam_width=32),
        Case("hopper", 11, 3, horizon=15, beam_width=128),
        Case("ant", 27, 8, horizon=5, beam_width=128),
        Case("pen", 45, 24, horizon=15, beam_width=32),
    )
}


@dataclass(frozen=True)
class PlanSpeed:
    """The engine's speed with full contexts."""

    decoder: str
    seconds: list[float]
    """Of each round of decisions."""
    episodes: int
    gflop: float
    """Of one decision."""
    memory_mib: float

    @property
    def per_second(self) -> float:
        """Decisions a second over all episodes."""
        return self.episodes * len(self.seconds) / sum(self.seconds)

    def latency(self, quantile: float) -> float:
        """Milliseconds from observations to actions."""
        return 1000 * float(np.quantile(self.seconds, quantile))


def random_checkpoint(case: Case, device: torch.device) -> Checkpoint:
    """A model of random weights; its bins are those of normal numbers."""
    torch.manual_seed(0)
    layout = case.layout
    model = TrajectoryTransformer(case.model, layout).eval().to(device)
    values = np.random.default_rng(0).normal(size=(5_000, layout.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=layout.num_bins)
    return Checkpoint(model, bins, random_spec(layout), {}, 0, {})


def measure_engine(
    case: Case, episodes: int, seconds: float, device: torch.device, decoder: DecoderName = "auto"
) -> PlanSpeed:
    """Decide for `episodes` at once, round after round, for about `seconds` and twice at least."""
    reset_peak(device)
    engine = PlanningEngine(
        random_checkpoint(case, device), case.planner, discount=0.99, slots=episodes, decoder=decoder
    )
    _fill_contexts(engine, episodes)
    engine.act()  # compiles, touches memory
    slid = slid_tokens(engine) / episodes  # a captured graph counts nothing when it is replayed
    for _ in range(2 if device.type == "cuda" else 0):  # captures
        engine.act()
    rounds: list[float] = []
    while sum(rounds) < seconds or len(rounds) < 2:
        started = time.perf_counter()
        engine.act()
        synchronize(device)
        rounds.append(time.perf_counter() - started)
    gflop = case.work.decision(slid) / 1e9
    return PlanSpeed(engine.searcher.name, rounds, episodes, gflop, peak_mebibytes(device))


def slid_tokens(engine: PlanningEngine) -> int:
    """Tokens that the engine's decoder has fed again because a window was full."""
    return engine.searcher.decoder.slid_tokens


def _fill_contexts(engine: PlanningEngine, episodes: int) -> None:
    """Give every slot an episode with as much of a past as the search takes."""
    random = np.random.default_rng(0)
    observation_dim, action_dim = engine.layout.observation_dim, engine.layout.action_dim

    def draw(count: int) -> np.ndarray:
        return random.normal(size=count).astype(np.float32)

    for episode in range(episodes):
        engine.add(episode, episode, draw(observation_dim))
        for _ in range(engine.planner.max_context_transitions - 1):
            engine.observe(episode, draw(action_dim), 0.0, draw(observation_dim))


def measure_reference(case: Case, device: torch.device, seconds: float) -> float:
    """Decisions a second of a planner without a cache, one episode: beams in one batch, the window cropped.

    Times passes of the first planned transition, all of them or as many, evenly spread, as take about
    `seconds`; the whole search is scaled up from their operations.
    """
    work, beams = case.work, case.beam_width
    passes = [(2 * beams, length) for length in work.candidate_lengths(0)]
    passes += [(beams, length) for length in work.beam_lengths(0)]
    model = random_checkpoint(case, device).model
    spent, done = 0.0, 0.0
    with torch.inference_mode():
        _window_pass(model, 2, passes[0][1])
        for rows, length in _spread(passes):
            synchronize(device)
            started = time.perf_counter()
            _window_pass(model, rows, length)
            synchronize(device)
            spent += time.perf_counter() - started
            done += work.window(rows, length)
            if spent > seconds:
                break
    whole = sum(work.reference_transition(step) for step in range(case.horizon))
    return done / spent / whole


def _window_pass(model: TrajectoryTransformer, rows: int, length: int) -> torch.Tensor:
    tokens = torch.randint(0, model.layout.num_bins, (rows, length), device=model.head.device)
    hidden, _ = model.encode(tokens)
    return model.logits_at(hidden[:, -1], (length - 1) % model.layout.slots).softmax(dim=-1).argmax(dim=-1)


def _spread(passes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same passes, those of any beginning spread over the whole."""
    count = len(passes)
    stride = next(s for s in range(max(1, round(count * 0.618)), count + 1) if np.gcd(s, count) == 1)
    return [passes[i * stride % count] for i in range(count)]


def vary(case: Case, **changes: int) -> Case:
    """The case with changes; `slots` spreads over observations and actions, `window` is the model's."""
    if "slots" in changes:
        slots = changes.pop("slots")
        actions = max(1, round((slots - 2) * case.action_dim / (case.observation_dim + case.action_dim)))
        case = replace(case, observation_dim=slots - 2 - actions, action_dim=actions)
    if "window" in changes:
        window = changes.pop("window")
        case = replace(
            case,
            model=replace(case.model, context_transitions=window),
            max_context_transitions=max(1, window // 2),
        )
    return replace(case, **cast(Any, changes))
