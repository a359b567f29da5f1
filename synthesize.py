"""Reference estimation: from the rollouts o_1..o_G of a question to ONE pseudo-reference s (paper, section 3).

The paper's aggregator is synthesis. The frozen anchor pi_0 reads the rollouts, not the question, and writes a new
answer that takes from each what is right. Selection can only return what some rollout already says; synthesis can be
right although every rollout is wrong, when they are wrong in different places.

The other aggregators are its baselines. `majority` is TTRL's pseudo-label; `self-bon`, `min-ppl` and
`mutual-predictability` select a rollout by what the anchor thinks of it; `single` is no aggregation at all.
"""

import argparse
import bisect
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from xml.sax.saxutils import escape

from rewards import boxed_answer, equal
from rollout import Engine, Messages, Rollout
from tasks import InputError, Question, gather, seed_of

# Ours: the paper's prompts were not published as text. The requirements were: no question, reconcile and do not
# vote, the final answer in \boxed{}. The model that --model tiny names was taught with this very text, so a changed
# prompt wants a new tiny model (tests/make_tiny.py).
SYNTHESIS_PROMPT = """Below are independent attempts at the same problem. Each may be wrong in a different place. \
Compare them step by step, keep what is right at every step, and write one complete solution in the same form. \
Do not mention the attempts. End with the final answer in \\boxed{}."""


# For open-ended questions: nothing to box, and nothing to vote on.
FREEFORM_PROMPT = """Below are independent responses to the same message, which you are not shown. Each may be wrong, \
incomplete or unclear in a different place. Where they contradict each other, keep what is best supported; put together \
what is right and useful in any of them; leave out what only one of them says without support. Write one complete \
response, in the same language, addressed to the same reader. Do not mention the responses."""

BEST_PROMPT = """Below are independent answers to the same message, numbered from 1. Each may be wrong in a different \
place. Compare them and answer with the number of the best one, and nothing else."""

ANOTHER_PROMPT = """Below are independent answers to the same message. Write one more, in the same form."""

CUT = "\n[... cut here ...]\n"


@dataclass(frozen=True)
class Reference:
    """The pseudo-reference s of one question: never a label, only what was made of its rollouts."""

    text: str
    ids: list[int] = field(default_factory=list)  # its tokens, as some model generated them; what CaT-SFT trains on
    finish_reason: str = "stop"  # "length": the anchor, or the rollout that was chosen, ran out of tokens
    tokens: int = 0  # generated for it, beyond the rollouts themselves
    cut: int = 0  # rollouts that the anchor saw cut, because all together were longer than its context


# ------------------------------------------------------------------------------------------------- the anchor


