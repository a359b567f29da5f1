"""Means, intervals and p: against simulation, by hand, and against other ways to one number."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import difference, interval


def drawn(rng, n_runs, n_questions=100, run_sd=0.0, effect=0.0, answers=8):
    """Scores (runs, questions) of two methods on the same questions.

    Their true means are 0.5 and 0.5 + effect.
    """
    difficulty = rng.normal(0.5, 0.17, n_questions)
    shifts = rng.normal([[[0.0]], [[effect]]], run_sd, (2, n_runs, 1))
    return rng.binomial(answers, np.clip(difficulty + shifts, 0, 1)) / answers


def test_the_standard_error_of_one_run_is_the_deviation_over_the_root_of_the_questions():
    values = np.random.default_rng(1).exponential(size=300)
    found = interval(values)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(300), rel=0.03)


@pytest.mark.parametrize("run_means", [(0.2, 0.6), (0.3, 0.5, 0.6), (0.1, 0.4, 0.4, 0.7, 0.9)])
def test_a_few_runs_vary_as_much_as_their_unbiased_deviation_says(run_means):
    between = statistics.variance(run_means) / len(run_means)
    error = interval(np.repeat(np.array(run_means)[:, None], 50, axis=1))["error"]
    assert error == pytest.approx(math.sqrt(between), rel=0.03)
    # questions differ as well, the same in all runs: variances add
    spread = np.random.default_rng(2).normal(0, 2, 200)
    error = interval(np.array(run_means)[:, None] + spread)["error"]
    assert error == pytest.approx(math.sqrt(between + statistics.variance(spread) / 200), rel=0.03)


def test_one_run_is_a_plain_bootstrap_over_questions():
    rng = random.Random(3)
    values = np.random.default_rng(3).gamma(0.5, 0.2, 40) - 0.08  # skewed, and not far from 0
    unbiased = math.sqrt(40 / 39)
    student = 2.0227 / 1.9600  # t's and the normal's 97.5% quantile, 39 degrees of freedom
    drawn_means = (statistics.fmean(rng.choices(values.tolist(), k=40)) for _ in range(20_000))
    means = sorted(values.mean() + (m - values.mean()) * unbiased * student for m in drawn_means)
    found = interval(values)
    assert found["low"] == pytest.approx(means[500], abs=0.002)
    assert found["high"] == pytest.approx(means[19_500], abs=0.002)
    assert found["error"] == pytest.approx(statistics.stdev(means) / student, rel=0.03)
    assert found["p"] == pytest.approx(2 * sum(m <= 0 for m in means) / 20_000, abs=0.015)
    assert 0.01 < found["p"] < 0.5
    above, below = found["high"] - found["mean"], found["mean"] - found["low"]
    assert above / below > 1.1  # as skewed as the values


def test_nominal_95_percent_intervals_of_one_run_cover_the_truth_as_often():
    rng = np.random.default_rng(4)
    found = [interval(drawn(rng, 1)[0], draws=600) for _ in range(1000)]
    assert 0.93 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) / 1000 <= 0.97


@pytest.mark.parametrize(("n_runs", "run_sd"), [(3, 0.02), (5, 0.02), (3, 0.03)])
def test_intervals_of_a_few_runs_cover_the_truth_about_as_often(n_runs, run_sd):
    rng = np.random.default_rng(5)
    found = [interval(drawn(rng, n_runs, run_sd=run_sd)[0], draws=600) for _ in range(600)]
    assert 0.93 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) / 600 <= 0.97


def test_intervals_of_three_runs_that_differ_more_than_questions_do_cover_it_less_often():
    rng = np.random.default_rng(5)
    found = [interval(drawn(rng, 3, run_sd=0.1)[0], draws=600) for _ in range(600)]
    covered = sum(f["low"] <= 0.5 <= f["high"] for f in found) / 600
    assert 0.88 <= covered <= 0.95  # docs/evaluation.md says so


@pytest.mark.parametrize(("effect", "low", "high"), [(0, 0.03, 0.07), (0.12, 0.95, 1)])
def test_p_of_a_paired_difference_is_uniform_without_an_effect_and_small_with_one(
    effect, low, high
):
    rng = np.random.default_rng(6)
    found = [
        interval(b - a, draws=600) for a, b in (drawn(rng, 1, effect=effect) for _ in range(700))
    ]
    assert low <= sum(f["p"] < 0.05 for f in found) / 700 <= high
    if not effect:
        assert 0.44 <= sum(f["p"] < 0.5 for f in found) / 700 <= 0.56
    disagree = [f for f in found if (f["p"] < 0.05) != (not f["low"] <= 0 <= f["high"])]
    assert all(0.04 < f["p"] < 0.06 for f in disagree)
    assert len(disagree) < 7


def test_pairing_finds_what_the_spread_of_questions_would_hide_and_no_difference_has_p_1():
    rng = np.random.default_rng(7)
    hard_and_easy = rng.random(100)
    better = hard_and_easy + 0.02 + rng.normal(0, 0.02, 100)
    assert interval(better - hard_and_easy)["p"] < 0.001
    assert interval(hard_and_easy - better)["p"] < 0.001  # two-sided
    assert interval(better - 0.5)["p"] > 0.1
    assert interval(np.zeros((2, 30))) == {"mean": 0, "error": 0, "low": 0, "high": 0, "p": 1}


def test_questions_without_a_score_in_any_run_are_left_out():
    values = np.random.default_rng(8).random((2, 50))
    holes = np.insert(values, [0, 7, 50], math.nan, axis=1)
    holes[0, 0] = 0.9  # the other run has no score there
    assert interval(holes) == interval(values)
    assert all(math.isnan(x) for x in interval(np.full((2, 3), math.nan)).values())
    one = interval([0.25])
    assert one["mean"] == 0.25
    assert math.isnan(one["low"])  # of a single question nothing is known about the spread
    assert math.isnan(one["error"])  # one question says nothing about its spread


def test_the_error_of_a_clipped_mean_is_that_of_healthbench():
    """simple-evals draws samples with replacement and takes the deviation of their clipped means.

    The scores are those of a poor model: most means of a draw are at or below 0.
    """
    rng = np.random.default_rng(5)
    values = rng.normal(0.0, 0.4, 100)
    values -= values.mean() + 0.02
    draws = [np.clip(rng.choice(values, len(values)).mean(), 0, 1) for _ in range(20_000)]
    found = interval(values, clip=True)
    assert found["error"] == pytest.approx(np.std(draws), rel=0.1)
    assert found["error"] < interval(values)["error"] / 1.5


def test_clipping_is_of_the_mean_and_not_of_the_values():
    found = interval([-1.0, 0.5, -0.2], clip=True)
    assert (found["mean"], found["low"]) == (0, 0)
    values = np.array([1.0] * 20 + [-0.5] * 20)
    assert interval(values, clip=True)["mean"] == pytest.approx(0.25)  # with clipped values: 0.5
    assert interval([1.5, 0.9, 1.0], clip=True)["high"] == 1


def test_p_of_a_few_runs_is_that_of_t_over_them_and_of_no_spread_is_nothing():
    values = np.repeat([[0.10], [0.12], [0.14]], 50, axis=1)
    between = statistics.stdev((0.10, 0.12, 0.14)) / math.sqrt(3)
    assert interval(values)["p"] == pytest.approx(2 * stats.t.sf(0.12 / between, 2), rel=0.1)
    assert math.isnan(interval([1, 1, 1])["p"])
    assert interval([0, 0, 0])["p"] == 1


def test_a_difference_is_paired_over_the_seeds_that_both_have():
    a = {"runs": {0: np.array([1.0, 0.5]), 1: np.array([0.0, 0.0]), 2: np.array([0.5, 1.0])}}
    b = {"runs": {2: np.array([0.25, 0.75]), 3: np.array([1.0, 1.0]), 0: np.array([0.5, 0.0])}}
    assert difference(a, b) == interval([[0.5, 0.5], [0.25, 0.25]])
    assert difference(a, {"runs": {4: np.array([0.0, 0.0])}}) is None
