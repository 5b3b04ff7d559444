from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tt_ray.cli.view import Bars
from tt_ray.config import (
    CriticConfig,
    DatasetConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    PlannerConfig,
)
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec
from tt_ray.data.tokens import TokenLayout
from tt_ray.distributed.baselines import IqlBaseline, require_policy, return_conditioned
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.evaluate import (
    EpisodeFile,
    Planner,
    RandomBaseline,
    Row,
    Worker,
    evaluate,
    read_episodes,
)
from tt_ray.distributed.line import Line
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import summarize
from tt_ray.model.checkpoint import Checkpoint, save_checkpoint
from tt_ray.model.critic import Critic, CriticCheckpoint, load_critic, save_critic
from tt_ray.model.transformer import TrajectoryTransformer

SPEC = DataSpec(
    dataset_id="tiny/pendulum-v0",
    environment={"id": "Pendulum-v1"},
    observation_keys=(),
    observation_dim=3,
    action_dim=1,
    action_low=(-2.0,),
    action_high=(2.0,),
    ref_min_score=None,
    ref_max_score=None,
    fingerprint="0",
)
LAYOUT = TokenLayout(observation_dim=3, action_dim=1, num_bins=12)
SEEDS = [100, 101, 102, 103, 104]


def allocation(actors: int) -> Allocation:
    return Allocation(evaluation_actors=actors)


def played(
    worker: Worker,
    seeds: list[int],
    actors: int,
    slots: int = 1,
    on_steps: Callable[[int], None] | None = None,
) -> list[EpisodeResult]:
    """Results in the order of `seeds`."""
    results: list[EpisodeResult] = []
    evaluate(worker, seeds, allocation(actors), slots=slots, on_result=results.append, on_steps=on_steps)
    return sorted(results, key=lambda result: seeds.index(result.seed))


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, context_transitions=4)
    model = TrajectoryTransformer(config, LAYOUT).eval()
    values = np.random.default_rng(0).normal(size=(500, LAYOUT.slots)).astype(np.float32)
    bins = Discretizer.fit(values, strategy="quantile", num_bins=LAYOUT.num_bins)
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(model, bins, SPEC, {}, 1, {}), {})
    settings = PlannerConfig(horizon=2, beam_width=3, max_context_transitions=2)
    return Planner(tmp_path / "checkpoint", settings, 0.99, slots=2)


def critic(folder: Path, policy: bool = True) -> Path:
    """A random critic's checkpoint."""
    torch.manual_seed(0)
    network = Critic(3, 1, (8,), policy)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    save_critic(folder, CriticCheckpoint(network, SPEC, {"seed": 0}, 1, {}), {})
    return folder


def test_iql_acts_within_the_bounds_and_alone_as_in_company(tmp_path: Path) -> None:
    policy = IqlBaseline(critic(tmp_path / "critic"))()
    random = np.random.default_rng(0)
    seen = {episode: random.normal(size=3).astype(np.float32) for episode in range(5)}
    for episode, observation in seen.items():
        policy.add(episode, episode, observation)
    actions = policy.act()
    for episode, observation in seen.items():
        alone = IqlBaseline(tmp_path / "critic")()
        alone.add(0, 0, observation)
        assert alone.act()[0].tobytes() == actions[episode].tobytes()
    assert len({float(action[0]) for action in actions.values()}) > 2
    assert all(abs(action) <= 2 for action in actions.values())
    raw = load_critic(tmp_path / "critic").critic.act(torch.from_numpy(seen[0])).detach()
    assert float(actions[0][0]) == float(raw.clamp(-2, 2))


def test_a_critic_without_a_policy_is_refused_in_one_line(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(baselines=("data", "iql"))
    config = ExperimentConfig(
        name="x", dataset=DatasetConfig(id="x"), evaluation=evaluation, critic=CriticConfig()
    )
    line = Line(config, Bars())
    line.given_critic = critic(tmp_path / "old", policy=False)
    with pytest.raises(UserError, match=r"no policy for evaluation\.baselines: iql; name iql in") as caught:
        require_policy(line, 0)
    assert "\n" not in str(caught.value)
    line.given_critic = None
    with pytest.raises(UserError, match=r"evaluation\.baselines: iql needs a critic, and .* has none"):
        require_policy(line, 0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("policy", ["planner", "random", "iql", "return-conditioned"])
def test_episodes_are_the_same_here_and_on_actors(planner: Planner, tmp_path: Path, policy: str) -> None:
    policies = {
        "planner": planner,
        "random": RandomBaseline(SPEC),
        "iql": IqlBaseline(critic(tmp_path / "critic")),
        "return-conditioned": replace(planner, settings=return_conditioned(planner.settings)),
    }
    worker = Worker(policies[policy], SPEC, max_steps=8)
    found = [played(worker, SEEDS, actors, slots=2) for actors in (0, 1, 2)]
    assert found[0] == found[1] == found[2]
    assert [result.seed for result in found[0]] == SEEDS
    assert len({result.episode_return for result in found[0]}) == len(SEEDS)


def test_every_step_is_told(planner: Planner) -> None:
    steps: list[int] = []
    results = played(Worker(planner, SPEC, max_steps=8), SEEDS[:3], 0, on_steps=steps.append)
    assert sorted(steps) == steps
    assert steps[-1] == sum(result.length for result in results) == 3 * 8


def test_episodes_are_kept_one_by_one(planner: Planner, tmp_path: Path) -> None:
    assert read_episodes(tmp_path / "evaluation") == {}
    file = EpisodeFile(tmp_path / "evaluation")
    for result in played(Worker(planner, SPEC, max_steps=8), SEEDS, 0):
        file.append(result)
        assert read_episodes(tmp_path / "evaluation") == file.results
    assert sorted(file.results) == SEEDS


def test_a_torn_line_is_no_episode(planner: Planner, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    file = EpisodeFile(folder)
    whole = played(Worker(planner, SPEC, max_steps=8), SEEDS[:3], 0)
    for result in whole:
        file.append(result)
    text = file.path.read_text()
    file.path.write_text(text[:-20])
    torn = file.path.read_bytes()
    assert sorted(read_episodes(folder)) == SEEDS[:2]
    assert file.path.read_bytes() == torn  # a reader leaves alone what someone may be writing
    EpisodeFile(folder).append(whole[2])
    assert file.path.read_text() == text


def test_speed_says_how_idle_the_slots_were(planner: Planner) -> None:
    results = played(Worker(planner, SPEC, max_steps=8), SEEDS, 0)
    speed = Row("planner", 0, summarize(results, None, None, 0.95, 100), results).speed()
    assert 0 <= speed["speed/idle_slot_share"] < 0.5
    assert speed["speed/decisions_per_second"] > 0


def test_episodes_may_be_played_in_another_environment_that_fits() -> None:
    def line(environment: str | None) -> Line:
        evaluation = EvaluationConfig(environment=environment)
        return Line(ExperimentConfig(name="x", dataset=DatasetConfig(id="x"), evaluation=evaluation), Bars())

    usual, other = line(None), line("Acrobot-v1")
    usual.use(SPEC)
    assert usual.played == SPEC
    pendulum = line("Pendulum-v1")
    pendulum.use(replace(SPEC, environment={"id": "NotHere-v0"}))
    assert pendulum.played == SPEC
    with pytest.raises(UserError, match="Acrobot-v1"):
        other.use(SPEC)
