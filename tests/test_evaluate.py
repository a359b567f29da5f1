"""The final table against hand-made questions."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from evaluate import correct, final_table, format_table, mean_and_error
from rollout import Rollout
from synthesize import Reference
from tasks import Question


def rollout(answer, tokens=10):
    return Rollout(f"\\boxed{{{answer}}}", [1] * tokens, [0.0] * tokens, "stop", [1])


QUESTIONS = [Question([{"role": "user", "content": q}], a) for q, a in (("a", "1/2"), ("b", "3"), ("c", None))]


def test_correct_compares_with_the_label_by_meaning():
    texts = [["\\boxed{0.5}", "\\boxed{2}"], ["\\boxed{3}", "none"], ["\\boxed{1}", "x"]]
    values = correct(QUESTIONS, texts)
    assert values[:2].tolist() == [[1, 0], [1, 0]]
    assert values[2].isnan().all()


def test_the_error_is_over_questions_not_over_answers():
    values = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [math.nan, math.nan]]).double()
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(statistics.stdev([0.5, 1.0, 0.0]) / math.sqrt(3))
    assert all(math.isnan(x) for x in mean_and_error(values[3:]))


def test_the_final_table_counts_generations_and_tokens():
    before = [[rollout("1/2"), rollout("7"), rollout("0.5"), rollout("9")], [rollout("4")] * 4]
    after = [[rollout("1/2", 5)] * 4, [rollout("3", 5)] * 4]

    def aggregate(groups):
        assert groups == before
        return [Reference("\\boxed{1/2}", tokens=20), Reference("\\boxed{3}", tokens=40)]

    rows = final_table(QUESTIONS[:2], lambda p, n: before, lambda p, n: after, aggregate, 4)
    assert [r["accuracy"] for r in rows] == [0.25, 0.5, 1.0, 1.0]
    assert [r["generations"] for r in rows] == [1, 4, 5, 1]
    assert [r["tokens"] for r in rows] == [10, 40, 70, 5]
    text = format_table(rows, 2)
    assert "| initial policy | 0.250 ± 0.250 | 1 | 10 |" in text
    assert "5 : 1 in generations, 14.0 : 1 in generated tokens" in text
    assert "(of" not in text


def test_the_final_table_says_how_many_questions_a_judge_left_open():
    questions = [replace(q, rubric=(("Is kind", 1.0),)) for q in QUESTIONS[:2]]
    groups = [[rollout("a")], [rollout("b")]]
    aggregate = lambda groups: [Reference("s"), Reference("t")]  # noqa: E731
    score = lambda questions, texts: torch.tensor([[0.5], [math.nan]])  # noqa: E731
    rows = final_table(questions, lambda p, n: groups, lambda p, n: groups, aggregate, 1, score)
    assert {r["scored"] for r in rows} == {1}
    assert "| initial policy | 0.500 ± 0.000 (of 1 questions) |" in format_table(rows, 2, judged=True)
