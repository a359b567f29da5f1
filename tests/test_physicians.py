"""The oracle: HealthBench's score by the physicians' own rubrics, by hand and on real rows."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from judged_helpers import GROUPS, QUESTIONS, REFERENCES, judge_for
from rewards import REWARDS, physician_scores
from rubric_helpers import parts_of, said
from tasks import Question

HEALTHBENCH = Path(__file__).resolve().parents[2] / "shared" / "data" / "healthbench_sample.jsonl"
NAN = math.nan
TEXTS = [[o.text for o in group] for group in GROUPS]


def test_only_the_physicians_criteria_are_marked_in_view_of_the_conversation():
    to_judge = []
    REWARDS["physician"](QUESTIONS, GROUPS, REFERENCES, None, judge_for(to_judge))
    seen = [parts_of(messages) for messages in to_judge]
    assert [list(parts) for parts in seen] == [["conversation", "criterion", "response"]] * 9
    conversations = [q.conversation for q in QUESTIONS for _ in range(3)]
    assert [parts["conversation"] for parts in seen] == conversations
    assert [parts["response"] for parts in seen] == [o.text for group in GROUPS for o in group]


def asked(*rubrics) -> list[Question]:
    return [Question([{"role": "user", "content": "Q"}], rubric=rows) for rows in rubrics]


def same(values, expected):
    torch.testing.assert_close(values, expected, equal_nan=True)


@pytest.mark.parametrize("none", [(), None])  # None: what a Question has that came without
def test_the_physicians_rubric_gives_points(none):
    questions = asked(
        (("Names aspirin", 6), ("Names rest", 4), ("Wrongly names fever", -5)),
        (("Names rest", 2.5), ("Has an unclear tone", 7.5), ("Wrongly names water", -5)),
        none,
    )
    # By hand: 10/10, 10/10 - 5/10, nothing; 2.5/2.5 (the 7.5 are unknown), -5/2.5, no verdict; no
    # rubric. With 5 of 18 verdicts unknown, that is a measurement and no reward.
    expected = torch.tensor([[1, 0.5, 0], [1, -2, NAN], [NAN, NAN, NAN]])
    same(physician_scores(questions, TEXTS, judge_for([])), expected)
    made = REWARDS["physician"](questions, GROUPS, REFERENCES, None, judge_for([]))
    same(made.values, torch.full((3, 3), NAN))
    assert made.stats == {"judge/unknown_rate": 5 / 18}
    assert [detail["points"] for detail in made.details] == [[6, 4, -5], [2.5, 7.5, -5], []]


def test_the_physicians_points_are_the_reward_where_enough_is_known():
    questions = asked(
        (("Names aspirin", 6), ("Names rest", 4), ("Wrongly names fever", -5)),
        (("Names rest", 2.5), ("Names a tone", 7.5), ("Wrongly names water", -5)),
        (),
    )
    # As above, but the tone is judged: 2.5/10 and -5/10. Unknown are the mute response's 3 of 18.
    expected = torch.tensor([[1, 0.5, 0], [0.25, -0.5, NAN], [NAN, NAN, NAN]])
    made = REWARDS["physician"](questions, GROUPS, REFERENCES, None, judge_for([]))
    same(made.values, expected)
    assert made.values.dtype == torch.float32
    assert made.stats == {"judge/unknown_rate": 3 / 18}
    same(physician_scores(questions, TEXTS, judge_for([])), expected)


@pytest.mark.skipif(not HEALTHBENCH.exists(), reason="the sample of HealthBench is not here")
def test_the_physicians_reward_on_real_rubrics():
    written = HEALTHBENCH.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in written if line.strip()]
    rubrics = [tuple((r["criterion"], r["points"]) for r in row["rubrics"]) for row in rows]
    questions = [Question(row["prompt"], rubric=r) for row, r in zip(rows, rubrics, strict=True)]
    assert len(rows) == 20
    assert sum(points < 0 for r in rubrics for _, points in r) > 50
    # (meets the positive criteria, meets the negative ones)
    meets = {"all": (True, True), "good": (True, False), "bad": (False, True), "no": (False, False)}
    points_of, shown = dict(pair for r in rubrics for pair in r), []

    def judge(calls):
        parts = [parts_of(messages) for messages in calls]
        shown.extend(p["criterion"] for p in parts)
        met = [meets[p["response"]][points_of[p["criterion"]] < 0] for p in parts]
        return ["yes" if yes else "no" for yes in met]

    groups = [[said(text) for text in meets] for _ in rows]
    made = REWARDS["physician"](questions, groups, [], None, judge)
    # Real criteria hold line breaks, quotes and <: each reaches the judge as it is, once for each
    # of the four responses.
    assert Counter(shown) == Counter(text for r in rubrics for text, _ in r for _ in meets)
    good = torch.tensor([sum(p for _, p in r if p > 0) for r in rubrics])
    bad = torch.tensor([sum(p for _, p in r if p < 0) for r in rubrics])
    expected = torch.stack([1 + bad / good, good / good, bad / good, 0 * good], dim=1)
    torch.testing.assert_close(made.values, expected)
