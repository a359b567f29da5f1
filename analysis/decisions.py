"""One logged question in words: who says what, who is right, which line is whose.

A question is a line of rollouts.jsonl, as a dict. Rollouts are numbered from 1, as people do.
"""

import re
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from grpo import advantages
from plumbing.answers import boxed_answer, equal
from synthesize import answer_classes

LIKE = 0.5  # two lines with the same numbers and this share of words in common are alike
# What can become of the vote, and of the anchor that may leave it. "good" and "bad" are for colour.
HEADLINES = {
    "right": ("good", "Right to leave the majority"),
    "wrong": ("bad", "Wrong to leave the majority"),
    "neither": ("bad", "Left the majority, and both are wrong"),
    "left": ("", "Left the majority"),
    "both right": ("good", "With the majority, and right"),
    "both wrong": ("bad", "With the majority, and both are wrong"),
    "with": ("", "With the majority"),
    "silent": ("bad", "The reference has no answer"),
    "no vote": ("", "No rollout has an answer"),
}


# ---------------------------------------------------------------------------------------- the vote


def vote(row: dict) -> dict:
    """The final answers of a question: who gives them, and what that makes of the reference.

    "options" holds one entry per answer, the most frequent first: {answer, rollouts, right,
    reference}. The first option is the majority, as in synthesize.majority: of equally frequent
    ones, the first to appear. "right" is None without a label.
    """
    group = [SimpleNamespace(text=text, number=n) for n, text in enumerate(row["rollouts"], 1)]
    classes = sorted(answer_classes(group), key=len, reverse=True)
    truth, answer = row.get("answer"), boxed_answer(row["reference"])
    options = [(boxed_answer(c[0].text), [o.number for o in c]) for c in classes]
    if answer and not any(equal(answer, found) for found, _ in options):
        options.append((answer, []))
    options = [
        {
            "answer": found,
            "rollouts": numbers,
            "right": None if truth is None else equal(found, truth),
            "reference": equal(found, answer),
        }
        for found, numbers in options
    ]
    majority = options[0] if classes else None
    said = next((option for option in options if option["reference"]), None)
    silent = [o.number for o in group if boxed_answer(o.text) is None]
    known = truth is not None
    return {
        "options": options,
        "majority": majority,
        "reference": said,
        "silent": silent,
        "truth": truth,
        "kind": kind_of(majority, said),
        "differs": majority is not None and majority is not said,
        "hopeless": known and not any(o["right"] and o["rollouts"] for o in options),
        "wrong": known and not (said and said["right"]),
    }


def kind_of(majority: dict | None, said: dict | None) -> str:
    """A key of HEADLINES, from two options of a vote."""
    if said is None:
        return "silent"
    if majority is None:
        return "no vote"
    if said is majority:
        return {True: "both right", False: "both wrong", None: "with"}[said["right"]]
    if said["right"] is None:
        return "left"
    return "right" if said["right"] else "wrong" if majority["right"] else "neither"


def told(found: dict, size: int) -> str:
    """A vote in sentences."""
    majority, said, truth = found["majority"], found["reference"], found["truth"]
    parts = []
    if majority:
        count = len(majority["rollouts"])
        ties = sum(len(option["rollouts"]) == count for option in found["options"])
        tie = f", the first of {ties} answers with as many" if ties > 1 else ""
        parts.append(f"The majority ({count} of {size}{tie}) says {majority['answer']}.")
    if said is None:
        parts.append("The reference has no answer in a box, so it rewards nobody.")
    elif said is majority:
        parts = [f"Reference and majority ({len(said['rollouts'])} of {size}) say {said['answer']}"]
        parts[0] += {True: ", and that is true.", False: ".", None: "."}[said["right"]]
    else:
        others = len(said["rollouts"])
        who = f"{others} of {size} rollouts" if others else "none of the rollouts"
        true = ", and that is true" if said["right"] else ""
        parts.append(f"The reference says {said['answer']}{true}; {who} said so.")
    if truth is not None and not (said and said["right"]):
        solved = next((len(o["rollouts"]) for o in found["options"] if o["right"]), 0)
        parts.append(f"True is {truth}, which {solved or 'none'} of {size} rollouts found.")
    return " ".join(parts)


# --------------------------------------------------------------------------------------- the lines


def plain(line: str) -> str:
    """A line without what does not change it: spacing and bold type."""
    return " ".join(line.replace("**", "").split())


def features(line: str) -> tuple[frozenset, frozenset]:
    """(numbers, other words) of a line."""
    words = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", line.casefold())
    numbers = frozenset(word for word in words if word[0].isdigit())
    return numbers, frozenset(words) - numbers


