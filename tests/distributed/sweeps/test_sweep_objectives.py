"""A sweep over objectives: one model, one critic, whichever trials ask for them; and its records' paths."""

from pathlib import Path

import pytest
from study_tools import comparable, launch, make_sweep, points, trainings

from tt_ray.distributed.sweeps.cells import cell_folder, episode_frame, read_record
from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.study import Study
from tt_ray.errors import UserError
from tt_ray.model.checkpoint import last_checkpoint
from tt_ray.sweep_file import Sweep

CRITIC = {"steps": 30, "batch_size": 16, "hidden": [8], "log_every": 10, "checkpoint_every": 15}
OBJECTIVES = {"parameters": {"planner.objective": {"values": ["return", "q", "likelihood"]}}}


def sweep_of(folder: Path, **sections: object) -> Sweep:
    return make_sweep(folder, OBJECTIVES, **{"critic": CRITIC, **sections})


def study_of(sweep: Sweep) -> Study:
    return check_sweep(sweep, Flags(resume=True))


def test_objectives_share_a_model_and_only_q_has_a_critic(tmp_path: Path, counted: None) -> None:
    sweep = sweep_of(tmp_path, evaluation={"episodes": 4, "max_steps": 10, "record": [0, 1]})
    board = launch(sweep)
    study = study_of(sweep)
    assert len(trainings(study.storage)) == 1
    (critic,) = study.store.path("critics", "0" * 16).parent.glob("[0-9a-f]*")
    assert study.store.find("critics", critic.name) is not None
    assert last_checkpoint(critic) == critic / "checkpoints" / "step-00000030"
    frame = board.frame()
    assert list(frame["status"]) == ["finished"] * 3
    assert frame["return/mean"].nunique() > 1  # else the objectives made no difference
    by_name = {trial.settings["planner.objective"]: trial for trial in study.trials}
    for name, trial in by_name.items():
        folder = cell_folder(study.folder, trial, 0)
        curves = {metric for metric, _ in points(folder) if metric.startswith("critic/")}
        assert bool(curves) == (name == "q")
        record = read_record(folder)
        assert record is not None
        assert [len(result.path) for result in record.results] == [11] * 4
        assert all(len(point) == 2 for result in record.results for point in result.path)
        assert list(episode_frame([record])["path"].map(len)) == [11] * 4


def test_what_is_there_is_not_made_again_and_forecast(tmp_path: Path) -> None:
    first = launch(sweep_of(tmp_path))
    study = study_of(sweep_of(tmp_path))
    assert [study.forecast(trial).episodes for trial in study.trials] == [4, 4, 4]
    again = make_sweep(tmp_path, OBJECTIVES, critic=CRITIC, name="again")
    second = launch(again)
    assert comparable(first.frame()).equals(comparable(second.frame()))
    reused = {
        trial.settings["planner.objective"]: read_record(cell_folder(study_of(again).folder, trial, 0))
        for trial in study_of(again).trials
    }
    assert reused["q"] is not None
    assert reused["q"].reused == {"tokens": 1, "models": 1, "critics": 1, "evaluations": 4}
    assert reused["return"] is not None
    assert reused["return"].reused == {"tokens": 1, "models": 1, "evaluations": 4}


def test_another_critic_is_another_evaluation(tmp_path: Path) -> None:
    launch(sweep_of(tmp_path))
    changed = make_sweep(tmp_path, OBJECTIVES, critic={**CRITIC, "expectile": 0.9}, name="changed")
    study = study_of(changed)
    forecast = {t.settings["planner.objective"]: study.forecast(t).episodes for t in study.trials}
    assert forecast == {"return": 4, "q": 0, "likelihood": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": None}, "critic"),
        ({"planner": {"objective": "goal", "horizon": 2, "max_context_transitions": 2}}, "goal"),
        ({"planner": {"objective": "qq", "horizon": 2, "max_context_transitions": 2}}, "did you mean q?"),
    ],
)
def test_an_objective_without_what_it_needs_is_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    search = (
        OBJECTIVES if "planner" not in settings else {"parameters": {"planner.horizon": {"values": [1, 2]}}}
    )
    with pytest.raises(UserError, match=message) as caught:
        check_sweep(make_sweep(tmp_path, search, **settings), Flags())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
