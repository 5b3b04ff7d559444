"""What holds for every configuration and for any text: it is read back exactly, or refused in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tt_ray import strict_yaml
from tt_ray.config import (
    CollectConfig,
    DatasetConfig,
    DiscretizerConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    PlannerConfig,
    ResourcesConfig,
    TrackingConfig,
    TrainingConfig,
    to_dict,
)
from tt_ray.errors import UserError
from tt_ray.experiment_file import apply_overrides, dump_yaml, experiment_from_dict, load_experiment


def fault_of(action: Callable[[], Any]) -> str:
    """The `UserError` that `action` ends in; empty when it succeeds."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def floats(low: float, high: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **bounds)


TEXT = st.one_of(
    st.text(min_size=1),
    st.sampled_from(
        ["1e-4", "1e5", ".5e3", "null", "yes", "2024-01-01", "12:30", "=", "<<", "*a", "a: b", "5"]
    ),
).filter(str.strip)
COUNT = st.integers(1, 10**12)
NUMBER_OF_WORKERS = st.one_of(st.just("auto"), st.integers(1, 64))


@st.composite
def experiments(draw: st.DrawFn) -> ExperimentConfig:
    """Valid configurations with something in every corner."""
    heads, context = draw(st.integers(1, 16)), draw(st.integers(5, 50))
    horizon, directions = draw(COUNT), draw(COUNT)
    return ExperimentConfig(
        name=draw(TEXT),
        question=draw(st.text()),
        dataset=DatasetConfig(
            id=draw(TEXT),
            discount=draw(floats(0, 1, exclude_min=True)),
            terminal_penalty=draw(st.none() | floats(-1e300, 1e300)),
            observation_dims=draw(st.none() | COUNT),
        ),
        discretizer=DiscretizerConfig(
            strategy=draw(st.sampled_from(["uniform", "quantile"])), num_bins=draw(st.integers(4, 32766))
        ),
        model=ModelConfig(num_heads=heads, embed_dim=heads * draw(COUNT), context_transitions=context),
        training=TrainingConfig(learning_rate=draw(floats(0, 1, exclude_min=True)), steps=draw(COUNT)),
        planner=PlannerConfig(
            horizon=horizon,
            plan_every=draw(st.integers(1, horizon)),
            k_act=draw(st.none() | COUNT),
            cdf_act=draw(st.none() | floats(0, 1, exclude_max=True)),
            window=draw(st.none() | st.integers(5, context)),
            keep=draw(st.none() | st.integers(1, 4)),
        ),
        evaluation=EvaluationConfig(
            max_steps=draw(st.none() | COUNT), first_seed=draw(st.integers(0, 2**64))
        ),
        collect=draw(
            st.none()
            | st.builds(
                CollectConfig,
                environment=TEXT,
                directions=st.just(directions),
                top_directions=st.integers(1, directions),
            )
        ),
        resources=ResourcesConfig(
            workers=draw(NUMBER_OF_WORKERS),
            gpus_per_worker=draw(st.one_of(st.just("auto"), floats(0, 8))),
            storage=draw(TEXT),
        ),
        tracking=TrackingConfig(
            uri=draw(st.none() | st.text()), experiment=draw(st.none() | TEXT), films=draw(st.integers(0, 9))
        ),
        seeds=tuple(draw(st.lists(st.integers(0, 2**63), min_size=1, max_size=5, unique=True))),
    )


@settings(deadline=None, max_examples=50)
@given(config=experiments())
def test_a_dumped_configuration_is_read_back(
    config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_experiment(file) == config
    assert experiment_from_dict(to_dict(config)) == config
    assert apply_overrides(config, []) == config


ODD_LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
ODD = st.recursive(
    ODD_LEAF | st.just(float("nan")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["name", "dataset", "seeds", "planner", "resources", "collect", "id", "window", "workers", "keep"]


@settings(deadline=None, max_examples=100)
@given(data=st.dictionaries(st.sampled_from(KEYS), ODD | st.dictionaries(st.sampled_from(KEYS), ODD)))
def test_odd_data_gives_one_line_or_a_configuration(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "odd.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    fault = fault_of(lambda: load_experiment(file))
    assert fault == "" or fault.startswith(str(file))
    assert len(fault.splitlines()) <= 1


@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text("a1:-{}[],?!&*#'\"\\|> \n\t~.e"))
def test_any_text_is_data_or_one_line_of_fault(text: str) -> None:
    fault = fault_of(lambda: strict_yaml.parse(text, lambda line: f"line {line}"))
    assert fault == "" or fault.startswith("line ")
    assert len(fault.splitlines()) <= 1


@settings(deadline=None, max_examples=100)
@given(data=st.dictionaries(st.text(), st.lists(ODD_LEAF) | ODD_LEAF))
def test_dumped_data_is_parsed_back(data: dict[str, Any]) -> None:
    assert strict_yaml.parse(strict_yaml.dump(data), str)[0] == data


def test_lines_are_those_of_keys_and_items() -> None:
    _, lines = strict_yaml.parse("# a\nb:\n  c: 1\n  d: [1,\n   2]\ne:\n- 5\n- 6\n", str)
    assert lines == {(): 2, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("e",): 6, ("e", 0): 7, ("e", 1): 8}
