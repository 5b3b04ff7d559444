"""Sweep files: what is read, the trials they make, and which of them are recognised again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tt_ray.config import DatasetConfig, ExperimentConfig, PlannerConfig, TrainingConfig
from tt_ray.errors import UserError
from tt_ray.experiment_file import load_experiment
from tt_ray.search import Case, MetricConfig, Range, SchedulerConfig, SearchConfig, Values
from tt_ray.sweep_file import Sweep, dump_trial, load_sweep

MINIMAL = "name: x\ndataset: {id: d}\n"
BASE = ExperimentConfig(name="x", dataset=DatasetConfig(id="d"))
GRID = (
    MINIMAL
    + """search:
  parameters:
    discretizer.strategy: {values: [uniform, quantile]}
    planner.horizon: {values: [5, 15]}
"""
)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """Writes a text to `x.yaml` and reads it as a sweep."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Sweep:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return load_sweep("x.yaml", overrides)

    return read


def test_a_full_file(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "seeds: [0, 1]\n"
        "search:\n"
        "  parameters:\n"
        "    training.learning_rate: {min: 1e-4, max: 1e-2, distribution: log_uniform}\n"
        "    planner.horizon: {min: 1, max: 20}\n"
        "    planner.cdf_act: {values: [null, 0, 0.6]}\n"
        "    training.weight_decay: {min: 0, max: 0.2}\n"
        "  cases:\n"
        "  - name: hopper\n"
        "    dataset: {id: mujoco/hopper/medium-v0, terminal_penalty: -100}\n"
        "    planner.beam_width: 64\n"
        "  - {name: 東京, collect: null}\n"
        "  method: optuna\n"
        "  num_trials: 20\n"
        "  seed: 3\n"
        "  metric: val/loss\n"
        "  scheduler: {type: asha, rung: training_steps, grace: 1000, reduction: 2}\n"
        "  max_concurrent_trials: 2\n"
        "  confirm_episodes: 50\n"
    )
    sweep = load(text)
    assert sweep.base == replace(BASE, seeds=(0, 1))
    assert sweep.source == text
    assert sweep.search == SearchConfig(
        parameters={
            "training.learning_rate": Range(min=1e-4, max=1e-2, distribution="log_uniform"),
            "planner.horizon": Range(min=1, max=20, distribution="int"),
            "planner.cdf_act": Values(values=(None, 0.0, 0.6)),
            "training.weight_decay": Range(min=0, max=0.2, distribution="uniform"),
        },
        cases=(
            Case(
                name="hopper",
                settings={
                    "dataset.id": "mujoco/hopper/medium-v0",
                    "dataset.terminal_penalty": -100.0,
                    "planner.beam_width": 64,
                },
            ),
            Case(name="東京", settings={"collect": None}),
        ),
        method="optuna",
        num_trials=20,
        seed=3,
        metric=MetricConfig(name="val/loss", goal="minimize"),
        scheduler=SchedulerConfig(type="asha", rung="training_steps", grace=1000, reduction=2),
        max_concurrent_trials=2,
        confirm_episodes=50,
    )
    assert sweep.search.count == 40
    assert sweep.case_names == ["hopper", "東京"]


def test_defaults(load: Callable[..., Sweep]) -> None:
    search = load(GRID + "  cases: null\n  scheduler: null\n  num_trials: null\n").search
    assert search == SearchConfig(parameters=search.parameters)
    assert search.metric == MetricConfig(name="score/mean", goal="maximize")


def test_a_grid_has_the_cases_outermost(load: Callable[..., Sweep]) -> None:
    cases = "  cases:\n  - {name: wide, planner.beam_width: 256}\n  - {name: small, model: {num_layers: 2}}\n"
    trials = load(GRID + cases).trials()
    assert [trial.index for trial in trials] == list(range(8))
    assert [trial.name for trial in trials][2:5] == [
        "wide, strategy=quantile, horizon=5",
        "wide, strategy=quantile, horizon=15",
        "small, strategy=uniform, horizon=5",
    ]
    last = trials[-1]
    assert (last.case, last.settings) == (
        "small",
        {"discretizer.strategy": "quantile", "planner.horizon": 15},
    )
    assert (last.config.model.num_layers, last.config.planner.beam_width) == (2, 128)
    assert trials[0].config.discretizer.strategy == "uniform"
    assert len({trial.fingerprint for trial in trials}) == 8


@pytest.mark.parametrize("text", [MINIMAL, MINIMAL + "search: null\n", MINIMAL + "search:\n"])
def test_a_file_without_a_search_is_one_trial(load: Callable[..., Sweep], text: str) -> None:
    (trial,) = load(text, "planner.horizon=3").trials()
    assert (trial.name, trial.case, trial.settings) == ("x", None, {})
    assert trial.config == replace(BASE, planner=PlannerConfig(horizon=3))
    assert load_experiment("x.yaml") == BASE


