"""Tables: on a narrow terminal they are wrapped, never cut off."""

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from tt_ray.cli import view
from tt_ray.distributed.evaluate import Row
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import summarize
from tt_ray.tracking.results import METRICS

RUN_ID = "0123456789abcdef0123456789abcdef"


def shown(table: Table, width: int) -> str:
    """The table on a terminal of `width` columns."""
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def letters(text: str) -> str:
    """The text's characters without blanks and rules: what is there, however it was wrapped."""
    return "".join(sorted(text.replace("─", "").replace(" ", "").replace("\n", "")))


def row(policy: str, seed: int | None, mean: float, episodes: int = 20) -> Row:
    returns = np.random.default_rng(0).normal(mean, abs(mean) / 3, episodes)
    results = [
        EpisodeResult(
            seed=i,
            episode_return=float(value),
            length=1000,
            terminated=False,
            decisions=1000,
            environment_seconds=1.0,
            planning_seconds=2.0,
        )
        for i, value in enumerate(returns)
    ]
    return Row(policy, seed, summarize(results, -280.178953, 12135.0, 0.95, 500), results)


def rows(seeds: int) -> list[Row]:
    planned = [
        row(policy, seed, 11_000.0) for seed in range(seeds) for policy in ("greedy decoding", "planner")
    ]
    return [row("random policy", None, -278.4), row("final behaviour policy", None, 1637.0), *planned]


@pytest.mark.parametrize("seeds", [1, 3])
def test_results_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, seeds: int) -> None:
    texts = []
    for width in (80, 200):
        monkeypatch.setattr(view.console, "width", width)
        texts.append(shown(view.result_table(rows(seeds), 0.95), width))
    assert letters(texts[0]) == letters(texts[1])
    assert ("seed" in texts[1]) == (seeds > 1)
    assert "return [95 %]" in texts[1]


def test_a_set_without_references_has_no_scores() -> None:
    plain = row("planner", 0, 50.0)
    unscored = dataclasses.replace(
        plain, summary=dataclasses.replace(plain.summary, score=None, score_iqm=None)
    )
    cells = shown(view.result_table([unscored], 0.9), 120).splitlines()[-1].split()
    assert cells[0] == "planner"
    assert cells[5] == "-"


def test_runs_are_whole_on_a_narrow_terminal() -> None:
    figures = dict.fromkeys(METRICS, 1234.5)
    frame = pd.DataFrame(
        [
            {
                "run": "walker",
                "parent": "",
                "status": "FINISHED",
                "seed": None,
                **figures,
                "planner.horizon": None,
            },
            {"run": "walker seed 1", "parent": "walker", "status": "FAILED", "seed": "1", **figures}
            | {"val/loss": np.nan, "planner.horizon": "15"},
        ],
        index=[RUN_ID, RUN_ID[::-1]],
    )
    texts = [shown(view.runs_table(frame, "walker"), width) for width in (80, 200)]
    assert letters(texts[0]) == letters(texts[1])
    assert RUN_ID in texts[0]
    assert RUN_ID[::-1] in texts[0]
    assert "  walker seed 1 (failed)" in texts[1]
    assert "nan" not in texts[1].lower()


def test_a_log_is_as_wide_as_the_tables() -> None:
    assert not view.console.is_terminal
    assert view.LOG_WIDTH == 120


def test_progress_in_a_log_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with view.Bars().stage("training", 1000) as update:
        for step in range(1, 1001):
            update(step, "loss 1.0")
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_brackets_in_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert view.console._markup is view.errors._markup is False
    console = Console(file=io.StringIO(), width=80, force_terminal=True, markup=False, highlight=False)
    monkeypatch.setattr(view, "console", console)
    console.print(view.plain_table(["[/a]"], [["[/b]"]], "[/c]"))
    view.Bars().note("[/d]")
    with view.Bars().stage("[/e]", 2) as update, view.waiting("[/f]"):
        update(1, "[/g]")
    view.show_line("folder", "runs/[/h]")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [name for name in "abcdegh" if f"[/{name}]" not in text] == []
