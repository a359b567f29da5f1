"""What a tidied answer says, as a small tree.

    x=\\frac{1}{2}\\text{cm}     ->  expression \\frac{1}{2}, named x, in cm
    (1,2]                      ->  tuple of 1 and 2, marked (]
    1\\pm\\sqrt{2}               ->  list of 1+\\sqrt{2} and 1-\\sqrt{2}
    -2\\le x<7                  ->  tuple of -2 and 7, marked [), named x

What no rule can read is "unclear": it equals only itself. A rule that guesses pays for wrong
answers; one that gives up costs a reward now and then, and is counted (`reward/unsure`).
"""

import re

from plumbing.latex import Reading, expression, unclear
from plumbing.units import MAGNITUDES, unit_of

EMPTY = Reading("word", (r"\emptyset",))
_NO_SOLUTION = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set"}

# What may be the left side of "x = 5": x, a_{3}, f(x), AB, |AB|, (x,y), A:B, \frac{NO}{BO}
_ONE = r"(?:[a-zA-Z]|[A-Z]{2,3}|\\[a-z]{2,7} ?)(?:_\{\w+\})?'*(?:\([a-zA-Z](?:,[a-zA-Z])*\))?"
_NAME = re.compile(
    rf"{_ONE}(?::{_ONE})*|\|{_ONE}\||\({_ONE}(?:,{_ONE})+\)|\\frac\{{{_ONE}\}}\{{{_ONE}\}}"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|equiv|approx)(?![a-zA-Z]) ?|[<>=]")
_UNIT = re.compile(r"(?:\\text\{[^{}]*\}(?:\^\{[23]\})?|\\degree|\\?%|/(?=\\text))+$")
_MATRIX = re.compile(
    r"\(?(?:\\begin\{([pb]?matrix)\}|\[\\begin\{array\}\{[clr|]+\})(.*)\\end\{(?:\1|array)\}[)\]]?"
)


def read(text: str) -> Reading:
    """The Reading of a tidied answer. Each rule below looks at the whole of it, or passes on."""
    parts = split(text, r",|;|\\lor ?")
    if len(parts) > 1:
        return _list(parts, text)
    if all_text := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        phrase = all_text[1]
        # The first letter of a sentence is no difference: Even, even. AB and ab are.
        word = phrase.lower() if re.fullmatch(r"[A-Za-z][a-z' ]{2,}", phrase) else phrase
        return EMPTY if word in _NO_SOLUTION else Reading("word", (word,))
    if text == r"\emptyset":
        return EMPTY
    if choice := re.fullmatch(r"\(?([A-J])[).:]|\(([A-J])\)", text):
        return Reading("expression", (choice[1] or choice[2],))
    for rule in (_matrix, _related, _united, _bracketed, _signs, _ratio, _with_unit):
        if (found := rule(text)) is not None:
            return found
    return expression(text)


def split(text: str, separator: str, found_too: list[str] | None = None) -> list[str]:
    r"""`text` at each separator outside brackets and \begin{}..\end{}; [text] if there is none.

    The separators are added to `found_too`."""
    depth, parts, last = 0, [], 0
    token = rf"(?P<cut>{separator})|\\begin|\\end|\\\{{|\\\}}|\\[a-zA-Z]+|[(\[{{)\]}}]"
    for match in re.finditer(token, text):
        found = match[0]
        if match["cut"] is not None:
            if depth == 0:
                parts.append(text[last : match.start()])
                (found_too if found_too is not None else []).append(found.strip())
                last = match.end()
        elif found in ("(", "[", "{", r"\{", r"\begin"):
            depth += 1
        elif found in (")", "]", "}", r"\}", r"\end"):
            depth -= 1
    return [p.strip() for p in (*parts, text[last:])]


