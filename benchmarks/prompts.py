"""Which prompts are best? All that candidates.py holds, on the same saved texts.

    python benchmarks/prompts.py synthesis --data FILE... --out FOLDER --url URL --model NAME
    python benchmarks/prompts.py freeform --data HEALTHBENCH --out FOLDER2 --url URL --model NAME
    python benchmarks/prompts.py rubric --out FOLDER2 --url URL --model NAME
    python benchmarks/prompts.py judge --out FOLDER2 --url URL --model NAME

The model is behind any server that speaks the OpenAI protocol. Each text is saved at once, so that
the same command goes on after an interruption. If nothing is missing it prints its table without a
server.

`synthesis` answers --problems problems of every file G times. Then every prompt makes a synthesis
of these rollouts. Its table:

    accuracy     of s, and of one answer and the majority of the same rollouts
    differs      questions where s has another answer than the majority; who is right there
    hopeless     questions that no rollout solves, and how many of these s does
    boxed        share of syntheses that end with an answer
    words        of a synthesis, as a share of a rollout's
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from asking import Saved, fill
from candidates import FREEFORM, JUDGE, RUBRIC, SYNTHESIS, judge_chat, rubric_chat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.statistics import interval
from analysis.tables import markdown
from evaluate import correct, mechanism
from plumbing.answers import boxed_answer
from plumbing.data import read_jsonl
from plumbing.errors import InputError, exit_status
from rollout import Rollout
from rubrics import MIN_CRITERIA, parse_rubric, verdict
from synthesize import majority
from tasks import Question, ask, load_healthbench

# --------------------------------------------------------------------------------------- synthesis


def problems(args) -> dict[tuple, Question]:
    """{(file, row): question}, --problems of each file, drawn with seed 0. Raises InputError."""
    found = []
    for path in args.data:
        name = "problem" if path.stem.startswith("math500") else "prompt"
        rows = read_jsonl(path, name)
        fit = [i for i, row in enumerate(rows) if row.get("level", 1) <= args.max_level]
        random.Random(0).shuffle(fit)  # the first 20 of 60 are those of 20
        made = [(i, Question(ask(rows[i][name]), str(rows[i]["answer"]))) for i in fit]
        found.append([((path.stem, i), q) for i, q in made[: args.problems]])
    # One of each file in turn, so that what there is after an interruption is a fair part.
    return {k: q for turn in zip_longest(*found) for k, q in filter(None, turn)}


def synthesis(args) -> None:
    """The command `synthesis`."""
    questions, g = problems(args), range(args.group_size)
    saved = Saved(args.out / "rollouts.jsonl")
    chains = [[((*k, n), q.messages) for n in g] for k, q in questions.items()]
    fill(args, saved, chains, "rollouts")
    rollouts = {k: [saved.texts[*k, n] for n in g] for k in questions}
    written, prompts = Saved(args.out / "syntheses.jsonl"), {n: SYNTHESIS[n] for n in args.prompts}
    chains = [
        [((n, *k), p.chat(rollouts[k], q.conversation)) for n, p in prompts.items()]
        for k, q in questions.items()
    ]
    fill(args, written, chains, "syntheses")
    print(table(questions, rollouts, written.texts, args.prompts))


def as_rollouts(texts: Sequence[str]) -> list[Rollout]:
    return [Rollout(text, [], [], "stop", []) for text in texts]


def table(questions: dict, rollouts: dict, written: dict, names: Sequence[str]) -> str:
    """Markdown. Differences are paired with the majority, and with the first of `names`."""
    keys, asked = list(questions), list(questions.values())
    groups = [as_rollouts(rollouts[k]) for k in keys]
    files = list(dict.fromkeys(file for file, _ in keys))
    right = correct(asked, [rollouts[k] for k in keys]).numpy()  # (Q, G)
    vote, length = majority(asked, groups), words([rollouts[k] for k in keys])
    voted = correct(asked, [[s.text] for s in vote]).numpy()[:, 0]  # (Q,)

    def cells(values: np.ndarray) -> list[str]:
        """Accuracy on each file and on all, and minus the majority's."""
        each = [values[[k[0] == f for k in keys]].mean() for f in files]
        i, d = interval(values), interval(values - voted)
        return [*(f"{v:.2f}" for v in each), f"{i['mean']:.3f} ± {i['error']:.3f}", signed(d)]

    head = ["", *files, "all", "minus majority", f"minus {names[0]}"]
    rows = [[*head, "differs", "s, majority right", "hopeless", "s right", "boxed", "words"]]
    rows += [
        [name, *cells(values), *[""] * 7]
        for name, values in (
            ("one answer", right.mean(axis=1)),
            ("majority", voted),
            ("some rollout", right.max(axis=1)),
        )
    ]
    first = None
    for name in names:
        texts = [written[name, *k] for k in keys]
        s = correct(asked, [[text] for text in texts]).numpy()[:, 0]
        first = s if first is None else first
        m = mechanism(asked, groups, as_rollouts(texts), vote)
        boxed = np.mean([boxed_answer(text) is not None for text in texts])
        share = words([[text] for text in texts]) / length
        versus = "" if s is first else signed(interval(s - first))
        who = f"{m['differs_right']}, {m['other_right']}"
        numbers = [f"{m['differs']}", who, f"{m['hopeless']}", f"{m['hopeless_right']}"]
        rows.append([name, *cells(s), versus, *numbers, f"{boxed:.2f}", f"{share:.2f}"])
    what = f"{len(keys)} problems, {len(groups[0])} rollouts of {length:.0f} words each"
    return "\n".join([what, "", *markdown(rows)])


