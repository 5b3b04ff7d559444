import json
import os
from dataclasses import replace

import pytest

from tt_ray.distributed.sweep_bench import SweepReport, measure_sweep
from tt_ray.errors import UserError

MB = 1_000_000
CURVE = 10  # points of one curve of the model, which each trial shows


def check(report: SweepReport, trials: int, at_once: int) -> None:
    assert (report.trials, report.at_once) == (trials, at_once)
    assert report.first_seconds > 0
    assert report.overhead_seconds == pytest.approx(at_once * report.trial_seconds - report.stage_seconds)
    parts = report.overhead_in_trial + report.overhead_around_trial
    assert report.overhead_seconds == pytest.approx(parts)
    assert report.stage_seconds > 0
    assert report.overhead_in_trial > 0
    assert report.overhead_around_trial > 0
    in_driver = report.driver_cpu_table + report.driver_cpu_tuning + report.driver_cpu_mlflow
    assert 0 < in_driver <= report.driver_cpu + 0.05  # seconds; the clocks tick in hundredths
    assert report.trial_cpu > 0
    assert report.processes > 0
    assert report.mlflow_points > 2 * CURVE * trials
    assert report.end_seconds > 0
    assert report.driver_rss_100 - report.driver_rss_25 < 40 * MB
    assert replace(report, **json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.ray
def test_a_sweep_can_be_measured(ray_local: None) -> None:
    before = dict(os.environ)
    check(measure_sweep(trials=40, at_once=2), trials=40, at_once=2)
    assert dict(os.environ) == before


def test_too_few_trials_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 trials"):
        measure_sweep(3)


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_stays_as_large_as_it_was_over_200_trials(ray_local: None) -> None:
    report = measure_sweep()
    check(report, trials=200, at_once=2)
    assert report.driver_rss_100 - report.driver_rss_50 < 20 * MB
    assert report.processes < 50  # a new one for each trial would be 200
