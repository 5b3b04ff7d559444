from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scaling
from scaling import (
    Bill,
    Cell,
    Cluster,
    Load,
    Machine,
    Parameters,
    Plan,
    bill,
    load_of,
    loads_of,
    read_parameters,
    refed_tokens,
    report,
)

from tt_ray.config import PlannerConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.sweep_file import load_sweep

ROOT = Path(__file__).parents[2]
DEFAULTS = ROOT / "analysis" / "scaling.yaml"
HOPPER = TokenLayout(11, 3, num_bins=100)
CELL = Cell(start_seconds=360, episode_steps=1000, refed={5: 0.25, 15: 0.75})
MACHINE = Machine(train=1000, plan=100, price=2.0, spot=1.0, basis="assumed")
CLUSTER = Cluster(
    head_price=0.5,
    boot_minutes=6,
    idle_minutes=12,
    disk_price=0.25,
    storage_price=0.25,
    interruptions=0.5,
    lost_minutes=12,
)
PARAMETERS = Parameters(machines={"gpu": MACHINE, "cpu": MACHINE}, plans=[], cluster=CLUSTER, cell=CELL)
# One model: 3.6e15 FLOP at 1e12 a second, 1 h of training; 3.24e14 at 1e11, 0.9 h of planning; 0.1 h beside.
LOAD = Load(
    title="",
    seeds=2,
    layout=HOPPER,
    tokens=3_600_000_000,
    token_flop=1e6,
    decisions=1000,
    decision_flop=3.24e11,
)


def test_the_document_has_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for block in capsys.readouterr().out.strip().split("\n\n"):
        assert block in document


def test_a_bill_by_hand() -> None:
    three = [LOAD, LOAD, replace(LOAD, seeds=1)]
    # 2 h for each model: 4, 4 and 2 h on two machines, so 6 and 4, 6 minutes after the start.
    found = bill(three, Plan(title="", machine="gpu", count=2), PARAMETERS)
    assert found.wall_hours == pytest.approx(6.1)
    assert found.machine_hours == pytest.approx(6 + 4 + 2 * 0.3)
    assert found.dollars == pytest.approx(10.6 * 2.25 + 6.1 * (0.5 + 0.25 + 0.25))


def test_spot_machines_are_cheaper_and_lose_some_work() -> None:
    # Every other hour a loss of a fifth of an hour: a tenth more.
    found = bill([LOAD], Plan(title="", machine="gpu", count=4, market="spot"), PARAMETERS)
    assert found.wall_hours == pytest.approx(4.4 + 0.1)
    assert found.machine_hours == pytest.approx(4.4 + 0.3)
    assert found.dollars == pytest.approx(4.7 * 1.25 + 4.5 * 1.0)


def test_players_shorten_the_play_and_are_paid_as_long_as_the_trial_lasts() -> None:
    plan = Plan(title="", machine="gpu", count=1, player="cpu", players=3)
    found = bill([LOAD], plan, PARAMETERS)
    assert found.wall_hours == pytest.approx(2 * (1 + 0.3 + 0.1) + 0.1)
    assert found.machine_hours == pytest.approx(4 * (2.8 + 0.3))
    assert found.dollars == pytest.approx(12.4 * 2.25 + 2.9 * 1.0)


def test_without_a_cluster_nothing_is_beside_the_work() -> None:
    found = bill([LOAD], Plan(title="", machine="gpu", count=1, head=False), PARAMETERS)
    assert found == Bill(pytest.approx(4.0), pytest.approx(4.0), pytest.approx(8.0))  # type: ignore[arg-type]


def test_operations_of_a_model_by_hand() -> None:
    sweep = load_sweep(ROOT / "sweeps" / "locomotion.yaml")
    config = next(trial.config for trial in sweep.trials() if trial.case == "hopper-medium")
    load = load_of("", config, CELL)
    assert load.tokens == 195_000 * 256 * 159
    weights = 4 * 12 * 128**2 + 101 * 128
    # Transition t's first 15 tokens see 15 t older ones, themselves and those before them; its value token
    # does not see itself. The last of 160 tokens is no input.
    keys = sum(15 * t + i + 1 for t in range(10) for i in range(15)) + sum(15 * t + 15 for t in range(9))
    assert load.token_flop == pytest.approx(6 * weights + 12 * 128 * 4 * keys / 159)
    assert load.decisions == 20_000


def test_tokens_that_are_fed_again_by_hand() -> None:
    planner = PlannerConfig(horizon=10, beam_width=2, n_expand=2, max_context_transitions=3, window=5, keep=2)
    # Two whole transitions before, at most four: they slide at the third planned one, then at every third.
    assert refed_tokens(planner, 10, HOPPER, CELL.refed) == 0.5 * 3 * 2 * 2 * 15


def test_a_model_that_trials_share_is_trained_once(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: study\nquestion: Does it?\ndataset: {id: hopper-medium-v2}\n"
        "search: {parameters: {planner.horizon: {values: [1, 5]}, training.steps: {values: [100, 200]}}}\n"
    )
    loads = loads_of(load_sweep(file), read_parameters(DEFAULTS).cell)
    assert sorted(load.tokens > 0 for load in loads) == [False, False, True, True]


def test_prices_are_parameters(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(DEFAULTS.read_text().replace("price: 1.212", "price: 12.12"))
    sweep, mine, theirs = (
        load_sweep(ROOT / "sweeps" / "locomotion.yaml"),
        read_parameters(file),
        read_parameters(DEFAULTS),
    )
    loads = loads_of(sweep, mine.cell)
    assert report(loads, mine) != report(loads, theirs)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("head_price:", "hat_price:", "unexpected keyword argument 'hat_price'"),
        ("machine: A100", "machine: B100", "plan 'large GPUs' names no machine of the file: 'B100'"),
        ("count: 12", "count: 0", "plan 'all trials at once': count at least 1"),
        ("machines:", "machines: [", "while parsing"),
    ],
)
def test_a_mistake_in_the_parameters_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, message: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(DEFAULTS.read_text().replace(before, after))
    assert scaling.main(["--parameters", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"scaling.py: error: {file}: ")
    assert message in error


def test_data_of_unknown_dimensions_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(ROOT / "sweeps" / "bins.yaml")]) == 2
    assert "only D4RL's locomotion sets" in capsys.readouterr().err