class Anchor:
    """The frozen anchor pi_0, as aggregators see it. `seed(n)` seeds its n-th call: asked again, it draws anew.

    `sampling` (temperature, max_new_tokens, ...) goes to engine.sample.
    """

    def __init__(self, engine: Engine, seed: Callable[[int], int], **sampling):
        self.engine, self.sampling = engine, sampling
        self.seeds = map(seed, itertools.count())

    def sample(self, prompts: Sequence[Messages], **changes) -> list[Rollout]:
        """One completion of each prompt; `changes` to the sampling."""
        drawn = self.engine.sample(prompts, 1, policy=False, seed=next(self.seeds), **self.sampling | changes)
        return [group[0] for group in drawn]

    def nll(self, prompts: Sequence[Messages], completions: Sequence[list[int]]) -> list[float]:
        """Mean negative log-probability a token (nats) of completions[i] after prompts[i]: the log of its perplexity."""
        scores = self.engine.score(prompts, completions, policy=False)
        return [-sum(logprobs) / len(logprobs) for logprobs in scores]

    def shown(self, texts: Sequence[str], prompt: Callable, new_tokens: int | None = None) -> tuple[Messages, int]:
        """`prompt(texts)`, with room for `new_tokens` (default: max_new_tokens) in the context, and how many texts it cuts.

        Texts that do not fit are cut in the middle, evenly: to the greatest length in tokens that all of them can have,
        marker included. Shorter ones stay whole. The middle goes first because a solution states its problem at the start
        and its answer at the end. check_aggregators has made sure that markers alone fit.
        """
        room = self.engine.context - (self.sampling["max_new_tokens"] if new_tokens is None else new_tokens)
        if len(self.engine.encode(prompt(texts))) <= room:
            return prompt(texts), 0
        decode = partial(self.engine.tokenizer.decode, skip_special_tokens=True)
        *encoded, marker = [self.engine.tokenizer.encode(text, add_special_tokens=False) for text in [*texts, CUT]]

        def at_most(limit: int) -> list[str]:  # a text that is shorter than the marker would only grow
            kept = limit - len(marker)
            return [
                text if len(ids) <= limit else decode(ids[: kept // 2]) + CUT + decode(ids[len(ids) - (kept + 1) // 2 :])
                for text, ids in zip(texts, encoded, strict=True)
            ]

        def too_long(limit: int) -> bool:
            return len(self.engine.encode(prompt(at_most(limit)))) > room

        first = bisect.bisect_left(range(len(marker) + 1, max(map(len, encoded))), True, key=too_long)
        limit = len(marker) + first  # the last that is not too long
        return prompt(at_most(limit)), sum(len(ids) > limit for ids in encoded)


# ------------------------------------------------------------------------------------------------- the prompts


def show(instruction: str, attempts: Sequence[str], boxed: bool, question: str = "", numbered: bool = False) -> Messages:
    """A chat: the instruction, the question if it is to be seen, then every attempt between tags."""
    # Mathematics is full of < and &, and goes in as it stands. Free text is escaped, so that no response can close its
    # tag and pass for several, or for us.
    as_data, tag = ((lambda text: text), "attempt") if boxed else (escape, "response")
    blocks = [instruction, *([f"<question>\n{as_data(question)}\n</question>"] if question else [])]
    for n, text in enumerate(attempts, start=1):
        blocks.append(f"<{tag}{f' {n}' if numbered else ''}>\n{as_data(text)}\n</{tag}>")
    return [{"role": "user", "content": "\n\n".join(blocks)}]


def synthesis_messages(attempts: Sequence[str], boxed: bool = True, question: str = "") -> Messages:
    """What asks the anchor for s. Without `question`, as in the paper, q is not in it."""
    return show(SYNTHESIS_PROMPT if boxed else FREEFORM_PROMPT, attempts, boxed, question)


def best_messages(attempts: Sequence[str], boxed: bool = True) -> Messages:
    """What asks the anchor for the number of the best attempt."""
    return show(BEST_PROMPT, attempts, boxed, numbered=True)


def texts(group: Sequence[Rollout]) -> list[str]:
    return [o.text for o in group]


# ------------------------------------------------------------------------------------------------- the aggregators


def synthesis(questions, groups, anchor: Anchor, boxed: bool = True, with_question: bool = False) -> list[Reference]:
    """s is a new text by the anchor. `with_question`: it sees q as well (paper, ablation: +0.004 on MATH-500).

    The anchor is sampled like the rollouts are, at their temperature: then the comparison of s with a rollout
    shows what reading the others was worth, and not what a lower temperature was worth.
    """
    asked = [
        anchor.shown(
            texts(group), partial(synthesis_messages, boxed=boxed, question=q.conversation if with_question else "")
        )
        for q, group in zip(questions, groups, strict=True)
    ]
    written = anchor.sample([messages for messages, _ in asked])
    return [Reference(w.text, w.ids, w.finish_reason, len(w.ids), cut) for w, (_, cut) in zip(written, asked, strict=True)]


def answer_classes(group: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts that have a final answer, by its meaning (rewards.equal, not the string), in order of appearance."""
    classes: list[list[Rollout]] = []
    for o in group:
        answer = boxed_answer(o.text)
        same = next((c for c in classes if equal(boxed_answer(c[0].text), answer)), None)
        if same is not None:
            same.append(o)
        elif answer is not None:
            classes.append([o])
    return classes


def chosen(o: Rollout, tokens: int = 0, cut: int = 0) -> Reference:
    """A rollout as the reference."""
    return Reference(o.text, o.ids, o.finish_reason, tokens, cut)


def majority(questions, groups, anchor: Anchor | None = None, boxed: bool = True) -> list[Reference]:
    """s is the first rollout that has the most common final answer (TTRL).

    The first class of answers to appear wins a tie. Rollouts without an answer do not vote; if none has one, s is
    empty, and an empty reference rewards nobody.
    """
    # max returns the first of equals
    return [chosen(max(classes, key=len)[0]) if (classes := answer_classes(g)) else Reference("") for g in groups]


def self_bon(questions, groups, anchor: Anchor, boxed: bool = True) -> list[Reference]:
    """s is the rollout whose number the anchor names when it is shown all of them (Self-BoN, best of N by the model itself).

    Greedy: the number is to be its best guess. An answer that is no number of a rollout leaves s empty.
    """
    asked = [anchor.shown(texts(group), partial(best_messages, boxed=boxed), 8) for group in groups]
    numbers = [str(n + 1) for n in range(max(map(len, groups)))]
    named = anchor.sample([messages for messages, _ in asked], temperature=0, max_new_tokens=8, choices=numbers)
    return [
        chosen(group[int(w.text) - 1], len(w.ids), cut)
        if w.text in numbers[: len(group)]
        else Reference("", tokens=len(w.ids), cut=cut)
        for group, w, (_, cut) in zip(groups, named, asked, strict=True)
    ]


def lowest_perplexity(groups, nlls: Sequence[float], cuts: Sequence[int]) -> list[Reference]:
    """Of each group the rollout with the lowest of `nlls`, which has one number a rollout; the first of equals."""
    references, start = [], 0
    for group, cut in zip(groups, cuts, strict=True):
        own = nlls[start : start + len(group)]
        references.append(chosen(group[own.index(min(own))], cut=cut))
        start += len(group)
    return references


def min_perplexity(questions, groups, anchor: Anchor, boxed: bool = True) -> list[Reference]:
    """s is the rollout with the lowest perplexity given q, under the anchor and at temperature 1."""
    pairs = [(q.messages, o.ids) for q, group in zip(questions, groups, strict=True) for o in group]
    return lowest_perplexity(groups, anchor.nll(*zip(*pairs, strict=True)), [0] * len(groups))


def mutual_predictability(questions, groups, anchor: Anchor, boxed: bool = True) -> list[Reference]:
    """s is the rollout that the others predict best: each comes last after the others in random order, and the one
    with the lowest perplexity there is kept."""
    order, prompt = random.Random(next(anchor.seeds)), partial(show, ANOTHER_PROMPT, boxed=boxed)
    pairs, cuts = [], []
    for group in groups:
        cuts.append(0)
        for i, o in enumerate(group):
            others = order.sample([*group[:i], *group[i + 1 :]], len(group) - 1)
            messages, cut = anchor.shown(texts(others), prompt, len(o.ids) + 1)  # 1: vLLM wants to generate one token
            pairs.append((messages, o.ids))
            cuts[-1] = max(cuts[-1], cut)
    return lowest_perplexity(groups, anchor.nll(*zip(*pairs, strict=True)), cuts)


def single(questions, groups, anchor: Anchor | None = None, boxed: bool = True) -> list[Reference]:
    """s is the first rollout: the control that shows what aggregation adds, and how a loop feeds on its own errors."""
    return [chosen(group[0]) for group in groups]


def style(written: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means per text of what the paper counts in texts (how syntheses differ from rollouts)."""
    flat = [text for row in written for text in row]
    patterns = {"words": r"\S+", "lines": r"[^\n]+", "equations": r"="}
    patterns |= {"step words": r"(?i)\b(?:step|first|second|third|next|then|finally)\b"}
    patterns |= {"verification words": r"(?i)\b(?:check|verif\w+|confirm\w*|indeed|correct\w*|double-check)\b"}
    return {name: sum(len(re.findall(p, text)) for text in flat) / len(flat) for name, p in patterns.items()}


# --aggregator NAME. An aggregator is any function (questions, groups, anchor, boxed) -> references; add yours here.
# `questions` Q, `groups` Q x G rollouts, `boxed`: whether rollouts end with an answer in \boxed{}, and so shall s.
AGGREGATORS: dict[str, Callable[[Sequence[Question], Sequence, Anchor, bool], list[Reference]]] = {
    "synthesis": synthesis,
    "synthesis-question": partial(synthesis, with_question=True),
    "majority": majority,
    "self-bon": self_bon,
    "min-ppl": min_perplexity,
    "mutual-predictability": mutual_predictability,
    "single": single,
}


# ------------------------------------------------------------------------------------------------- in a run


def check_aggregators(s: argparse.Namespace, engine, questions: list, aggregators: list[str]) -> None:
    """Refuse before the first step what would fail, or not fit the context, in the middle of a run. Raises InputError.

    Rollouts are cut to fit the anchor's context (Anchor.shown); what cannot be cut is a question, the frame around
    the rollouts, and what is to be written.
    """
    cut, boxed = [CUT] * s.group_size, s.reward == "match"
    if "majority" in aggregators and not boxed:
        raise InputError("the aggregator majority counts boxed answers, which only --reward match asks for: take another")
    seen = {q.conversation for q in questions} if "synthesis-question" in aggregators else {""}
    frames = [synthesis_messages(cut, boxed, question) for question in seen] + [best_messages(cut, boxed)]
    longest = max(len(engine.encode(messages)) for messages in [*frames, *(q.messages for q in questions)])
    if longest + s.max_new_tokens >= engine.context:  # one token of room, because scoring with vLLM generates one
        raise InputError(
            f"a question, or the frame around {s.group_size} rollouts, has {longest} tokens; with --max-new-tokens "
            f"{s.max_new_tokens} the context of {s.model}, {engine.context}, is too short: lower it or --group-size"
        )


def explore_with_anchor(s: argparse.Namespace, where, batch: list, engine, sampling: dict) -> tuple[list, list, list]:
    """(groups, references, targets) from pi_0 alone. Targets: (the chat of q, its reference as a rollout), but for
    references that were cut off, or should end with an answer and do not: nobody should imitate those."""
    seed = seed_of(s.seed, where, "rollouts")
    groups = engine.sample([q.messages for q in batch], s.group_size, policy=False, seed=seed, **sampling)
    anchor = Anchor(engine, partial(seed_of, s.seed, where, "anchor"), **sampling)
    boxed, targets = s.reward == "match", []
    references = gather(AGGREGATORS[s.aggregator](batch, groups, anchor, boxed))[0]  # of rank 0, as in train.cat_step
    for q, group, r in zip(batch, groups, references, strict=True):
        if r.ids and r.finish_reason == "stop" and not (boxed and boxed_answer(r.text) is None):
            targets.append((q.messages, Rollout(r.text, r.ids, [0.0] * len(r.ids), r.finish_reason, group[0].prompt_ids)))
    return groups, references, targets
