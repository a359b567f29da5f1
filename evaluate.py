"""How good is it really, and why? This is the one file that reads labels.

python evaluate.py --task math500 --model M     every aggregator on the same rollouts of pi_0
python evaluate.py --adapter RUN                the same, and the policy that a run has trained
python evaluate.py table RUN...                 what these runs have measured, in one table
python evaluate.py show RUN STEP                what was asked, answered and judged in a step
python evaluate.py report RUN...                report.html: curves, decisions, rollouts, verdicts

Training uses two things from here: `watcher` for the true accuracy in the log, and `validator`,
which chooses the best step where --validate-every asks for it. Neither reaches a reward.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from analysis import commands, report
from analysis.mechanism import added, coverage
from analysis.statistics import style
from plumbing import checks, flags, folder
from plumbing.answers import boxed_answer, equal
from plumbing.draws import seed_of
from plumbing.engines import load_engine
from plumbing.errors import InputError, exit_status
from plumbing.models import add_lora, load_base, saved_policy
from plumbing.settings import EVALUATION, config, settle
from rewards import MAX_UNKNOWN, physician_scores
from synthesize import AGGREGATORS, Anchor, majority, texts
from tasks import Question, load_questions

pictures = report.pictures  # what train.run leaves of its steps


def correct(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> torch.Tensor:
    """(Q, n): 1.0 where the boxed answer of answers[q][i] is the true one; NaN without a label."""
    rows = [
        [math.nan if q.answer is None else float(equal(boxed_answer(o), q.answer)) for o in row]
        for q, row in zip(questions, answers, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def mechanism(questions, groups, references, others) -> dict:
    """What a reference adds to its rollouts, in numbers of questions (analysis/mechanism.py).

    `others`: what another aggregator made of the same rollouts.
    """
    right_o = correct(questions, [texts(group) for group in groups])  # (Q, G)
    made = (references, others)
    right, right_other = (correct(questions, [[s.text] for s in which])[:, 0] for which in made)
    return added(groups, references, others, right_o, right, right_other)


# ------------------------------------------------------------------------------------ while it runs


def watcher(labelled: Sequence[Question]) -> Callable:
    """What puts true accuracy and labels into the log. It has them; the loop's questions do not.

    It returns the step's numbers, and the label of each of its questions.
    """
    labels = {json.dumps(q.messages): q for q in labelled}

    def watch(questions, groups, references) -> tuple[dict, list[dict]]:
        questions = [labels[json.dumps(q.messages)] for q in questions]
        found = mechanism(questions, groups, references, majority(questions, groups))
        agree = 1 - found["differs"] / found["voted"] if found["voted"] else None
        right = correct(questions, [texts(group) for group in groups])  # (Q, G)
        right_s = correct(questions, [[s.text] for s in references])  # (Q, 1)
        numbers = {
            "accuracy/rollouts": float(right.nanmean()),
            "accuracy/reference": float(right_s.nanmean()),
            "reference/majority_agreement": agree,
            **{f"mechanism/{name}": value for name, value in found.items()},
        }
        return numbers, [{"answer": q.answer, "physicians": q.rubric} for q in questions]

    return watch


def scorer(questions: Sequence[Question], judge) -> Callable:
    """(questions, texts) -> (Q, n) scores: by the physicians' rubrics if there are any."""
    judged = bool(questions) and questions[0].rubric is not None
    return partial(physician_scores, judge=judge) if judged else correct


def validator(cfg, engine, judge, questions: Sequence[Question]) -> Callable:
    """What scores the policy on the validation questions: their true score, higher is better.

    None if too few of the answers could be scored.
    """
    score, prompts = scorer(questions, judge), [q.messages for q in questions]

    def validate() -> float | None:
        drawn = engine.sample(prompts, 1, cfg.final_sampling, seed=seed_of(cfg.seed, "after"))
        scores = score(questions, [texts(group) for group in drawn])  # (questions, 1)
        unknown = float(scores.isnan().float().mean())
        return float(scores.nanmean()) if unknown <= MAX_UNKNOWN else None

    return validate


# -------------------------------------------------------------------------------------- comparison


