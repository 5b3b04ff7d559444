"""Reading experiment files: what is right is read exactly, what is wrong is named in one line."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tt_ray.config import (
    CollectConfig,
    DatasetConfig,
    DiscretizerConfig,
    EvaluationConfig,
    ExperimentConfig,
    PlannerConfig,
    ResourcesConfig,
    TrainingConfig,
    flatten,
    to_dict,
)
from tt_ray.errors import UserError
from tt_ray.experiment_file import apply_overrides, experiment_from_dict, load_experiment

MINIMAL = "name: x\ndataset: {id: d}\n"
EXPERIMENT = ExperimentConfig(name="x", dataset=DatasetConfig(id="d"))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path to write to; errors name it `x.yaml`."""
    monkeypatch.chdir(tmp_path)
    return Path("x.yaml")


def error_of(file: Path, text: str, *overrides: str) -> str:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_experiment(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_file_takes_the_defaults(file: Path) -> None:
    file.write_text(MINIMAL)
    assert load_experiment(file) == EXPERIMENT


def test_a_full_file(file: Path) -> None:
    file.write_text(
        "# usage: tt-ray run x.yaml\n"
        "name: hopper\n"
        "question: Does a longer horizon pay?\n"
        "dataset: {id: mujoco/hopper/medium-v0, terminal_penalty: -100}\n"
        "discretizer: {strategy: uniform, num_bins: 64}\n"
        "model:   # all of it at its defaults\n"
        "planner:\n"
        "  cdf_act: null\n"
        "  k_act: 1\n"
        "training: {learning_rate: 1e-4, weight_decay: 1E+0, beta1: .9, gradient_clip: 2}\n"
        "collect: {environment: Hopper-v5, steps: 100_000}\n"
        "resources: {workers: 2, gpus_per_worker: auto}\n"
        "seeds: [0, 3]\n"
    )
    assert load_experiment(str(file)) == ExperimentConfig(
        name="hopper",
        question="Does a longer horizon pay?",
        dataset=DatasetConfig(id="mujoco/hopper/medium-v0", terminal_penalty=-100.0),
        discretizer=DiscretizerConfig(strategy="uniform", num_bins=64),
        planner=PlannerConfig(cdf_act=None, k_act=1),
        training=TrainingConfig(learning_rate=1e-4, weight_decay=1.0, beta1=0.9, gradient_clip=2.0),
        collect=CollectConfig(environment="Hopper-v5", steps=100_000),
        resources=ResourcesConfig(workers=2),
        seeds=(0, 3),
    )


def test_whole_numbers_for_floats_become_floats(file: Path) -> None:
    file.write_text(MINIMAL + "training: {gradient_clip: 2}")
    assert isinstance(load_experiment(file, ["training.weight_decay=1"]).training.gradient_clip, float)
    assert isinstance(load_experiment(file, ["training.weight_decay=1"]).training.weight_decay, float)


def test_text_that_looks_like_a_date_stays_text(file: Path) -> None:
    file.write_text("name: 2024-01-01\ndataset: {id: d}")
    assert load_experiment(file).name == "2024-01-01"


@pytest.mark.parametrize(
    ("override", "dotted", "value"),
    [
        ("planner.horizon=5", "planner.horizon", 5),
        ("planner.horizon = 5", "planner.horizon", 5),
        ("seeds=[0,1]", "seeds", [0, 1]),
        ("dataset.terminal_penalty=null", "dataset.terminal_penalty", None),
        ("dataset.terminal_penalty=-1e2", "dataset.terminal_penalty", -100.0),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("dataset.id=mujoco/hopper/medium-v0", "dataset.id", "mujoco/hopper/medium-v0"),
        ("name=a=b", "name", "a=b"),
        ("tracking.uri=http://127.0.0.1:5000", "tracking.uri", "http://127.0.0.1:5000"),
        ("collect.environment=Hopper-v5", "collect.environment", "Hopper-v5"),
        ("model={num_layers: 2}", "model.num_layers", 2),
        ("discretizer={}", "discretizer.num_bins", 100),
    ],
)
def test_overrides(file: Path, override: str, dotted: str, value: Any) -> None:
    file.write_text(MINIMAL + "discretizer: {num_bins: 7}\ntracking:\n")
    assert flatten(to_dict(load_experiment(file, [override])))[dotted] == value


def test_a_later_override_wins_and_null_removes_an_optional_section(file: Path) -> None:
    file.write_text(MINIMAL + "collect: {environment: Hopper-v5}")
    config = load_experiment(file, ["planner.horizon=5", "planner.horizon=6", "collect=null"])
    assert config == replace(EXPERIMENT, planner=PlannerConfig(horizon=6))


def test_overrides_can_complete_or_mend_a_file(file: Path) -> None:
    file.write_text("name: x\nmodel: {num_layers: 0}\nplanner: 5\n")
    config = load_experiment(file, ["dataset.id=d", "model.num_layers=2", "planner={horizon: 3}"])
    assert (config.dataset.id, config.model.num_layers, config.planner.horizon) == ("d", 2, 3)


FAULTS = [
    # unknown keys
    ("model:\n  num_layer: 3", "x.yaml:4: model.num_layer: unknown key; did you mean num_layers?"),
    ("modl: {}", "x.yaml:3: modl: unknown key; did you mean model?"),
    ("horizon: 5", "x.yaml:3: horizon: unknown key; did you mean planner.horizon or prediction.horizon?"),
    ("steps: 5", "x.yaml:3: steps: unknown key; did you mean training.steps or critic.steps or "),
    ("planner: {embed_dim: 8}", "x.yaml:3: planner.embed_dim: unknown key; did you mean model.embed_dim?"),
    (
        "\nmodel: {zzz: 3}",
        "x.yaml:4: model.zzz: unknown key; known here: "
        "num_layers, num_heads, embed_dim, context_transitions and dropout",
    ),
    ('"a\\nb": 1', "x.yaml:3: 'a\\nb': unknown key; known here: name, dataset, "),
    (
        "search: {}",
        "x.yaml:3: search: this file is a sweep: run it with `tt-ray sweep FILE`, or remove this ",
    ),
    # types
    ("model: {num_layers: '3'}", 'x.yaml:3: model.num_layers: expected a whole number, found text "3"'),
    ("model: {num_layers: true}", "x.yaml:3: model.num_layers: expected a whole number, found true"),
    ("model: {num_layers: 3.0}", "x.yaml:3: model.num_layers: expected a whole number, found 3.0"),
    ("model: {num_layers: [1]}", "x.yaml:3: model.num_layers: expected a whole number, found a list"),
    ("model: {num_layers:}", "x.yaml:3: model.num_layers: expected a whole number, found null"),
    ("model: {dropout: x}", 'x.yaml:3: model.dropout: expected a number, found text "x"'),
    ("model: {dropout: false}", "x.yaml:3: model.dropout: expected a number, found false"),
    (
        "training: {learning_rate: .inf}",
        "x.yaml:3: training.learning_rate: expected a number, found inf, which",
    ),
    ("dataset.x: 1", "x.yaml:3: dataset.x: unknown key"),
    ("question: 5", "x.yaml:3: question: expected text, found 5"),
    ("question: {a: 1}", "x.yaml:3: question: expected text, found a section"),
    ("tracking: {uri: 5}", "x.yaml:3: tracking.uri: expected text or null, found 5"),
    ("planner: {cdf_act: all}", 'x.yaml:3: planner.cdf_act: expected a number or null, found text "all"'),
    (
        "resources: {workers: two}",
        'x.yaml:3: resources.workers: expected a whole number or auto, found text "two"',
    ),
    (
        "resources: {workers: true}",
        "x.yaml:3: resources.workers: expected a whole number or auto, found true",
    ),
    ("resources: {workers: aut}", 'found text "aut"; did you mean auto?'),
    (
        "discretizer: {strategy: quantil}",
        'expected uniform or quantile, found text "quantil"; did you mean quantile?',
    ),
    (f"discretizer: {{strategy: {'z' * 99}}}", "z..."),
    ("model: 5", "x.yaml:3: model: expected a section (key: value), found 5"),
    ("model: [1]", "x.yaml:3: model: expected a section (key: value), found a list"),
    ("collect: Hopper-v5", "x.yaml:3: collect: expected a section (key: value) or null, found text"),
    ("seeds: 3", "x.yaml:3: seeds: expected a list like [0, 1], found 3"),
    ("seeds:\n- 0\n- one", 'x.yaml:5: seeds[1]: expected a whole number, found text "one"'),
    # required keys
    ("collect: {steps: 5}", "x.yaml:3: collect.environment: this key is required"),
    # rules, of one section and across sections
    ("planner:\n  horizon: 0", "x.yaml:4: planner.horizon: must be at least 1, not 0"),
    (
        "planner:\n  objective: goal",
        "x.yaml:4: planner.objective: goal needs a model that is trained with goals",
    ),
    ("goal:\n  dims: []", "x.yaml:4: goal.dims: must name some dimensions"),
    ("seeds: []", "x.yaml:3: seeds: needs at least one training seed"),
    ("planner: {window: 12}", "x.yaml:3: planner.window: 12 is larger than the model's context of 10"),
    (
        "model: {context_transitions: 3}",
        "x.yaml:3: planner.max_context_transitions: 5 is larger than the window of 3",
    ),
    (
        "model:\n  context_transitions: 3\nplanner:\n  max_context_transitions: 4",
        "x.yaml:6: planner.max_context_transitions: 4 is larger than the window of 3",
    ),
    # YAML
    ("model: {num_layers: 1, num_layers: 2}", "x.yaml:3: not valid YAML: key 'num_layers' is given twice"),
    ("name: y", "x.yaml:3: not valid YAML: key 'name' is given twice"),
    ("1: 2", "x.yaml:3: not valid YAML: key 1 is not text"),
    ("? [1]\n: 2", "x.yaml:3: not valid YAML: key [1] is not text"),
    ("question: a: b", "x.yaml:3: not valid YAML: mapping values are not allowed here"),
    ("\n\nmodel: {num_layers: [1,}", "x.yaml:5: not valid YAML: "),
    ("question: !!python/object:os.system {}", "x.yaml:3: not valid YAML: could not determine a constructor"),
    ("question: !!binary aGVs", "x.yaml:3: not valid YAML: could not determine a constructor"),
    ("model: {num_layers: !!int x}", "x.yaml:3: not valid YAML: this is no int"),
    (f"model: {{num_layers: {'1' * 5000}}}", "x.yaml:3: not valid YAML: this is no int"),
    ("model: &m {num_layers: *m}", "x.yaml:3: not valid YAML: write the value out in place of *m"),
    ("question: \x07", "x.yaml:3: not valid YAML: special characters are not allowed"),
    ("---\nname: z", "x.yaml:3: not valid YAML: but found another document"),
    ("question: " + 5000 * "[", "x.yaml:1: not valid YAML: it is nested too deeply"),
    ("question: " + 300 * "[" + 300 * "]", "x.yaml:3: question: expected text, found a list"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[text[:40] for text, _ in FAULTS])
def test_a_fault_is_named_with_its_line(file: Path, text: str, message: str) -> None:
    assert message in error_of(file, MINIMAL + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: is empty; an experiment has at least a name and a dataset.id"),
        ("# nothing\n---\n", "x.yaml: is empty"),
        ("\n- a", "x.yaml:2: expected sections and keys (name: value), found a list"),
        ("hello", 'x.yaml:1: expected sections and keys (name: value), found text "hello"'),
        ("dataset: {id: d}", "x.yaml: name: this key is required"),
        ("name: x", "x.yaml: dataset.id: this key is required"),
        ("name: x\ndataset:\n", "x.yaml:2: dataset.id: this key is required"),
        ("name: x\ndataset:\n  discount: 0.9", "x.yaml:2: dataset.id: this key is required"),
        ("name: ''\ndataset: {id: d}", "x.yaml:1: name: must not be empty"),
        ("name:\ndataset: {id: d}", "x.yaml:1: name: expected text, found null"),
    ],
)
def test_files_that_are_no_experiment(file: Path, text: str, message: str) -> None:
    assert error_of(file, text).startswith(message)


def test_several_faults_give_the_first_line_and_their_number(file: Path) -> None:
    text = (
        "seeds: x\ndataset: {idd: d}\nmodel:\n  num_layers: x\n  dropout: 2\nplanner: {horizon: 0}\nname: x\n"
    )
    assert error_of(file, text) == 'x.yaml:1: seeds: expected a list like [0, 1], found text "x" (and 4 more)'
    assert error_of(file, text, "seeds=[0]").startswith(
        "x.yaml:2: dataset.idd: unknown key; did you mean id?"
    )
    fixed = ["seeds=[0]", "dataset={id: d}", "model.num_layers=1", "model.dropout=0.5"]
    assert error_of(file, text, *fixed) == "x.yaml:6: planner.horizon: must be at least 1, not 0"


def test_unreadable_files(file: Path) -> None:
    with pytest.raises(UserError, match=r"^x.yaml: cannot be read: No such file or directory$"):
        load_experiment(file)
    with pytest.raises(UserError, match=r"^\.: cannot be read: Is a directory$"):
        load_experiment(".")
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"^x.yaml: cannot be read: it is not UTF-8 text$"):
        load_experiment(file)


