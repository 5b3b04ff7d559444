"""Mistakes in sweep files: each gives one line with the place and the key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tt_ray.config import DatasetConfig, ExperimentConfig
from tt_ray.errors import UserError
from tt_ray.sweep_file import load_sweep

MINIMAL = "name: x\ndataset: {id: d}\n"
GRID = (
    MINIMAL
    + """search:
  parameters:
    discretizer.strategy: {values: [uniform, quantile]}
    planner.horizon: {values: [5, 15]}
"""
)


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line that a text, as the file `x.yaml`, is refused with."""
    monkeypatch.chdir(tmp_path)

    def refuse(text: str, *overrides: str) -> str:
        Path("x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_sweep("x.yaml", overrides)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refuse


SECTION_FAULTS = [
    ("search: []", "3: search: expected a section (key: value), found a list"),
    ("search: grid", '3: search: expected a section (key: value), found text "grid"'),
    ("search: {}", "3: search: has no parameters and no cases; without this section, the file is a single"),
    ("search:\n  parameters: {}\n  cases: []", "3: search: has no parameters and no cases"),
    ("search:\n  parameter: {}", "4: search.parameter: unknown key; did you mean parameters?"),
    ("search:\n  zzz: 1", "4: search.zzz: unknown key; known here: parameters, cases, method, num_trials, "),
    ('search:\n  "a\\nb": 1', "3: search.'a\\nb': unknown key; known here: "),
    ("search:\n  parameters: [1]", "4: search.parameters: expected a section (section.key: space), found a"),
    ("search:\n  cases: {a: 1}", "4: search.cases: expected a list, found a section"),
]

SEARCH_FAULTS = [
    # the search's own keys; these follow one good parameter
    (
        "method: gird",
        '5: search.method: expected grid or random or optuna, found text "gird"; did you mean gr',
    ),
    ("method: random", "5: search.method: random needs search.num_trials: how many settings to try"),
    ("method: optuna", "5: search.method: optuna needs search.num_trials: how many settings to try"),
    ("num_trials: 4", "5: search.num_trials: is for random and optuna; a grid has every combination"),
    ("num_trials: 3\n  method: random", "5: search.num_trials: there are only 2 settings to draw 3 from"),
    ("num_trials: four", '5: search.num_trials: expected a whole number or null, found text "four"'),
    ("max_concurrent_trials: 0", "5: search.max_concurrent_trials: must be at least 1, not 0"),
    ("max_concurrent_trials: 1.5", "5: search.max_concurrent_trials: expected a whole number, found 1.5"),
    ("confirm_episodes: -1", "5: search.confirm_episodes: must be at least 0 (0: as many as evaluation.epi"),
    ("seed: x", '5: search.seed: expected a whole number, found text "x"'),
    (
        "metric: {name: score/men}",
        '5: search.metric.name: no trial reports "score/men"; did you mean score/m',
    ),
    ("metric: loss", '5: search.metric.name: no trial reports "loss"; did you mean val/loss?'),
    ("metric: {name: score/mean, goal: max}", "5: search.metric.goal: expected maximize or minimize, found"),
    ("metric: {goal: minimize, nam: x}", "5: search.metric.nam: unknown key; did you mean name?"),
    ("metric: {name: 5}", "5: search.metric.name: expected text, found 5"),
    ("metric: 5", "5: search.metric: expected a section (key: value), found 5"),
    ("scheduler: {type: asha, grace: 2}", "5: search.scheduler.rung: this key is required"),
    ("scheduler: {type: asha, rung: episodes}", "5: search.scheduler.grace: this key is required"),
    ("scheduler: {rung: episodes, grace: 2}", "5: search.scheduler.type: this key is required"),
    (
        "scheduler: {type: hyperband, rung: episodes, grace: 2}",
        "5: search.scheduler.type: expected asha, found",
    ),
    (
        "scheduler: {type: asha, rung: steps, grace: 2}",
        "5: search.scheduler.rung: expected episodes or traini",
    ),
    (
        "scheduler: {type: asha, rung: episodes, grace: 0}",
        "5: search.scheduler.grace: must be at least 1, not",
    ),
    (
        "scheduler: {type: asha, rung: episodes, grace: 1, reduction: 1}",
        "5: search.scheduler.reduction: must be at least 2, not 1",
    ),
    (
        "scheduler: {type: asha, rung: episodes, grace: 21}",
        "5: search.scheduler.grace: 21 is more than evaluation.episodes = 20",
    ),
    (
        "scheduler: {type: asha, rung: training_steps, grace: 200000}\n  metric: val/loss",
        "5: search.scheduler.grace: 200000 is more than training.steps = 195000",
    ),
    (
        "scheduler: {type: asha, rung: training_steps, grace: 5}",
        "5: search.scheduler.rung: at rungs of training_steps trials are compared by val/loss, not",
    ),
    (
        "scheduler: {type: asha, rung: episodes, grace: 5}\n  metric: val/loss",
        "5: search.scheduler.rung: at rungs of episodes trials are compared by score/... or return/...",
    ),
    ("scheduler: asha", '5: search.scheduler: expected a section (key: value), found text "asha"'),
    # cases
    ("cases: [a]", '5: search.cases[0]: expected a name and settings, found text "a"'),
    ("cases:\n  - model.dropout: 0.5", "6: search.cases[0].name: this key is required"),
    ("cases:\n  - name:", "6: search.cases[0].name: expected text, found null"),
    ("cases:\n  - name: ''", "6: search.cases[0].name: must not be empty"),
    ('cases:\n  - name: "a\\tb"', "6: search.cases[0].name: has characters that cannot be shown: 'a\\tb'"),
    ("cases:\n  - name: a\n  - name: a", "7: search.cases[1].name: a names another case already"),
    (
        "cases:\n  - name: a\n  - {name: b, planner.beam_width: 128}",
        "7: search.cases[1]: trial 'b, horizon=5' has the same settings as 'a, horizon=5'; remove",
    ),
    (
        "cases:\n  - name: a\n    planner: {horizon: 5}",
        "7: search.cases[0].planner.horizon: is searched already: see search.parameters.planner.horizon",
    ),
    (
        "cases:\n  - name: a\n    planner.beam_width: 5\n    planner:\n      beam_width: 6",
        "9: search.cases[0].planner.beam_width: is given twice",
    ),
    (
        "cases:\n  - name: a\n    planner:\n      beam_width: 0",
        "8: search.cases[0].planner.beam_width: must be at least 1, not 0",
    ),
    (
        "cases:\n  - name: a\n    planner.beam_width: wide",
        '7: search.cases[0].planner.beam_width: expected a whole number, found text "wide"',
    ),
    (
        "cases:\n  - name: a\n    planner:\n      beam_widht: 5",
        "8: search.cases[0].planner.beam_widht: unknown key planner.beam_widht; did you mean planner.beam",
    ),
    (
        "cases:\n  - name: a\n    model: {context_transitions: 3}",
        "6: search.cases[0].planner.max_context_transitions: 5 is larger than the window of 3 transitions",
    ),
    (
        "cases:\n  - name: a\n    collect.steps: 3",
        "6: search.cases[0].collect.environment: this key is required",
    ),
    ("cases:\n  - name: a\n    planer: {}", "7: search.cases[0].planer: unknown key planer; did you mean pl"),
    (
        "cases:\n  - name: a\n    planner: 5",
        "7: search.cases[0].planner: expected a section (key: value), fo",
    ),
    (
        "cases:\n  - name: a\n    planner:",
        "7: search.cases[0].planner: expected a section (key: value), found",
    ),
    (
        "cases:\n  - name: a\n    seeds: [1]",
        "7: search.cases[0].seeds: cannot differ between trials: seeds a",
    ),
    (
        "cases:\n  - name: a\n    question: b",
        "7: search.cases[0].question: cannot differ between trials: the",
    ),
    (
        "cases:\n  - name: a\n    search: {}",
        "7: search.cases[0].search: cannot differ between trials: a sear",
    ),
    (
        "cases:\n  - name: a\n    resources: {workers: 2}",
        "7: search.cases[0].resources: cannot differ between trials: resources are the whole sweep's",
    ),
    (
        "cases:\n  - name: a\n    tracking.uri: x",
        "7: search.cases[0].tracking.uri: cannot differ between trials: tracking is the whole sweep's",
    ),
    # what fits the base alone
    (
        "scheduler: {type: asha, rung: episodes, grace: 10}\n  cases: [{name: a, evaluation.episodes: 9}]",
        "5: search.scheduler.grace: 10 is more than evaluation.episodes = 9 in trial 'a, horizon=5'",
    ),
    (
        "metric: val/loss\n  cases: [{name: a}, {name: b, dataset.validation_fraction: 0}]",
        "5: search.metric.name: val/loss is not reported with dataset.validation_fraction = 0 in trial 'b",
    ),
]


@pytest.mark.parametrize(("text", "message"), SECTION_FAULTS)
def test_a_faulty_section(error_of: Callable[..., str], text: str, message: str) -> None:
    assert error_of(MINIMAL + text).startswith(f"x.yaml:{message}")


@pytest.mark.parametrize(("text", "message"), SEARCH_FAULTS)
def test_a_faulty_search(error_of: Callable[..., str], text: str, message: str) -> None:
    good = "search:\n  parameters: {planner.horizon: {values: [5, 6]}}\n"
    assert error_of(f"{MINIMAL}{good}  {text}").startswith(f"x.yaml:{message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.num_trial=3", "write it as search.key=value; did you mean search.num_trials?"),
        ("search=null", "write it as search.key=value; can be overridden: method, num_trials, seed, "),
        ("search.parameters={}", "write it as search.key=value; can be overridden: method, "),
        ("search.scheduler.grace=3", "write it as search.key=value; did you mean search.scheduler?"),
        ("search.num_trials", "write it as search.key=value; did you mean search.num_trials?"),
        ("search.num_trials=[", "not valid YAML: "),
        ("search.num_trials=3", "search.num_trials: is for random and optuna; a grid has every combination"),
        ("search.method=rnd", "search.method: expected grid or random or optuna, found"),
        ("search.max_concurrent_trials=0", "search.max_concurrent_trials: must be at least 1, not 0"),
        (
            "search.scheduler={type: asha, rung: episodes, grace: 30}",
            "search.scheduler.grace: 30 is more than evaluation.episodes = 20",
        ),
        ("searchh.method=grid", "unknown key searchh.method"),
        ("planner.horizn=3", "unknown key planner.horizn; did you mean planner.horizon?"),
        ("name=", "name: expected text, found null"),
        ('name="a\\nb"', "name: has characters that cannot be shown: 'a\\nb'"),
    ],
)
def test_a_faulty_override(error_of: Callable[..., str], override: str, message: str) -> None:
    assert error_of(GRID, override).startswith(f"override {override!r}: {message}")