def _list(parts: list[str], text: str) -> Reading:
    """1,2 or 1;2 or "1 and 2": unordered, and with x = 1, y = 2 a list of names."""
    readings = [read(p) for p in parts if p]  # "1, 2, and 3" has an empty part
    if len(readings) < 2 or any(r.kind in ("unclear", "relation") for r in readings):
        return unclear(text)
    names = [r.name for r in readings]
    alone = tuple(r._replace(name="") for r in readings)
    if re.search(r"[<>]|\\(?:le|ge|ne|in)(?![a-z])", text):  # "or" joins them, "and" cuts
        joined = r"\lor" in text and len(set(names)) == 1
        return Reading("union", alone, name=names[0]) if joined else unclear(text)
    if names[0] and not any(names[1:]):  # n = 1, 2, 3
        return Reading("list", alone, name=names[0])
    if len(set(names)) == 1:
        return Reading("list", alone, name=names[0])
    return Reading("list", tuple(readings), mark="named" if all(names) else "")


def _matrix(text: str) -> Reading | None:
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    rows = [row for row in re.split(r"\\\\", found[2]) if row.strip()]
    cells = [[read(cell.strip()) for cell in split(row, "&")] for row in rows]
    if any(len(row) != len(cells[0]) for row in cells) or found[0].count(r"\begin") > 1:
        return unclear(text)
    return Reading("matrix", tuple(c for row in cells for c in row), f"{len(cells)} rows")


def _related(text: str) -> Reading | None:
    """x = ..., x \\in ..., inequalities, equations."""
    signs: list[str] = []
    sides = split(text, _RELATION.pattern, signs)
    if len(sides) == 1:
        return None
    if not all(sides):
        return unclear(text)
    named = _NAME.fullmatch(sides[0]) is not None
    if r"\approx" in signs:  # the exact value stands before it, except in "x \approx 3"
        first = signs.index(r"\approx")
        if named and first == 0:
            return read(sides[1])._replace(name=sides[0]) if len(sides) == 2 else unclear(text)
        signs, sides = signs[:first], sides[: first + 1]
        if not signs:
            return read(sides[0])
    if named and signs[0] in ("=", r"\equiv", r"\in") and set(signs) <= {"=", r"\equiv", signs[0]}:
        inner = read(sides[-1])  # x = 2 + 3 = 5
        return inner._replace(name=sides[0]) if not inner.name else unclear(text)
    if len(signs) == 2:
        return _between(sides, signs) or unclear(text)
    if len(signs) > 1 or signs[0] in (r"\in", r"\equiv"):
        return unclear(text)
    left, right = sides
    flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
    if _NAME.fullmatch(right) and not named:
        left, right, signs, named = right, left, [flipped.get(signs[0], signs[0])], True
    if named and not re.search(rf"(?<![a-zA-Z\\]){re.escape(left)}(?![a-zA-Z])", right):
        if signs[0] == "=":
            return read(right)._replace(name=left)
        return _half_line(left, signs[0], right)
    difference = f"({left})-({right})"
    if expression(left).kind != "expression" or expression(right).kind != "expression":
        return unclear(text)
    if signs[0] in (">", r"\ge"):
        difference = f"({right})-({left})"
    mark = {">": "<", r"\ge": r"\le"}.get(signs[0], signs[0])
    return Reading("relation", (difference,), mark)


def _half_line(name: str, sign: str, end: str) -> Reading:
    """x > 3 is (3, infinity); x != 3 is two of them."""
    here = read(end)
    low, high = Reading("expression", (r"-\infty",)), Reading("expression", (r"\infty",))
    below = Reading("tuple", (low, here), "(]" if sign == r"\le" else "()", name=name)
    above = Reading("tuple", (here, high), "[)" if sign == r"\ge" else "()", name=name)
    if sign == r"\ne":
        return Reading("union", (below._replace(name=""), above._replace(name="")), name=name)
    return below if sign in ("<", r"\le") else above


def _between(sides: list[str], signs: list[str]) -> Reading | None:
    """-2 <= x < 7 is [-2, 7), and 7 > x >= -2 the same."""
    if signs[0] in (">", r"\ge"):
        flipped = {">": "<", r"\ge": r"\le"}
        sides, signs = sides[::-1], [flipped.get(s, "") for s in signs[::-1]]
    if not set(signs) <= {"<", r"\le"} or not _NAME.fullmatch(sides[1]):
        return None
    ends = (read(sides[0]), read(sides[2]))
    mark = ("[" if signs[0] == r"\le" else "(") + ("]" if signs[1] == r"\le" else ")")
    return Reading("tuple", ends, mark, name=sides[1])


