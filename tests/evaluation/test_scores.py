import numpy as np
import pytest

from tt_ray.errors import UserError
from tt_ray.evaluation.rollout import EpisodeResult
from tt_ray.evaluation.scores import (
    aggregate_interval,
    bootstrap_interval,
    iqm,
    mean,
    mean_interval,
    normalized_score,
    summarize,
    with_scores,
)


def episode(seed: int, episode_return: float, length: int = 10, terminated: bool = False) -> EpisodeResult:
    return EpisodeResult(
        seed=seed,
        episode_return=episode_return,
        length=length,
        terminated=terminated,
        decisions=length,
        environment_seconds=0.1,
        planning_seconds=0.2,
    )


def test_normalized_score_of_hopper():
    # D4RL's references for Hopper: a random policy's -20.27 is 0, the expert's 3234.3 is 100
    scores = normalized_score([-20.272305, 3234.3, 1607.0138475], -20.272305, 3234.3)
    np.testing.assert_allclose(scores, [0, 100, 50])


@pytest.mark.parametrize(("low", "high"), [(None, 1.0), (0.0, None), (None, None)])
def test_no_score_without_references(low, high):
    assert normalized_score([1.0], low, high) is None


def test_equal_references_are_refused():
    with pytest.raises(UserError, match="reference scores"):
        normalized_score([1.0], 5.0, 5.0)


def test_iqm_leaves_out_a_quarter_at_each_end():
    assert iqm([-1000.0, 1, 2, 3, 4, 5, 6, 1000]) == pytest.approx(np.mean([2, 3, 4, 5]))
    np.testing.assert_allclose(iqm([[0, 1, 2, 9], [9, 3, 0, 4]]), [1.5, 3.5])


def test_mean_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(50, 10, size=400)
    interval = mean_interval(values, 0.95, 10_000, seed=0)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        interval = mean_interval(random.exponential(1.0, size=50), 0.8, 400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    # about 0.78 for 50 skewed values; the standard error of 400 trials is 0.02
    assert 0.70 <= hits / 400 <= 0.86


def test_interval_is_deterministic_by_seed():
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_wider_confidence_is_a_wider_interval():
    values = np.arange(20.0)
    narrow, wide = mean_interval(values, 0.5), mean_interval(values, 0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_many_episodes_are_resampled_in_chunks():
    values = np.random.default_rng(0).normal(size=30_000)  # 1000 samples at once would be 240 MB
    interval = mean_interval(values, 0.95, 1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(30_000), rel=0.15)


def test_one_episode_has_an_interval_of_no_width():
    interval = mean_interval([7.0])
    assert (interval.low, interval.value, interval.high) == (7.0, 7.0, 7.0)


def test_nothing_to_resample_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([np.array([1.0]), np.array([])], mean)


def test_strata_are_resampled_within_each_training_seed():
    # within each training seed nothing varies, so neither does the stratified bootstrap
    aggregate = aggregate_interval([[10.0] * 5, [30.0] * 5, [50.0] * 5])
    assert (aggregate.interval.low, aggregate.interval.value, aggregate.interval.high) == (30, 30, 30)
    assert aggregate.seed_values == (10, 30, 50)
    assert aggregate.seed_std == pytest.approx(20)
    assert aggregate.seed_error == pytest.approx(20 / np.sqrt(3))


def test_aggregate_takes_groups_of_different_sizes_and_any_statistic():
    aggregate = aggregate_interval([[0.0, 1, 2, 100], [3.0, 4]], statistic=iqm)
    assert aggregate.interval.value == pytest.approx(iqm([0, 1, 2, 100, 3, 4]))
    assert aggregate.seed_values == pytest.approx((1.5, 3.5))


def test_a_single_training_seed_has_no_spread():
    aggregate = aggregate_interval([[1.0, 2.0, 3.0]])
    assert aggregate.seed_std is None
    assert aggregate.seed_error is None


def test_summary_of_episodes():
    results = [episode(0, 0.0, 5, terminated=True), episode(1, 50.0), episode(2, 100.0), episode(3, 250.0)]
    summary = summarize(results, ref_min=0.0, ref_max=200.0, samples=500)
    metrics = summary.metrics()
    assert metrics["episodes/count"] == 4
    assert metrics["return/mean"] == 100
    assert metrics["return/iqm"] == 75
    assert metrics["return/std"] == pytest.approx(np.std([0, 50, 100, 250], ddof=1))
    assert metrics["score/mean"] == 50
    assert metrics["score/iqm"] == 37.5
    assert metrics["episodes/length"] == 8.75
    assert metrics["episodes/terminated"] == 0.25
    assert metrics["score/ci_low"] == pytest.approx(metrics["return/ci_low"] / 2)
    assert metrics["score/ci_high"] == pytest.approx(metrics["return/ci_high"] / 2)
    assert 0 <= metrics["score/iqm_ci_low"] < 37.5 < metrics["score/iqm_ci_high"] <= 125


def test_summary_without_references_has_no_score():
    summary = summarize([episode(0, 1.0)], samples=10)
    assert summary.score is None
    assert not any(name.startswith("score/") for name in summary.metrics())


def test_scores_are_filled_in():
    results = [episode(0, 0.0), episode(1, 5.0)]
    assert [result.score for result in with_scores(results, 0.0, 10.0)] == [0, 50]
    assert with_scores(results, None, None) == results


def test_a_return_of_nan_is_named():
    with pytest.raises(UserError, match="seed 7"):
        summarize([episode(6, 1.0), episode(7, float("nan"))])


def test_no_episodes_are_refused():
    with pytest.raises(UserError, match="no episodes"):
        summarize([])