def test_an_override_of_a_search_that_is_not_there(error_of: Callable[..., str]) -> None:
    assert error_of(MINIMAL, "search.seed=1") == "override 'search.seed=1': the file has no search section"


def test_a_faulty_name_or_base(error_of: Callable[..., str]) -> None:
    hidden = error_of('dataset: {id: d}\nname: "a\\nb"\n')
    assert hidden == "x.yaml:2: name: has characters that cannot be shown: 'a\\nb'"
    assert error_of("name: ''\ndataset: {id: d}\n") == "x.yaml:1: name: must not be empty"
    assert error_of(GRID + "planner: {horizon: 0}") == "x.yaml:7: planner.horizon: must be at least 1, not 0"
    with pytest.raises(UserError, match=r"^nothing.yaml: cannot be read: "):
        load_sweep("nothing.yaml")


LEAF = st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.sampled_from(["grid", "a", "\x07b"])
KEYS = st.sampled_from(
    [
        *("name", "min", "max", "distribution", "values", "type", "rung", "grace", "goal", "planner", "x: y"),
        *("planner.horizon", "model.dropout", "discretizer.strategy", "horizon", "collect", "a\nb", "[", "."),
    ]
)
ODD = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=9
)
OWN_KEYS = st.sampled_from(
    [
        *("parameters", "cases", "method", "num_trials", "seed", "metric", "scheduler"),
        *("max_concurrent_trials", "confirm_episodes"),
    ]
)


