"""A logged question in words, against what a person finds by hand."""

import itertools
import statistics

import pytest

from analysis import decisions, page
from page_helpers import boxed, row


@pytest.mark.parametrize(
    ("answers", "reference", "truth", "kind", "differs", "hopeless", "wrong"),
    [
        (["1", "1", "2"], "2", "2", "right", True, False, False),
        (["1", "1", "2"], "2", "1", "wrong", True, False, True),
        (["1", "1", "2"], "3", "4", "neither", True, True, True),
        (["1", "1", "2"], "4", "4", "right", True, True, False),  # that no rollout has
        (["1", "1", "2"], "2", None, "left", True, False, False),
        (["1", "1", "2"], "1", "1", "both right", False, False, False),
        (["1", "1", "2"], "1", "2", "both wrong", False, False, True),
        (["0.5", "\\frac{1}{2}", "2"], "1/2", "0.5", "both right", False, False, False),
        (["2", "1", "1", "2"], "1", "1", "right", True, False, False),  # of a tie, the first
        (["a\nb", "c\nd"], "7", "7", "no vote", False, True, False),
        (["1", "1"], "nothing\nat all", "1", "silent", True, False, True),
        (["1", "1"], "nothing\nat all", None, "silent", True, False, False),
    ],
)
def test_who_is_right(answers, reference, truth, kind, differs, hopeless, wrong):
    found = decisions.vote(row(0, "?", answers, reference, truth))
    assert found["kind"] == kind
    flags = (found["differs"], found["hopeless"], found["wrong"])
    assert flags == (differs, hopeless, wrong)


def test_the_vote_lists_every_answer_once_and_who_gives_it():
    found = decisions.vote(row(0, "?", ["3", "1/2", "0.5", "x\ny"], "4", "0.5"))
    listed = [(o["answer"], o["rollouts"], o["right"], o["reference"]) for o in found["options"]]
    assert listed == [
        ("1/2", [2, 3], True, False),
        ("3", [1], False, False),
        ("4", [], False, True),
    ]
    assert found["silent"] == [4]


def sentences(answers, reference, truth):
    given = row(0, "?", answers, reference, truth)
    return decisions.told(decisions.vote(given), len(answers))


def test_the_vote_in_words():
    told = sentences(["1", "1", "2", "3"], "2", "2")
    assert told == "The majority (2 of 4) says 1. The reference says 2, and that is true; " \
        "1 of 4 rollouts said so."  # fmt: skip
    told = sentences(["1", "1", "2", "3"], "5", "2")
    assert "The reference says 5; none of the rollouts said so." in told
    assert told.endswith("True is 2, which 1 of 4 rollouts found.")
    assert "(1 of 2, the first of 2 answers with as many)" in sentences(["1", "2"], "2", None)
    assert (
        sentences(["1", "1"], "1", "1")
        == "Reference and majority (2 of 2) say 1, and that is true."
    )
    assert "no answer in a box" in sentences(["1", "1"], "oh\nno", "1")


def test_lines_are_the_same_alike_or_new():
    reference = ["First, **add** 3 and 4.", "", "So 3 + 4 = 7", "\\["]
    given = ["First, add 3  and 4.", "First add 3 to 4", "First, add 3 and 5.", "", "\\]", "So 3"]
    marks = decisions.sources(given, reference)
    # Bold type and spacing change nothing; another number makes another line.
    assert marks == ["same", "alike", "new", "", "", "new"]


def test_the_reference_says_which_rollouts_have_a_line_and_where_it_leaves_the_majority():
    texts = [boxed("8", "ones: 7+1=8", "tens: 0"), boxed("8", "ones: 7+1=8", "tens: 0"),
             boxed("18", "ones: 7+1=8", "tens: 1")]  # fmt: skip
    given = row(0, "?", texts, boxed("18", "ones: 7+1=8", "tens: 1"), "18")
    reference, rollouts = decisions.marked(given)
    third = ["new", "new", "same"]
    assert [marks for _, marks in reference] == [["same"] * 3, third, third]
    assert [mark for _, mark in rollouts[0]] == ["same", "new", "new"]
    said = decisions.parting(given, decisions.vote(given))
    assert said == "It first leaves rollout 1, of the majority, at “tens: 1”, " \
        "which is also in rollout 3."  # fmt: skip
    own = row(0, "?", texts, boxed("28", "ones: 7+1=8", "tens: 2"), "18")
    assert "“tens: 2”, which is in no rollout." in decisions.parting(own, decisions.vote(own))
    same = row(0, "?", texts, texts[0], "18")
    assert decisions.parting(same, decisions.vote(same)) == ""


def test_advantages_are_those_of_the_logged_rewards():
    rewards = [1.0, 0.0, 0.0, 0.5]
    by_hand = [(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards]
    assert decisions.pushes(rewards) == pytest.approx(by_hand)
    assert decisions.pushes([0.3, 0.3]) == decisions.pushes([1.0, None]) == [0, 0]


def lesson(answers, reference, truth):
    given = row(0, "?", answers, reference, truth)
    A = decisions.pushes(given["rewards"])
    return decisions.consequence(given, A, decisions.vote(given))


def test_what_the_update_teaches():
    text = lesson(["1", "1", "2"], "2", "2")
    start = "The update makes rollout 3 likelier and rollouts 1 and 2 less likely."
    assert text == f"{start} That is the right lesson."
    text = lesson(["1", "1", "2"], "2", "1")
    assert text == f"{start} That is the wrong lesson: rollouts 1 and 2 had the true answer."
    text = lesson(["1", "1", "2"], "2", "3")
    assert text == f"{start} That is a wrong lesson: their answer is not true."
    assert lesson(["1", "1", "2"], "2", None) == start
    assert "teaches nothing" in lesson(["1", "1"], "1", "1")
    unknown = row(0, "?", ["1", "2"], "1") | {"rewards": [None, 1.0]}
    assert "One of the rewards is not known" in decisions.consequence(unknown, [0, 0], None)


def test_a_criterion_that_separates_nobody_is_flat():
    given = {"rubric": ["a", "b", "c"], "rewards": [1.0, 0.5]}
    given |= {"verdicts": [[True, True, None], [False, True, None]]}
    given |= {"judge": [["yes", "yes", "?"], ["no", "yes", None]]}
    found = decisions.criteria(given)
    assert [criterion["flat"] for criterion in found] == [False, True, True]
    assert found[0]["cells"] == [(True, "yes"), (False, "no")]
    told = decisions.compared(given, found)
    assert told == "1 of 3 criteria tell the rollouts apart. Rollout 1 (1.00) is ahead of " \
        "rollout 2 (0.50), which does not meet: “a”."  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 60, 1000])
def test_the_steps_that_are_shown_are_the_first_the_last_and_eight_between(count):
    chosen = page.spread(range(count), page.BETWEEN)
    assert len(chosen) == len(set(chosen)) == min(count, 10)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
