"""What a reference adds, counted by hand; pass@k against all subsets; right by meaning."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch

from analysis.mechanism import coverage, pass_at_k
from evaluate import correct, mechanism, watcher
from rollout import Rollout
from synthesize import Reference
from tasks import Question, without_labels

QUESTIONS = [
    Question([{"role": "user", "content": q}], a)
    for q, a in (("a", "1/2"), ("b", "3"), ("c", None))
]


def box(answer):
    return "none" if answer is None else f"\\boxed{{{answer}}}"


def rollouts(*answers):
    return [Rollout(box(a), [1] * 10, [0.0] * 10, "stop", [1]) for a in answers]


def test_correct_compares_with_the_label_by_meaning():
    texts = [["\\boxed{0.5}", "\\boxed{2}"], ["\\boxed{3}", "none"], ["\\boxed{1}", "x"]]
    values = correct(QUESTIONS, texts)
    assert values[:2].tolist() == [[1, 0], [1, 0]]
    assert values[2].isnan().all()


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer():
    n = 6
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [1.0] * c + [0.0] * (n - c)
        subsets = list(itertools.combinations(right, k))
        expected = float(Fraction(sum(any(subset) for subset in subsets), len(subsets)))
        found = pass_at_k(torch.tensor([right[::-1], right]), k)
        assert float(found[1]) == pytest.approx(expected, abs=1e-6)
    both = pass_at_k(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 0]]), 2)
    assert both.tolist() == pytest.approx([1 / 2, 1])


def test_coverage_decides_by_one_half_and_counts_in_the_other():
    initial = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    trained = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    found = coverage({"initial": initial, "trained": trained})
    # Three questions have no right one among the first two rollouts of pi_0.
    counts = {"solved by 2 of initial": 2, "solved by 2 of trained": 1}
    assert found["coverage"] == {"3 questions that 2 of initial did not solve": counts}
    assert found["pass"]["initial"] == pytest.approx({"1": 4 / 16, "2": 11 / 24, "4": 3 / 4})
    assert list(found["pass"]["trained"]) == ["1", "2", "4"]


CASES = [  # label, rollouts, the reference, the other aggregator's; what this case is of
    ("3", ("3", "3", "4", None), "3", "4"),  # differs, right
    ("5", ("6", "6", "7", "7"), "5", "6"),  # differs, new and hopeless, right
    ("1/2", ("0.5", "2", "7", "\\frac{1}{2}"), "2", "1/2"),  # differs, the other is right
    ("8", (None,) * 4, None, None),  # hopeless, without a vote
    ("9", ("9", "9.0", "9", "9"), "9.0", "9"),  # the same
    ("1", ("1", "1", "2", "2"), None, "1"),  # differs: it has no answer; the other is right
    ("3", (None,) * 4, "3", None),  # new and hopeless, right, without a vote
    ("6", ("4", "4", "5", None), "7", "4"),  # differs, new and hopeless
    ("2", ("2", "3", "3", "3"), "2", "3"),  # differs, right
    ("1", ("1", "1", "1", "2"), "2", "1"),  # differs, the other is right
    ("1", ("1", "1", "1", "2"), "2", "1"),
]
COUNTED = {"voted": 9, "differs": 8, "new": 3, "hopeless": 4}
RIGHT = {"differs_right": 3, "other_right": 4, "new_right": 2, "hopeless_right": 2}


def entropy_by_hand():
    thirds, quarters, halves = (1 / 3, 2 / 3), (1 / 4, 3 / 4), (1 / 2, 1 / 2)
    shares = [thirds, halves, (1 / 2, 1 / 4, 1 / 4), (1,), halves, thirds]
    shares += [quarters, quarters, quarters]
    return statistics.fmean(-sum(p * math.log(p) for p in each) for each in shares)


def of_cases(cases):
    questions = [Question(QUESTIONS[0].messages, label) for label, *_ in cases]
    made = ([Reference(box(case[i])) for case in cases] for i in (2, 3))
    return mechanism(questions, [rollouts(*case[1]) for case in cases], *made)


def test_the_mechanism_counts_are_those_counted_by_hand():
    found = of_cases(CASES)
    assert found.pop("entropy") == pytest.approx(entropy_by_hand())
    assert found == COUNTED | RIGHT
    found = of_cases([("8", (None,) * 4, None, None)] * 2)
    assert found == dict.fromkeys(found, 0) | {"hopeless": 2, "entropy": None}


def test_what_is_right_is_unknown_without_labels():
    unlabelled = of_cases([(None, *case[1:]) for case in CASES])
    assert unlabelled.pop("entropy") == pytest.approx(entropy_by_hand())
    known = {name: n for name, n in COUNTED.items() if name != "hopeless"}
    assert unlabelled == known | dict.fromkeys([*RIGHT, "hopeless"])


def watched(cases, labels):
    """The watcher's numbers of questions without labels; it has been given `labels`."""
    messages = [[{"role": "user", "content": f"{i}?"}] for i in range(len(cases))]
    pairs = zip(messages, labels, strict=True)
    labelled = [Question(m, label) for m, label in pairs]
    groups = [rollouts(*case[1]) for case in cases]
    references = [Reference(box(case[2])) for case in cases]
    order = [*range(len(cases))][::-1]  # a step takes the questions in another order
    batch = without_labels(labelled)
    given = ([each[i] for i in order] for each in (batch, groups, references))
    return watcher(labelled)(*given)[0]


def test_the_watcher_knows_the_labels_that_the_loops_questions_have_lost():
    """By hand: 17 of the 44 rollouts are right, and five of the eleven references.

    The majority has an answer in nine questions; the reference agrees with it in two of them.
    """
    found = watched(CASES, [case[0] for case in CASES])
    assert found["accuracy/rollouts"] == pytest.approx(17 / 44)
    assert found["accuracy/reference"] == pytest.approx(5 / 11)
    assert found["reference/majority_agreement"] == pytest.approx(2 / 9)
    assert found["mechanism/hopeless"] == 4
    assert found["mechanism/new_right"] == 2
    nothing = watched(CASES, [None] * len(CASES))
    assert math.isnan(nothing["accuracy/rollouts"])
    assert math.isnan(nothing["accuracy/reference"])
    assert nothing["reference/majority_agreement"] == found["reference/majority_agreement"]
    assert nothing["mechanism/hopeless"] is None
