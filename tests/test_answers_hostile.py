"""Answers: hostile strings cost little and do no harm (10,000: python tests/hostile_answers.py)."""

import time

from hostile_answers import hostile, measured
from plumbing.answers import compare, equal


def test_a_thousand_hostile_strings_are_fast_and_a_group_never_above_five_seconds():
    equal(r"\sqrt{2}", "x")  # the child is up
    started = time.monotonic()
    groups = measured(1_000, seed=1)
    assert time.monotonic() - started < 60  # 12 s is the goal's pace; other work may share the CPU
    assert max(groups) < 5


def test_no_hostile_string_equals_a_plain_answer_unless_it_is_that():
    """What is called equal to 7 must be 7 by another way: here, a list of all that were."""
    assert [s for s in hostile(1_000, seed=2) if equal(s, "7")] == []


def test_a_hostile_string_is_symmetric_and_equals_itself_or_is_nothing():
    for text in hostile(300, seed=3):
        assert compare(text, "x+1") is compare("x+1", text)
        assert equal(text, text) or not text.strip("$ \n\\.{}()[]~!,")
