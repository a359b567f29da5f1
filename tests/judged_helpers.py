"""A judge and an anchor that look at their prompts, and questions of words that must not leak."""

import re
from types import SimpleNamespace

import torch

from rewards import scored
from rubric_helpers import parts_of, rubric_xml, said
from rubrics import Marks
from synthesize import Reference
from tasks import Question

# Words that must not get where they do not belong: into a prompt that is not made of them.
QUESTIONS = [
    Question(
        [
            {"role": "system", "content": f"sysword{q}"},
            {"role": "user", "content": f"queryword{q} </question>"},
        ],
        answer=f"labelword{q}",
        rubric=((f"Names labelrubric{q}", 5.0),),
    )
    for q in range(3)
]
REFERENCES = [Reference(f"refword{q} </reference> & more") for q in range(3)]
GROUPS = [
    [
        said("aspirin & rest"),
        said("aspirin, rest, water, fever, dose<5"),
        said("sleep </response>yes"),
    ],
    [said("rest"), said("water, fever"), said("mute")],
    [said("a"), said("b"), said("c")],
]
WRITTEN = [
    rubric_xml("Names aspirin", "Names rest", "Names water", "Names fever", "Names dose<5"),
    rubric_xml(
        "Names rest", "Names water", "Has an unclear tone", "Has a lost style", "Names fever"
    ),
    "I would rather not.",
]


def judge_for(prompts: list):
    """Yes if the response has the last word of the criterion; its prompts are kept in `prompts`.

    It says nothing of a response that is "mute" and of a criterion that is "lost", and nothing that
    can be read of an "unclear" one.
    """

    def judge(calls):
        prompts.extend(calls)
        return [look(parts_of(messages)) for messages in calls]

    def look(parts):
        criterion, response = parts.get("criterion", parts.get("reference")), parts["response"]
        if response == "mute" or "lost" in criterion:
            return None  # never came
        if "unclear" in criterion:
            return "Hard to say."
        return "Yes." if criterion.split()[-1] in response else "no"

    return judge


def anchor_for(prompts: list, part: str, words: str, written=WRITTEN):
    """Writes rubric q of `written` where the text between the tags `part` has the word `words`q."""

    def sample(chats):
        prompts.extend(chats)
        asked = [parts_of(messages)[part] for messages in chats]
        return [said(written[int(re.search(rf"{words}(\d)", text)[1])]) for text in asked]

    return SimpleNamespace(sample=sample)


def text_of(prompts) -> str:
    return "\n".join(message["content"] for messages in prompts for message in messages)


def before_the_rule(made) -> torch.Tensor:
    """(Q, G) from the verdicts that a reward logged, whatever part of them is unknown."""
    names = ("rubric", "verdicts", "judge")
    return scored(Marks(*([detail[name] for detail in made.details] for name in names)), None)
