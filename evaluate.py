"""How good is it really? Where labels are read: accuracy of rollouts, references and policies.

python evaluate.py show RUN STEP    what was asked, answered and judged in a step of a run
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rewards import Rewards, boxed_answer, equal
from rollout import Rollout
from synthesize import Reference, majority
from tasks import InputError, Question


def correct(questions: Sequence[Question], texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """1.0 where the boxed answer of texts[q][i] is the true one, (Q, n). NaN where a question has no label."""
    rows = [
        [math.nan if q.answer is None else float(equal(boxed_answer(text), q.answer)) for text in row]
        for q, row in zip(questions, texts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def healthbench_score(verdicts: Sequence[bool | None], points: Sequence[float]) -> float:
    """HealthBench's score of one response: points of the criteria met / sum of the positive points.

    A negative criterion is met where what it warns of is present. The score can be negative; its mean over questions is
    clipped to [0, 1], not the score itself. Unknown verdicts are left out of both sums; NaN if no positive one is left.

    >>> healthbench_score([True, False, True], [10, 5, -6])
    0.26666666666666666
    """
    known = [(v, p) for v, p in zip(verdicts, points, strict=True) if v is not None]
    possible = sum(p for _, p in known if p > 0)
    return sum(p for v, p in known if v) / possible if possible else math.nan


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
    votes = [boxed_answer(v.text) for v in majority(groups)]
    agree = [equal(boxed_answer(s.text), v) for s, v in zip(references, votes, strict=True)]

    def accuracy(texts):
        mean, _ = mean_and_error(correct(batch, texts))
        return None if mean != mean else mean  # NaN: no labels

    return {
        "reward": float(rewards.values.nanmean()),
        "reward_std": float(rewards.values.std(dim=1).nanmean()),
        "frac_reward_zero_std": float((advantage == 0).all(dim=1).float().mean()),
        "accuracy/rollouts": accuracy([[o.text for o in group] for group in groups]),
        "accuracy/reference": accuracy([[s.text] for s in references]),
        "reference/majority_agreement": sum(agree) / len(agree) if any(votes) else None,  # None: there is nothing to vote on
        "reference/clipped_ratio": sum(s.finish_reason == "length" for s in references) / len(references),
        **rewards.stats,
        "completions/mean_length": sum(len(o.ids) for o in rollouts) / len(rollouts),
        "completions/clipped_ratio": sum(o.finish_reason == "length" for o in rollouts) / len(rollouts),
    }


def healthbench_mean(values: torch.Tensor) -> tuple[float, float]:
    """HealthBench's mean over questions, clipped to [0, 1], and its bootstrap standard deviation. `values` (Q, n)."""
    questions = values.nanmean(dim=1)  # (Q,)
    questions = questions[~questions.isnan()]
    if not len(questions):
        return math.nan, math.nan
    draws = torch.randint(len(questions), (1000, len(questions)), generator=torch.Generator().manual_seed(0))
    return float(questions.mean().clamp(0, 1)), float(questions[draws].mean(dim=1).clamp(0, 1).std())


