"""Sweeps made small: the same study, valid, no two trials alike, and everything in it tiny."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.dataset.minari_dataset import DATASET_ID_RE

from tt_ray.config import DatasetConfig, ExperimentConfig, GoalConfig, ModelConfig, to_dict
from tt_ray.errors import UserError
from tt_ray.experiment_file import load_experiment
from tt_ray.search import Range, SearchConfig, Values
from tt_ray.smoke import smoke
from tt_ray.sweep_file import Sweep, Trial, dump_trial, load_sweep

FILES = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))
TRIALS = {
    "action_filters": 8,
    "antmaze": 5,
    "beam_search_asha": 3,
    "bins": 2,
    "context_length": 4,
    "data_fraction": 2,
    "frontier": 8,
    "goal_reaching": 6,
    "imitation": 8,
    "locomotion": 12,
    "pointmaze_q": 9,
    "replanning": 2,
    "tuning": 3,
    "uniform_vs_quantile": 4,
}
MINIMAL = "name: x\ndataset: {id: hopper-medium-v2}\n"


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Sweep]:
    """The smoke version of the text of a sweep file."""

    def read(text: str) -> Sweep:
        file = tmp_path / "x.yaml"
        file.write_text(text)
        return smoke(load_sweep(file))

    return read


def trials(sweep: Sweep) -> list[Trial]:
    """All trials; for optuna, those at both ends of every parameter."""
    if sweep.search.method != "optuna":
        return sweep.trials()
    ends = [{key: space.at(u) for key, space in sweep.search.parameters.items()} for u in (0.0, 0.999)]
    return [sweep.trial(end, case) for case in sweep.case_names for end in ends]


def column(sweep: Sweep, section: str, key: str) -> list[Any]:
    """A setting's value in every trial."""
    return [getattr(getattr(trial.config, section), key) for trial in trials(sweep)]


def check_tiny(config: ExperimentConfig) -> None:
    model, training, planner, evaluation = config.model, config.training, config.planner, config.evaluation
    assert model.num_layers <= 2
    assert model.embed_dim <= 32
    assert model.context_transitions <= 5
    assert training.steps * training.batch_size <= 64
    assert training.validate_every <= 4
    assert planner.horizon <= 3
    assert planner.beam_width * planner.n_expand <= 8
    assert evaluation.episodes <= 2
    assert evaluation.max_steps is not None
    assert evaluation.max_steps <= 10
    assert config.collect is not None
    assert config.collect.steps <= 400
    assert config.collect.max_steps is not None
    assert config.collect.max_steps <= 40
    assert len(config.seeds) <= 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_sweep_stays_the_same_study(file: Path, tmp_path: Path) -> None:
    whole = load_sweep(file)
    tiny = smoke(whole)
    assert tiny.base.name == f"{whole.base.name} smoke"
    assert tiny.base.question == whole.base.question
    assert tiny.base.seeds == whole.base.seeds[:2]
    assert tiny.source == whole.source
    before, after = whole.search, tiny.search
    assert (after.method, after.metric, after.seed) == (before.method, before.metric, before.seed)
    assert list(after.parameters) == list(before.parameters)
    assert [case.name for case in after.cases] == [case.name for case in before.cases]
    kinds = [
        search.scheduler and (search.scheduler.type, search.scheduler.rung) for search in (before, after)
    ]
    assert kinds[0] == kinds[1]
    assert tiny.search.count == TRIALS.get(file.stem, tiny.search.count)
    assert len({trial.fingerprint for trial in trials(tiny)}) == len(trials(tiny))
    for trial in trials(tiny):
        check_tiny(trial.config)
        single = tmp_path / "trial.yaml"
        single.write_text(dump_trial(trial))
        assert load_experiment(single) == trial.config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_data_set_of_a_shipped_sweep_becomes_a_tiny_one_of_its_own(file: Path) -> None:
    whole, tiny = load_sweep(file), smoke(load_sweep(file))
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    for case in whole.case_names:
        settings = [
            {key: space.at(0) for key, space in sweep.search.parameters.items()} for sweep in (whole, tiny)
        ]
        before, after = whole.trial(settings[0], case).config, tiny.trial(settings[1], case).config
        assert DATASET_ID_RE.fullmatch(after.dataset.id)
        assert after.dataset.id.startswith("smoke/")
        assert after.collect is not None
        assert before.collect is None or before.collect.environment == after.collect.environment
        collect = to_dict(after.collect)
        assert made.setdefault(before.dataset.id, (after.dataset.id, collect)) == (after.dataset.id, collect)
    assert len({name for name, _ in made.values()}) == len(made)
    assert len({collect["seed"] for _, collect in made.values()}) == len(made)