def test_a_sweep_is_not_run_as_an_experiment(load: Callable[..., Sweep]) -> None:
    load(GRID)
    for override in ([], ["planner.horizon=3"]):
        with pytest.raises(UserError) as caught:
            load_experiment("x.yaml", override)
        assert str(caught.value) == (
            "x.yaml:3: search: this file is a sweep: run it with `tt-ray sweep FILE`, or remove this section"
        )
    with pytest.raises(UserError, match=r"^override 'search.num_trials=3': search: this file is a sweep"):
        load_experiment("x.yaml", ["search.num_trials=3"])


def test_namesakes_are_told_apart(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + "collect: {environment: E}\nsearch: {parameters: {training.steps: {values: [1, 2]}, "
    (first, *_) = load(text + "collect.steps: {values: [3]}, planner.horizon: {values: [4]}}}").trials()
    assert first.name == "training.steps=1, collect.steps=3, horizon=4"


def test_values_in_names(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "search:\n  parameters:\n    planner.cdf_act: {values: [null, 0.25]}\n"
        '    dataset.id: {values: ["a\\nb", "Zürich / 東京"]}\n'
    )
    assert [trial.name for trial in load(text).trials()] == [
        'cdf_act=null, id="a\\nb"',
        "cdf_act=null, id=Zürich / 東京",
        'cdf_act=0.25, id="a\\nb"',
        "cdf_act=0.25, id=Zürich / 東京",
    ]


def test_random_search_tries_the_same_settings_in_each_case(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "search:\n  method: random\n  num_trials: 4\n"
        "  parameters: {training.learning_rate: {min: 1e-4, max: 1e-2, distribution: log_uniform}}\n"
        "  cases: [{name: a}, {name: b, planner.horizon: 5}]\n"
    )
    sweep = load(text)
    trials = sweep.trials()
    assert sweep.search.count == len(trials) == 8
    assert [trial.settings for trial in trials[:4]] == [trial.settings for trial in trials[4:]]
    rates = [trial.config.training.learning_rate for trial in trials[:4]]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert [trial.fingerprint for trial in load(text).trials()] == [trial.fingerprint for trial in trials]
    more = [trial.fingerprint for trial in load(text, "search.num_trials=9").trials()]
    assert {trial.fingerprint for trial in trials} < set(more)


def test_optuna_makes_trials_one_by_one(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "search:\n  method: optuna\n  num_trials: 4\n  parameters:\n"
        "    training.learning_rate: {min: 1e-4, max: 1e-2}\n    planner.horizon: {values: [5, 6]}\n"
    )
    sweep = load(text)
    drawn = {"planner.horizon": 6, "training.learning_rate": 0.00123456789}
    trial = sweep.trial(drawn, index=7)
    assert (trial.index, trial.name) == (7, "learning_rate=0.00123457, horizon=6")
    assert trial.config == replace(
        BASE, training=TrainingConfig(learning_rate=0.00123457), planner=PlannerConfig(horizon=6)
    )
    with pytest.raises(ValueError, match="expected settings for"):
        sweep.trial({"planner.horizon": 6})
    with pytest.raises(ValueError, match="no case 'a'"):
        sweep.trial(drawn, case="a")
    with pytest.raises(ValueError, match="one by one"):
        sweep.trials()


def test_a_made_trial_that_cannot_be_is_named(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "search:\n  method: optuna\n  num_trials: 4\n  parameters:\n"
        "    planner.horizon: {min: 1, max: 9}\n    planner.plan_every: {min: 1, max: 9}\n"
    )
    sweep = load(text)
    with pytest.raises(UserError) as caught:
        sweep.trial({"planner.horizon": 2, "planner.plan_every": 3})
    assert str(caught.value) == (
        "x.yaml:8: search.parameters.planner.plan_every: trial 'horizon=2, plan_every=3': "
        "planner.plan_every: 3 steps cannot come from a plan of planner.horizon = 2"
    )


def test_a_combination_may_mend_what_the_base_forbids(load: Callable[..., Sweep]) -> None:
    text = MINIMAL + (
        "planner: {horizon: 2}\nsearch:\n  parameters: {planner.plan_every: {values: [1, 3]}}\n"
        "  cases: [{name: a, planner.horizon: 3}]\n"
    )
    assert [trial.config.planner.plan_every for trial in load(text).trials()] == [1, 3]


def test_added_values_seeds_and_cases_leave_old_trials_as_they_were(load: Callable[..., Sweep]) -> None:
    old = {trial.fingerprint for trial in load(GRID).trials()}
    text = GRID.replace("[5, 15]", "[20, 15, 5]").replace("[uniform, quantile]", "[quantile, uniform]")
    text = text.replace("name: x", "name: y\nquestion: Why?\nseeds: [4, 5]\nresources: {storage: elsewhere}")
    changed = load(text + "  max_concurrent_trials: 9\n", "tracking.uri=http://127.0.0.1:5000").trials()
    assert len(changed) == 6
    assert {trial.fingerprint for trial in changed if trial.settings["planner.horizon"] != 20} == old
    cases = "  cases: [{name: new, model.num_layers: 2}, {name: as before}]\n"
    assert {trial.fingerprint for trial in load(GRID + cases).trials() if trial.case != "new"} == old
    other = {trial.fingerprint for trial in load(GRID, "training.steps=7").trials()}
    assert other.isdisjoint(old)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_identity_and_number_of_trials(data: st.DataObject) -> None:
    choices = {
        "planner.horizon": [1, 5, 15, 20],
        "planner.k_act": [None, 1, 2],
        "training.learning_rate": [1e-3, 2.0, 1],
        "dataset.id": ["a", "b c", "ä\n"],
    }
    names = data.draw(st.lists(st.sampled_from(sorted(choices)), unique=True))
    chosen = {
        name: tuple(data.draw(st.lists(st.sampled_from(choices[name]), min_size=1, unique=True)))
        for name in names
    }
    cases = tuple(
        Case(name=f"case {count}", settings={"model.num_layers": count})
        for count in data.draw(st.lists(st.integers(1, 5), unique=True, max_size=3))
    )
    search = SearchConfig(parameters={k: Values(values=v) for k, v in chosen.items()}, cases=cases)
    turned = SearchConfig(
        parameters={k: Values(values=v[::-1]) for k, v in reversed(chosen.items())}, cases=cases[::-1]
    )
    trials = Sweep(base=BASE, search=search).trials()
    others = Sweep(base=replace(BASE, seeds=(3, 4)), search=turned).trials()
    identities = {trial.fingerprint: (trial.case, trial.settings) for trial in trials}
    assert len(identities) == len(trials) == search.count
    assert identities == {trial.fingerprint: (trial.case, trial.settings) for trial in others}
    assert len({trial.name for trial in trials}) == len(trials)
    assert all(trial.name.isprintable() for trial in trials)


def test_a_dumped_trial_is_a_file_to_run(load: Callable[..., Sweep]) -> None:
    cases = '  cases:\n  - {name: "ä: #1", dataset: {id: "a: b # c"}, planner: {cdf_act: null}}\n'
    text = GRID.replace("name: x", "name: Zürich / 東京\nseeds: [1, 2]") + cases
    for trial in load(text).trials():
        dumped = dump_trial(trial)
        assert dumped.startswith(f"# trial: {trial.name}\nname: Zürich / 東京\n")
        Path("y.yaml").write_text(dumped, encoding="utf-8")
        assert load_experiment("y.yaml") == trial.config
        (again,) = load_sweep("y.yaml").trials()
        assert again.fingerprint == trial.fingerprint


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("search.num_trials=7", "num_trials", 7),
        ("search.max_concurrent_trials = 1", "max_concurrent_trials", 1),
        ("search.method=optuna", "method", "optuna"),
        ("search.seed=5", "seed", 5),
        ("search.confirm_episodes=9", "confirm_episodes", 9),
        ("search.scheduler=null", "scheduler", None),
        ("search.metric=return/iqm", "metric", MetricConfig(name="return/iqm")),
        ("search.metric={name: episodes/length, goal: minimize}", "metric", None),
    ],
)
def test_overrides_of_the_search(load: Callable[..., Sweep], override: str, key: str, value: Any) -> None:
    text = MINIMAL + (
        "search:\n  parameters: {planner.horizon: {min: 1, max: 20}}\n  method: random\n  num_trials: 3\n"
        "  scheduler: {type: asha, rung: episodes, grace: 2}\n"
    )
    overrides = [override, "search.scheduler=null"] if "length" in override else [override]
    expected = MetricConfig(name="episodes/length", goal="minimize") if "length" in override else value
    assert getattr(load(text, *overrides).search, key) == expected


def test_overrides_change_the_base(load: Callable[..., Sweep]) -> None:
    sweep = load(GRID, "planner.beam_width=4", "planner.horizon=2", "seeds=[7]")
    assert sweep.base == replace(BASE, planner=PlannerConfig(beam_width=4, horizon=2), seeds=(7,))
    assert {trial.config.planner.horizon for trial in sweep.trials()} == {5, 15}


def test_trials_made_without_a_file_are_refused_by_key_alone() -> None:
    search = SearchConfig(parameters={"planner.horizon": Values(values=(5, 0))})
    with pytest.raises(UserError) as caught:
        Sweep(base=BASE, search=search).trials()
    assert str(caught.value) == (
        "search.parameters.planner.horizon: trial 'horizon=0': planner.horizon: must be at least 1, not 0"
    )
