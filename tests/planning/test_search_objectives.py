"""Each objective against an exhaustive or an uncached computation, and the registry."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import Kind, TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.cache import SearchCache
from tt_ray.model.critic import Critic
from tt_ray.model.native import NativeCache, NativeTokenCache
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.beam import BeamSearch, Plans
from tt_ray.planning.expansions import SearchSettings, Uniforms
from tt_ray.planning.objectives import (
    OBJECTIVES,
    Goal,
    Likelihood,
    QValue,
    Return,
    ReturnConditioned,
    find_objective,
    register,
)

TINY = TokenLayout(observation_dim=1, action_dim=1, num_bins=3)
SMALL = TokenLayout(observation_dim=2, action_dim=2, num_bins=4)


def random_model(layout: TokenLayout, seed: int, context: int = 4) -> TrajectoryTransformer:
    torch.manual_seed(seed)
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=context)
    model = TrajectoryTransformer(config, layout).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the near-uniform distributions of a fresh model
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return model


def contexts(layout: TokenLayout, past: list[int], max_context: int, seed: int) -> Tensor:
    places = layout.goal_dim + (max_context - 1) * layout.slots + layout.observation_dim
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, layout.num_bins, (len(past), places), generator=generator)


def no_numbers(settings: SearchSettings, episodes: int) -> Uniforms:
    return Uniforms(torch.zeros(episodes, settings.horizon, 0, settings.beam_width, 1), None)


def search_by_token(
    model: TrajectoryTransformer,
    objective: Likelihood,
    settings: SearchSettings,
    tokens: Tensor,
    past: list[int],
    max_context: int,
    window: int,
    keep: int,
    decoder: str = "native",
) -> Plans:
    sizes = {
        "episodes": len(past),
        "beams": settings.beam_width,
        "horizon": settings.horizon,
        "max_context_transitions": max_context,
        "window": window,
        "keep": keep,
    }
    native = decoder == "native"
    cache = (
        NativeTokenCache(model, **sizes) if native else SearchCache(model, copies=1, by_token=True, **sizes)
    )
    values = torch.zeros(model.layout.num_bins + 1, dtype=torch.float64)
    search = BeamSearch(model.layout, settings, objective, values, values)
    with torch.inference_mode():
        return search.run(cache, tokens, past, no_numbers(settings, len(past)))


class Everything(Likelihood):
    """Rewards and values count, too."""

    kinds = frozenset(Kind)


class Uncached:
    """The whole window through the model at every token, sliding as the search's does."""

    def __init__(self, model: TrajectoryTransformer, window: int, keep: int) -> None:
        self.model, self.window, self.keep = model, window, keep
        self.layout = model.layout

    def feed(self, visible: tuple[int, ...], token: int) -> tuple[int, ...]:
        goal = visible[: self.layout.goal_dim]
        rest = (*visible[self.layout.goal_dim :], token)
        if len(rest) == self.window * self.layout.slots:
            rest = rest[-self.keep * self.layout.slots :]
        return (*goal, *rest)

    @torch.no_grad()
    def log_probs(self, visible: tuple[int, ...], slot: int) -> list[float]:
        logits = self.model(torch.tensor([visible]))[0, -1]
        if slot > 0:
            logits = logits[: self.layout.num_bins]
        return logits.log_softmax(0).tolist()

    def every_plan(
        self, context: list[int], horizon: int, kinds: frozenset[Kind]
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Every plan there is, with its score, best first; kinds that do not count are the likeliest."""
        layout, total = self.layout, horizon * self.layout.slots
        plans: list[tuple[float, tuple[int, ...]]] = []

        def extend(visible: tuple[int, ...], plan: tuple[int, ...], score: float) -> None:
            slot = len(plan) % layout.slots
            if len(plan) == total:
                plans.append((score, plan))
                return
            log_probs = self.log_probs(visible, slot)
            choices = range(len(log_probs))
            if layout.kinds[slot] not in kinds:
                choices = [max(choices, key=lambda k: log_probs[k])]
                log_probs = [0.0] * len(log_probs)
            for token in choices:
                if token == layout.stop_token:
                    plans.append((score + log_probs[token], plan + (token,) * (total - len(plan))))
                else:
                    extend(self.feed(visible, token), (*plan, token), score + log_probs[token])

        extend(tuple(context), tuple(context[-layout.observation_dim :]), 0.0)
        return sorted(plans, reverse=True)


@pytest.mark.parametrize(("window", "keep"), [(4, 2), (2, 1)])
@pytest.mark.parametrize("objective", [Everything(), Goal()])
@pytest.mark.parametrize("goal_slots", [(), (0, 0)])
def test_a_beam_that_prunes_nothing_finds_every_plan_in_order(
    goal_slots: tuple[int, ...], objective: Likelihood, window: int, keep: int
) -> None:
    layout = TokenLayout(1, 1, 3, goal_slots)
    model, past = random_model(layout, seed=3), [0, 1]
    tokens = contexts(layout, past, 2, seed=1)
    settings = SearchSettings(horizon=2, beam_width=1000, n_expand=1)
    plans = search_by_token(model, objective, settings, tokens, past, 2, window, keep)
    for e, count in enumerate(past):
        goal, rest = tokens[e, : layout.goal_dim].tolist(), tokens[e, layout.goal_dim :].tolist()
        seen = [*goal, *rest[len(rest) - count * layout.slots - layout.observation_dim :]]
        every = Uncached(model, window, keep).every_plan(seen, 2, objective.kinds)
        every = every[: settings.beam_width]
        assert len(every) > 20
        torch.testing.assert_close(plans.scores[e, : len(every)].tolist(), [score for score, _ in every])
        assert plans.tokens[e, : len(every)].flatten(1).tolist() == [list(plan) for _, plan in every]


def greedy_beams(
    model: TrajectoryTransformer,
    context: list[int],
    settings: SearchSettings,
    window: int,
    keep: int,
    kinds: frozenset[Kind],
) -> list[tuple[float, tuple[int, ...]]]:
    """The likelihood beam search token by token, without a cache, for one episode."""
    layout, uncached = model.layout, Uncached(model, window, keep)
    plan = tuple(context[-layout.observation_dim :])
    beams = [(0.0, tuple(context), plan, False)]
    for place in range(len(plan), settings.horizon * layout.slots):
        slot, candidates = place % layout.slots, []
        for score, visible, plan, stopped in beams:
            if stopped:
                candidates.append((score, visible, (*plan, layout.stop_token), True))
                continue
            log_probs = uncached.log_probs(visible, slot)
            choices = list(enumerate(log_probs))
            if layout.kinds[slot] not in kinds:
                choices = [(max(range(len(log_probs)), key=lambda k: log_probs[k]), 0.0)]
            for token, log_prob in choices:
                ends = token == layout.stop_token
                fed = visible if ends else uncached.feed(visible, token)
                candidates.append((score + log_prob, fed, (*plan, token), ends))
        candidates.sort(key=lambda candidate: -candidate[0])
        beams = candidates[: settings.beam_width]
    return [(score, plan) for score, _, plan, _ in beams]


@pytest.mark.parametrize("decoder", ["native", "eager"])
@pytest.mark.parametrize("objective", [Likelihood(), Everything()])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("window", "keep", "max_context"), [(4, 3, 3), (3, 1, 2), (3, 2, 3)])
def test_pruned_likelihood_search_equals_the_uncached_one(
    objective: Likelihood, seed: int, window: int, keep: int, max_context: int, decoder: str
) -> None:
    model, past = random_model(SMALL, seed), [seed % max_context, max_context - 1]
    settings = SearchSettings(horizon=4, beam_width=5, n_expand=1)
    tokens = contexts(SMALL, past, max_context, seed)
    plans = search_by_token(model, objective, settings, tokens, past, max_context, window, keep, decoder)
    for e, count in enumerate(past):
        seen = tokens[e, tokens.shape[1] - count * SMALL.slots - SMALL.observation_dim :].tolist()
        expected = greedy_beams(model, seen, settings, window, keep, objective.kinds)
        torch.testing.assert_close(plans.scores[e].tolist(), [score for score, _ in expected])
        assert plans.tokens[e].flatten(1).tolist() == [list(plan) for _, plan in expected]


def test_batched_likelihood_equals_single() -> None:
    model, past = random_model(SMALL, 7), [0, 2, 1]
    settings = SearchSettings(horizon=3, beam_width=4, n_expand=1)
    tokens = contexts(SMALL, past, 3, 5)
    together = search_by_token(model, Likelihood(), settings, tokens, past, 3, 3, 2)
    for e, count in enumerate(past):
        alone = search_by_token(model, Likelihood(), settings, tokens[e : e + 1], [count], 3, 3, 2)
        assert torch.equal(alone.tokens[0], together.tokens[e])
        torch.testing.assert_close(alone.scores[0], together.scores[e])


VALUES = torch.linspace(-1, 1, 4 * 6, dtype=torch.float64).view(6, 4).flip(1)
"""What the tokens of SMALL's slots stand for, the stop token aside; higher tokens for less."""


def conditioned(target: float | None, discount: float = 0.9) -> ReturnConditioned:
    values = torch.nn.functional.pad(VALUES, (0, 1))
    return ReturnConditioned(discount, target, values)


def every_action(
    model: TrajectoryTransformer, seen: tuple[int, ...]
) -> list[tuple[float, tuple[int, ...], list[tuple[float, float]]]]:
    """Log-odds of every action, its plan, and (return, odds) of each of its value tokens; without a cache."""
    uncached, found = Uncached(model, 4, 2), []
    for actions in itertools.product(range(SMALL.num_bins), repeat=SMALL.action_dim):
        visible, log_odds = seen, 0.0
        for j, token in enumerate(actions):
            log_odds += uncached.log_probs(visible, SMALL.observation_dim + j)[token]
            visible = uncached.feed(visible, token)
        of_rewards = uncached.log_probs(visible, SMALL.reward_slot)
        reward = max(range(SMALL.num_bins), key=lambda k: of_rewards[k])
        visible = uncached.feed(visible, reward)
        odds = torch.tensor(uncached.log_probs(visible, SMALL.value_slot), dtype=torch.float64).exp()
        returns = VALUES[-2, reward] + 0.9 * VALUES[-1]
        value = int(odds.argmax())
        plan = (*seen[-SMALL.observation_dim :], *actions, reward, value)
        found.append((log_odds, plan, list(zip(returns.tolist(), odds.tolist(), strict=True))))
    return found


@pytest.mark.parametrize("decoder", ["native", "eager"])
@pytest.mark.parametrize("target", [None, -0.3, 0.2, 50.0])
def test_return_conditioning_is_bayes_rule_over_every_action(target: float | None, decoder: str) -> None:
    """With a beam for every action nothing is pruned: p(a | past) p(return >= target | past, a)."""
    model, past = random_model(SMALL, 12), [1, 0, 1, 0, 1, 1, 0, 1]
    settings = SearchSettings(horizon=1, beam_width=SMALL.num_bins**SMALL.action_dim, n_expand=1)
    tokens = contexts(SMALL, past, 2, 3)
    plans = search_by_token(model, conditioned(target), settings, tokens, past, 2, 4, 2, decoder)
    firsts = set()
    for e, count in enumerate(past):
        seen = tuple(tokens[e, tokens.shape[1] - count * SMALL.slots - SMALL.observation_dim :].tolist())
        every = every_action(model, seen)
        odds = torch.tensor([log_odds for log_odds, _, _ in every], dtype=torch.float64).softmax(0)
        futures = [(g, float(o) * p) for o, (_, _, each) in zip(odds, every, strict=True) for g, p in each]
        reachable = max(g for g, _ in futures)
        if target is None:
            futures.sort(reverse=True)
            mass = list(itertools.accumulate(p for _, p in futures))
            threshold = next(g for (g, _), m in zip(futures, mass, strict=True) if m >= 0.1 * mass[-1])
        else:
            threshold = min(target, reachable)
        scored = [
            (log_odds + torch.tensor(sum(p for g, p in each if g >= threshold)).log().item(), plan)
            for log_odds, plan, each in every
        ]
        scored = sorted(((s, plan) for s, plan in scored if s > float("-inf")), reverse=True)
        assert scored
        torch.testing.assert_close(plans.scores[e, : len(scored)].tolist(), [s for s, _ in scored])
        assert plans.tokens[e, : len(scored)].flatten(1).tolist() == [list(plan) for _, plan in scored]
        firsts.add((scored[0][1] == max(every)[1], len(scored)))
    if target in (None, 50.0):  # a lower one asks for little more than the likeliest action has
        assert any(not likeliest for likeliest, _ in firsts)  # else it would be greedy imitation


def test_return_conditioning_of_a_batch_equals_single() -> None:
    model, past = random_model(SMALL, 7), [0, 2, 1]
    settings = SearchSettings(horizon=1, beam_width=6, n_expand=1)
    tokens = contexts(SMALL, past, 3, 5)
    together = search_by_token(model, conditioned(None), settings, tokens, past, 3, 3, 2)
    for e, count in enumerate(past):
        alone = search_by_token(model, conditioned(None), settings, tokens[e : e + 1], [count], 3, 3, 2)
        assert torch.equal(alone.tokens[0], together.tokens[e])
        assert torch.equal(alone.scores[0], together.scores[e])


def q_objective(layout: TokenLayout) -> QValue:
    torch.manual_seed(11)
    critic = Critic(layout.observation_dim, layout.action_dim, (8,)).double().eval()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(torch.randn_like(parameter))
    values = torch.randn(layout.slots, layout.num_bins + 1, dtype=torch.float64)
    return QValue(critic, 0.9, -0.5, values)


@pytest.mark.parametrize("decoder", ["native", "eager"])
def test_q_search_equals_one_that_scores_each_plan_by_hand(decoder: str) -> None:
    """With as many candidates as beams nothing is pruned, so every plan's score can be worked out again."""
    model, objective, past = random_model(SMALL, 2), q_objective(SMALL), [1, 0]
    settings = SearchSettings(horizon=3, beam_width=6, n_expand=1)
    generator = torch.Generator().manual_seed(4)
    actions = torch.rand(2, 3, SMALL.action_dim, 6, 1, generator=generator, dtype=torch.float64)
    rewards, values = objective_values(objective)
    sizes = {
        "episodes": 2,
        "beams": 6,
        "copies": 1,
        "horizon": 3,
        "max_context_transitions": 2,
        "window": 4,
        "keep": 2,
    }
    cache = (
        NativeCache(model, **sizes, reward_values=rewards, value_values=values)
        if decoder == "native"
        else SearchCache(model, **sizes)
    )
    tokens = contexts(SMALL, past, 2, 9)
    search = BeamSearch(SMALL, settings, objective, rewards, values)
    with torch.inference_mode():
        plans = search.run(cache, tokens, past, Uniforms(actions, None))
    uncached = Uncached(model, 4, 2)
    checked = 0
    for e, count in enumerate(past):
        seen = tokens[e, tokens.shape[1] - count * SMALL.slots - SMALL.observation_dim :].tolist()
        for beam in range(6):
            plan = plans.tokens[e, beam]
            if (plan == SMALL.stop_token).any():
                continue
            score = score_by_hand(uncached, objective, tuple(seen), plan, rewards)
            assert plans.scores[e, beam].item() == pytest.approx(score)
            checked += 1
    assert checked >= 6


def objective_values(objective: QValue) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return tuple(torch.randn(SMALL.num_bins + 1, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def score_by_hand(
    uncached: Uncached, objective: QValue, seen: tuple[int, ...], plan: Tensor, rewards: Tensor
) -> float:
    """sum_{i<t} 0.9^i (r_i - 0.5) + 0.9^t min Q(s_t, a_t) of a whole plan [H, D]."""
    n, m = SMALL.observation_dim, SMALL.action_dim
    total, visible = 0.0, seen
    for t, row in enumerate(plan.tolist()):
        state = torch.stack([objective.observation_values[i, row[i]] for i in range(n)])
        move = torch.stack([objective.action_values[i, row[n + i]] for i in range(m)])
        if t == len(plan) - 1:
            with torch.no_grad():
                return total + 0.9**t * float(objective.critic.q_values(state, move).min())
        for token in row[n if t == 0 else 0 : n + m]:
            visible = uncached.feed(visible, token)
        with torch.no_grad():
            logits = uncached.model(torch.tensor([visible]))[0, -1]
        total += 0.9**t * (float(logits.softmax(0) @ rewards) - 0.5)
        for token in row[n + m :]:
            visible = uncached.feed(visible, token)
    raise AssertionError("a plan has a last transition")


def test_one_class_and_one_line_make_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "objectives_of_a_test.py").write_text(
        "from tt_ray.planning.objectives import Return, register\n\n\n"
        "@register('last-value')\n"
        "class LastValue(Return):\n"
        "    def extend(self, totals, candidates):\n"
        "        return totals, candidates.value\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_objective("objectives_of_a_test:last-value").__name__ == "LastValue"
    assert find_objective("last-value").expansion == "transition"
    del OBJECTIVES["last-value"]


def test_registered_classes_say_what_they_need() -> None:
    class Own:
        uses_critic: ClassVar[bool] = True

    assert register("own-for-a-test")(Own) is Own
    assert OBJECTIVES.pop("own-for-a-test").uses_critic
    assert OBJECTIVES["return"] is Return
    assert [name for name, kind in OBJECTIVES.items() if kind.uses_goal] == ["goal"]
    assert [name for name, kind in OBJECTIVES.items() if kind.uses_critic] == ["q"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("retrun", "unknown objective 'retrun'; did you mean return?"),
        ("zzz", "there are goal, likelihood, q, return, return-conditioned"),
        ("no_such_module_here:x", "no_such_module_here cannot be imported"),
        ("tt_ray.planning.objectives:nothing", "unknown objective"),
    ],
)
def test_unknown_objectives_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        find_objective(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stop_tokens_occur_between_transitions_only() -> None:
    counts = []
    for seed in range(6):
        model, past = random_model(SMALL, seed), [1]
        settings = SearchSettings(horizon=3, beam_width=12, n_expand=1)
        tokens = contexts(SMALL, past, 2, seed)
        plans = search_by_token(model, Likelihood(), settings, tokens, past, 2, 4, 1).tokens[0]
        for plan in plans:
            stops = (plan == SMALL.stop_token).any(-1)
            assert (plan[stops] == SMALL.stop_token).all()
        counts.append((plans == SMALL.stop_token).flatten(1).any(-1).float().mean().item())
    assert 0 < sum(counts) / len(counts) < 1


def test_prefixes_are_enumerated_once() -> None:
    """The brute force itself: with every token counted, probabilities of all plans sum to one."""
    model = random_model(TINY, 1)
    plans = Uncached(model, 4, 2).every_plan([1], 1, frozenset(Kind))
    assert len(plans) == len(list(itertools.product(range(3), repeat=3)))
    assert sum(torch.tensor([score for score, _ in plans]).exp().tolist()) == pytest.approx(1.0)
