"""The final answer of a text, and whether two final answers mean the same.

The paper compares strings. We compare what the strings mean, because "1/2", "0.5" and
"\\frac{1}{2}" are one answer, and a reward that calls them different teaches notation.
"""

import re
from fractions import Fraction

from plumbing.checker import same_value
from plumbing.normal import tidy
from plumbing.reading import Reading, read

# --------------------------------------------------------------------------------------- the answer

# "\\." steps over \{ and \}, which do not nest
_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def boxed_answer(text: str) -> str | None:
    """The content of the last balanced `\\boxed{}` in `text`, stripped; None if there is none or
    it is empty.

    One pass with a stack, so 10,000 nested braces take milliseconds and no recursion. An unclosed
    box (a rollout that ran out of tokens) is no answer.

    >>> boxed_answer(r"so \\boxed{1}, no: \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    # where the content of each open box starts; None for a plain brace
    open_braces: list[int | None] = []
    start, end = -1, -1
    for token in _TOKENS.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].startswith("\\boxed"):
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None and opened > start:  # the last box is the one that STARTS last
                start, end = opened, token.start()
    return text[start:end].strip() or None if start >= 0 else None


# ----------------------------------------------------------------------------------------- equality

LONGEST = 400  # characters
MOST_QUESTIONS = 20  # to the checker, for one pair: a list of 30 roots against another asks 900


class Unsure(Exception):
    """Raised inside `compare`, never out of it."""


def equal(a: str | None, b: str | None) -> bool:
    """Do two final answers mean the same? What cannot be told is not equal: see `compare`."""
    return compare(a, b) is True


def compare(a: str | None, b: str | None) -> bool | None:
    r"""Do two final answers mean the same? None: the rules are not sure.

    Symmetric; None (no answer) equals nothing; never raises, never hangs. Texts that agree but for
    spacing are equal. Others are read (plumbing/reading.py) and compared part by part; only single
    expressions of the same place go to sympy, in a process of its own (plumbing/checker.py). A
    `True` pays in training, so every rule that could guess says None instead.

    >>> compare(r"x = \frac12 \text{ cm}", "0.5"), compare("12 cm", "12 m"), compare("a/bc", "a")
    (True, False, None)
    """
    if a is None or b is None:
        return False
    if max(len(a), len(b)) > LONGEST:
        return True if a.strip() == b.strip() else None
    a, b = sorted((tidy(a), tidy(b)))
    if a == b:
        return a != ""
    questions = iter(range(MOST_QUESTIONS))

    def ask(p: str, q: str, scaled: bool = False) -> bool:
        verdict = same_value(*sorted((p, q)), scaled) if next(questions, None) is not None else None
        if verdict is None:
            raise Unsure
        return verdict

    try:
        return _same(read(a), read(b), ask)
    except Unsure:
        return None


def _same(x: Reading, y: Reading, ask) -> bool:
    """Are two readings equal? Raises Unsure."""
    names_differ = x.name and y.name and x.name != y.name
    if names_differ or (x.kind != y.kind and "relation" in (x.kind, y.kind)):
        x, y = _as_relation(x), _as_relation(y)  # y = 2x and 2x - y = 0; not x = 5 and y = 5
    if x._replace(name="", unit="") == y._replace(name="", unit=""):
        return not (x.unit and y.unit) or x.unit == y.unit
    if "unclear" in (x.kind, y.kind):
        raise Unsure
    if x.unit and y.unit and x.unit != y.unit:
        return False
    for one, other in ((x, y), (y, x)):
        if one.kind == "list" and len(one.parts) == 1 and other.kind == "expression":  # \{5\} and 5
            return _same(one.parts[0], other, ask)
    if {x.kind, y.kind} == {"list", "tuple"}:
        raise Unsure  # "1,3" for (1,3): sloppy, or another answer
    if x.kind != y.kind and "word" in (x.kind, y.kind):
        raise Unsure  # "five" for 5
    if x.kind != y.kind or x.kind == "word":
        return False
    if x.kind == "expression":
        if x.mark != y.mark:
            raise Unsure  # 13_5 is 8, but the question may have asked for base 5
        return not x.mark and not _plainly_differ(x, y) and ask(x.parts[0], y.parts[0])
    if x.kind == "relation":
        p, q = x.parts[0], y.parts[0]
        either = x.mark in ("=", r"\ne")
        return x.mark == y.mark and (ask(p, q, True) or (either and ask(p, f"-({q})", True)))
    if x.kind in ("list", "union") and x.mark == y.mark:
        if x.mark == "named":  # x = 1, y = 2 in any order
            x, y = (r._replace(parts=sorted(r.parts, key=lambda p: p.name)) for r in (x, y))
        else:
            # Sets: roots have no order, and a root that is named twice is one root.
            return all(any(_same(p, q, ask) for q in y.parts) for p in x.parts) and all(
                any(_same(p, q, ask) for p in x.parts) for q in y.parts
            )
    elif x.kind != "list" and x.mark != y.mark:
        return False
    pairs = zip(x.parts, y.parts, strict=False)
    return len(x.parts) == len(y.parts) and all(_same(p, q, ask) for p, q in pairs)


def _as_relation(x: Reading) -> Reading:
    """x = 5 as x - 5 = 0, and the half-line x < 5 as x - 5 < 0."""
    if x.kind == "relation" or not x.name:
        return x
    parts, name = [p.parts[0] for p in x.parts if isinstance(p, Reading)], f"({x.name})"
    if read(x.name).kind != "expression" or x.mark.startswith("base") or x.unit:
        raise Unsure
    if x.kind == "expression":
        return Reading("relation", (f"{name}-({x.parts[0]})",), "=")
    if x.kind == "tuple" and parts[0] == r"-\infty":
        return Reading("relation", (f"{name}-({parts[1]})",), r"\le" if "]" in x.mark else "<")
    if x.kind == "tuple" and parts[-1] == r"\infty":
        return Reading("relation", (f"({parts[0]})-{name}",), r"\le" if "[" in x.mark else "<")
    raise Unsure


def _plainly_differ(x: Reading, y: Reading) -> bool:
    """Two fractions, or two letters: settled here, because most pairs are such."""
    p, q = x.parts[0], y.parts[0]
    if re.fullmatch("[a-zA-Z]", p) and re.fullmatch("[a-zA-Z]", q):
        return True
    one, other = _FRACTION.fullmatch(p), _FRACTION.fullmatch(q)
    if not one or not other or max(len(p), len(q)) > 24:  # long decimals: see the checker
        return False
    values = [
        Fraction(int(m["minus"] + m["over"]), int(m["under"] or 1))
        for m in (one, other)
        if int(m["under"] or 1)
    ]
    return len(values) == 2 and values[0] != values[1]


_FRACTION = re.compile(
    r"(?P<minus>-?)(?:\(?\\frac\{)?(?P<over>\d+)(?:(?:/|\}\{)(?P<under>\d+)\}?\)?)?"
)
