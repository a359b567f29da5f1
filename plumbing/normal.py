"""An answer's LaTeX without what carries no meaning: spacing, sizes, dialects of one command."""

import re

from plumbing.units import ABBREVIATIONS

_UNICODE = {
    **{c: f" {n} " for c, n in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", (
        r"\frac{1}{2} \frac{1}{3} \frac{2}{3} \frac{1}{4} \frac{3}{4} \frac{1}{5} \frac{2}{5} "
        r"\frac{3}{5} \frac{4}{5} \frac{1}{6} \frac{5}{6} \frac{1}{8} \frac{3}{8} \frac{5}{8} "
        r"\frac{7}{8}").split(), strict=True)},
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ", (f"^{{{c}}}" for c in "0123456789n"), strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{{{c}}}" for c in "0123456789"), strict=True)),
    **dict(zip("×·⋅÷", (rf"\{c} " for c in "times cdot cdot div".split()), strict=True)),
    **dict.fromkeys("−–", "-"),
    **dict(zip("≤≥≠≈∈∪∅∞±°", (rf"\{c} " for c in (
        "le ge ne approx in cup emptyset infty pm degree").split()), strict=True)),
    **dict(zip("πθαβγλμφω√", (rf"\{c} " for c in (
        "pi theta alpha beta gamma lambda mu phi omega sqrt").split()), strict=True)),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\t\n\r", " "), "′": "'", "€": r"\text{euro}",
}  # fmt: skip
_TRANSLATE = str.maketrans(_UNICODE)

# In this order. A thin space is a space: whether it groups digits is the business of _GROUPED.
_COSMETIC = [
    # JSON, escaped once too often
    (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|left|right|[lg]eq?|pi|infty|text|begin)(?![a-z]))", r"\\"),
    (r"\*\*(.+)\*\*", r"\1"),  # bold
    (r"\\(?:left|right|displaystyle|[bB]ig[glr]?)(?![a-zA-Z])", ""),
    (r"(?<!\\)\$|\\[()\[\]]", ""),  # $...$, \(...\), \[...\]
    (r"\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
    (r"\\(?:mathrm|text[a-z]+|mbox|mathbf|operatorname)(?![a-zA-Z])", r"\\text"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
    (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\varnothing(?![a-zA-Z])|\\\{ *\\\}", r"\\emptyset"),
    (r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?", r"\\degree "),
    (r"\\bar(?![a-zA-Z])", r"\\overline"),
    (r"\(\s*(?:mod|\\bmod|\\text *\{ *mod *\}) *(\w+) *\)|\\bmod *(\w+)", r"\\pmod{\1\2}"),
    (r"([\^_]) *(\d+)", r"\1{\2}"),
    # an argument without braces: \frac12, \sqrt2, x^n, \frac{1}2
    (r"(\\frac|\\pmod|\\sqrt(?:\[\d\])?|[\^_]) *(\\[a-zA-Z]+|[a-zA-Z\d])", r"\1{\2}"),
    (r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *([a-zA-Z\d])", r"\1{\2}"),
    (r"\\sqrt\[([357])\]\{-", r"-\\sqrt[\1]{"),  # the real root, as every school book means it
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2}"),  # 1.5e3
]
_COSMETIC = [(re.compile(pattern), to) for pattern, to in _COSMETIC]

# 1 000, 10\,000, 10{,}000 and 1,000 are thousands; "1, 000", "1,00" and "0 001" are not.
_THOUSANDS = re.compile(
    r"(?<![\d.,}{^_ ])[1-9]\d{0,2}(?:(?: ?\{,\} ?|,| )\d{3})+(?![\d,]| \d| ?\\frac|/)"
)
_WORDS = re.compile(
    r"\\text *\{[^{}]*\}|\\(?:begin|end) *\{[^{}]*\}|\\[a-zA-Z]+|\\.|"
    r"(?<=[\d)\]} ])(?:(?:or|and)(?![a-z])|[ap]\.?m\.?(?![a-zA-Z]))|[a-zA-Z]{2,}"
)
# A space is kept where it separates: "\pi r" is not "\pir", "1 2" is not "12".
_LOOSE_SPACE = re.compile(r" +(?![A-Za-z0-9])|(?<![A-Za-z0-9\\]) +")


def tidy(answer: str) -> str:
    r"""`answer` without what carries no meaning; its words in \text{}, lists with commas."""
    text = answer.translate(_TRANSLATE)
    for pattern, to in _COSMETIC:
        text = pattern.sub(to, text)
    text = text.strip().rstrip(".").rstrip("\\").strip()
    # Inside brackets a comma separates coordinates: (1,234) is a point.
    if not re.search(r"[(\[]|\\[{}]", text):
        text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    bare = re.fullmatch(r"[a-zA-Z ]{2,}", text) is not None
    text = _WORDS.sub(lambda m: _word(m, text, bare), text)
    text = re.sub(r"\} *\\text\{(?=[^{}]*\})", " ", text) if _ALL_TEXT.fullmatch(text) else text
    return _LOOSE_SPACE.sub("", re.sub(" +", " ", text)).strip()


_ALL_TEXT = re.compile(r"(?:\\text\{[^{}]*\} *)+")


def _word(match: re.Match, text: str, bare: bool) -> str:
    r"""What a command, a \text{} or a run of letters becomes: itself, \text{}, or a comma."""
    found, before = match[0], text[: match.start()]
    is_text = re.match(r"\\text *\{", found)
    if found.startswith("\\") and not is_text:
        return found
    content = found[is_text.end() : -1].replace("-", " ") if is_text else found
    content = re.sub(r"\s+", " ", content).strip()
    if re.fullmatch(r",? ?(?:and|or),?", content) and before and match.end() < len(text):
        return r"\lor " if "or" in content else ","  # 6 and 8; alone it is a word
    if is_text:
        if not re.search(r"[a-zA-Z%$£]", content):
            return content  # \text{13} is 13
        unit = content in "msghLlNJWV" and re.search(r"[\d}] *$", before)
        if re.fullmatch(r"\(?[a-zA-Z]\)?", content) and not unit:
            return content  # \text{E}, \text{(C)}
        return rf"\text{{{content}}}"
    if before.endswith("_{"):
        return found
    after_number = re.search(r"\d( *)$", before)
    short = found in ABBREVIATIONS or found.lower() in ("am", "pm")
    apart = short and after_number and after_number[1]
    if bare or len(found) >= 4 or "." in found or apart:
        return rf"\text{{{found}}}"
    if found in ABBREVIATIONS and after_number:
        return rf"\text{{?{found}}}"  # 12cm: a unit, or a product of letters
    return found
