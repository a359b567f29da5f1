"""Answers: the test lists of public graders, and our own pairs that look alike."""

from pathlib import Path

import pytest

from plumbing.answers import compare, equal
from rewards import match
from rubric_helpers import said
from synthesize import Reference

LISTS = sorted((Path(__file__).parent / "data/answers").glob("*.txt"))


def cases(path):
    """(a, b, "yes" or "no", the reason why we disagree or "") of each line but comments."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            a, b, verdict, *reason = line.split(" | ")
            yield a, b, verdict, reason[0] if reason else ""


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_no_false_yes_and_nearly_all_true_pairs(path):
    false_yes, missed, true = [], [], 0
    for a, b, verdict, reason in cases(path):
        assert verdict in ("yes", "no")
        assert equal(a, b) is equal(b, a)
        if reason:  # listed because we disagree: then we must
            assert equal(a, b) is (verdict == "no"), (a, b, reason)
        elif verdict == "no" and equal(a, b):
            false_yes.append((a, b))
        elif verdict == "yes":
            true += 1
            missed += [(a, b)] if not equal(a, b) else []
    assert false_yes == []
    assert len(missed) <= 0.05 * true, missed


def test_the_lists_are_whole():
    """Their sizes, so that a case that is in the way is not dropped in silence."""
    sizes = {path.stem: len(list(cases(path))) for path in LISTS}
    assert sizes.pop("alike") >= 300
    assert sizes == {"hendrycks": 16, "mario": 60, "math_verify": 202, "nemo_skills": 31, "verl": 4}
    alike = [c for c in cases(LISTS[0]) if c[2] == "no"]
    assert len(alike) >= 200
    assert not any(reason for *_, reason in cases(LISTS[0]))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("1/2", "0.5", True),
        ("1/2", "0.25", False),
        ("12 cm", "12 m", False),
        ("x", "y", False),
        ("a/bc", "a", None),  # two readings
        ("13_5", "8", None),
        (r"\text{no idea}", "5", None),
        ("5", None, False),
    ],
)
def test_what_cannot_be_told_is_none_and_not_equal(a, b, verdict):
    assert compare(a, b) is verdict
    assert compare(b, a) is verdict
    assert equal(a, b) is (verdict is True)


def test_unsure_pairs_earn_nothing_and_are_counted():
    group = [said(rf"\boxed{{{answer}}}") for answer in (r"\frac{a}{bc}", "a/bc", "1/a/b", "2")]
    made = match([None], [group], [Reference(r"\boxed{\frac{a}{bc}}")])
    assert made.values.tolist() == [[1, 0, 0, 0]]
    assert made.stats["reward/unsure"] == 2 / 4
