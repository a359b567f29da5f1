"""Rewards by a judge, against tables by hand: what each is made of, and what it is not shown."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from judged_helpers import (
    GROUPS,
    QUESTIONS,
    REFERENCES,
    WRITTEN,
    anchor_for,
    before_the_rule,
    judge_for,
    text_of,
)
from rewards import MAX_UNKNOWN, REWARDS, physician_scores, scored
from rubric_helpers import parts_of, rubric_xml, said
from rubrics import mark, parse_rubric
from synthesize import Reference
from tasks import Question

NAN = math.nan
# By hand: question 0 has two, five and no criteria of five; in question 1 two of five have no
# verdict, and the judge says nothing of a response that is "mute"; question 2 has no rubric.
# Unknown are 5 + 4 of 30 verdicts, too many for a reward.
SHARES = torch.tensor([[0.4, 1, 0], [1 / 3, 2 / 3, NAN], [NAN, NAN, NAN]])
# The same with a rubric for question 1 that the judge can read: unknown are 5 of 30.
CLEAR = [
    WRITTEN[0],
    rubric_xml("Names rest", "Names water", "Names tone", "Names style", "Names fever"),
    WRITTEN[2],
]
REWARDED = torch.tensor([[0.4, 1, 0], [0.2, 0.4, NAN], [NAN, NAN, NAN]])
NOTHING = torch.full((3, 3), NAN)
BY_RUBRIC = [
    ("rubric", "reference", "refword", ["queryword", "sysword", "labelword", "labelrubric"]),
    ("rubric-question", "question", "queryword", ["refword", "labelword", "labelrubric"]),
]


def same(values, expected):
    torch.testing.assert_close(values, expected, equal_nan=True)


@pytest.mark.parametrize(("name", "part", "words", "hidden"), BY_RUBRIC)
def test_a_rubric_rewards_the_share_of_its_criteria_and_sees_nothing_else(
    name, part, words, hidden
):
    to_anchor, to_judge = [], []
    anchor = anchor_for(to_anchor, part, words)
    made = REWARDS[name](QUESTIONS, GROUPS, REFERENCES, anchor, judge_for(to_judge))
    same(before_the_rule(made), SHARES)
    same(made.values, NOTHING)
    assert made.stats == {
        "rubric/criteria": 10 / 3,
        "rubric/short": 0,
        "rubric/unparsable": 1 / 3,
        "judge/unknown_rate": 9 / 30,
    }
    assert len(to_anchor) == 3 + 1 + 1  # the third one is asked for again, twice
    assert not [word for word in hidden if word in text_of(to_anchor)]
    # The judge is shown a criterion and a response: not where the criterion is from, no label.
    assert len(to_judge) == 30
    assert {(*parts_of(messages),) for messages in to_judge} == {("criterion", "response")}
    assert not [word for word in [*hidden, words] if word in text_of(to_judge)]
    # What rollouts.jsonl is to hold: each rubric, and G rows of verdicts and of raw texts.
    assert [detail["rubric"] for detail in made.details] == [parse_rubric(text) for text in WRITTEN]
    assert made.details[0]["verdicts"] == [
        [True, True, False, False, False],
        [True] * 5,
        [False] * 5,
    ]
    assert made.details[1]["verdicts"] == [
        [True, False, None, None, False],
        [False, True, None, None, True],
        [None] * 5,
    ]
    assert made.details[1]["judge"][0] == ["Yes.", "no", "Hard to say.", None, "no"]
    assert made.details[2]["verdicts"] == [[], [], []]
    json.dumps(made.details)


@pytest.mark.parametrize(("name", "part", "words", "hidden"), BY_RUBRIC)
def test_a_response_without_a_verdict_has_no_reward_and_the_others_keep_theirs(
    name, part, words, hidden
):
    anchor = anchor_for([], part, words, CLEAR)
    made = REWARDS[name](QUESTIONS, GROUPS, REFERENCES, anchor, judge_for([]))
    same(made.values, REWARDED)
    assert made.values.dtype == torch.float32
    assert made.stats["judge/unknown_rate"] == 5 / 30


@pytest.mark.parametrize(("written", "shares"), [(WRITTEN, SHARES), (CLEAR, REWARDED)])
def test_marks_are_shares_of_yes_by_response(written, shares):
    responses = [[o.text for o in group] for group in GROUPS]
    marks = mark([parse_rubric(text) for text in written], responses, judge_for([]))
    same(scored(marks, None), shares)


def test_a_rubric_from_the_question_is_written_from_the_whole_conversation():
    to_anchor = []
    anchor = anchor_for(to_anchor, "question", "queryword")
    REWARDS["rubric-question"](QUESTIONS, GROUPS, REFERENCES, anchor, judge_for([]))
    assert parts_of(to_anchor[0])["question"] == "system: sysword0\n\nuser: queryword0 </question>"


def test_the_judge_baseline_compares_with_the_reference_and_sees_no_question():
    references, to_judge = [Reference("fine rest"), Reference("so unclear"), Reference("b")], []
    # No anchor: it is asked nothing.
    made = REWARDS["judge"](QUESTIONS, GROUPS, references, None, judge_for(to_judge))
    same(before_the_rule(made), torch.tensor([[1.0, 1, 0], [NAN, NAN, NAN], [0, 1, 0]]))
    same(made.values, NOTHING)
    assert made.stats == {"judge/unknown_rate": 3 / 9}
    assert [parts_of(messages) for messages in to_judge] == [
        {"reference": s.text, "response": o.text}
        for s, group in zip(references, GROUPS, strict=True)
        for o in group
    ]
    hidden = ("queryword", "sysword", "labelword", "labelrubric")
    assert not [word for word in hidden if word in text_of(to_judge)]
    # With a reference that can be judged, the one response that is mute is 1 of 9.
    references[1] = Reference("it is fever")
    made = REWARDS["judge"](QUESTIONS, GROUPS, references, None, judge_for([]))
    same(made.values, torch.tensor([[1.0, 1, 0], [0, 1, NAN], [0, 1, 0]]))
    assert made.stats == {"judge/unknown_rate": 1 / 9}


@pytest.mark.parametrize("name", ["rubric", "judge"])
def test_an_empty_reference_rewards_nobody(name):
    references = [Reference("refword rest"), Reference(" \n"), Reference("refword a")]
    # It would make a rubric up from nothing.
    anchor = SimpleNamespace(sample=lambda chats: [said(WRITTEN[0]) for _ in chats])
    made = REWARDS[name](QUESTIONS, GROUPS, references, anchor, judge_for([]))
    assert made.stats["judge/unknown_rate"] == 0
    assert made.values[1].isnan().all()
    assert not made.values[0].isnan().all()


# --------------------------------------------------------------------- the rule of unknown verdicts


def twenty_verdicts(unknown: int):
    """(questions, groups, references, anchor, judge): one criterion each, 20 calls.

    The first `unknown` answers cannot be read and the others are yes.
    """
    questions = [Question([{"role": "user", "content": "Q"}], rubric=(("C", 2.0),))] * 4
    anchor = SimpleNamespace(sample=lambda chats: [said(rubric_xml("C")) for _ in chats])

    def judge(calls):
        assert len(calls) == 20
        return ["?"] * unknown + ["yes"] * (20 - unknown)

    return questions, [[said("o")] * 5] * 4, [Reference("s")] * 4, anchor, judge


@pytest.mark.parametrize("name", ["rubric", "rubric-question", "judge", "physician"])
def test_one_in_five_unknown_is_the_most_that_a_step_may_have(name):
    assert MAX_UNKNOWN == 4 / 20
    made = REWARDS[name](*twenty_verdicts(4))
    assert made.stats["judge/unknown_rate"] == 0.2
    same(made.values, torch.tensor([[NAN] * 4 + [1.0], *[[1.0] * 5] * 3]))
    made = REWARDS[name](*twenty_verdicts(5))
    assert made.stats["judge/unknown_rate"] == 0.25
    same(made.values, torch.full((4, 5), NAN))
    # What was asked and answered is logged all the same.
    assert made.details[0]["verdicts"] == [[None]] * 5
    assert made.details[3]["judge"] == [["yes"]] * 5


def test_the_rule_is_for_what_is_learnt_and_not_for_what_is_measured():
    """In evaluation what is known stands by itself, however little it is."""
    questions, groups, _, _, judge = twenty_verdicts(19)
    scores = physician_scores(questions, [[o.text for o in group] for group in groups], judge)
    same(scores, torch.tensor([*[[NAN] * 5] * 3, [NAN] * 4 + [1.0]]))


def test_where_nothing_was_asked_nothing_is_unknown():
    """Rubrics that nobody could write: no reward is known, and no verdict is doubted."""
    anchor = SimpleNamespace(sample=lambda chats: [said("No.") for _ in chats])
    made = REWARDS["rubric"](QUESTIONS, GROUPS, REFERENCES, anchor, judge_for([]))
    same(made.values, NOTHING)
    assert made.stats["judge/unknown_rate"] == 0
