"""Reward derivation R(o_i; s): how well does each rollout agree with the pseudo-reference?

    verifiable      R = 1 if the final \\boxed{} answers of o_i and s are equal, else 0      match
    otherwise       R = share of yes over a rubric that the anchor wrote from s             rubric

(Paper, section 3.) Nothing here knows the true answer: a reward sees the rollouts, the references
and the questions, and these come without labels. One reward is an exception, and says so:
`physician`, the oracle that the paper compares with.

Every reward is in the table REWARDS at the end. Add yours there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import rubrics
from plumbing.answers import boxed_answer, compare
from synthesize import Anchor, Reference, texts
from tasks import Question

# A step with a larger share of unknown verdicts than this is not trained on (see `judged`).
MAX_UNKNOWN = 0.2


@dataclass(frozen=True)
class Rewards:
    """R(o_i; s) of a step's Q questions with G rollouts each."""

    # (Q, G) float32. NaN: not known. One NaN leaves out its whole question (grpo.update).
    values: torch.Tensor
    stats: dict[str, float] = field(default_factory=dict)  # for the log, of the reward's choosing
    details: list[dict] = field(default_factory=list)  # one per question, for rollouts.jsonl


def over_length(groups: Sequence[Sequence], limit: int | None) -> torch.Tensor:
    """(Q, G): 1 for rollouts of more than `limit` tokens, to be taken off their reward.

    Rubrics reward every further fact, so answers grow without end (paper, HealthBench: 750).
    """
    limit = math.inf if limit is None else limit
    return torch.tensor([[float(len(o.ids) > limit) for o in group] for group in groups])


# ------------------------------------------------------------------------------- verifiable rewards
# Each reward takes Q questions, their Q groups of G rollouts, Q references, the anchor and a judge.


def match(questions, groups, references: Sequence[Reference], anchor=None, judge=None) -> Rewards:
    """1 where the rollout's boxed answer equals the reference's, else 0 (paper, "verifiable").

    Answers are compared by meaning, not as strings: 1/2 and 0.5 are equal (plumbing/answers.py). A
    reference without an answer equals none: its row is all 0, so A = 0, and only the KL acts.
    """
    targets = [boxed_answer(s.text) for s in references]  # (Q,)
    verdicts = [  # True, False, or None: not sure, which is no reward, and counted
        [compare(boxed_answer(o.text), target) for o in group]
        for group, target in zip(groups, targets, strict=True)
    ]
    rows = [[float(verdict is True) for verdict in row] for row in verdicts]
    unsure = [verdict is None for row in verdicts for verdict in row]
    stats = {"reference/unparsable": sum(target is None for target in targets) / len(targets)}
    stats["reward/unsure"] = sum(unsure) / len(unsure)
    return Rewards(torch.tensor(rows, dtype=torch.float32), stats)  # (Q, G)


# ----------------------------------------------------------------------------------- judged rewards


def rubric(questions, groups, references, anchor: Anchor, judge: Callable) -> Rewards:
    """The paper's reward: share of the criteria met, of a rubric that the anchor wrote from s.

    The anchor sees s alone. The judge sees a response and one criterion, and neither s nor q. An
    empty reference has no rubric: its row is NaN, and the question is left out of the update.
    """
    what = "a reference answer to a question that you are not shown"
    prompt = rubrics.RUBRIC_PROMPT.format("reference", what)
    asked = [rubrics.between_tags(prompt, reference=s.text) for s in references]
    written, stats = rubrics.write_rubrics(asked, lambda chats: texts(anchor.sample(chats)))
    written = [c if s.text.strip() else [] for c, s in zip(written, references, strict=True)]
    return judged(rubrics.mark(written, [texts(group) for group in groups], judge), stats)


def rubric_question(questions, groups, references, anchor: Anchor, judge: Callable) -> Rewards:
    """The same with a rubric written from q: the ablation that shows what s adds."""
    what = "a question, or a conversation that ends with one"
    prompt = rubrics.RUBRIC_PROMPT.format("question", what)
    asked = [rubrics.between_tags(prompt, question=q.conversation) for q in questions]
    written, stats = rubrics.write_rubrics(asked, lambda chats: texts(anchor.sample(chats)))
    return judged(rubrics.mark(written, [texts(group) for group in groups], judge), stats)


def same_meaning(questions, groups, references, anchor, judge: Callable) -> Rewards:
    """1 where the judge says that o_i means the same as s, else 0 (paper, "model as judge")."""
    criteria = [[s.text] if s.text.strip() else [] for s in references]
    responses = [texts(group) for group in groups]
    return judged(rubrics.mark(criteria, responses, judge, rubrics.SAME_PROMPT, "reference"), {})


def judged(marks: rubrics.Marks, stats: dict, points: Sequence | None = None) -> Rewards:
    """Marks as rewards: the share of yes, or with `points` HealthBench's score.

    If more than MAX_UNKNOWN of a step's verdicts are unknown, ALL its rewards become NaN, so that
    the step makes no update from the few that are left.
    """
    stats = stats | {"judge/unknown_rate": marks.unknown_rate}
    values = scored(marks, points)
    if marks.unknown_rate > MAX_UNKNOWN:
        values = torch.full_like(values, math.nan)
    details = [
        {"rubric": list(criteria), "verdicts": verdicts, "judge": raw}
        for criteria, verdicts, raw in zip(marks.rubrics, marks.verdicts, marks.raw, strict=True)
    ]
    for i, detail in enumerate(details if points else ()):
        detail["points"] = list(points[i])
    return Rewards(values, stats, details)


def scored(marks: rubrics.Marks, points: Sequence | None) -> torch.Tensor:
    """(Q, G) float32: each response's share of yes, or its score by points; NaN if not known."""
    if points is None:
        rows = [[rubrics.share_of_yes(v) for v in verdicts] for verdicts in marks.verdicts]
    else:
        rows = [
            [rubrics.healthbench_score(v, p) for v in verdicts]
            for verdicts, p in zip(marks.verdicts, points, strict=True)
        ]
    return torch.tensor(rows, dtype=torch.float32)


# ------------------------------------------------------------------------------------- the oracle


def by_physicians(questions: Sequence[Question], responses, judge: Callable) -> tuple:
    """(marks by the physicians' rubrics, the points of their criteria).

    Here the judge sees the conversation as well, as HealthBench's own grader does.
    """
    criteria = [[text for text, _ in q.rubric or ()] for q in questions]
    points = [[p for _, p in q.rubric or ()] for q in questions]
    given = [{"conversation": q.conversation} for q in questions]
    return rubrics.mark(criteria, responses, judge, given=given), points


def physician(questions, groups, references, anchor, judge: Callable) -> Rewards:
    """HealthBench's score by the physicians' own rubrics: an oracle, which READS LABELS."""
    marks, points = by_physicians(questions, [texts(group) for group in groups], judge)
    return judged(marks, {}, points)


def physician_scores(questions, responses: Sequence[Sequence[str]], judge) -> torch.Tensor:
    """The score of responses[q][i], (Q, n), for evaluation: NaN only where it is not known."""
    return scored(*by_physicians(questions, responses, judge))


REWARDS: dict[str, Callable[..., Rewards]] = {
    "match": match,
    "rubric": rubric,
    "rubric-question": rubric_question,
    "judge": same_meaning,
    "physician": physician,
}