def words(rows: Sequence[Sequence[str]]) -> float:
    """The mean number of words of a text."""
    return float(np.mean([len(text.split()) for row in rows for text in row]))


def signed(i: dict) -> str:
    return f"{i['mean']:+.3f} ({i['low']:+.3f} to {i['high']:+.3f})"


# ------------------------------------------------------------------- open-ended answers, rubrics


def freeform(args) -> None:
    """The command `freeform`: references of HealthBench's rows, to be read by a person."""
    train, test = load_healthbench(args.data[0])
    questions, g = [*train, *test], range(args.group_size)
    saved, written = Saved(args.out / "rollouts.jsonl"), Saved(args.out / "freeform.jsonl")
    fill(args, saved, [[((q.id, n), q.messages) for n in g] for q in questions], "rollouts")
    rollouts = {q.id: [saved.texts[q.id, n] for n in g] for q in questions}
    chains = [
        [((n, q.id), FREEFORM[n].chat(rollouts[q.id], "", boxed=False)) for n in FREEFORM]
        for q in questions
    ]
    fill(args, written, chains, "references")
    length, rows = words(list(rollouts.values())), [["", "words", "of a rollout's", "shortest"]]
    for n in FREEFORM:
        texts = {q.id: written.texts[n, q.id] for q in questions}
        shares = [words([[text]]) / words([rollouts[i]]) for i, text in texts.items()]
        mean = words([texts.values()])
        rows.append([n, f"{mean:.0f}", f"{mean / length:.2f}", f"{min(shares):.2f}"])
    what = f"{len(questions)} questions, {len(g)} rollouts of {length:.0f} words each"
    print("\n".join([what, "", *markdown(rows)]))