def test_sizes_that_become_equal_stay_different_and_in_order(small: Callable[[str], Sweep]) -> None:
    sweep = small(
        MINIMAL
        + "search:\n  parameters:\n"
        + "    planner.horizon: {values: [15, 5, 20]}\n"
        + "    planner.plan_every: {values: [2, 4]}\n"
        + "    discretizer.num_bins: {values: [10, 20, 400]}\n"
        + "    evaluation.max_steps: {values: [null, 500]}\n"
        + "    model.num_layers: {values: [2, 6]}\n"
        + "    model.embed_dim: {values: [128, 64]}\n"
        + "    training.learning_rate: {values: [1.0e-3]}\n"
    )
    assert {key: space.values for key, space in sweep.search.parameters.items()} == {  # type: ignore[union-attr]
        "planner.horizon": (3, 2),
        "planner.plan_every": (1, 2),
        "discretizer.num_bins": (10, 20),
        "evaluation.max_steps": (10, 5),
        "model.num_layers": (1, 2),
        "model.embed_dim": (32, 16),
        "training.learning_rate": (1e-3,),
    }
    assert len(sweep.trials()) == 64


def test_cases_that_become_equal_stay_different(small: Callable[[str], Sweep]) -> None:
    cases = "".join(
        f"  - {{name: {h}-{b}, planner: {{horizon: {h}, beam_width: {b}}}}}\n"
        for h in (5, 15)
        for b in (32, 64)
    )
    sweep = small(MINIMAL + "search:\n  cases:\n" + cases)
    assert [trial.name for trial in sweep.trials()] == ["5-32", "5-64", "15-32", "15-64"]
    assert column(sweep, "planner", "horizon") == [3] * 4
    assert column(sweep, "evaluation", "bootstrap_samples") == [200, 201, 202, 203]


def test_only_the_first_twelve_cases(small: Callable[[str], Sweep]) -> None:
    cases = "".join(f"  - {{name: c{i}, dataset.split_seed: {i}}}\n" for i in range(14))
    assert column(small(MINIMAL + "search:\n  cases:\n" + cases), "dataset", "split_seed") == list(range(12))


