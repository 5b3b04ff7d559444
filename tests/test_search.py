"""The search's dataclasses: their rules, the settings of grid and random search, and names of folders."""

import inspect
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tt_ray.distributed.evaluate import Row
from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import summarize
from tt_ray.model.loss import LossSums
from tt_ray.search import (
    MAX_TRIALS,
    METRICS,
    Case,
    Distribution,
    MetricConfig,
    Range,
    SchedulerConfig,
    SearchConfig,
    Values,
    default_goal,
    safe_name,
)
from tt_ray.training.loop import Trainer

TWO_CASES = (Case(name="a"), Case(name="b"))
HORIZON = {"planner.horizon": Values(values=(5, 15))}


def random_search(num_trials: int, **spaces: Any) -> SearchConfig:
    return SearchConfig(parameters=spaces, method="random", num_trials=num_trials)


def error_of(**search: Any) -> str:
    with pytest.raises(UserError) as caught:
        SearchConfig(**search)
    return str(caught.value)


def test_the_metrics_are_those_that_trials_report() -> None:
    result = EpisodeResult(
        **{
            item.name: 1
            for item in inspect.signature(EpisodeResult).parameters.values()
            if item.default is item.empty
        }
    )
    summary = summarize([result], ref_min=0.0, ref_max=1.0, samples=10)
    row = Row(policy="planner", seed=0, summary=summary, results=[result])
    losses = LossSums(torch.tensor(1.0), torch.ones(4), torch.ones(4)).metrics()
    reported = {*summary.metrics(), *row.speed(), *(f"val/{name}" for name in losses)}
    assert set(METRICS) - {"speed/tokens_per_second"} == reported - {"episodes/count"}
    assert '"speed/tokens_per_second"' in inspect.getsource(Trainer)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("score/means", "did you mean score/mean?"),
        ("mean_score", "did you mean "),
        ("score", "did you mean score/mean?"),
        ("loss", "did you mean val/loss?"),
        ("train/loss", "did you mean val/loss?"),
        ("zzz", "known: score/mean, "),
        ("a\nb", '"a\\nb"; '),
    ],
)
def test_a_metric_that_nobody_reports(name: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        MetricConfig(name=name)
    assert str(caught.value).startswith("search.metric.name: no trial reports ")
    assert advice in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_goal_of_a_metric() -> None:
    assert {name for name in METRICS if default_goal(name) == "minimize"} == {
        *(name for name in METRICS if name.startswith("val/loss")),
        *("return/std", "speed/latency_p50_ms", "speed/latency_p95_ms", "speed/idle_slot_share"),
    }


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"max_concurrent_trials": 0}, "search.max_concurrent_trials: must be at least 1, not 0"),
    ({"confirm_episodes": -1}, "search.confirm_episodes: must be at least 0 (0: as many as"),
    ({"seed": -1}, "search.seed: must be at least 0, not -1"),
    ({"method": "random", "num_trials": 2}, "search.parameters: is empty, so that random has nothing"),
    ({"method": "optuna", "parameters": HORIZON}, "search.method: optuna needs search.num_trials: how many"),
    ({"method": "random", "parameters": HORIZON, "num_trials": 0}, "search.num_trials: must be at least 1"),
    ({"parameters": HORIZON, "num_trials": 2}, "search.num_trials: is for random and optuna; a grid has"),
    (
        {"method": "random", "parameters": HORIZON, "num_trials": 3},
        "search.num_trials: there are only 2 settings to draw 3 from; lower it, or use a grid",
    ),
    (
        {"parameters": {f"a.{i}": Values(values=tuple(range(30))) for i in range(3)}},
        f"search.parameters: makes 27000 trials; at most {MAX_TRIALS} are possible",
    ),
    (
        {"method": "optuna", "parameters": HORIZON, "num_trials": MAX_TRIALS, "cases": TWO_CASES},
        f"search.num_trials: makes {2 * MAX_TRIALS} trials; at most {MAX_TRIALS} are possible",
    ),
    ({"cases": (Case(name="a"), Case(name="a"))}, "search.cases[1].name: a names another case already"),
    ({"cases": (Case(name=" "),)}, "search.cases[0].name: must not be empty"),
    ({"cases": (Case(name="a\x07"),)}, "search.cases[0].name: has characters that cannot be shown: 'a\\x07'"),
    (
        {"parameters": HORIZON, "cases": (Case(name="a", settings={"planner.horizon": 5}),)},
        "search.cases[0].planner.horizon: is searched already: see search.parameters.planner.horizon",
    ),
]


