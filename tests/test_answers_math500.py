"""Answers: MATH-500's gold answers, against each other and against themselves rewritten."""

import json
import random
import re
from pathlib import Path

import pytest

from plumbing.answers import equal

FILE = Path(__file__).resolve().parent.parent.parent / "shared/data/math500.jsonl"

# All pairs of different gold answers that are equal, found by trying all 45,150 (`ALL`, 7 minutes):
# order in a set, grouped digits, a unit or a name that one leaves out, and spacing.
SAME = r"""
1,-2 | -2,1
10080 | 10,\!080
120^\circ | 120
15\mbox{ cm}^2 | 15
2\sqrt{5} | 2 \sqrt{5}
30^\circ | 30
36^\circ | 36
90^\circ | 90
\$36 | 36
\frac{1}{4} | \frac14
x=5 | 5
"""
ALL = False


@pytest.fixture(scope="module")
def gold():
    if not FILE.exists():
        pytest.skip(f"no {FILE}")
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["answer"] for line in lines})


def test_no_two_gold_answers_of_different_value_are_equal(gold):
    pairs = [(a, b) for i, a in enumerate(gold) for b in gold[:i]]
    pairs = pairs if ALL else random.Random(0).sample(pairs, 2_000)
    same = {frozenset(line.split(" | ")) for line in SAME.strip().splitlines()}
    assert all(equal(*pair) for pair in same)
    found = {frozenset(pair) for pair in pairs if equal(*pair)}
    assert found <= same, found - same


REWRITTEN = {
    "spaces": lambda a: " " + re.sub(r"([+=])", r" \1 ", a) + "  ",
    "left and right": lambda a: re.sub(
        r"\\?(?:left|right)?(?<![a-z\\])([()])",
        lambda m: (r"\left" if m[1] == "(" else r"\right") + m[1],
        re.sub(r"\\left|\\right", "", a),
    ),
    "frac": lambda a: re.sub(r"\\[dt]?frac", r"\\dfrac", a),
    "text": lambda a: re.sub(r"\\(text|mbox)(?=\{)", r"\\mathrm", a),
    "dollars and a period": lambda a: f"${a}$.",
    "display": lambda a: rf"\[ \displaystyle {a} \]",
    "bold": lambda a: f"**{a}**",
}


@pytest.mark.parametrize("form", REWRITTEN)
def test_each_gold_answer_equals_itself_rewritten(gold, form):
    assert [(a, REWRITTEN[form](a)) for a in gold if not equal(a, REWRITTEN[form](a))] == []
