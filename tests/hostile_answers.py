"""Strings that make parsers and computer algebra hang, for tests/test_answers_hostile.py."""

import random
import sys
import time
from pathlib import Path

_ATOMS = ("9", "x", "2", "99", r"\pi", "i", "e", "123456789", "0", "n", r"\infty", "0.1", "a_{1}")
_WRAPS = (
    r"\frac{{{0}}}{{{1}}}", "({0})^{{{1}}}", "{0}^{{{1}}}", r"\sqrt{{{0}}}", "({0})!", "({0})({1})",
    r"\sin({0})", r"\log_{{{0}}} {1}", "|{0}|", "{0}+{1}", "{0}-{1}", r"\binom{{{0}}}{{{1}}}",
    r"\sum_{{k=1}}^{{{0}}} {1}", r"\int_{{0}}^{{{0}}} {1} dx", "{0}/{1}", r"({0},{1})", "{0},{1}",
    r"\lfloor {0} \rfloor", r"\begin{{pmatrix}} {0} \\ {1} \end{{pmatrix}}", "{0}={1}", "{0}<{1}",
    r"{0} \cup {1}", r"\{{{0},{1}\}}", r"{0} \pm {1}", r"{0}\text{{ cm}}", r"\text{{{0}}}", "{0}!",
)  # fmt: skip
_LONG = (
    lambda n: "(" * n + "x" + ")" * n,
    lambda n: "{" * n + "}" * n,
    lambda n: "9^{" * (n % 90) + "9" + "}" * (n % 90),
    lambda n: "2^" * n + "2",
    lambda n: "9" * n,
    lambda n: "1+" * n + "1",
    lambda n: r"\sqrt{" * (n % 60) + "2" + "}" * (n % 60),
    lambda n: r"\frac{1}{1+" * (n % 30) + "x" + "}" * (n % 30),
    lambda n: ",".join(rf"\sqrt{{{i}}}" for i in range(n % 60)),
    lambda n: "(x+1)" * (n % 60),
    lambda n: f"{n}!" * 3,
    lambda n: f"({n}x+y)^{{{n}}}",
    lambda n: f"10^{{-{n}}}",
    lambda n: f"9^{{{n}}}" * 5,
    lambda n: f"({n}!)!",
    lambda n: f"{n}^{{{n}}}^{{{n}}}",
    lambda n: f"\\sin({n}^{{{n}}})",
    lambda n: r"\text{" * n,
    lambda n: "\\" * n,
    lambda n: "1:" * n,
    lambda n: "a_{" * n + "1" + "}" * n,
    lambda n: "x=" * n + "1",
    lambda n: "|" * n + "x" + "|" * n,
    lambda n: "1/" * n + "1",
    lambda n: "1 000" * n,
    lambda n: r"\begin{pmatrix}" * n,
)


def hostile(count: int, seed: int = 0):
    """`count` strings: nested at random, long in one way, or bytes of noise."""
    draw = random.Random(seed)
    for i in range(count):
        if i % 4 == 0:
            yield draw.choice(_LONG)(draw.choice((3, 7, 20, 50, 99, 150, 999, 4321)))
        elif i % 4 == 1:
            letters = "\\{}[]()^_,.;:|!/+-*=<>$%&~'0123456789xyiefracsqrt \n√½²°∞é\u0000\ud800"
            yield "".join(draw.choice(letters) for _ in range(draw.randint(1, 60)))
        else:
            made = draw.choice(_ATOMS)
            for _ in range(draw.randint(1, 7)):
                pair = [made, draw.choice(_ATOMS)]
                draw.shuffle(pair)
                made = draw.choice(_WRAPS).format(*pair)
            yield made


def measured(count: int, seed: int = 0) -> list[float]:
    """Seconds of each group of eight strings against one reference."""
    from plumbing.answers import equal

    strings, references = list(hostile(count, seed)), ("7", r"\frac{1}{2}", "x+1", r"\sqrt{2}")
    seconds = []
    for i in range(0, count, 8):
        started = time.monotonic()
        for text in strings[i : i + 8]:
            equal(text, references[i // 8 % len(references)])
        seconds.append(time.monotonic() - started)
    return seconds


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    groups = measured(10_000)
    print(f"10,000 strings in {sum(groups):.0f} s, the slowest group of eight {max(groups):.1f} s")