@pytest.mark.parametrize(("search", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_rules(search: dict[str, Any], message: str) -> None:
    assert error_of(**search).startswith(message)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Values(values=()), "x.values: is empty"),
        (Values(values=(1, 2, 1.0)), "x.values[2]: 1.0 is there already"),
        (Range(min=2, max=1), "x.min: 2 is above max = 1"),
        (Range(min=1, max=1), "x.min: 1 is also max; write values: [1]"),
        (Range(min=0, max=1, distribution="log_uniform"), "x.min: must be above 0 for distribution log_un"),
        (Range(min=-1, max=1, distribution="log_uniform"), "x.min: must be above 0 for distribution log_un"),
        (Range(min=0, max=9, distribution="log_int"), "x.min: must be above 0 for distribution log_int, not"),
        (Range(min=0.5, max=9, distribution="int"), "x.min: must be a whole number for distribution int, no"),
        (Range(min=1, max=9.5, distribution="log_int"), "x.max: must be a whole number for distribution log"),
        (Range(min=0, max=math.inf), "x.max: must be finite, not inf"),
    ],
)
def test_rules_of_spaces(space: Values | Range, message: str) -> None:
    found = error_of(parameters={"x": space}, method="random", num_trials=1)
    assert found.startswith(f"search.parameters.{message}")


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_a_grid_takes_no_range(distribution: Distribution) -> None:
    message = error_of(parameters={"x": Range(min=1, max=2, distribution=distribution)})
    assert message == (
        "search.parameters.x: a grid needs values: [...]; a range is for method random or optuna"
    )


@pytest.mark.parametrize(
    ("rung", "metric", "fine"),
    [
        ("episodes", "score/mean", True),
        ("episodes", "return/iqm", True),
        ("episodes", "val/loss", False),
        ("episodes", "speed/latency_p50_ms", False),
        ("training_steps", "val/loss_action", True),
        ("training_steps", "score/mean", False),
    ],
)
def test_a_rung_goes_with_its_metric(rung: Any, metric: str, fine: bool) -> None:
    scheduler = SchedulerConfig(type="asha", rung=rung, grace=1)
    parts: dict[str, Any] = {"scheduler": scheduler, "metric": MetricConfig(name=metric)}
    if fine:
        assert SearchConfig(**parts).scheduler == scheduler
    else:
        assert error_of(**parts).startswith(f"search.scheduler.rung: at rungs of {rung} trials are compared")


@pytest.mark.parametrize(("key", "value"), [("grace", 0), ("reduction", 1)])
def test_rules_of_the_scheduler(key: str, value: int) -> None:
    parts: dict[str, Any] = {"type": "asha", "rung": "episodes", "grace": 1, key: value}
    with pytest.raises(UserError, match=rf"^search\.scheduler\.{key}: must be at least \d, not {value}$"):
        SchedulerConfig(**parts)


def test_a_grid_is_in_file_order() -> None:
    search = SearchConfig(parameters={"b": Values(values=(2, 1)), "a": Values(values=("x", None))})
    assert [tuple(setting.items()) for setting in search.settings()] == [
        (("b", 2), ("a", "x")),
        (("b", 2), ("a", None)),
        (("b", 1), ("a", "x")),
        (("b", 1), ("a", None)),
    ]


def test_nothing_varied_is_one_setting() -> None:
    assert list(SearchConfig().settings()) == [{}]
    assert SearchConfig().count == 1


def test_optuna_has_no_settings_of_its_own() -> None:
    with pytest.raises(ValueError, match="one by one"):
        SearchConfig(method="optuna", parameters=HORIZON, num_trials=3).settings()


SPACES = st.one_of(
    st.lists(st.integers() | st.text(), min_size=1, max_size=5, unique=True).map(
        lambda values: Values(values=tuple(values))
    ),
    st.builds(
        lambda low, more, kind: Range(min=low, max=2 * low + more, distribution=kind),
        st.integers(1, 10**6),
        st.integers(1, 10**6),
        st.sampled_from(get_args(Distribution)),
    ),
)