def compare(cfg, questions, engine, judge, aggregators, sizes, trained: bool) -> dict:
    """The same questions answered in every way: what results.json holds (docs/evaluation.md).

    pi_0 is sampled once, G times a question. Every aggregator gets those rollouts in parts of each
    size of `sizes`, and a question's score is the mean over the parts. `trained`: also pi_t, and
    the run's aggregator on top of it. Where every answer costs calls of a judge, one part and one
    rollout are scored instead of all.
    """
    g, judged = cfg.group_size, questions[0].rubric is not None
    prompts, score, rows = [q.messages for q in questions], scorer(questions, judge), []

    def add(kind, answers, generations, tokens, **more) -> torch.Tensor:
        values = score(questions, [row[: 1 if judged else None] for row in answers])  # (Q, n)
        row = {"kind": kind, **more, "generations": generations, "tokens": tokens}
        means = [None if math.isnan(v) else v for v in values.nanmean(dim=1).tolist()]
        rows.append({**row, "answers": values.shape[1], "values": means})
        return values

    def sample(kind, where, policy) -> tuple:
        options = {"policy": policy, "seed": seed_of(cfg.seed, where)}
        groups = engine.sample(prompts, g, cfg.final_sampling, **options)
        return groups, add(kind, [texts(group) for group in groups], 1, mean_length(groups))

    def aggregate(kind, groups, name, size) -> list:
        """Adds the row; returns the references of the first part."""
        print(f"{time.strftime('%H:%M:%S')}  {name} of {size}", flush=True)
        anchor = Anchor(engine, cfg.final_sampling, (cfg.seed, kind, name, size))
        parts, count = 1 if judged else g // size, len(questions)
        shares = [group[i * size : (i + 1) * size] for i in range(parts) for group in groups]
        made = AGGREGATORS[name](list(questions) * parts, shares, anchor)
        answers = [[s.text for s in made[q::count]] for q in range(count)]
        written, used = sum(s.tokens for s in made) / len(made), 1 if name == "single" else size
        more = {"aggregator": name, "size": size, "cut": sum(s.cut for s in made)}
        add(kind, answers, used + bool(written), used * mean_length(groups) + written, **more)
        return made[:count]

    before, right = sample("initial", "before", policy=False)
    whole = {}  # what each aggregator makes of all G
    for name in aggregators:
        for size in sizes:
            if size > 1 or name.startswith("synthesis"):  # the others return their only rollout
                made = aggregate("inference", before, name, size)
                whole |= {name: made} if size == g else {}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    results = {"questions": len(questions), "digest": digest, "judged": judged, "rows": rows}
    written = {name: [[s.text] for s in made] for name, made in whole.items()}
    written = {"rollouts": [texts(group) for group in before], **written}
    results["style"] = {name: style(shown) for name, shown in written.items()}
    if questions[0].boxed and (ours := whole.pop("synthesis", None)):
        against = {n: mechanism(questions, before, ours, made) for n, made in whole.items()}
        results["mechanism"] = against
    if trained:
        after, right_after = sample("trained", "after", policy=True)
        aggregate("on trained", after, cfg.aggregator, g)
        if not judged and not right.isnan().any():
            results |= coverage({"initial": right, "trained": right_after})
    return results


def mean_length(groups: Sequence[Sequence]) -> float:
    return sum(len(o.ids) for group in groups for o in group) / sum(map(len, groups))


def final_table(cfg, settings: dict, questions, engine, judge, out: Path, started: float) -> None:
    """The table at the end of a run: the initial policy, its aggregates, the trained policy."""
    names = ["majority", cfg.aggregator] if questions[0].boxed else [cfg.aggregator]
    names, sizes = list(dict.fromkeys(names)), [cfg.group_size]
    results = compare(cfg, questions, engine, judge, names, sizes, trained=True)
    report.save_comparison(out, settings, results, started)


# ------------------------------------------------------------------------------------- the command


def evaluate(given: dict) -> None:
    """The command without a subcommand. Raises InputError."""
    started = time.perf_counter()
    adapter, names, sizes = (given.pop(name, None) for name in ("adapter", "aggregators", "sizes"))
    if adapter and "seed" in given:
        raise InputError("with --adapter the seed is the run's: leave --seed out")
    run = folder.saved_settings(adapter) if adapter else None
    out, settings, _ = settle(given, run)
    cfg = config(settings)
    sizes = sizes or [2**k for k in range(cfg.group_size.bit_length())]
    sizes = sorted({*sizes, cfg.group_size})
    if not 1 <= sizes[0] <= sizes[-1] <= cfg.group_size:
        parts = f"--sizes are of parts of the {cfg.group_size} rollouts of --group-size"
        raise InputError(f"{parts}: take them from 1 to that")
    unfit = {"single"} if cfg.reward == "match" else {"single", "majority"}
    names = names or [name for name in AGGREGATORS if name not in unfit]
    questions = load_questions(cfg)["test"]
    base, tokenizer = load_base(cfg.model)
    fresh = partial(add_lora, base, cfg.lora_rank, cfg.seed)
    policy = saved_policy(base, adapter) if adapter else fresh()
    # Beside the folder: verdicts are paid for once, also by a second try.
    engine, judge = load_engine(cfg, policy, tokenizer, out.parent)
    checks.check_room(cfg, engine, questions, names)
    folder.create(out, settings | {"evaluation": True})
    shown = f"{cfg.group_size} rollouts each, in parts of {sizes}"
    print(f"{len(questions)} questions, {shown}", flush=True)
    results = compare(cfg, questions, engine, judge, names, sizes, trained=adapter is not None)
    results |= {"adapter": str(adapter), "trained": run} if adapter else {}
    report.save_comparison(out, settings, results, started)


def more_flags(parser) -> None:
    parser.add_argument("--adapter", type=Path, help="folder of a run: its policy and settings")
    parser.add_argument("--aggregators", nargs="+", choices=list(AGGREGATORS), help="which of them")
    parser.add_argument("--sizes", nargs="+", type=int, help="rollouts an aggregator gets")
    commands.add(parser)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> None:
        given = flags.parse(argv, __doc__.split("\n")[0], EVALUATION, more_flags)
        command = given.pop("command", None)
        (commands.COMMANDS[command] if command else evaluate)(given)

    return exit_status("evaluate.py", work, lambda: "")


if __name__ == "__main__":
    sys.exit(main())
