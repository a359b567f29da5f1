"""Which LaTeX is a single expression that the checker may see, and in which exact form.

Single letters, numbers and the commands below. What is ambiguous in print (a/bc) or too big for
sympy (towers, long digits, deep brackets) is unclear: it equals only itself.
"""

import re
from typing import NamedTuple


class Reading(NamedTuple):
    """One answer, or a part of one."""

    kind: str  # expression, word, list, tuple, union, matrix, ratio, relation, unclear
    parts: tuple  # strings, or the Readings of its elements
    mark: str = ""  # what must agree as well: brackets, the base, < or =
    unit: str = ""  # one side may leave it out: 12 cm and 12; not 12 cm and 12 m
    name: str = ""  # the same: x = 5 and 5; not x = 5 and y = 5


def unclear(text: str) -> Reading:
    return Reading("unclear", (text,))


_BASED = re.compile(r"([0-9A-F]+)_\{(?:\\text\{)?(\w+)\}?\}")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
          "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip

LONGEST = 120  # characters; the longest answer in MATH-500 has 53
DEEPEST = 6  # brackets within brackets: the parser's time doubles with each

# One expression is what the checker may see: single letters and these commands. Nesting, digits
# and towers are bounded here, because sympy is not.
_COMMANDS = set(
    "frac sqrt pi cdot times div ln log exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh "
    "tanh alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega psi eta "
    "zeta xi kappa binom degree lfloor rfloor lceil rceil".split()
)
_TOO_BIG = re.compile(
    r"\d{41}|!!|[)}\]]!|\d{5,}!|\^\{[^{}]*\d{5}|"  # long numbers, factorials, exponents
    r"\^\{[^{}]*[\d)}]\^|\^\{\d+\}\^|\)\^\{\d{3,}"  # towers of numbers
)
_INNER = r"(?:[^{}]|\{[^{}]*\})*"  # two levels of braces
_FACTOR = (
    rf"(?:\d+|[a-zA-Z]|\\(?:sqrt(?:\[\d\])?|frac\{{{_INNER}\}})\{{{_INNER}\}}|\\[a-z]+ ?|"
    rf"\((?:[^()]|\([^()]*\))*\))(?:_\{{\w+\}})?(?:\^\{{{_INNER}\}})?"
)
# a/bc is read in two ways, and so are sin x/2 and 1/2/3
_CLEAR_SLASH = re.compile(rf"/{_FACTOR}(?=$|[+\-)}}*]|\\cdot|\\times)")
_AMBIGUOUS = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc|log|ln)[^()+\-]*/|/[^+\-(){}]*/|"
    r"\d \d|\d ?\\frac\{\d+\}|(?<![a-zA-Z\\])(?:[a-zA-Z]{4}|[fgFGPQ]\()|"
    r"[^\w\s\\{}()+\-*/^!|.]|_(?!\{\w+\})|[\d)}]_|(?<!\d)\.|\.(?!\d)|(?<![\d.])0\d"
)


def _exact(text: str) -> str:
    r"""Mixed numbers and decimals as fractions: 1\frac{1}{2}, 1 1/2, 0.25, 0.\overline{3}."""
    mixed = r"([+-]?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))"
    if (m := re.fullmatch(mixed, text)) and int(m[3] or m[5]) < int(m[4] or m[6]):
        return rf"{m[1]}({m[2]}+\frac{{{m[3] or m[5]}}}{{{m[4] or m[6]}}})"
    text = re.sub(r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating, text)
    places = r"(?<![\d.])(\d*)\.(\d+)(?![\d.])"
    return re.sub(places, lambda m: rf"(\frac{{{int(m[1] + m[2])}}}{{1{'0' * len(m[2])}}})", text)


def _repeating(m: re.Match) -> str:
    """0.1(6) is (16 - 1) / 90."""
    once, again = int((m[1] + m[2]) or "0"), int(m[1] + m[2] + m[3])
    return rf"(\frac{{{again - once}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}})"


def expression(text: str) -> Reading:
    """The Reading of a text that holds one expression, or nothing that we can read."""
    if based := _BASED.fullmatch(text):
        base = _BASES.get(based[2], based[2])
        return Reading("expression", (based[1].lstrip("0"),), f"base {base}")
    if re.fullmatch(r"[+-]?\d+", text):
        sign, digits = text[0] if text[0] == "-" else "", text.lstrip("+-").lstrip("0")
        return Reading("expression", (sign * bool(digits) + (digits or "0"),))
    if re.fullmatch(r"[a-zA-Z]|-?\\infty|\+\\infty", text):
        return Reading("expression", (text.removeprefix("+"),))
    text = _exact(text) if len(text) <= LONGEST else text
    depths, bare = [0], re.sub(r"\\sqrt\[\d\]", r"\\sqrt", text)
    for character in text:
        depths.append(depths[-1] + (character in "({") - (character in ")}"))
    unreadable = (
        not 0 < len(text) <= LONGEST
        or text.count("|") > 4
        or not text.isascii()
        or not set(re.findall(r"\\([a-zA-Z]+|.)", text)) <= _COMMANDS
        or min(depths) < 0
        or max(depths) > DEEPEST
        or depths[-1] != 0
        or _TOO_BIG.search(text)
        or _AMBIGUOUS.search(bare)
        or text.count("/") != len(_CLEAR_SLASH.findall(text))
    )
    if unreadable:
        return unclear(text)
    return Reading("expression", (re.sub(r"\\degree ?", r"^{\\circ}", text),))