@settings(deadline=None, max_examples=150)
@given(search=st.dictionaries(OWN_KEYS, ODD) | ODD)
def test_odd_data_gives_one_line_or_a_sweep(search: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "odd-sweep.yaml"
    data = {"name": "x", "dataset": {"id": "d"}, "search": search}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    fault = ""
    try:
        assert load_sweep(file).base == ExperimentConfig(name="x", dataset=DatasetConfig(id="d"))
    except UserError as error:
        fault = str(error)
    assert fault == "" or fault.startswith(f"{file}:")
    assert len(fault.splitlines()) <= 1


def test_an_override_takes_the_place_of_all_lines_below_it(error_of: Callable[..., str]) -> None:
    text = GRID + "  scheduler:\n    type: asha\n    rung: episodes\n    grace: 3\n"
    override = "search.scheduler={type: asha, rung: episodes, grace: 30}"
    assert error_of(text, "evaluation.episodes=2") == (
        "x.yaml:10: search.scheduler.grace: 3 is more than evaluation.episodes = 2"
    )
    assert error_of(text, override) == (
        f"override {override!r}: search.scheduler.grace: 30 is more than evaluation.episodes = 20"
    )


def test_a_late_rung_is_found_before_optuna_begins(error_of: Callable[..., str]) -> None:
    text = GRID + "  method: optuna\n  num_trials: 3\n  scheduler: {type: asha, rung: episodes, grace: 21}\n"
    late = "x.yaml:9: search.scheduler.grace: 21 is more than evaluation.episodes = 20"
    assert error_of(text) == late
