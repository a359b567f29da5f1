"""The final answer of a text, and whether two final answers mean the same.

The paper compares strings. We compare what the strings mean, because "1/2", "0.5" and
"\\frac{1}{2}" are one answer, and a reward that calls them different teaches notation.

`python plumbing/answers.py` is the checker's child process (see `equal`); people never call it.
"""

import atexit
import json
import re
import subprocess
import sys
import threading
from functools import lru_cache
from queue import Empty, Queue

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

CHECK_SECONDS = 5.0  # one comparison; most take 3 ms
START_SECONDS = 120.0  # importing sympy on a busy machine
# characters; the longest answer in MATH-500 has 53. Longer ones must match as strings.
LONGEST = 400

_COSMETIC = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\$|[\s~]+"
)
# A space is kept where it separates: "\pi r" is not "\pir", "1 2" is not "12", and "1 \\ 2" is a
# row of a matrix.
_LOOSE_SPACE = re.compile(r" +(?![A-Za-z0-9])|(?<![A-Za-z0-9\\]) +")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+")
_INTEGER = re.compile(r"[+-]?\d+")


def _plain(answer: str) -> str:
    """`answer` without what never carries meaning: spacing, sizes of brackets, thousands commas;
    infinity as a command.
    """
    answer = _COSMETIC.sub(" ", answer.replace("\\!", "").replace("∞", "\\infty "))
    answer = _LOOSE_SPACE.sub("", answer).rstrip(".")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _elements(answer: str) -> tuple[str, list[str], str] | None:
    """A tuple or interval as (opening, elements, closing): "(1,[2,3]]" -> ("(", ["1", "[2,3]"],
    "]"); else None.
    """
    if len(answer) < 3 or answer[0] not in "([" or answer[-1] not in ")]":
        return None
    parts, depth = [""], 0
    for character in answer[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:  # "(1,2)U(3,4)": the first bracket does not enclose the rest
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return (answer[0], parts, answer[-1]) if len(parts) > 1 and depth == 0 else None


def equal(a: str | None, b: str | None) -> bool:
    """Do two final answers mean the same? Symmetric; None (no answer) equals nothing; never
    raises, never hangs.

    Strings that agree are equal and unequal integers are not: that settles most pairs for
    nothing. Tuples and intervals are compared element by element and in order, with the same
    brackets: math-verify reads "(15,-29)" as an empty interval, equal to every other. The rest
    goes to math-verify, in a child process that is killed after CHECK_SECONDS: its own time-out
    needs SIGALRM, which works in the main thread only and cannot interrupt 9^{9^{9^9}}, a single
    call into C."""
    if a is None or b is None:
        return False
    a, b = _plain(a), _plain(b)
    if a == b:
        return a != ""
    if max(len(a), len(b)) > LONGEST:
        return False
    if _INTEGER.fullmatch(a) and _INTEGER.fullmatch(b):
        return int(a) == int(b)
    one, other = _elements(a), _elements(b)
    if one and other:
        same_shape = (one[0], len(one[1]), one[2]) == (other[0], len(other[1]), other[2])
        return same_shape and all(equal(x, y) for x, y in zip(one[1], other[1], strict=True))
    braces = ("\\{" in a, "\\{" in b)
    if (one and braces[1]) or (other and braces[0]):
        return False  # an interval or a tuple is not a set, which math-verify overlooks
    return _ask_child(*sorted((a, b)))


_lock = threading.Lock()
_child: subprocess.Popen | None = None
_verdicts: Queue = Queue()


@lru_cache(maxsize=100_000)  # the same few answers come back in every group
def _ask_child(a: str, b: str) -> bool:
    global _child
    with _lock:
        try:
            if _child is None:
                _start_child()
            _child.stdin.write(json.dumps([a, b]).encode() + b"\n")
            _child.stdin.flush()
            verdict = _next_line(CHECK_SECONDS)
        except BrokenPipeError:
            verdict = b""
        # Ctrl-C, say: an answer that arrives later must not be read as the next pair's
        except BaseException:
            _stop_child()
            raise
        # it hung or crashed on this pair: not shown to be equal, and the next pair gets a new
        # child
        if not verdict:
            _stop_child()
        return verdict == b"true\n"


def _start_child() -> None:
    global _child, _verdicts
    command = [sys.executable, "-P", __file__]  # -P: this folder is not where it imports from
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    _child = subprocess.Popen(command, **pipes)
    atexit.register(_child.kill)
    _verdicts = Queue()
    # A thread reads, because a pipe has no read with a time-out; it ends with the child.
    threading.Thread(target=_read_lines, args=(_child.stdout, _verdicts), daemon=True).start()
    if _next_line(START_SECONDS) != b"ready\n":
        raise RuntimeError(
            "the answer checker did not start: does `python -c 'import math_verify'` work?"
        )


def _stop_child() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child.wait()
        _child = None


def _read_lines(stream, lines: Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _next_line(seconds: float) -> bytes:
    try:
        return _verdicts.get(timeout=seconds)
    except Empty:
        return b""


def _serve() -> None:
    """The child: a pair of answers per line in, true or false per line out."""
    from math_verify import parse, verify  # here, so that the parent never pays for sympy

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            # Two symbols for one value must agree to 12 digits: with the default of 6, 1/3 equals
            # 0.333333.
            x, y = (
                parse(f"\\boxed{{{answer}}}", parsing_timeout=None) for answer in json.loads(line)
            )
            settings = {"float_rounding": 12, "timeout_seconds": None}
            # Both directions, because verify(gold, answer) is lenient to the answer: it finds
            # "7=11a+c" in "11a+c".
            same = bool(x and y) and verify(x, y, **settings) and verify(y, x, **settings)
        # sympy raises anything at all on hostile input; what cannot be read is not equal
        except Exception:
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