def _united(text: str) -> Reading | None:
    parts = split(text, r"\\cup(?![a-zA-Z]) ?")
    return Reading("union", tuple(read(p) for p in parts)) if len(parts) > 1 else None


def _bracketed(text: str) -> Reading | None:
    r"""(1,2), [1,2), P(1,2), \{1,2\}, and brackets around one thing, which say nothing."""
    point = re.match(r"[A-Z](?=\(.*,)", text)
    name, text = (point[0], text[1:]) if point else ("", text)
    if text.startswith(r"\{") and text.endswith(r"\}") and len(split(text, ",")) == 1:
        inside = text[2:-2]
        if not _balanced(inside) or re.search(r"[:|]|\\mid", inside):
            return None
        found = read(inside)
        return found if found.kind == "list" else Reading("list", (found,))
    if len(text) < 3 or text[0] not in "([{" or text[-1] not in ")]}" or not _balanced(text[1:-1]):
        return None
    parts, mark = split(text[1:-1], ","), text[0] + text[-1]
    if mark == "{}" or (len(parts) == 1 and mark == "()" and ";" not in text):
        return read(text[1:-1])
    if len(parts) == 1:
        parts = split(text[1:-1], ";")
    if len(parts) == 1 or "{" in mark or "}" in mark or not all(parts):
        return None
    return Reading("tuple", tuple(read(p) for p in parts), mark, name=name)


def _balanced(text: str) -> bool:
    """No bracket closes more than was opened: "1,2)U(3,4" is not the inside of one pair."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _signs(text: str) -> Reading | None:
    r"""1 \pm \sqrt{2} is two values; with two \pm it would matter which go together."""
    if text.count(r"\pm") != 1 or "\\pmod" in text:
        return None
    both = [re.sub(r"\\pm(?![a-zA-Z]) ?", sign, text).removeprefix("+") for sign in "+-"]
    return Reading("list", tuple(read(each) for each in both))


def _ratio(text: str) -> Reading | None:
    """7:32, and 10:30, which may be a time: element by element, never reduced."""
    clock = re.fullmatch(r"(\d+:\d+)\\text\{([ap])\.? ?m\.?\}", text, re.IGNORECASE)
    mark = clock[2].lower() if clock else ""
    parts = split(clock[1] if clock else text, ":")
    return Reading("ratio", tuple(read(p) for p in parts), mark) if len(parts) > 1 else None


def _with_unit(text: str) -> Reading | None:
    """12 cm, $5, 28%, 90 degrees, 5 million, 7 (mod 11)."""
    if modulo := re.fullmatch(r"(.+)\\pmod\{(\w+)\}", text):
        return read(modulo[1])._replace(unit=f"mod {modulo[2]}")
    before = re.match(r"\\\$|\\text\{(?:euro|£)\}|-\\\$", text)
    after = _UNIT.search(text)
    if not before and not after:
        return None
    number = text[before.end() if before else 0 : after.start() if after else None]
    if before and before[0].startswith("-"):
        number = "-" + number
    phrase = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", after[0]) if after else ""
    phrase = phrase.replace(r"\degree", " degree ").replace("\\%", " % ")
    words = phrase.split()
    while words and words[0] in MAGNITUDES:
        number = rf"({number})\cdot 10^{{{MAGNITUDES[words.pop(0)]}}}"
    unit = unit_of(" ".join(words))
    money = "" if not before else "$" if "$" in before[0] else "euro"
    inner = expression(number)
    if (
        unit is None
        or inner.kind != "expression"
        or inner.unit
        or (money and unit not in ("", money))
    ):
        return unclear(text)
    if re.search(r"[a-zA-Z]$", number) and "\\" not in number:  # x cm; but a bare word is no unit
        return unclear(text) if not money else inner._replace(unit=money)
    return inner._replace(unit=money or unit)