@settings(deadline=None, max_examples=100)
@given(space=SPACES, us=st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_draws_lie_in_their_space(space: Values | Range, us: list[float]) -> None:
    for u in us:
        value = space.at(u)
        if isinstance(space, Values):
            assert value in space.values
        else:
            assert space.min <= value <= space.max
            assert isinstance(value, int) == space.whole
        assert space.tidy(value) == value


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_ranges_reach_both_ends_in_order(distribution: Distribution) -> None:
    space = Range(min=2, max=50, distribution=distribution)
    drawn = [space.at(u / 1000) for u in range(1000)] + [space.at(1 - 2**-53)]
    assert drawn == sorted(drawn)
    assert (drawn[0], drawn[-1]) == (2, 50)
    middle = {"uniform": 26, "int": 26, "log_uniform": 10, "log_int": 9}[distribution]
    assert space.at(0.5) == pytest.approx(middle, abs=0.5)


def test_whole_numbers_are_equally_likely() -> None:
    space = Range(min=-1, max=1, distribution="int")
    assert Counter(space.at(u / 300) for u in range(300)) == {-1: 100, 0: 100, 1: 100}


@settings(deadline=None, max_examples=50)
@given(
    spaces=st.dictionaries(st.text("abc.", min_size=1), SPACES, min_size=1, max_size=3), seed=st.integers(0)
)
def test_random_settings_are_distinct_and_go_on_where_they_stopped(spaces: dict[str, Any], seed: int) -> None:
    size = math.prod(space.size for space in spaces.values())
    parts: dict[str, Any] = {"parameters": spaces, "method": "random", "seed": seed}
    few, many = (list(SearchConfig(num_trials=int(min(size, most)), **parts).settings()) for most in (3, 20))
    assert many[: len(few)] == few
    assert len(many) == min(size, 20)
    assert all(many.count(setting) == 1 for setting in many)


def test_a_parameters_draws_do_not_depend_on_its_neighbours() -> None:
    rate = Range(min=1e-5, max=1e-2, distribution="log_uniform")
    alone = [drawn["rate"] for drawn in random_search(20, rate=rate).settings()]
    other = Range(min=0, max=1)
    both = [drawn["rate"] for drawn in random_search(20, other=other, rate=rate).settings()]
    assert alone == both
    assert len(set(alone)) == 20
    search = SearchConfig(parameters={"rate": rate}, method="random", num_trials=20, seed=1)
    assert alone != [drawn["rate"] for drawn in search.settings()]


def test_random_search_can_empty_a_small_space() -> None:
    space = Range(min=1, max=100, distribution="log_int")
    drawn = [setting["x"] for setting in random_search(100, x=space).settings()]
    assert sorted(drawn) == list(range(1, 101))
    assert drawn != sorted(drawn)


def test_random_search_gives_up_on_a_range_with_too_few_numbers() -> None:
    with pytest.raises(UserError, match=r"^search.num_trials: only 3 different settings came up in 5000"):
        list(random_search(5, x=Range(min=1.00001, max=1.00003)).settings())


def test_a_search_is_plain_data() -> None:
    search = SearchConfig(parameters=HORIZON, cases=(Case(name="a", settings={"model.dropout": 0.0}),))
    assert asdict(search)["parameters"] == {"planner.horizon": {"values": (5, 15)}}
    assert asdict(search)["cases"][0]["settings"] == {"model.dropout": 0.0}


@pytest.mark.parametrize("name", ["quickstart", "beam-width_2.1", "0", "a" * 64])
def test_plain_names_are_their_own_folders(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("Beam width / Horizon", "beam-width-horizon-"),
        ("Zürich", "zurich-"),
        ("東京", "x-"),
        ("..", "x-"),
        (".hidden", "hidden-"),
        ("../../etc/passwd", "etc-passwd-"),
        ("-f", "f-"),
        ("a" * 300, "a" * 48 + "-"),
        ("a.", "a-"),
        ("con a", "con-a-"),
    ],
)
def test_other_names_keep_what_they_can(name: str, begin: str) -> None:
    folder = safe_name(name)
    assert folder.startswith(begin)
    assert len(folder) == len(begin) + 12


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1).filter(str.strip)


@settings(max_examples=300)
@given(one=PRINTABLE, other=PRINTABLE | st.sampled_from(["a b", "A", "a/b"]))
def test_different_names_have_different_folders(one: str, other: str) -> None:
    assert (safe_name(one).lower() == safe_name(other).lower()) == (one == other)
    assert Path(safe_name(one)).name == safe_name(one)
    assert safe_name(one).isascii()
    assert safe_name(safe_name(one)) != safe_name(one) or safe_name(one) == one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name: must not be empty"),
        ("  ", "name: must not be empty"),
        ("a\nb", "name: has characters that cannot be shown: 'a\\nb'"),
        ("a\u202eb", "name: has characters that cannot be shown: 'a\\u202eb'"),
        ("\ud800", "name: has characters that cannot be shown: '\\ud800'"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        safe_name(name)
    assert str(caught.value) == message