def final_table(
    questions: Sequence[Question],
    sample_anchor: Callable,
    sample_policy: Callable,
    aggregate: Callable,
    group_size: int,
    score: Callable = correct,
) -> list[dict]:
    """The rows of the table that ends a run: the same questions, answered in four ways (three, if none can vote).

    `sample_anchor(prompts, n)` and `sample_policy(prompts, n)` sample from pi_0 and pi_t; `aggregate(groups)` makes
    the references, as in training; `score(questions, texts)` is `correct`, or asks a judge, (Q, n). The accuracy of a
    single answer is the mean of G of them, for a smaller error; where each costs calls of a judge, it is of one.
    """
    judged = questions[0].rubric is not None
    summary = healthbench_mean if judged else mean_and_error

    def row(name, texts, generations, tokens):
        texts = [list(answers)[: 1 if judged else None] for answers in texts]
        values = score(questions, texts)  # (Q, n)
        accuracy, error = (None if math.isnan(x) else x for x in summary(values))
        numbers = {"accuracy": accuracy, "error": error, "scored": int((~values.isnan()).any(dim=1).sum())}
        return {"name": name, **numbers, "generations": generations, "tokens": tokens}

    def mean_length(groups: Sequence[Sequence[Rollout]]) -> float:
        return sum(len(o.ids) for group in groups for o in group) / sum(map(len, groups))

    prompts = [q.messages for q in questions]
    before = sample_anchor(prompts, group_size)
    references: list[Reference] = aggregate(before)
    votes = majority(before)
    after = sample_policy(prompts, group_size)
    one, g = mean_length(before), group_size
    written = sum(s.tokens for s in references) / len(references)
    vote = [row(f"majority of {g}, at inference", [[s.text] for s in votes], g, g * one)]
    return [
        row("initial policy", [[o.text for o in group] for group in before], 1, one),
        *(vote if any(s.text for s in votes) else []),
        row("reference at inference (initial policy)", [[s.text] for s in references], g + bool(written), g * one + written),
        row("trained policy", [[o.text for o in group] for group in after], 1, mean_length(after)),
    ]


def format_table(rows: Sequence[dict], questions: int, judged: bool = False) -> str:
    """The table as Markdown, and what an answer costs at inference time against the trained policy."""
    measure = "score" if judged else "accuracy"
    spread = "± bootstrap standard deviation, clipped to [0, 1]" if judged else "± standard error over questions"
    lines = [f"| on {questions} questions | {measure} | generations | tokens |", "|---|---|---|---|"]
    for r in rows:
        error = "" if r["error"] is None else f" ± {r['error']:.3f}"
        accuracy = "no labels" if r["accuracy"] is None else f"{r['accuracy']:.3f}{error}"
        few = f" (of {r['scored']} questions)" if 0 < r["scored"] < questions else ""  # the judge left the others open
        lines.append(f"| {r['name']} | {accuracy}{few} | {r['generations']} | {r['tokens']:.0f} |")
    cat, trained = rows[-2:]
    lines += [
        "",
        f"{measure}: mean {spread}; generations and tokens: per answer.",
        "test-time compute, reference at inference against trained policy: "
        f"{cat['generations'] / trained['generations']:.0f} : 1 in generations, "
        f"{cat['tokens'] / trained['tokens']:.1f} : 1 in generated tokens",
    ]
    return "\n".join(lines)


def show(run: Path, step: int) -> str:
    """Every question of a step of a run as a table: rollouts across, criteria down. Raises InputError."""
    try:
        lines = (run / "rollouts.jsonl").read_text(encoding="utf-8").split("\n")
    except OSError:
        raise InputError(f"{run} holds no rollouts.jsonl: give the folder of a run") from None
    rows = [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] == step]
    if not rows:
        raise InputError(f"{run} has no step {step}: it is counted from 0, and metrics.jsonl lists them")
    marks, parts = {True: "yes", False: "no", None: "?"}, []
    for row in rows:
        parts += ["=" * 100, *(f"{m['role']}: {m['content']}" for m in row["question"])]
        parts += [f"\n--- rollout {i}\n{text}" for i, text in enumerate(row["rollouts"], start=1)]
        parts += [f"\n--- reference\n{row['reference']}\n"]
        table = [["", *(f"{i}" for i in range(1, len(row["rollouts"]) + 1))]]
        for k, criterion in enumerate(row.get("rubric", [])):
            table.append([criterion, *(marks[verdicts[k]] for verdicts in row["verdicts"])])
        table.append(["reward", *("-" if r is None else f"{r:.2f}" for r in row["rewards"])])
        parts += ["| " + " | ".join(cells) + " |" for cells in [table[0], ["---"] * len(table[0]), *table[1:]]]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("show", help="print a step of a run: questions, rollouts, references, rubrics, verdicts")
    command.add_argument("run", type=Path, help="the run's folder")
    command.add_argument("step", type=int, help="the step, from 0")
    arguments = parser.parse_args(argv)
    try:
        print(show(arguments.run, arguments.step))
    except InputError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
