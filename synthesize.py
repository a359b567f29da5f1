"""Reference estimation: from the rollouts o_1..o_G of a question to ONE pseudo-reference s.

    s ~ pi_0( . | o_1, ..., o_G)                                        (paper, section 3)

The paper's aggregator is synthesis. The frozen anchor pi_0 reads the rollouts, not the question,
and writes a new answer that takes from each what is right. Selection can only return what some
rollout already says. Synthesis can be right although every rollout is wrong, when they are wrong
in different places.

The other aggregators are its baselines: `majority` is TTRL's pseudo-label; `self-bon`, `min-ppl`
and `mutual-predictability` select a rollout by what the anchor thinks of it; `single` is no
aggregation at all. All of them are in the table AGGREGATORS at the end. Add yours there.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from xml.sax.saxutils import escape

from plumbing.answers import boxed_answer, equal
from plumbing.context import fit
from plumbing.draws import seed_of
from rollout import Engine, Messages, Rollout, Sampling
from tasks import Question

# The prompts are ours: the paper's were not published as text. This one must show no question, ask
# to reconcile and not to vote, and get the answer in \boxed{}. The default model, models/tiny, was
# taught with this very text. If you change it, teach a new one (tests/make_tiny.py).
SYNTHESIS_PROMPT = """Below are independent attempts at the same problem. Each may be wrong in a \
different place. Compare them step by step, keep what is right at every step, and write one \
complete solution in the same form. Do not mention the attempts. End with the final answer in \
\\boxed{}."""

# For open-ended questions: nothing to box, and nothing to vote on.
FREEFORM_PROMPT = """Below are independent responses to the same message, which you are not shown. \
Each may be wrong, incomplete or unclear in a different place. Where they contradict each other, \
keep what is best supported; put together what is right and useful in any of them; leave out what \
only one of them says without support. Write one complete response, in the same language, \
addressed to the same reader. Do not mention the responses."""

BEST_PROMPT = """Below are independent answers to the same message, numbered from 1. Each may be \
wrong in a different place. Compare them and answer with the number of the best one, and nothing \
else."""

ANOTHER_PROMPT = """Below are independent answers to the same message. Write one more, in the same \
form."""


@dataclass(frozen=True)
class Reference:
    """The pseudo-reference s of one question: never a label, only what its rollouts became."""

    text: str
    ids: list[int] = field(default_factory=list)  # its tokens, as some model generated them
    finish_reason: str = "stop"  # "length": it, or the rollout that was chosen, was cut off
    tokens: int = 0  # generated for it, beyond the rollouts themselves
    cut: int = 0  # rollouts that were cut, so that all fit the anchor's context


class Anchor:
    """The frozen anchor pi_0, as aggregators and rewards ask it.

    It samples with the rollouts' own settings. So where s is better than a rollout, that comes from
    reading the others, not from a lower temperature. `seed` names a place in the run, like
    (0, step, "anchor"); each call of `sample` derives the next seed from it.
    """

    def __init__(self, engine: Engine, sampling: Sampling, seed: tuple):
        self.engine, self.sampling = engine, sampling
        self.seeds = (seed_of(*seed, call) for call in itertools.count())

    def sample(self, prompts: Sequence[Messages], choices=(), **changes) -> list[Rollout]:
        """One completion of each prompt; `changes` to the sampling, like temperature=0."""
        options = {"policy": False, "seed": next(self.seeds), "choices": choices}
        drawn = self.engine.sample(prompts, 1, replace(self.sampling, **changes), **options)
        return [group[0] for group in drawn]

    def nll(self, prompts: Sequence[Messages], completions: Sequence[list[int]]) -> list[float]:
        """Mean -log pi_0 per token of completions[i] after prompts[i], nats: its log-perplexity."""
        scores = self.engine.score(prompts, completions, policy=False)
        return [-sum(logprobs) / len(logprobs) for logprobs in scores]

    def shown(self, texts: Sequence[str], prompt: Callable, new_tokens: int | None = None):
        """(`prompt(texts)`, how many texts were cut so that it fits with an answer).

        `new_tokens` is the room for the answer; default: max_new_tokens.
        """
        new_tokens = self.sampling.max_new_tokens if new_tokens is None else new_tokens
        return fit(self.engine, texts, prompt, new_tokens)


# ------------------------------------------------------------------------------------- the prompts


def show(instruction: str, attempts: Sequence[str], boxed=True, question="", numbered=False):
    """A chat: the instruction, the question if it is to be seen, every attempt between tags.

    Mathematics (`boxed`) is full of < and &, and goes in as it stands. Free text is escaped, so
    that no response can close its tag and pass for several, or for us.
    """
    as_data, tag = ((lambda text: text), "attempt") if boxed else (escape, "response")
    blocks = [instruction]
    if question:
        blocks.append(f"<question>\n{as_data(question)}\n</question>")
    for n, text in enumerate(attempts, start=1):
        blocks.append(f"<{tag}{f' {n}' if numbered else ''}>\n{as_data(text)}\n</{tag}>")
    return [{"role": "user", "content": "\n\n".join(blocks)}]


def synthesis_messages(attempts: Sequence[str], boxed: bool = True, question: str = "") -> Messages:
    """What asks the anchor for s. Without `question`, as in the paper, q is not in it."""
    return show(SYNTHESIS_PROMPT if boxed else FREEFORM_PROMPT, attempts, boxed, question)


# What asks the anchor for the number of the best attempt.
best_messages = partial(show, BEST_PROMPT, numbered=True)


def texts(group: Sequence[Rollout]) -> list[str]:
    return [o.text for o in group]


# --------------------------------------------------------------------------------- the aggregators
# Each takes Q questions, their Q groups of G rollouts and the anchor, and returns Q references.


def synthesis(questions, groups, anchor: Anchor, with_question: bool = False) -> list[Reference]:
    """s is a new text by the anchor (paper, "synthesis").

    `with_question` shows it q as well (paper, ablation: +0.004 on MATH-500).
    """
    asked = []
    for q, group in zip(questions, groups, strict=True):
        # Without q the anchor cannot simply solve the problem once more: it has to read.
        question = q.conversation if with_question else ""
        prompt = partial(synthesis_messages, boxed=q.boxed, question=question)
        asked.append(anchor.shown(texts(group), prompt))
    written = anchor.sample([messages for messages, _ in asked])  # Q of them
    return [
        Reference(w.text, w.ids, w.finish_reason, tokens=len(w.ids), cut=cut)
        for w, (_, cut) in zip(written, asked, strict=True)
    ]


def answer_classes(group: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts that have a final answer, classed by its meaning, in order of appearance.

    1/2 and 0.5 are one class. Every rollout is compared with the first of each class.
    """
    classes: list[list[Rollout]] = []
    for o in group:
        answer = boxed_answer(o.text)
        same = next((c for c in classes if equal(boxed_answer(c[0].text), answer)), None)
        if same is not None:
            same.append(o)
        elif answer is not None:
            classes.append([o])
    return classes


