"""The benchmark that holds rewards to the physicians' score: its correlations, and a whole run."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy

from judged_runs_helpers import SMALL, health_rows, judges, points

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import rubric_validity


@pytest.fixture
def judge():
    yield from judges()


def test_the_correlations_are_scipys_and_within_questions_is_not_overall():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(40, 1))  # a reward that only knows which questions are hard
    truth, blind = hard + 0.3 * rng.normal(size=(40, 6)), hard + 0.3 * rng.normal(size=(40, 6))
    found = rubric_validity.agreement(blind, truth, draws=200)
    coefficients = {"Pearson": scipy.stats.pearsonr, "Spearman": scipy.stats.spearmanr}
    for name, coefficient in coefficients.items():
        estimate, low, high, used = found["overall", name]
        assert estimate == pytest.approx(coefficient(blind.ravel(), truth.ravel()).statistic)
        assert 0.7 < low < estimate < high <= 1
        estimate, low, high, used = found["within", name]
        each = [coefficient(a, b).statistic for a, b in zip(blind, truth, strict=True)]
        assert estimate == pytest.approx(np.mean(each))
        assert low < estimate < high < 0.5
        assert used == 40
    same = rubric_validity.agreement(truth, truth, draws=50)
    assert all(estimate == pytest.approx(1) for estimate, *_ in same.values())
    # A reward that is constant in a question teaches nothing there: 0. A constant truth says
    # nothing. NaN is no score.
    blind[0], truth[1], truth[2, 2:] = 0.5, 0.5, np.nan
    found = rubric_validity.agreement(blind, truth, draws=50)
    pairs = [*zip(blind[3:], truth[3:], strict=True), (blind[2, :2], truth[2, :2])]
    expected = sum(scipy.stats.kendalltau(a, b).statistic for a, b in pairs) / 39
    assert found["within", "Kendall"][0] == pytest.approx(expected)
    assert found["within", "Kendall"][3] == 39
    constant = rubric_validity.agreement(np.ones((3, 4)), truth[:3, :4], draws=20)
    assert math.isnan(constant["overall", "Kendall"][0])


def test_rubric_validity_scores_the_same_responses_in_every_way(judge, tmp_path, capsys):
    out, data = tmp_path / "validity", health_rows(tmp_path / "health.jsonl")
    at = SMALL.index("--prompts-per-step")  # which is for training alone
    arguments = [*SMALL[:at], *SMALL[at + 2 :], "--data", str(data), "--judge-url", judge().url]
    assert rubric_validity.main([*arguments, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| rubric | overall |" in table
    assert "| judge | within |" in table
    rewards = json.loads((out / "validity.json").read_text())["rewards"]
    assert set(rewards) == {"physician", "rubric", "rubric-question", "judge"}
    physician = rewards["physician"]
    for values, detail in zip(physician["values"], physician["details"], strict=True):
        for value, verdicts in zip(values, detail["verdicts"], strict=True):
            assert value == pytest.approx(points(verdicts))
    assert [len(row) for row in rewards["judge"]["values"]] == [3, 3]
    arguments = ["--model", "tiny", "--eval-questions", "2", "--out", str(tmp_path / "x")]
    assert rubric_validity.main(arguments) == 2
    assert "--task healthbench" in capsys.readouterr().err
