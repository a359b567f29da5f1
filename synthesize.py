"""Reference estimation: from the rollouts o_1..o_G of a question to ONE pseudo-reference s (paper, section 3).

The paper's aggregator is synthesis. The frozen anchor pi_0 reads the rollouts, not the question, and writes a new
answer that takes from each what is right. Selection can only return what some rollout already says; synthesis can be
right although every rollout is wrong, when they are wrong in different places.

The other aggregators are baselines: `majority` is TTRL's pseudo-label, `single` is no aggregation at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from rewards import boxed_answer, equal
from rollout import Rollout

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


@dataclass(frozen=True)
class Reference:
    """The pseudo-reference s of one question: never a label, only what was made of its rollouts."""

    text: str
    finish_reason: str = "stop"  # "length": the anchor ran out of tokens
    tokens: int = 0  # generated for it, beyond the rollouts themselves


def synthesis_messages(attempts: Sequence[str], boxed: bool = True) -> list[dict[str, str]]:
    """The chat that asks the anchor for s: the instruction, then every attempt between tags; q is not in it."""
    if boxed:  # as it stands: mathematics is full of < and &
        blocks = [SYNTHESIS_PROMPT, *(f"<attempt>\n{text}\n</attempt>" for text in attempts)]
    else:  # escaped, so that no response can close its tag and pass for several, or for us
        blocks = [FREEFORM_PROMPT, *(f"<response>\n{escape(text)}\n</response>" for text in attempts)]
    return [{"role": "user", "content": "\n\n".join(blocks)}]


def synthesis(groups: Sequence[Sequence[Rollout]], sample: Callable, boxed: bool = True) -> list[Reference]:
    """s is a new text by the anchor. `sample(prompts)` asks pi_0 for one completion of each prompt; `boxed`: the rollouts
    end with an answer in \\boxed{}, and so shall s.

    The anchor is sampled like the rollouts are, at their temperature: then the comparison of s with a rollout
    shows what reading the others was worth, and not what a lower temperature was worth.
    """
    written = sample([synthesis_messages([o.text for o in group], boxed) for group in groups])
    return [Reference(w.text, w.finish_reason, len(w.ids)) for w in written]


def majority(groups: Sequence[Sequence[Rollout]], sample: Callable | None = None, boxed: bool = True) -> list[Reference]:
    """s is the first rollout that has the most common final answer (TTRL). Equal answers are grouped by `equal`.

    The first class of answers to appear wins a tie. Rollouts without an answer do not vote; if none has one, s is
    empty, and an empty reference rewards nobody.
    """
    references = []
    for group in groups:
        classes: list[list[Rollout]] = []  # rollouts by the meaning of their answer, in order of appearance
        for o in group:
            answer = boxed_answer(o.text)
            if answer is None:
                continue
            same = next((c for c in classes if equal(boxed_answer(c[0].text), answer)), None)
            if same is None:
                classes.append([o])
            else:
                same.append(o)
        winner = max(classes, key=len)[0] if classes else None  # max returns the first of equals
        references.append(Reference(winner.text, winner.finish_reason) if winner else Reference(""))
    return references


def single(groups: Sequence[Sequence[Rollout]], sample: Callable, boxed: bool = True) -> list[Reference]:
    """s is the first rollout: the control that shows what aggregation adds, and how a loop feeds on its own errors."""
    return [Reference(group[0].text, group[0].finish_reason) for group in groups]


# --aggregator NAME. An aggregator is any function (groups, sample, boxed) -> references; add yours here.
AGGREGATORS = {"synthesis": synthesis, "majority": majority, "single": single}
