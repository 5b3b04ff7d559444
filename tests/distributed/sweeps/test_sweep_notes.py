"""Descriptions of a sweep and its trials, and the mark on the best one."""

from dataclasses import replace
from pathlib import Path

import pytest
from study_tools import Deaf, launch, make_sweep

from tt_ray.distributed.sweeps.board import Board
from tt_ray.distributed.sweeps.cells import cell_folder
from tt_ray.distributed.sweeps.notes import mark_best, sweep_note
from tt_ray.distributed.sweeps.study import Study
from tt_ray.distributed.sweeps.table import winners
from tt_ray.distributed.sweeps.trial import describe_cell
from tt_ray.tracking import read

pytestmark = pytest.mark.usefixtures("counted")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory, data: None) -> Board:
    return launch(make_sweep(tmp_path_factory.mktemp("sweep")))


def tags(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for record, _ in read(folder / "journal.jsonl"):
        found |= record.get("tags", {})
    return found


def cells(study: Study) -> dict[str, Path]:
    return {trial.fingerprint: cell_folder(study.folder, trial, 0) for trial in study.trials}


def test_the_note_answers_the_question(board: Board) -> None:
    frame = board.frame()
    note = sweep_note(board.study, frame, [Path("figures/parameters.png")], "abc")
    (best,) = winners(frame, board.study.sweep.search)["trial"]
    assert note.startswith(f"**Which is best?**\n\nBest: **{best}**, ")
    assert [line for line in note.splitlines() if line.startswith(f"| {best} ")]
    assert "![parameters](get-artifact?path=figures%2Fparameters.svg&run_uuid=abc)" in note
    assert "![" not in sweep_note(board.study, frame, [Path("figures/parameters.png")], None)


def test_a_long_table_is_cut_and_says_so(board: Board) -> None:
    frame = board.frame()
    long = frame.loc[[i % 3 for i in range(300)]].reset_index(drop=True)
    note = sweep_note(board.study, long, [], None)
    shown = sum(line.startswith("| horizon") for line in note.splitlines())
    assert 10 < shown < 300
    assert f"{300 - shown} more trials are in `results.md`" in note
    assert len(note) <= 8000
    assert note.endswith("among the artifacts.")


def test_what_a_trial_says(board: Board) -> None:
    trial = board.study.trials[0]
    (record,) = board.study.records(trial)
    line = describe_cell(record, trial)
    assert line.startswith((f"return {record.metrics['return/mean']:.4g} [", "score "))
    assert "4 episodes" in line
    assert tags(cells(board.study)[trial.fingerprint])["mlflow.note.content"] == line
    failed = replace(record, cause="OSError: gone", episodes=[], reused={})
    assert describe_cell(failed, trial) == "failed: OSError: gone"


def test_the_mark_goes_to_the_best_and_moves_with_it(board: Board) -> None:
    study, frame, courier = board.study, board.frame(), Deaf()
    metric = study.sweep.search.metric.name
    for index, expected in ((0, 1), (0, 0), (2, 2)):  # again: nothing to tell; another: two cells
        ours = frame.assign(**{metric: [float(i == index) for i in range(3)]})
        before = len(courier.added)
        mark_best(study, ours, courier, "parent")  # type: ignore[arg-type]
        assert len(courier.added) - before == expected
        for i, trial in enumerate(study.trials):
            (record,) = study.records(trial)
            found = tags(cells(study)[trial.fingerprint])
            assert record.best == (i == index)
            assert found.get("best", "") == ("yes" if i == index else "")
            if record.best:
                assert found["mlflow.runName"] == f"★ {trial.name} seed 0"
    reused = cells(study)[study.trials[2].fingerprint]
    uploads = [r["artifact"][1] for r, _ in read(reused / "journal.jsonl") if "artifact" in r]
    assert uploads.count("checkpoint") == 1  # it has taken the model from the store
