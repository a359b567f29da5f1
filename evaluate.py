"""How good is it really, and why? Where labels are read: accuracy of rollouts, references and policies, with intervals.

python evaluate.py --task math500 --model M     every aggregator on the same rollouts of pi_0, for several G
python evaluate.py --adapter RUN                the same and the policy that a run has trained, on the run's task
python evaluate.py table RUN...                 what these runs have measured, in one table
python evaluate.py show RUN STEP                what was asked, answered and judged in a step of a run
"""

import argparse
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

import runs
from rewards import Rewards, boxed_answer, equal
from rollout import EngineError, Rollout
from rubrics import JudgeError, physician_scores
from settings import EVALUATION, load_engine, parser_of, saved_policy, settle
from synthesize import AGGREGATORS, Anchor, Reference, answer_classes, check_aggregators, majority, style, texts
from tasks import RANK, InputError, Question, RankError, add_lora, load_base, load_questions, seed_of

# ------------------------------------------------------------------------------------------------- scores


def correct(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> torch.Tensor:
    """1.0 where the boxed answer of answers[q][i] is the true one, (Q, n). NaN where a question has no label."""
    rows = [
        [math.nan if q.answer is None else float(equal(boxed_answer(text), q.answer)) for text in row]
        for q, row in zip(questions, answers, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def describe(
    batch: Sequence[Question],
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Reference],
    rewards: Rewards,
    advantage: torch.Tensor,
) -> dict:
    """The step in numbers (README, Metrics). What is right is read from labels, for the log; nothing trains on it."""
    rollouts = [o for group in groups for o in group]
    right, right_s = correct(batch, [texts(g) for g in groups]), correct(batch, [[s.text] for s in references])[:, 0]
    numbers = {
        "reward": float(rewards.values.nanmean()),
        "reward_std": float(rewards.values.std(dim=1).nanmean()),
        "frac_reward_zero_std": float((advantage == 0).all(dim=1).float().mean()),
        "accuracy/rollouts": float(right.nanmean()),
        "accuracy/reference": float(right_s.nanmean()),
        "reference/clipped_ratio": sum(s.finish_reason == "length" for s in references) / len(references),
        "reference/cut_rollouts": sum(s.cut for s in references) / len(rollouts),
        **rewards.stats,
        "completions/mean_length": sum(len(o.ids) for o in rollouts) / len(rollouts),
        "completions/clipped_ratio": sum(o.finish_reason == "length" for o in rollouts) / len(rollouts),
    }
    found = mechanism(batch, groups, references, majority(batch, groups))
    numbers["reference/majority_agreement"] = 1 - found["differs"] / found["voted"] if found["voted"] else None
    return numbers | {f"mechanism/{name}": value for name, value in found.items()}


def mechanism(questions, groups, references, others) -> dict:
    """What a reference adds to its rollouts, in numbers of questions (paper, section 5; only boxed answers count).

    `others`: what another aggregator made of the same rollouts.

        voted, differs, other_right     `others` has an answer; the reference's is not the same; the other is right then
        new                             the reference has an answer that no rollout has
        hopeless                        no rollout is right
        ..._right                       and the reference is right there
        entropy                         of the rollouts' answers, nats, mean over questions: 0 where all agree
    """
    answers, rivals = ([boxed_answer(s.text) for s in made] for made in (references, others))
    right, other_right = (correct(questions, [[s.text] for s in made])[:, 0] for made in (references, others))  # (Q,)
    right_o = correct(questions, [texts(group) for group in groups])  # (Q, G)
    classes = [answer_classes(group) for group in groups]
    known = [[boxed_answer(c[0].text) for c in found] for found in classes]
    sets = {
        "differs": [b is not None and not equal(a, b) for a, b in zip(answers, rivals, strict=True)],
        "new": [a is not None and not any(equal(a, b) for b in found) for a, found in zip(answers, known, strict=True)],
        "hopeless": (right_o == 0).all(dim=1).tolist(),
    }
    counts = {name: sum(members) for name, members in sets.items()} | {"voted": sum(b is not None for b in rivals)}
    counts |= {f"{name}_right": int((right[torch.tensor(members)] == 1).sum()) for name, members in sets.items()}
    counts["other_right"] = int((other_right[torch.tensor(sets["differs"])] == 1).sum())
    if right.isnan().any():  # no labels, so nothing is known to be right
        counts |= dict.fromkeys([name for name in counts if name.endswith("right")] + ["hopeless"])
    shares = [[len(c) / sum(map(len, found)) for c in found] for found in classes if found]  # of the answers
    entropy = [-sum(p * math.log(p) for p in each) for each in shares]
    return counts | {"entropy": sum(entropy) / len(entropy) if entropy else None}


def pass_at_k(right: torch.Tensor, k: int) -> torch.Tensor:
    """The chance that one of k samples is right, (Q,), from n >= k of them, `right` (Q, n): 1 - C(n-c, k) / C(n, k), which
    has no bias (Chen et al. 2021, arXiv 2107.03374)."""
    n = right.shape[1]
    return torch.tensor([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(dim=1)], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- comparison


def compare(s, questions: Sequence[Question], engine, judge, aggregators, sizes: Sequence[int], trained: bool) -> dict:
    """The same questions answered in every way: results for results.json (README, "Evaluate it").

    pi_0 is sampled once, s.group_size times a question; every aggregator gets those rollouts, in parts of each size of
    `sizes`, and a question's score is the mean over the parts. `trained`: also pi_t, and synthesis on top of it.
    Where every answer costs calls of a judge, one part and one rollout are scored instead of all.
    """
    prompts, g, judged = [q.messages for q in questions], s.group_size, questions[0].rubric is not None
    sampling, boxed = s.eval_sampling | {"max_new_tokens": s.max_new_tokens}, s.reward == "match"
    score = partial(physician_scores, judge=judge) if judged else correct  # (questions, texts) -> (Q, n)
    rows = []

    def add(kind, answers, generations, tokens, **more):
        values = score(questions, [list(row)[: 1 if judged else None] for row in answers])  # (Q, n)
        rows.append({"kind": kind, **more, "generations": generations, "tokens": tokens, "answers": values.shape[1]})
        rows[-1]["values"] = [None if math.isnan(v) else v for v in values.nanmean(dim=1).tolist()]
        return values

    def mean_length(groups: Sequence[Sequence[Rollout]]) -> float:
        return sum(len(o.ids) for group in groups for o in group) / sum(map(len, groups))

    def aggregate(kind, groups, name, size) -> list[Reference]:
        """Adds the row; returns the references of the first part."""
        anchor = Anchor(engine, partial(seed_of, s.seed, kind, name, size), **sampling)  # whatever else is asked for
        parts = 1 if judged else g // size
        print(f"{time.strftime('%H:%M:%S')}  {name} of {size}", flush=True)
        shares = [group[i * size : (i + 1) * size] for i in range(parts) for group in groups]
        made = AGGREGATORS[name](list(questions) * parts, shares, anchor, boxed)  # question q of part i at i * Q + q
        answers = [[s.text for s in made[q :: len(questions)]] for q in range(len(questions))]
        written, cut = sum(s.tokens for s in made) / len(made), sum(s.cut for s in made)
        used = 1 if name == "single" else size
        tokens = used * mean_length(groups) + written
        add(kind, answers, used + bool(written), tokens, aggregator=name, size=size, cut=cut)
        return made[: len(questions)]

    before = engine.sample(prompts, g, policy=False, seed=seed_of(s.seed, "before"), **sampling)
    right = add("initial", [texts(group) for group in before], 1, mean_length(before))
    whole = {}  # what each aggregator makes of all G
    for name in aggregators:
        for size in sizes:
            if size > 1 or name.startswith("synthesis"):  # the others return their only rollout
                made = aggregate("inference", before, name, size)
                whole |= {name: made} if size == g else {}
    digest = hashlib.sha256(json.dumps([q.messages for q in questions]).encode()).hexdigest()
    results = {"questions": len(questions), "digest": digest, "judged": judged, "rows": rows}
    written = {"rollouts": [texts(group) for group in before]} | {n: [[s.text] for s in made] for n, made in whole.items()}
    results["style"] = {name: style(rows_of_texts) for name, rows_of_texts in written.items()}
    if boxed and "synthesis" in whole:
        rivals = {name: made for name, made in whole.items() if name != "synthesis"}
        results["mechanism"] = {n: mechanism(questions, before, whole["synthesis"], made) for n, made in rivals.items()}
    if trained:
        after = engine.sample(prompts, g, policy=True, seed=seed_of(s.seed, "after"), **sampling)
        right_after = add("trained", [texts(group) for group in after], 1, mean_length(after))
        aggregate("on trained", after, s.aggregator, g)
        if not judged and not right.isnan().any():
            ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= g]
            both = {"initial": right, "trained": right_after}
            results["pass"] = {n: {f"{k}": float(pass_at_k(v, k).mean()) for k in ks} for n, v in both.items()}
            half = g // 2 or 1  # of pi_0's rollouts: which questions none of them solves; the rest are the control
            unsolved = right[:, :half].sum(dim=1) == 0
            counts = {f"solved by {g - half} of {n}": int(v[unsolved, half:].any(dim=1).sum()) for n, v in both.items()}
            results["coverage"] = {f"{int(unsolved.sum())} questions that {half} of initial did not solve": counts}
    return results


def plot(path: Path, measured: Sequence[dict]) -> None:
    """A PNG: accuracy against the generations an answer costs, against G, and what synthesis adds to the majority."""
    found = runs.methods([results for results in measured if results["digest"] == measured[0]["digest"]])
    first = next(m for m in found.values() if m["kind"] == "initial")
    at_inference = {(m["aggregator"], m["size"]): m for m in found.values() if m["kind"] == "inference"}
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(4, 3, 3))

    def bar(axis, x, i, **style):
        axis.errorbar(x, i["mean"], [[max(0, i["mean"] - i["low"])], [max(0, i["high"] - i["mean"])]], capsize=2, **style)

    for colour, name in enumerate(dict.fromkeys(name for name, _ in at_inference)):
        ms = [m for (n, _), m in at_inference.items() if n == name]
        ms = ms if ms[0]["size"] == 1 else [{**first, "size": 1}, *ms]  # of one, a selection is that one
        for axis, cost in ((axes[0], "generations"), (axes[1], "size")):
            points = [runs.interval(m["scores"], clip=True) for m in ms]
            axis.plot([m[cost] for m in ms], [i["mean"] for i in points], color=f"C{colour}", label=name)
            for m, i in zip(ms, points, strict=True):
                bar(axis, m[cost], i, fmt="o", ms=3, color=f"C{colour}")
    for name, m in found.items():
        if m["kind"] == "trained":
            bar(axes[0], 1, i := runs.interval(m["scores"], clip=True), fmt="*", ms=14, label=name)
            axes[0].axhline(i["mean"], lw=0.7, ls=":", color="grey")
    for (name, size), m in at_inference.items():
        if name == "synthesis" and (vote := at_inference.get(("majority", size))):
            bar(axes[2], size, runs.difference(m, vote), fmt="o", color="C0")
    axes[2].axhline(0, color="grey", lw=0.7)
    titles = {"mean by cost": "generations per answer", "mean by G": "G", "synthesis minus majority, paired": "G"}
    for axis, (title, x) in zip(axes, titles.items(), strict=True):
        ticks = sorted({1, *(m["generations" if axis is axes[0] else "size"] for m in at_inference.values())})
        axis.set_xscale("log", base=2)
        axis.set(title=f"{title}, 95% intervals", xlabel=x, xticks=ticks, xticklabels=ticks)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def explain(results: dict) -> str:
    """What the table does not show, as small tables: counts of questions, pass@k, how texts are written."""
    lines = []
    for corner, part in (("synthesis against", "mechanism"), ("pass@k", "pass"), ("of", "coverage"), ("per text", "style")):
        if rows := results.get(part):
            cells = [[corner, *next(iter(rows.values()))]]
            for name, numbers in rows.items():
                cells.append([name, *(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in numbers.values())])
            lines += [*runs.markdown(cells), ""]
    return "\n".join(lines)


def save_comparison(out: Path, settings: dict, results: dict, started: float) -> None:
    """Writes results.json, table.md and comparison.png, and prints the table."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30  # of the GPU: engine and trainer
    else:  # of the process, in KiB on Linux; without the answer checker's 0.3 GiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results |= {"minutes": (time.perf_counter() - started) / 60, "peak_gib": peak}
    runs.write_json(out / "results.json", results)
    text = f"{runs.table(measured := [results | {'settings': settings}])}\n\n{explain(results)}"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    if any(score is not None for row in results["rows"] for score in row["values"]):  # there are labels
        plot(out / "comparison.png", measured)
    print(f"\n{text}\n\n{results['minutes']:.1f} minutes, peak memory {peak:.2f} GiB; {out}/ holds it all")


def evaluate(given: dict) -> None:
    """The command without a subcommand. Raises InputError."""
    started = time.perf_counter()
    adapter, names, sizes = (given.pop(name, None) for name in ("adapter", "aggregators", "sizes"))
    if adapter and "seed" in given:
        raise InputError("with --adapter the seed is the run's: leave --seed out")
    out, settings, _ = settle(given, adapter and runs.saved_settings(adapter))
    s = argparse.Namespace(**settings)
    sizes = sorted(set(sizes or [2**k for k in range(s.group_size.bit_length())]) | {s.group_size})
    if not 1 <= sizes[0] <= sizes[-1] <= s.group_size:
        raise InputError(f"--sizes are of parts of the {s.group_size} rollouts of --group-size: take them from 1 to that")
    names = names or [name for name in AGGREGATORS if name != "single" and (name != "majority" or s.reward == "match")]
    _, questions = load_questions(s)
    base, tokenizer = load_base(s.model)
    policy = saved_policy(base, adapter) if adapter else add_lora(base, s.lora_rank, s.seed)
    engine, judge = load_engine(s, policy, tokenizer, out.parent)  # verdicts are paid for once, also by a second try
    check_aggregators(s, engine, questions, names)
    if RANK == 0:
        runs.create(out, settings | {"evaluation": True})
    print(f"{len(questions)} questions, {s.group_size} rollouts each, in parts of {sizes}", flush=True)
    results = compare(s, questions, engine, judge, names, sizes, trained=adapter is not None)
    trained = {"adapter": str(adapter), "trained": runs.saved_settings(adapter)} if adapter else {}
    if RANK == 0:
        save_comparison(out, settings, results | trained, started)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__.split("\n")[0], EVALUATION)
    parser.add_argument("--adapter", type=Path, help="folder of a run: its settings, and its trained policy as well")
    parser.add_argument("--aggregators", nargs="+", choices=list(AGGREGATORS), help="which; default: all that suit the task")
    parser.add_argument("--sizes", nargs="+", type=int, help="rollouts that an aggregator gets; default: 1, 2, 4, ... and G")
    commands = parser.add_subparsers(dest="command", metavar="{table,show}")
    command = commands.add_parser("table", help="what runs and evaluations have measured, in one table")
    command.add_argument("runs", type=Path, nargs="+", help="their folders")
    command.add_argument("--against", help="the row that differences are taken to; default: the first")
    command.add_argument("--plot", type=Path, default=argparse.SUPPRESS, help="PNG to draw them in; default: none")
    command = commands.add_parser("show", help="a step of a run: questions, rollouts, references, rubrics, verdicts")
    command.add_argument("run", type=Path, help="the run's folder")
    command.add_argument("step", type=int, help="the step, from 0")
    given = vars(parser.parse_args(argv))
    try:
        if given.get("command") == "table":
            print(runs.table(measured := [runs.saved_results(run) for run in given["runs"]], given.get("against")))
            if "plot" in given:
                plot(given["plot"], measured)
        elif given.get("command") == "show":
            print(runs.show(given["run"], given["step"]))
        else:
            given.pop("command", None)
            evaluate(given)
    except (InputError, OSError) as error:  # OSError: --plot names a folder that is not there, say
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except (EngineError, JudgeError, RankError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        print(f"evaluate.py: stopped: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