def sources(lines: Sequence[str], others: Sequence[str]) -> list[str]:
    """For each line whether `others` has it: "same", "alike", "new", or "" if it says nothing.

    Nothing is said without a letter or a digit. Alike: some other line has the same numbers, and at
    least LIKE of the words of both together.
    """
    exact, by_numbers = {plain(line) for line in others}, {}
    for line in others:
        numbers, words = features(line)
        by_numbers.setdefault(numbers, []).append(words)

    def source(line: str) -> str:
        if not any(map(str.isalnum, line)):
            return ""
        if plain(line) in exact:
            return "same"
        numbers, words = features(line)
        near = (len(words & w) / len(words | w) for w in by_numbers.get(numbers, ()) if words)
        return "alike" if any(share >= LIKE for share in near) else "new"

    return [source(line) for line in lines]


def marked(row: dict) -> tuple[list, list[list]]:
    """(the reference's lines, each rollout's lines), marked by who shares them.

    A line of the reference is (text, [of each rollout, whether it has the line: "same", ...]); a
    line of a rollout is (text, whether the reference has it).
    """
    reference = row["reference"].split("\n")
    rollouts = [text.split("\n") for text in row["rollouts"]]
    taken = [sources(reference, lines) for lines in rollouts]  # (G, lines)
    return (
        [(line, [marks[i] for marks in taken]) for i, line in enumerate(reference)],
        [list(zip(lines, sources(lines, reference), strict=True)) for lines in rollouts],
    )


def parting(row: dict, found: dict) -> str:
    """Where the reference leaves the majority, in a sentence; "" where that cannot be said."""
    if not found["differs"] or not found["reference"]:
        return ""
    first = found["majority"]["rollouts"][0]
    for line, marks in marked(row)[0]:
        if marks[first - 1] == "new":
            who = [n for n, mark in enumerate(marks, 1) if mark in ("same", "alike")]
            whose = f"which is also in {listed(who)}" if who else "which is in no rollout"
            where = f"It first leaves rollout {first}, of the majority, at"
            return f"{where} “{shortened(line.strip())}”, {whose}."
    return ""


def listed(numbers: Sequence[int]) -> str:
    """
    >>> listed([2]), listed([2, 5, 7])
    ('rollout 2', 'rollouts 2, 5 and 7')
    """
    *most, last = map(str, numbers)
    return f"rollouts {', '.join(most)} and {last}" if most else f"rollout {last}"


# ------------------------------------------------------------------------------------- the rewards


def pushes(rewards: Sequence[float | None]) -> list[float]:
    """The advantages of a question's rollouts, from its logged rewards; 0 if one is not known."""
    known = [float("nan") if reward is None else reward for reward in rewards]
    return advantages(torch.tensor([known]))[0].tolist()


def consequence(row: dict, A: Sequence[float], found: dict | None) -> str:
    """What the update does with a question, in sentences."""
    if all(reward is None for reward in row["rewards"]):
        return "No rollout is rewarded."
    if not any(A):
        known = None not in row["rewards"]
        why = "All rewards are equal" if known else "One of the rewards is not known"
        return f"{why}: every advantage is 0, and the question teaches nothing."
    up = [n for n, a in enumerate(A, 1) if a > 0]
    down = [n for n, a in enumerate(A, 1) if a < 0]
    text = f"The update makes {listed(up)} likelier and {listed(down)} less likely."
    if not found or found["truth"] is None:
        return text
    right = {n for option in found["options"] if option["right"] for n in option["rollouts"]}
    if lost := sorted(right & set(down)):
        return f"{text} That is the wrong lesson: {listed(lost)} had the true answer."
    lesson = "the right lesson" if right >= set(up) else "a wrong lesson: their answer is not true"
    return f"{text} That is {lesson}."


def criteria(row: dict) -> list[dict]:
    """The rubric: {text, points, cells: [(verdict, the judge's words) of each rollout], flat}.

    A flat criterion has the same known verdict for all rollouts: it separates nobody.
    """
    points, found = row.get("points") or [None] * len(row["rubric"]), []
    for k, text in enumerate(row["rubric"]):
        cells = [(v[k], raw[k]) for v, raw in zip(row["verdicts"], row["judge"], strict=True)]
        flat = len({verdict for verdict, _ in cells}) == 1
        found.append({"text": text, "points": points[k], "cells": cells, "flat": flat})
    return found


def compared(row: dict, rubric: Sequence[dict]) -> str:
    """What the rubric makes of the best and of the worst rollout, in sentences."""
    known = [(reward, n) for n, reward in enumerate(row["rewards"]) if reward is not None]
    apart = sum(not criterion["flat"] for criterion in rubric)
    text = f"{apart} of {len(rubric)} criteria tell the rollouts apart."
    if not known or max(known)[0] == min(known)[0]:
        return text
    (most, best), (least, worst) = max(known), min(known)
    better = [c["text"] for c in rubric if c["cells"][best][0] and c["cells"][worst][0] is False]
    ends = f"Rollout {best + 1} ({most:.2f}) is ahead of rollout {worst + 1} ({least:.2f})"
    why = ", ".join(f"“{shortened(criterion.rstrip('.'))}”" for criterion in better[:4])
    return f"{text} {ends}, which does not meet: {why}." if better else f"{text} {ends}."


def shortened(text: str, width: int = 90) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
