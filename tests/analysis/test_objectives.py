from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import pandas as pd
import pytest
from objectives import FACTS, GREEDY, objective_of
from published import read_published, task_name
from written_studies import StudyWriter

from tt_ray.distributed.sweeps.study import DataFacts

HOPPER, ANT = "d4rl/hopper/expert-v2", "D4RL/antmaze/large-play-v1"
FACTS_OF = {
    HOPPER: DataFacts("d4rl/hopper/expert-v2", 1000, 999_494, 3511.4, 3700.0, (108.5, 114.2)),
    ANT: DataFacts(ANT, 1000, 1_000_000, 0.5, 1.0, None),
}
TRIALS = [  # case, data set, returns by episode seed, settings
    ("greedy", "hopper-expert-v2", {7: 3000.0, 8: 2000.0, 9: 3400.0}, {"beam_width": 1, "k_act": 1}),
    ("likely", "hopper-expert-v2", {7: 3500.0, 8: 3600.0, 9: 3400.0}, {"objective": "likelihood"}),
    ("ant q", ANT, {7: 1.0, 8: 0.0, 9: 5.0}, {"objective": "q"}),
    ("ant return", ANT, {8: 0.0, 9: 0.0, 10: 1.0}, {}),
]
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def study(analysis_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep of four planners on two data sets, as `tt-ray sweep` leaves it; its name."""
    writer = StudyWriter(analysis_store, "four planners", tmp_path_factory.mktemp("objectives"))
    names = [case for case, *_ in TRIALS]
    table = pd.DataFrame({"index": range(4), "trial": names, "case": names, "status": "finished"})
    table["fingerprint"] = [f"f{index}" for index in table["index"]]
    rows = [
        {"fingerprint": f"f{i}", "case": case, "training_seed": model, "seed": seed, "fresh": False}
        | {"episode_return": value, "score": value / 32.0 if data != ANT else None}
        for i, (case, data, returns, _) in enumerate(TRIALS)
        for model in SEEDS
        for seed, value in returns.items()
    ]
    lucky = {**rows[0], "seed": 1_000_007, "fresh": True, "episode_return": 1e6}
    parent = writer.parent(table, pd.DataFrame([*rows, lucky]), question="Which is best?")
    for (_, trial), (_, data, _, given) in zip(table.iterrows(), TRIALS, strict=True):
        usual = {"objective": "return", "horizon": 5, "beam_width": 32, "n_expand": 1, "k_act": None}
        params = {f"planner.{key}": value for key, value in {**usual, **given}.items()}
        for model in SEEDS:
            writer.cell(parent, trial, model, {"dataset.id": data, **params}, None)
    lines = [f"- data set {facts}" for facts in FACTS_OF.values()]
    (writer.folder / "results.md").write_text("# four planners\n\n| trial |\n\n" + "\n".join(lines) + "\n")
    writer.client.log_artifact(parent, str(writer.folder / "results.md"))
    return "four planners"


@pytest.fixture
def make(
    study: str, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, pd.DataFrame]]:
    """The page and the table of the study."""

    def run(*arguments: object) -> tuple[str, pd.DataFrame]:
        code = run_main(objectives.main, study, "--out", tmp_path / "out", *arguments)
        assert code == 0, capsys.readouterr().err
        table = pd.read_parquet(tmp_path / "out" / "objectives.parquet")
        return capsys.readouterr().out, table

    return run


def test_returns_and_what_they_are_of_the_data(make: Callable[..., tuple[str, pd.DataFrame]]) -> None:
    _, table = make()
    trials = table[table["kind"] == "trial"].set_index("trial")
    assert trials["objective"].to_dict() == {
        "greedy": GREEDY,
        "likely": "likelihood",
        "ant q": "q",
        "ant return": "return",
    }
    assert trials["episodes"].tolist() == [6, 6, 6, 6]  # fresh ones are another question
    assert trials["return"].tolist() == pytest.approx([2800.0, 3500.0, 2.0, 1 / 3])
    data = [float(f"{mean:.4g}") for mean in (3511.4, 3511.4, 0.5, 0.5)]
    assert trials["of_data"].tolist() == pytest.approx(100 * trials["return"] / data)
    assert trials.loc["likely", "score"] == pytest.approx(3500 / 32)
    assert (trials["low"] <= trials["return"]).all()
    assert (trials["return"] <= trials["high"]).all()


def test_shares_of_rewarded_episodes_only_where_rewards_are_counted(
    make: Callable[..., tuple[str, pd.DataFrame]],
) -> None:
    _, table = make()
    shares = table[table["kind"] == "trial"]["rewarded"].tolist()
    assert shares[2:] == pytest.approx([200 / 3, 100 / 3])
    assert shares[:2] == [100.0, 100.0]  # whole returns, too; a page shows what it can


def test_differences_are_paired_by_episode_seed_within_a_data_set(
    make: Callable[..., tuple[str, pd.DataFrame]],
) -> None:
    _, table = make()
    trials = table[table["kind"] == "trial"].set_index("trial")
    assert trials["reference"].tolist() == ["greedy", "greedy", "ant q", "ant q"]
    likely, ant = trials.loc["likely"], trials.loc["ant return"]
    assert (likely["pairs"], likely["difference"]) == (3, pytest.approx(700.0))
    assert (likely["difference_low"], likely["difference_high"]) == pytest.approx((0.0, 1600.0))
    assert (ant["pairs"], ant["difference"]) == (2, pytest.approx(-2.5))  # seeds 8 and 9
    assert math.isnan(trials.loc["greedy", "difference"])
    assert likely["seed_error"] == 0.0


def test_another_reference(make: Callable[..., tuple[str, pd.DataFrame]]) -> None:
    text, table = make("--against", 1)
    trials = table[table["kind"] == "trial"].set_index("trial")
    assert trials["reference"].tolist() == ["likely", "likely", "ant q", "ant q"]
    assert trials.loc["greedy", "difference"] == pytest.approx(-700.0)
    assert "Differences are from `likely`." in text


def test_the_page_has_the_data_and_what_was_published(
    make: Callable[..., tuple[str, pd.DataFrame]], tmp_path: Path
) -> None:
    text, table = make()
    hopper, ant = (
        text.partition(f"## {name}\n")[2].partition("## ")[0] for name in ("hopper-expert-v2", ANT)
    )
    cells = {line.split("|")[1].strip(): line for line in (hopper + ant).splitlines() if line.startswith("|")}
    assert "3511" in cells["the data itself"] or "0.500" in cells["the data itself"]
    assert " 104.0 " in cells["published: TT likelihood"]
    assert " 66.7 " in cells["published: TT with Q"]
    published = table[table["kind"] == "published"].set_index("trial")
    assert published.loc["published: TT likelihood", "score"] == 104.0
    assert math.isnan(published.loc["published: TT likelihood", "rewarded"])
    assert published.loc["published: TT with Q", "rewarded"] == 66.7
    assert "Which is best?" in text
    assert "Published: AntMaze v0." in ant
    assert "score" not in ant.splitlines()[2]  # a column that nothing fills
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("objectives.md", "objectives.parquet", "returns.png", "returns.svg")
    }
    words = (tmp_path / "out" / "returns.svg").read_text()
    assert all(f"<!-- {name} -->" in words for name in ("likely", "ant q", "hopper-expert-v2"))


def test_a_sweep_without_results_md_or_settings_has_no_data_beside_it(
    write_sweep: Callable[..., None], run_main: Callable[..., int], tmp_path: Path
) -> None:
    trials = pd.DataFrame({"index": [0, 1], "trial": ["a", "b"], "status": ["finished", "failed"]})
    rows = [{"training_seed": 0, "seed": seed, "episode_return": -3.5, "score": None} for seed in (1, 2)]
    write_sweep("bare", trials, pd.DataFrame(rows).assign(fingerprint="f0", case="", fresh=False))
    assert run_main(objectives.main, "bare", "--out", tmp_path / "out") == 0
    table = pd.read_parquet(tmp_path / "out" / "objectives.parquet")
    assert table[["task", "trial", "return"]].to_numpy().tolist() == [["bare", "a", -3.5]]
    assert table[["of_data", "rewarded"]].isna().all(axis=None)


def test_a_line_of_a_sweeps_table_is_read_as_it_is_written() -> None:
    for facts in FACTS_OF.values():
        ((name, count, mean, score),) = FACTS.findall(f"- data set {facts}\n")
        assert (name, int(count)) == (facts.name, facts.episodes)
        assert float(mean) == pytest.approx(facts.mean, rel=1e-3)
        assert (float(score) if score else None) == (
            facts.scores and pytest.approx(facts.scores[0], rel=1e-2)
        )


def test_greedy_decoding_is_no_objective_of_its_own() -> None:
    alone = {"planner.beam_width": "1", "planner.n_expand": "1", "planner.k_act": "1"}
    assert objective_of({"planner.objective": "return", **alone}) == GREEDY
    assert objective_of({"planner.objective": "goal", **alone, "planner.beam_width": "8"}) == "goal"
    assert objective_of({}) == "return"


def test_published_figures_have_their_task_and_measure() -> None:
    groups = {group.name: group for group in read_published()}
    assert groups["AntMaze"].measure == "rewarded"
    assert {group.measure for name, group in groups.items() if name != "AntMaze"} == {"score"}
    everything = list(groups.values())
    assert task_name(ANT, everything) == "AntMaze large-play"
    assert task_name("likelihood, walker2d-expert", everything) == "Walker2d expert"
    assert task_name("hopper-medium-expert-v2", everything) == "Hopper medium-expert"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "four planners",
            ["--against", 4],
            "--against 4: sweep 'four planners' has no finished trial of that",
        ),
        ("nothing finished", [], "sweep 'nothing finished' has no finished trials to compare"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    name: str,
    arguments: list[Any],
    message: str,
    study: str,
    write_sweep: Callable[..., None],
    run_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name != study:
        write_sweep(name, pd.DataFrame({"index": [0], "trial": ["a"], "status": ["failed"]}))
    assert run_main(objectives.main, name, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"objectives.py: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interval_of_a_difference_is_a_bootstrap_over_pairs(
    make: Callable[..., tuple[str, pd.DataFrame]],
) -> None:
    _, table = make()
    likely = table[table["trial"] == "likely"].iloc[0]
    gaps = np.array([500.0, 1600.0, 0.0])
    drawn = np.random.default_rng(1).choice(gaps, (20_000, 3)).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (likely["difference_low"], likely["difference_high"]) == pytest.approx((low, high), abs=1.0)