def test_ranges_and_the_number_of_trials(small: Callable[[str], Sweep]) -> None:
    text = MINIMAL + (
        "search:\n  method: random\n  num_trials: 50\n  parameters:\n"
        "    planner.horizon: {min: 1, max: 20}\n"
        "    planner.beam_width: {min: 64, max: 256, distribution: log_int}\n"
        "    training.learning_rate: {min: 1.0e-4, max: 1.0e-2, distribution: log_uniform}\n"
        "    model.embed_dim: {values: [64, 128]}\n"
    )
    sweep = small(text)
    assert sweep.search.parameters["planner.horizon"] == Range(min=1, max=3, distribution="int")
    assert sweep.search.parameters["planner.beam_width"] == Range(min=2, max=4, distribution="log_int")
    rate = sweep.search.parameters["training.learning_rate"]
    assert rate == Range(min=1e-4, max=1e-2, distribution="log_uniform")
    assert len(sweep.trials()) == 3
    few = MINIMAL + (
        "search:\n  method: random\n  num_trials: 3\n  parameters:\n    planner.k_act: {values: [1, 2, 3]}\n"
    )
    assert column(small(few), "planner", "k_act") in ([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("scheduler", "rung", "grace"),
    [
        ("{type: asha, rung: episodes, grace: 8}", "score/mean", 1),
        ("{type: asha, rung: training_steps, grace: 1000, reduction: 4}", "val/loss", 4),
        ("{type: asha, rung: training_steps, grace: 2}", "val/loss", 2),
    ],
)
def test_rungs_fit_into_the_small_sizes(
    small: Callable[[str], Sweep], scheduler: str, rung: str, grace: int
) -> None:
    sweep = small(
        MINIMAL
        + f"search:\n  metric: {rung}\n  scheduler: {scheduler}\n"
        + "  parameters:\n    training.steps: {values: [5000, 10000]}\n"
    )
    assert sweep.search.scheduler is not None
    assert (sweep.search.scheduler.grace, sweep.search.scheduler.reduction) == (grace, 2)
    assert column(sweep, "training", "steps") == [6, 8]


def test_a_file_without_a_search_is_a_small_single_run(small: Callable[[str], Sweep]) -> None:
    (trial,) = small(MINIMAL + "tracking: {experiment: mine}\nseeds: [4, 5, 6]\n").trials()
    check_tiny(trial.config)
    assert (trial.config.seeds, trial.config.tracking.experiment) == ((4, 5), "mine smoke")


def test_small_settings_stay_as_they_are(small: Callable[[str], Sweep]) -> None:
    sweep = small(
        MINIMAL
        + "planner: {horizon: 2, beam_width: 1, n_expand: 1, k_act: 7, max_context_transitions: 1}\n"
        + "evaluation: {episodes: 1, max_steps: 3}\nresources: {workers: 1, gpus_per_worker: 2}\n"
        + "training: {warmup_steps: 0, learning_rate: 0.5}\n"
    )
    planner, base = sweep.base.planner, sweep.base
    assert (planner.horizon, planner.beam_width, planner.n_expand, planner.k_act) == (2, 1, 1, 7)
    assert planner.max_context_transitions == 1
    assert (base.evaluation.episodes, base.evaluation.max_steps) == (1, 3)
    assert (base.training.warmup_steps, base.training.learning_rate) == (0, 0.5)
    assert (base.resources.workers, base.resources.gpus_per_worker) == (1, "auto")


@pytest.mark.parametrize(
    ("dataset", "environment"),
    [
        ("hopper-medium-v2", "Hopper-v5"),
        ("mujoco/halfcheetah/expert-v0", "HalfCheetah-v5"),
        ("d4rl/walker2d/medium-v2", "Walker2d-v4"),
        ("mine/Ant-noisy-v1", "Ant-v5"),
        ("D4RL/antmaze/medium-play-v1", "AntMaze_UMaze-v5"),
        ("D4RL/pointmaze/large-v2", "PointMaze_UMaze-v3"),
    ],
)
def test_the_environment_is_told_by_the_id(dataset: str, environment: str) -> None:
    collect = smoke(Sweep(base=ExperimentConfig(name="x", dataset=DatasetConfig(id=dataset)))).base.collect
    assert collect is not None
    assert collect.environment == environment


GOALS = """
name: goals
dataset: {id: mine/rooms-v0, observation_keys: [achieved_goal, observation]}
goal: {relabel: future, dims: [0, 1]}
critic: {steps: 50000, hidden: [256, 256], log_every: 1, expectile: 0.9}
ensemble: {members: 7, hidden: [200]}
prediction: {context: 1}
planner: {objective: goal, goal: [0.5, 1.5]}
evaluation: {record: [0, 1]}
collect: {environment: PointMaze_Open-v3, method: waypoints, segment_cells: 3, steps: 100000}
search: {parameters: {critic.hidden: {values: [[64], [128, 128]]}, ensemble.steps: {values: [9000, 5000]}}}
"""


def test_a_study_of_goals_keeps_its_maze_its_goals_and_what_it_observes(
    small: Callable[[str], Sweep],
) -> None:
    sweep = small(GOALS)
    base = sweep.base
    assert base.goal == GoalConfig(relabel="future", dims=(0, 1))
    assert base.dataset.observation_keys == ("achieved_goal", "observation")
    assert (base.planner.objective, base.planner.goal) == ("goal", (0.5, 1.5))
    assert base.evaluation.record == (0, 1)
    collect, critic = base.collect, base.critic
    assert collect is not None
    assert (collect.environment, collect.method, collect.segment_cells) == (
        "PointMaze_Open-v3",
        "waypoints",
        3,
    )
    assert collect.steps <= 400
    assert critic is not None
    assert critic.steps * critic.batch_size <= 64
    assert (critic.log_every, critic.expectile) == (1, 0.9)
    assert base.ensemble.members <= 3
    assert base.prediction.context == 1
    assert base.prediction.rollouts * base.prediction.horizon * base.prediction.starts <= 24


def test_searched_widths_stay_different_and_in_their_order(small: Callable[[str], Sweep]) -> None:
    sweep = small(GOALS)
    assert column(sweep, "critic", "hidden") == [(8,), (8,), (16,), (16,)]
    assert column(sweep, "ensemble", "steps") == [8, 6, 8, 6]


@pytest.mark.parametrize("dataset", ["D4RL/kitchen/mixed-v1", "me/task-v0"])
def test_an_id_that_tells_no_environment_is_refused(small: Callable[[str], Sweep], dataset: str) -> None:
    with pytest.raises(UserError, match=f"cannot tell the environment of {dataset}: give the file a section"):
        small(f"name: x\ndataset: {{id: {dataset}}}\n")
    given = small(
        f"name: x\ndataset: {{id: {dataset}}}\ncollect: {{environment: Pendulum-v1}}\n"
    ).base.collect
    assert given is not None
    assert given.environment == "Pendulum-v1"


def test_cases_with_and_without_a_collection_of_their_own(small: Callable[[str], Sweep]) -> None:
    sweep = small(
        "name: x\ndataset: {id: me/task-v0}\ncollect: {environment: Pendulum-v1, noise: 0.5}\n"
        "search:\n  cases:\n"
        "  - {name: own}\n"
        "  - {name: known, collect: null, dataset.id: hopper-medium-v2}\n"
        "  - {name: other, dataset.id: me/other-v0, collect: {environment: Reacher-v5, steps: 90000}}\n"
    )
    configs = [trial.config.collect for trial in sweep.trials()]
    made = [(config.environment, config.steps, config.noise) for config in configs if config is not None]
    assert made == [("Pendulum-v1", 400, 0.5), ("Hopper-v5", 400, 0.03), ("Reacher-v5", 400, 0.5)]
    assert len(set(column(sweep, "dataset", "id"))) == 3


def test_searched_data_sets(small: Callable[[str], Sweep]) -> None:
    text = MINIMAL + "search:\n  parameters:\n    dataset.id: {values: [%s]}\n"
    ids = column(small(text % "hopper-medium-v2, hopper-expert-v2"), "dataset", "id")
    assert len(set(ids)) == 2
    assert all(DATASET_ID_RE.fullmatch(name) for name in ids)
    with pytest.raises(
        UserError, match=r"^search.parameters.dataset.id: .* Ant-v5 and Hopper-v5: write them as"
    ):
        small(text % "hopper-medium-v2, ant-medium-v2")


def test_a_set_that_is_collected_otherwise_is_another_set(small: Callable[[str], Sweep]) -> None:
    names = [
        small(MINIMAL + f"collect: {{environment: Hopper-v5, noise: {noise}}}\n").base.dataset.id
        for noise in (0.1, 0.2, 0.1)
    ]
    assert names[0] == names[2] != names[1]


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Sequence[Any]]:
    """Two values of everything that has to do with windows, all of which go together."""

    def two(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=1, max_size=2, unique=True))

    keep, most = two(1, 6), two(1, 7)
    window = two(max(max(keep) + 1, max(most)), 12)
    every = two(1, 6)
    given = {
        "planner.keep": keep,
        "planner.max_context_transitions": most,
        "planner.window": window,
        "model.context_transitions": two(max(window), 24),
        "planner.plan_every": every,
        "planner.horizon": two(max(every), 20),
    }
    if draw(st.booleans()):
        del given["planner.keep"]
    if draw(st.booleans()):
        given["planner.window"] = [None]
    return given


@settings(max_examples=40, deadline=None)
@given(windows())
def test_settings_that_go_together_still_do(values: dict[str, Sequence[Any]]) -> None:
    base = ExperimentConfig(
        name="x", dataset=DatasetConfig(id="ant-v0"), model=ModelConfig(context_transitions=24)
    )
    parameters = {key: Values(values=tuple(items)) for key, items in values.items()}
    tiny = smoke(Sweep(base=base, search=SearchConfig(parameters=parameters)))
    every = list(itertools.product(*values.values()))
    made = tiny.trials()
    assert len({trial.fingerprint for trial in made}) == len(every)
    for trial in made:
        check_tiny(trial.config)