def rubric(args) -> None:
    """The command `rubric`: criteria from what `freeform` wrote, to be read by a person."""
    references = Saved(args.out / "freeform.jsonl").texts
    references = {i: text for (name, i), text in references.items() if name == args.reference}
    if not references:
        raise InputError(f"{args.out} holds no references: run `prompts.py freeform` with --out")
    written = Saved(args.out / "rubrics.jsonl")
    chains = [[((n, i), rubric_chat(n, s)) for n in RUBRIC] for i, s in references.items()]
    fill(args, written, chains, "rubrics")
    rows = [["", "5 criteria or more", "none", "criteria", "words of a criterion"]]
    for n in RUBRIC:
        parsed = [parse_rubric(written.texts[n, i]) for i in references]
        counts, flat = list(map(len, parsed)), [c for criteria in parsed for c in criteria]
        enough = sum(k >= MIN_CRITERIA for k in counts)
        shares = [f"{enough} of {len(counts)}", f"{counts.count(0)}", f"{np.mean(counts):.1f}"]
        rows.append([n, *shares, f"{words([flat]):.0f}"])
        drawn = random.Random(0).sample(flat, min(60, len(flat)))
        (args.out / f"criteria_{n}.txt").write_text("\n".join(drawn) + "\n", encoding="utf-8")
    print("\n".join([f"{len(references)} references", "", *markdown(rows)]))
    print(f"\n{args.out}/criteria_*.txt: 60 of each, drawn at random, to be read")


# ------------------------------------------------------------------------------------------ judges


def judge(args) -> None:
    """The command `judge`: verdicts against an answer key that was written by hand."""
    lines = (Path(__file__).parent / "judge_key.jsonl").read_text(encoding="utf-8").splitlines()
    key = [(r["response"], c) for r in map(json.loads, lines) for c in r["criteria"]]
    written = Saved(args.out / "verdicts.jsonl")
    chains = [
        [((n, i), judge_chat(n, c["text"], text))] for n in JUDGE for i, (text, c) in enumerate(key)
    ]
    fill(args, written, chains, "verdicts", temperature=0, max_tokens=8)
    met = np.array([c["met"] for _, c in key])
    kinds = ("plain", "negative", "injection")
    rows = [["", "agrees", "where met", "where not", *kinds, "yes", "unreadable"]]
    for n in JUDGE:
        verdicts = [verdict(written.texts[n, i]) for i in range(len(key))]
        agrees = np.array([v == m for v, m in zip(verdicts, met, strict=True)])
        parts = [met, ~met, *(np.array([c["kind"] == k for _, c in key]) for k in kinds)]
        i = interval(agrees)
        cells = [f"{i['mean']:.2f} ({i['low']:.2f} to {i['high']:.2f})"]
        cells += [f"{agrees[part].sum()} of {part.sum()}" for part in parts]
        yes, unknown = (sum(v is wanted for v in verdicts) for wanted in (True, None))
        rows.append([n, *cells, f"{yes / len(key):.2f}", f"{unknown}"])
    print("\n".join([f"{len(key)} pairs of a response and a criterion", "", *markdown(rows)]))


# ------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=shown)
    commands = parser.add_subparsers(required=True)
    for work in (synthesis, freeform, rubric, judge):
        about = work.__doc__.split("\n")[0]
        command = commands.add_parser(work.__name__, help=about, formatter_class=shown)
        command.set_defaults(work=work)
        add = command.add_argument
        add("--out", type=Path, required=True, help="folder of all that is written")
        add("--url", default="http://localhost:8080/v1", help="server of the OpenAI protocol")
        add("--model", default="default", help="the server's name of the model")
        add("--concurrency", type=int, default=16, help="calls at a time")
        add("--temperature", type=float, default=0.7, help="of rollouts and of what reads them")
        add("--max-new-tokens", type=int, default=400, help="of each text")
        if work in (synthesis, freeform):
            add("--data", type=Path, nargs="+", required=True, help="JSONL files of questions")
            add("--group-size", type=int, default=8, help="rollouts a problem, G")
        if work is synthesis:
            add("--problems", type=int, default=60, help="of each file")
            add("--max-level", type=int, default=2, help="of problems that have a level")
            add("--prompts", nargs="+", choices=list(SYNTHESIS), default=list(SYNTHESIS))
        if work is rubric:
            add("--reference", choices=list(FREEFORM), default="first", help="whose references")
    args = parser.parse_args(argv)
    return exit_status("prompts.py", lambda: args.work(args), lambda: "")


if __name__ == "__main__":
    sys.exit(main())