def as_reference(o: Rollout, tokens: int = 0, cut: int = 0) -> Reference:
    """A rollout as the reference: what selection makes of it."""
    return Reference(o.text, o.ids, o.finish_reason, tokens, cut)


def majority(questions, groups, anchor: Anchor | None = None) -> list[Reference]:
    """s is the first rollout that has the most common final answer (TTRL).

    The first answer to appear wins a tie. Rollouts without an answer do not vote. If none has one,
    s is empty, and an empty reference rewards nobody.
    """
    by_group = [answer_classes(group) for group in groups]  # max returns the first of equals
    return [as_reference(max(c, key=len)[0]) if c else Reference("") for c in by_group]


def self_bon(questions, groups, anchor: Anchor) -> list[Reference]:
    """s is the rollout whose number the anchor names when it sees all of them (Self-BoN).

    Greedy, because the number is to be its best guess. A number of no rollout leaves s empty.
    """
    asked = [
        anchor.shown(texts(group), partial(best_messages, boxed=q.boxed), 8)
        for q, group in zip(questions, groups, strict=True)
    ]
    numbers = [str(n + 1) for n in range(max(map(len, groups)))]
    prompts = [messages for messages, _ in asked]
    named = anchor.sample(prompts, choices=numbers, temperature=0, max_new_tokens=8)
    return [
        as_reference(group[int(w.text) - 1], len(w.ids), cut)
        if w.text in numbers[: len(group)]
        else Reference("", tokens=len(w.ids), cut=cut)
        for group, w, (_, cut) in zip(groups, named, asked, strict=True)
    ]


def lowest_perplexity(groups, nlls: Sequence[float], cuts: Sequence[int]) -> list[Reference]:
    """The rollout of each group with the lowest of `nlls`, one per rollout; the first of equals."""
    references, start = [], 0
    for group, cut in zip(groups, cuts, strict=True):
        own = nlls[start : start + len(group)]
        references.append(as_reference(group[own.index(min(own))], cut=cut))
        start += len(group)
    return references


def min_perplexity(questions, groups, anchor: Anchor) -> list[Reference]:
    """s is the rollout that the anchor finds likeliest given q: of the lowest perplexity.

    A mean over tokens, because a sum would prefer short rollouts.
    """
    pairs = [(q.messages, o.ids) for q, g in zip(questions, groups, strict=True) for o in g]
    return lowest_perplexity(groups, anchor.nll(*zip(*pairs, strict=True)), [0] * len(groups))


def mutual_predictability(questions, groups, anchor: Anchor) -> list[Reference]:
    """s is the rollout that the others predict best.

    Each is scored after the others, shown in random order; the lowest perplexity wins.
    """
    rng, pairs, cuts = random.Random(next(anchor.seeds)), [], []
    for q, group in zip(questions, groups, strict=True):
        prompt, cut_of_group = partial(show, ANOTHER_PROMPT, boxed=q.boxed), 0
        for i, o in enumerate(group):
            others = rng.sample([*group[:i], *group[i + 1 :]], len(group) - 1)
            # One token of room more, because vLLM wants to generate one when it scores.
            messages, cut = anchor.shown(texts(others), prompt, len(o.ids) + 1)
            pairs.append((messages, o.ids))
            cut_of_group = max(cut_of_group, cut)
        cuts.append(cut_of_group)
    return lowest_perplexity(groups, anchor.nll(*zip(*pairs, strict=True)), cuts)


def single(questions, groups, anchor: Anchor | None = None) -> list[Reference]:
    """s is the first rollout: the control that shows what aggregation is worth."""
    return [as_reference(group[0]) for group in groups]


AGGREGATORS: dict[str, Callable[[Sequence[Question], Sequence, Anchor], list[Reference]]] = {
    "synthesis": synthesis,
    "synthesis-question": partial(synthesis, with_question=True),
    "majority": majority,
    "self-bon": self_bon,
    "min-ppl": min_perplexity,
    "mutual-predictability": mutual_predictability,
    "single": single,
}
