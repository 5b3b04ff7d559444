"""Mistakes in the parameters of a search: each gives one line with the place and the key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tt_ray.errors import UserError
from tt_ray.sweep_file import load_sweep

MINIMAL = "name: x\ndataset: {id: d}\n"


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The one line that a text, as the file `x.yaml`, is refused with."""
    monkeypatch.chdir(tmp_path)

    def refuse(text: str) -> str:
        Path("x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_sweep("x.yaml")
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refuse


PARAMETER_FAULTS = [
    (
        "planner.horizont: {values: [5]}",
        "5: {key}: unknown key planner.horizont; did you mean planner.horizon?",
    ),
    (
        "horizon: {values: [5]}",
        "5: {key}: unknown key horizon; did you mean planner.horizon or prediction.horizon?",
    ),
    ("planner: {values: [5]}", "5: {key}: is a section; name one of its keys, as in planner.key"),
    ("planner: {horizon: {values: [5]}}", "5: {key}: is a section; name one of its keys, as in planner.key"),
    (
        "seeds: {values: [[0]]}",
        "5: {key}: cannot differ between trials: seeds are repetitions of every trial",
    ),
    ("name: {values: [a]}", "5: {key}: cannot differ between trials: the name is the whole sweep's"),
    ("question: {values: [a]}", "5: {key}: cannot differ between trials: the question is the whole sweep's"),
    ("tracking.uri: {values: [a]}", "5: {key}: cannot differ between trials: tracking is the whole sweep's"),
    ("resources.workers: {values: [1]}", "5: {key}: cannot differ between trials: resources are the whole"),
    ("search.seed: {values: [1]}", "5: {key}: cannot differ between trials: a search cannot search itself"),
    (
        "evaluation.episodes: {values: [1]}",
        "5: {key}: cannot be searched: all trials are compared on the same",
    ),
    ('"a\\nb": {values: [1]}', "4: search.parameters.'a\\nb': unknown key"),
    (
        "planner.horizon: [5, 15]",
        "5: {key}: expected {values: [...]} or {min: ..., max: ..., distribution: ..",
    ),
    (
        "planner.horizon:",
        "5: {key}: expected {values: [...]} or {min: ..., max: ..., distribution: ...}, fou",
    ),
    (
        "planner.horizon: {value: [5]}",
        "5: {key}: expected {values: [...]} or {min: ..., max: ..., distributi",
    ),
    (
        "planner.horizon: {values: [5], min: 1}",
        "5: {key}: has both values and min; expected {values: [...]} o",
    ),
    ("planner.horizon: {values: [5], step: 1}", "5: {key}.step: unknown key; known here: values"),
    (
        "planner.horizon: {min: 1, max: 5, stp: 1}",
        "5: {key}.stp: unknown key; known here: min, max and distr",
    ),
    ("planner.horizon: {values: 5}", "5: {key}.values: expected a list like [0, 1], found 5"),
    ("planner.horizon: {values: []}", "5: {key}.values: is empty"),
    ("planner.horizon: {values:}", "5: {key}.values: is empty"),
    (
        "planner.horizon:\n      values:\n      - 5\n      - 6\n      - 5",
        "9: {key}.values[2]: 5 is there alrea",
    ),
    ("training.beta1: {values: [0, 0.0]}", "5: {key}.values[1]: 0.0 is there already"),
    (
        "planner.horizon: {values: [5, five]}",
        '5: {key}.values[1]: expected a whole number, found text "five"',
    ),
    ("planner.horizon: {values: [5.0]}", "5: {key}.values[0]: expected a whole number, found 5.0"),
    ("planner.horizon: {values: [true]}", "5: {key}.values[0]: expected a whole number, found true"),
    ("planner.horizon: {values: [null]}", "5: {key}.values[0]: expected a whole number, found null"),
    (
        "model.dropout: {values: [.nan]}",
        "5: {key}.values[0]: expected a number, found nan, which is not finite",
    ),
    ("planner.horizon:\n      values: [5,\n       0]", "7: {key}.values[1]: must be at least 1, not 0"),
    (
        "discretizer.strategy: {values: [unifrom]}",
        "5: {key}.values[0]: expected uniform or quantile, found te",
    ),
    (
        "model.context_transitions: {values: [3]}",
        "5: {key}.values[0]: planner.max_context_transitions: 5 is larger than the window of 3 transitions",
    ),
    ("model.embed_dim: {values: [66]}", "5: {key}.values[0]: 66 is not divisible by model.num_heads = 4"),
    (
        "planner.horizon: {min: 5, max: 15}",
        "5: {key}: a grid needs values: [...]; a range is for method rando",
    ),
    (
        "planner.plan_every: {values: [1, 8]}\n    planner.horizon: {values: [5, 15]}",
        "5: {key}: trial 'plan_every=8, horizon=5': planner.plan_every: 8 steps cannot come from a plan",
    ),
]

RANGE_FAULTS = [
    ("planner.horizon: {min: 5}", "7: {key}.max: this key is required"),
    ("planner.horizon: {min: null, max: 5}", "7: {key}.min: this key is required"),
    ("planner.horizon: {distribution: int}", "7: {key}.min: this key is required"),
    ("planner.horizon: {min: 5, max: ten}", '7: {key}.max: expected a number, found text "ten"'),
    (
        "planner.horizon: {min: 5, max: .inf}",
        "7: {key}.max: expected a number, found inf, which is not finite",
    ),
    ("planner.horizon: {min: 15, max: 5}", "7: {key}.min: 15 is above max = 5"),
    ("planner.horizon: {min: 5, max: 5}", "7: {key}.min: 5 is also max; write values: [5]"),
    (
        "planner.horizon: {min: 1.5, max: 5}",
        "7: {key}.min: must be a whole number for distribution int, not 1",
    ),
    (
        "planner.horizon: {min: 0, max: 5, distribution: log_int}",
        "7: {key}.min: must be above 0 for distributi",
    ),
    (
        "planner.horizon: {min: 1, max: 5, distribution: uniform}",
        "7: {key}.distribution: planner.horizon is a",
    ),
    (
        "planner.horizon: {min: 1, max: 5, distribution: log}",
        "7: {key}.distribution: expected uniform or log_",
    ),
    ("planner.horizon:\n      min: 0\n      max: 5", "8: {key}.min: must be at least 1, not 0"),
    ("model.dropout: {min: 0, max: 1}", "7: {key}.max: must lie in [0, 1), not 1.0"),
    (
        "training.learning_rate: {min: 0, max: 1, distribution: log_uniform}",
        "7: {key}.min: must be above 0 for distribution log_uniform, not 0",
    ),
    (
        "training.weight_decay: {min: -1, max: 1, distribution: log_uniform}",
        "7: {key}.min: must be above 0 for distribution log_uniform, not -1",
    ),
    (
        "discretizer.strategy: {min: 0, max: 1}",
        "7: {key}: discretizer.strategy is no number; expected {values",
    ),
    ("planner.horizon: {min: 1, max: 2}", "5: search.num_trials: there are only 2 settings to draw 5 from"),
    (
        "training.beta1: {min: 0.100001, max: 0.100003}",
        "5: search.num_trials: only 3 different settings came up in 5000 draws; lower it, or use a grid",
    ),
]


@pytest.mark.parametrize(("text", "message"), PARAMETER_FAULTS)
def test_a_faulty_parameter(error_of: Callable[[str], str], text: str, message: str) -> None:
    key = f"search.parameters.{text.partition(':')[0]}"
    found = error_of(f"{MINIMAL}search:\n  parameters:\n    {text}")
    assert found.startswith(f"x.yaml:{message.replace('{key}', key)}")


@pytest.mark.parametrize(("text", "message"), RANGE_FAULTS)
def test_a_faulty_range(error_of: Callable[[str], str], text: str, message: str) -> None:
    key = f"search.parameters.{text.partition(':')[0]}"
    found = error_of(f"{MINIMAL}search:\n  method: random\n  num_trials: 5\n  parameters:\n    {text}")
    assert found.startswith(f"x.yaml:{message.replace('{key}', key)}")
