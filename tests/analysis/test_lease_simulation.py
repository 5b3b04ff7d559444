from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lease_simulation
import numpy as np
import pytest
from lease_simulation import COLUMNS, Outcome, Scenario, recorded_durations, row, scenarios, simulate
from simulated_ray import Costs

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
SMALL = Scenario(name="small", actors=50, durations=recorded_durations(250, 60.0))
UNEVEN = replace(SMALL, late=20, late_until=120.0, lost_hosts=1)


def figures(outcome: Outcome) -> Outcome:
    """What comes of the simulated clock alone."""
    return replace(outcome, driver_cpu=0.0, queue_cpu=0.0, real=0.0)


def test_one_actor_after_another_takes_what_is_longest_by_hand() -> None:
    free = Costs(lease=0, trip=0, episode=0, result=0)
    scenario = Scenario(name="", actors=2, durations=np.array([3.0, 1.0, 1.0, 5.0]), start=10, costs=free)
    outcome = simulate(scenario)
    # One plays 3 and then nothing is left; the other 1, 1 and 5.
    assert outcome.makespan == pytest.approx(10 + 1 + 1 + 5)
    assert outcome.even == pytest.approx(10 + 5)
    assert outcome.utilisation == pytest.approx(10 / (2 * 7))
    assert (outcome.leases, outcome.each_once) == (4, True)


def test_an_actor_pays_for_leases_and_episodes_by_hand() -> None:
    costs = Costs(lease=0, trip=1, episode=0.5, result=0)
    scenario = Scenario(name="", actors=1, durations=np.array([3.0, 4.0]), start=10, costs=costs)
    # A result goes out with the next lease's answer, the last one with the answer that there is none.
    assert simulate(scenario).makespan == pytest.approx(10 + (1 + 3 + 0.5) + (1 + 4 + 0.5) + 1)


def test_the_queue_serves_one_call_after_another_by_hand() -> None:
    costs = Costs(lease=0.1, trip=0, episode=0, result=0)
    scenario = Scenario(name="", actors=3, durations=np.ones(3), start=10, costs=costs)
    # The first lease comes after 0.1 s. After its episode each actor reports its steps and asks for more: six
    # calls on end, of which the first is made when the first episode is over.
    assert simulate(scenario).makespan == pytest.approx(10 + 0.1 + 1 + 6 * 0.1, abs=1e-4)


def test_fifty_actors_waste_no_more_than_the_longest_episode() -> None:
    outcome = simulate(SMALL)
    assert outcome.each_once
    assert outcome.leases == 250
    assert 0.99 * outcome.even < outcome.makespan < outcome.even + outcome.longest
    assert outcome.lost == outcome.deaths == 0
    assert outcome.driver_cpu > 0
    assert outcome.queue_cpu > 0


def test_late_and_lost_hosts_change_no_count_and_every_run_is_the_same() -> None:
    outcome = simulate(UNEVEN)
    assert outcome.each_once
    assert outcome.deaths == 16
    assert outcome.leases > 250  # what was lost was leased again
    assert outcome.lost > 0
    assert 0.99 * outcome.even < outcome.makespan < outcome.even + 2 * outcome.longest
    assert outcome.makespan > simulate(SMALL).makespan
    assert figures(simulate(UNEVEN)) == figures(outcome)


def test_a_slow_driver_is_the_limit() -> None:
    outcome = simulate(replace(SMALL, costs=Costs(result=4.0, stream=0)))
    assert outcome.limit == SMALL.start + 250 * 4.0
    assert outcome.limit < outcome.makespan < outcome.limit + outcome.longest
    assert outcome.utilisation < 0.5


def test_too_few_actors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert lease_simulation.main(["--actors", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lease_simulation.py: error: wanted are 32 actors at least")


def numbers(line: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


@pytest.fixture(scope="module")
def documented() -> Callable[[str], list[str]]:
    """The cells of a scenario's line in the document."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    table = {
        cells[0]: cells
        for line in lines
        if len(cells := [c.strip() for c in line.strip("|").split("|")]) == len(COLUMNS)
    }
    return lambda name: table[name]


def test_every_scenario_is_in_the_document(documented: Callable[[str], list[str]]) -> None:
    assert all(documented(scenario.name)[-1] == "all" for scenario in scenarios(1000, 20_000, 60.0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("index", range(6))
def test_a_thousand_actors_do_as_the_document_says(
    index: int, documented: Callable[[str], list[str]]
) -> None:
    scenario = scenarios(1000, 20_000, 60.0)[index]
    outcome = simulate(scenario)
    assert outcome.each_once
    assert outcome.makespan < max(outcome.even, outcome.limit) + (1 + (outcome.deaths > 0)) * outcome.longest
    for here, there in zip(row(scenario, outcome)[1:], documented(scenario.name)[1:], strict=True):
        assert numbers(here) == pytest.approx(numbers(there), rel=0.02, abs=1.01)
