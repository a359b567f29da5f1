"""Do two LaTeX expressions have the same value? Asked of a child process, which may hang and die.

`python plumbing/checker.py` is the child; people never call it. The parent never imports sympy.

Why not math-verify's `verify` itself: we keep its parser (latex2sympy2_extended) and leave its
comparison. As of 0.9.0 `verify` finds 1/2004! = 1/2006! (it drops what is below 1e-15), x = X (it
lowers the case), x' = x, and x = x + 1 equal to x = x + 2 (both have no solution). And its
normalisation drops units and bases wherever it sees one: x/2 c = x/2, 2m = 2, 204_5 = 204.
"""

import atexit
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from queue import Empty, Queue

CPU_SECONDS = 0.5  # one comparison, in seconds of computing; most take 0.02. The kernel ends it.
CHECK_SECONDS = 2.0  # the same by the clock
START_SECONDS = 120.0  # importing sympy on a busy machine

# ------------------------------------------------------------------------------------- the parent

_lock = threading.Lock()
_child: subprocess.Popen | None = None
_lines: Queue = Queue()


@lru_cache(maxsize=100_000)  # the same few answers come back in every group, hangs among them
def same_value(a: str, b: str, scaled: bool = False) -> bool | None:
    """Do `a` and `b` agree wherever both are defined? None: not known (unreadable, or it hung).

    `scaled`: is a = k b for a number k > 0? (2x - 4 < 0 and x - 2 < 0 are one inequality.)
    """
    global _child
    with _lock:
        try:
            if _child is None:
                _start_child()
            _child.stdin.write(json.dumps([a, b, scaled]).encode() + b"\n")
            _child.stdin.flush()
            verdict = _next_line(
                CHECK_SECONDS + 2
            )  # the child bounds itself; this is for a dead one
        except BrokenPipeError:
            verdict = b""
        # Ctrl-C, say: a verdict that arrives later must not be read as the next pair's
        except BaseException:
            _stop_child()
            raise
        if not verdict:
            _stop_child()
            return None
        return json.loads(verdict)


def _start_child() -> None:
    global _child, _lines
    command = [sys.executable, "-P", __file__]  # -P: this folder is not where it imports from
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # A process group of its own: what kills the child kills its fork as well.
    _child = subprocess.Popen(command, **pipes, process_group=0)
    atexit.register(_kill, _child)
    _lines = Queue()
    # A thread reads, because a pipe has no read with a time-out; it ends with the child.
    threading.Thread(target=_read_lines, args=(_child.stdout, _lines), daemon=True).start()
    if _next_line(START_SECONDS) != b"ready\n":
        raise RuntimeError(
            "the answer checker did not start: does `python -c 'import math_verify'` work?"
        )


def _stop_child() -> None:
    global _child
    if _child is not None:
        _kill(_child)
        _child.wait()
        _child = None


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _read_lines(stream, lines: Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _next_line(seconds: float) -> bytes:
    try:
        return _lines.get(timeout=seconds)
    except Empty:
        return b""


# -------------------------------------------------------------------------------------- the child


def _serve() -> None:
    """A pair per line in, a verdict per line out, by a fork that the kernel kills when it is late.

    No handler of ours can interrupt 9^{9^{9^9}}, a single call into C; a signal without a handler
    can. A new fork has sympy loaded already, so a hang costs CPU_SECONDS and not an import.
    """
    parse, agree = _tools()
    for warm in (r"\frac{1}{x_{1}}+2\sqrt{3}", r"e^{2}\cdot(x+1)(y-5!)", r"\sin(x^{\circ})-\pi"):
        parse(warm)  # the parser learns its grammar as it goes; forks inherit what it learned
    print("ready", flush=True)
    while worker := os.fork():
        _, status = os.waitpid(worker, 0)
        if not os.WIFSIGNALED(status):
            return  # end of input
        print("null", flush=True)
    for timer in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(timer, signal.SIG_DFL)
    while line := _read_line():
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS)
        a, b, scaled = json.loads(line)
        try:
            verdict = agree(parse(a), parse(b), scaled)
        except Exception:  # noqa: BLE001 - sympy raises anything at all on what it cannot read
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


def _read_line() -> bytes:
    """One line of stdin and not a byte more: what follows may be for the next fork."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _tools():
    """(parse, agree): here, so that only the child pays for sympy."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy.core.function import AppliedUndef

    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)

    def parse(latex: str):
        options = {"normalization_config": None, "conversion_config": config}
        read = latex2sympy(latex, convert_degrees=True, **options)
        return read.subs(sympy.Symbol("i"), sympy.I).doit()

    def stands_for(x, y) -> bool:
        """Has x 12 decimals or more, of a y that has no end? 0.866025403784 may stand for a root;
        0.866 may not."""
        ends = [each.is_Rational and 10**20 % each.q == 0 for each in (x, y)]
        return ends == [True, False] and x.q >= 10**12

    def agree(x, y, scaled: bool) -> bool | None:
        """Exact for rational numbers; else by value at random points (Schwartz-Zippel)."""
        if x.has(AppliedUndef, sympy.nan, sympy.zoo) or y.has(AppliedUndef, sympy.nan, sympy.zoo):
            return None
        if x == y:
            return True
        symbols = sorted(x.free_symbols | y.free_symbols, key=str)
        loose = stands_for(x, y) or stands_for(y, x)
        if not scaled and x.is_Rational and y.is_Rational and not loose:
            return False
        # 2^{1/2^{1000}} is 1 to 300 digits: as many digits more as the numbers in it have.
        numbers = x.atoms(sympy.Rational) | y.atoms(sympy.Rational)
        size = max((len(str(n)) for n in numbers), default=0)
        tolerance = sympy.Rational(10) ** -(12 if loose else 25 + size)
        draw, ratio, seen = random.Random(0), None, 0
        # Positive points first. sqrt(x^2) and x agree on those alone: that is "not known".
        for signs in ((1,), (1,), (1,), (-1,), (-1, 1), (-1, 1)) if symbols else ((1,),):
            values = (draw.choice(signs) * draw.randint(200, 4000) for _ in symbols)
            point = {s: sympy.Rational(v, 997) for s, v in zip(symbols, values, strict=True)}
            p, q = (sympy.N(each, 40 + size, subs=point) for each in (x, y))
            if not (p.is_number and q.is_number and p.is_finite and q.is_finite):
                continue
            seen += 1
            if scaled:
                if p == 0 or q == 0 or not (p / q).is_real:
                    return None
                ratio = p / q if ratio is None else ratio
                p, q = p, q * ratio
            if abs(p - q) > tolerance * max(abs(p), abs(q)):
                return None if -1 in signs and seen > 3 and not scaled else False
        if seen < (3 if symbols else 1):
            return None
        return bool(ratio is None or ratio > 0)

    return parse, agree


if __name__ == "__main__":
    _serve()