OVERRIDE_FAULTS = [
    ("planner.horizont=5", "unknown key planner.horizont; did you mean planner.horizon?"),
    ("planer.horizon=5", "unknown key planer.horizon; did you mean planner.horizon?"),
    ("horizon=5", "unknown key horizon; did you mean planner.horizon or prediction.horizon?"),
    ("planner.num_layers=5", "unknown key planner.num_layers; did you mean model.num_layers?"),
    ("model.zzz=5", "unknown key model.zzz; known here: num_layers, num_heads, "),
    ("zzz.q=5", "unknown key zzz.q; known here: name, dataset, "),
    ("planner.horizon.x=5", "unknown key planner.horizon.x; did you mean planner.horizon?"),
    ("name.x=5", "unknown key name.x; did you mean name?"),
    ("horizon", "write it as section.key=value"),
    ("=5", "write it as section.key=value"),
    ("planner.=5", "write it as section.key=value"),
    ("planner.horizon=", "planner.horizon: expected a whole number, found null"),
    ("planner.horizon=5.5", "planner.horizon: expected a whole number, found 5.5"),
    ("planner.horizon=0", "planner.horizon: must be at least 1, not 0"),
    ("planner=3", "planner: expected a section (key: value), found 3"),
    ("planner={horizn: 3}", "planner.horizn: unknown key; did you mean horizon?"),
    ("planner.window=12", "planner.window: 12 is larger than the model's context of 10"),
    ("model.context_transitions=3", "planner.max_context_transitions: 5 is larger than the window of 3"),
    ("seeds=[0,", "not valid YAML: "),
    ("seeds=[0, x]", 'seeds[1]: expected a whole number, found text "x"'),
    ("collect.steps=5", "collect.environment: this key is required"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDE_FAULTS)
def test_a_faulty_override_is_named(file: Path, override: str, message: str) -> None:
    text = MINIMAL + "planner: {max_context_transitions: 5}"
    assert error_of(file, text, override).startswith(f"override '{override}': {message}")
    with pytest.raises(UserError, match=re.escape(f"override '{override}': {message}")):
        apply_overrides(EXPERIMENT, [override])


def test_an_override_below_something_else_than_a_section_shows_the_files_fault(file: Path) -> None:
    message = error_of(file, MINIMAL + "planner: 5", "planner.horizon=5")
    assert message == "x.yaml:3: planner: expected a section (key: value), found 5"


def test_apply_overrides() -> None:
    config = apply_overrides(
        EXPERIMENT, ["planner.horizon=5", "evaluation.episodes=3"], ["planner", "evaluation"]
    )
    assert config == replace(
        EXPERIMENT, planner=PlannerConfig(horizon=5), evaluation=EvaluationConfig(episodes=3)
    )
    assert apply_overrides(EXPERIMENT, []) == EXPERIMENT


def test_apply_overrides_in_certain_sections_only() -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(EXPERIMENT, ["model.num_layers=2"], sections=["planner", "evaluation"])
    assert str(caught.value) == (
        "override 'model.num_layers=2': model is settled here; only planner and evaluation can be overridden"
    )


def test_experiment_from_dict_names_its_source() -> None:
    assert experiment_from_dict(to_dict(EXPERIMENT)) == EXPERIMENT
    broken = {**to_dict(EXPERIMENT), "planner": {"horizn": 3}}
    with pytest.raises(UserError) as caught:
        experiment_from_dict(broken, source="runs/a/config.json")
    assert str(caught.value) == "runs/a/config.json: planner.horizn: unknown key; did you mean horizon?"
