"""What tests of rubrics share: texts as rollouts, rubrics as XML, and a prompt read apart."""

import re
from xml.sax.saxutils import escape, unescape

from rollout import Rollout

# Texts of these many characters: what is quadratic takes 15 s at the first, so that a failure does
# not wait for the hours of the second.
SIZES = (40_000, 1_000_000)


def said(text: str) -> Rollout:
    """A rollout of which only the text matters."""
    return Rollout(text, [1], [0.0], "stop", [1])


def rubric_xml(*criteria: str) -> str:
    inner = "".join(f"<criterion>{escape(c)}</criterion>" for c in criteria)
    return f"<rubric>{inner}</rubric>"


def parts_of(messages) -> dict[str, str]:
    """What stands between the tags of a prompt, read without the help of rubrics.py."""
    (message,) = messages
    _, blocks = message["content"].split("\n\n", 1)  # no instruction has an empty line
    found = re.findall(r"<(\w+)>\n(.*?)\n</\1>", blocks, re.DOTALL)
    return {name: unescape(text) for name, text in found}
