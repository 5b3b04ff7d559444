"""Halving, Optuna and trials of several processes under Ray Tune; each takes a minute."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from launch_tools import start
from study_tools import cells, played

from tt_ray.distributed.sweeps.checks import Flags
from tt_ray.distributed.sweeps.table import winners

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_local", "counted_everywhere")]


@pytest.mark.parametrize(("workers", "actors", "seeds"), [(2, 2, [0]), (1, 1, [0, 1])])
def test_several_processes_for_each_trial_do_not_block_two_cores(
    tmp_path: Path, uri: str, workers: int, actors: int, seeds: list[int]
) -> None:
    search = {"parameters": {"planner.horizon": {"values": [1, 2, 3]}}, "max_concurrent_trials": 4}
    resources = {"workers": workers, "evaluation_actors": actors, "episodes_per_actor": 2}
    found = start(tmp_path, uri, search, resources=resources, seeds=seeds, name=f"{workers} workers")
    assert list(found.frame["status"]) == 3 * ["finished"]
    assert list(found.frame["episodes"]) == 3 * [4 * len(seeds)]
    assert np.isfinite(found.frame["confirmed/mean"]).sum() == 1
    assert len(found.trained) == len(set(found.trained)) == len(seeds)


def test_halving_stops_hopeless_learning_rates(tmp_path: Path, uri: str) -> None:
    search = {
        "parameters": {"training.learning_rate": {"values": [1e-3, 1.0, 3.0, 1e-4]}},
        "metric": {"name": "val/loss", "goal": "minimize"},
        "scheduler": {"type": "asha", "rung": "training_steps", "grace": 20, "reduction": 2},
        "max_concurrent_trials": 1,
    }
    found = start(tmp_path, uri, search, name="halving")
    assert list(found.frame["status"])[:3] == ["finished", "stopped", "stopped"]
    assert list(found.frame["episodes"])[:3] == [4, 0, 0]
    assert (found.frame["val/loss"][1:3] > found.frame["val/loss"][0] + 0.5).all()
    (best,) = winners(found.frame, found.study.sweep.search)["index"]
    assert best in (0, 3)
    models = [
        found.study.store.find("models", str(found.study.model_key(t.config, 0))) for t in found.study.trials
    ]
    assert [model is not None for model in models] == [
        status == "finished" for status in found.frame["status"]
    ]

    again = start(tmp_path, uri, search, name="halving")
    assert cells(again.study) == again.before
    more = {**search, "parameters": {"training.learning_rate": {"values": [1e-3, 1.0, 3.0, 1e-4, 2.0]}}}
    third = start(tmp_path, uri, more, name="halving")  # knows what the others have reported
    assert third.frame["status"][4] == "stopped"
    assert math.isfinite(third.frame["val/loss"][4])


def test_optuna_completes_its_budget_and_repeats_nothing(tmp_path: Path, uri: str) -> None:
    search = {
        "method": "optuna",
        "num_trials": 4,
        "seed": 1,
        "max_concurrent_trials": 2,
        "parameters": {
            "planner.max_context_transitions": {"values": [2, 3, 9]},
            "model.context_transitions": {"values": [5, 10]},  # 9 with 5 do not go together
            "planner.cdf_act": {"values": [None, 0.5, 0.9]},
            "planner.beam_width": {"min": 2, "max": 6, "distribution": "int"},
        },
    }
    first = start(tmp_path, uri, search, name="optuna")
    assert list(first.frame["status"]) == 4 * ["finished"]
    assert list(first.frame["index"]) == [0, 1, 2, 3]
    for problem in first.outcome.problems:
        assert "max_context_transitions=9" in problem
        assert "context_transitions=5" in problem

    victim = sorted((first.study.folder / "cells").iterdir())[0]
    record = json.loads((victim / "result.json").read_text())
    record["status"], record["episodes"] = "running", []  # as if the driver had been killed there
    (victim / "result.json").write_text(json.dumps(record))
    kept = {name: state for name, state in cells(first.study).items() if not name.startswith(victim.name)}
    second = start(tmp_path, uri, {**search, "num_trials": 7}, Flags(resume=True), name="optuna")
    after = cells(second.study)
    assert {name: after[name] for name in kept} == kept
    assert list(second.frame["status"]) == 7 * ["finished"]
    assert list(second.frame["index"]) == list(range(7))
    assert second.frame["fingerprint"].is_unique
    assert set(played(second.study.storage).values()) == {1}
    values = [trial.settings["planner.cdf_act"] for trial in second.study.trials]
    assert {type(value) for value in values} <= {type(None), float}
    third = start(tmp_path, uri, {**search, "num_trials": 7}, name="optuna")
    assert cells(third.study) == after
