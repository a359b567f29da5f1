"""The verifiable reward, and what length costs: small tables by hand.

Rewards by a judge are in test_judged_rewards.py.
"""

import math

import pytest
import torch

from rewards import REWARDS, Rewards, match, over_length
from rollout import Rollout
from rubric_helpers import said
from synthesize import Reference
from tasks import Question

QUESTIONS = [Question([{"role": "user", "content": f"q{n}"}]) for n in range(2)]


def test_match_rewards_agreement_with_the_reference_by_meaning():
    groups = [
        [said(r"\boxed{1/2}"), said(r"\boxed{0.5}"), said(r"\boxed{2}"), said("no answer")],
        [said(r"\boxed{7}"), said(r"\boxed{7}"), said(r"\boxed{8}"), said(r"\boxed{7")],
    ]
    references = [Reference(r"so \boxed{\frac{1}{2}}"), Reference(r"\boxed{7}")]
    made = match(QUESTIONS, groups, references)
    assert torch.equal(made.values, torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]]))
    assert made.stats["reference/unparsable"] == 0


def test_a_reference_without_an_answer_rewards_nobody_and_is_counted():
    groups = [[said("no answer"), said(r"\boxed{7}")], [said(r"\boxed{7}"), said("")]]
    made = match(QUESTIONS, groups, [Reference("nothing"), Reference(r"\boxed{7}")])
    assert torch.equal(made.values, torch.tensor([[0.0, 0], [1, 0]]))
    assert made.stats["reference/unparsable"] == 0.5


def test_match_reads_no_label_and_asks_nobody():
    """The true answer is another one than the reference's, and the reference is what counts."""
    questions = [Question(q.messages, answer="8") for q in QUESTIONS]
    groups = [[said(r"\boxed{7}"), said(r"\boxed{8}")]] * 2
    made = match(questions, groups, [Reference(r"\boxed{7}")] * 2, anchor=None, judge=None)
    assert torch.equal(made.values, torch.tensor([[1.0, 0], [1, 0]]))


def test_the_table_holds_the_rewards_of_the_paper_and_its_baselines():
    assert REWARDS["match"] is match
    assert set(REWARDS) == {"match", "rubric", "rubric-question", "judge", "physician"}


# ------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(("limit", "over"), [(None, [0, 0, 0]), (750, [0, 1, 1]), (1, [1, 1, 1])])
def test_rollouts_of_more_tokens_than_the_limit_are_marked(limit, over):
    group = [Rollout("", [1] * n, [0.0] * n, "stop", [1]) for n in (750, 751, 900)]
    assert over_length([group, group], limit).tolist() == [over, over]


def test_long_rollouts_lose_one_and_a_missing_reward_stays_missing():
    group = [Rollout("", [1] * n, [0.0] * n, "stop", [1]) for n in (750, 751, 900)]
    rewards = Rewards(torch.tensor([[0.5, 0.5, math.nan]]))
    free = rewards.values - over_length([group], None)
    assert free[0, :2].tolist() == [0.5, 0.5]
    charged = rewards.values - over_length([group], 750)
    assert charged[0, :2].tolist() == [0.5, -0.5]
    assert free[0, 2].isnan()
    assert charged[0, 2].isnan()
