"""How good is it really? The one place that reads labels: accuracy of rollouts, references and policies."""

import math
from collections.abc import Callable, Sequence

import torch

from rewards import Rewards, boxed_answer, equal
from rollout import Rollout
from synthesize import Reference, majority
from tasks import Question


def correct(questions: Sequence[Question], texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """1.0 where the boxed answer of texts[q][i] is the true one, (Q, n). NaN where a question has no label."""
    rows = [
        [math.nan if q.answer is None else float(equal(boxed_answer(text), q.answer)) for text in row]
        for q, row in zip(questions, texts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean over questions and its standard error, std / sqrt(Q). `values` (Q, n): n answers of a question are averaged
    first, because they are not independent of each other. NaN without labels or, the error, with a single question."""
    questions = values.mean(dim=1)  # (Q,)
    questions = questions[~questions.isnan()]
    error = questions.std() / math.sqrt(len(questions)) if len(questions) > 1 else math.nan
    return float(questions.mean()), float(error)


def describe(
    batch: Sequence[Question],
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Reference],
    rewards: Rewards,
    advantage: torch.Tensor,
) -> dict:
    """The step in numbers (README, Metrics). The two accuracies read labels, for the log; nothing trains on them."""
    rollouts = [o for group in groups for o in group]
    votes = majority(groups)
    agree = [equal(boxed_answer(s.text), boxed_answer(v.text)) for s, v in zip(references, votes, strict=True)]

    def accuracy(texts):
        mean, _ = mean_and_error(correct(batch, texts))
        return None if mean != mean else mean  # NaN: no labels

    return {
        "reward": float(rewards.values.mean()),
        "reward_std": float(rewards.values.std(dim=1).mean()),
        "frac_reward_zero_std": float((advantage == 0).all(dim=1).float().mean()),
        "accuracy/rollouts": accuracy([[o.text for o in group] for group in groups]),
        "accuracy/reference": accuracy([[s.text] for s in references]),
        "reference/majority_agreement": sum(agree) / len(agree),
        "reference/clipped_ratio": sum(s.finish_reason == "length" for s in references) / len(references),
        **rewards.stats,
        "completions/mean_length": sum(len(o.ids) for o in rollouts) / len(rollouts),
        "completions/clipped_ratio": sum(o.finish_reason == "length" for o in rollouts) / len(rollouts),
    }


def final_table(
    questions: Sequence[Question],
    sample_anchor: Callable,
    sample_policy: Callable,
    aggregate: Callable,
    group_size: int,
) -> list[dict]:
    """The rows of the table that ends a run: the same questions, answered in four ways.

    `sample_anchor(prompts, n)` and `sample_policy(prompts, n)` sample from pi_0 and pi_t; `aggregate(groups)` makes
    the references, as in training. The accuracy of a single answer is the mean of G of them, for a smaller error.
    """

    def row(name, texts, generations, tokens):
        accuracy, error = (None if math.isnan(x) else x for x in mean_and_error(correct(questions, texts)))
        return {"name": name, "accuracy": accuracy, "error": error, "generations": generations, "tokens": tokens}

    def mean_length(groups: Sequence[Sequence[Rollout]]) -> float:
        return sum(len(o.ids) for group in groups for o in group) / sum(map(len, groups))

    prompts = [q.messages for q in questions]
    before = sample_anchor(prompts, group_size)
    references: list[Reference] = aggregate(before)
    votes = majority(before)
    after = sample_policy(prompts, group_size)
    one, g = mean_length(before), group_size
    written = sum(s.tokens for s in references) / len(references)
    return [
        row("initial policy", [[o.text for o in group] for group in before], 1, one),
        row(f"majority of {g}, at inference", [[s.text] for s in votes], g, g * one),
        row("reference at inference (initial policy)", [[s.text] for s in references], g + bool(written), g * one + written),
        row("trained policy", [[o.text for o in group] for group in after], 1, mean_length(after)),
    ]


def format_table(rows: Sequence[dict], questions: int) -> str:
    """The table as Markdown, and what an answer costs at inference time against the trained policy."""
    lines = [f"| on {questions} questions | accuracy | generations | tokens |", "|---|---|---|---|"]
    for r in rows:
        error = "" if r["error"] is None else f" ± {r['error']:.3f}"
        accuracy = "no labels" if r["accuracy"] is None else f"{r['accuracy']:.3f}{error}"
        lines.append(f"| {r['name']} | {accuracy} | {r['generations']} | {r['tokens']:.0f} |")
    cat, trained = rows[2], rows[3]
    lines += [
        "",
        "accuracy: mean ± standard error over questions; generations and tokens: per answer.",
        "test-time compute, reference at inference against trained policy: "
        f"{cat['generations'] / trained['generations']:.0f} : 1 in generations, "
        f"{cat['tokens'] / trained['tokens']:.1f} : 1 in generated tokens",
    ]
    return "\n".join(lines)
