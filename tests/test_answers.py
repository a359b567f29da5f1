"""Answers: extraction and equality, against hand-made tables and hostile text."""

import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing import checker
from plumbing.answers import boxed_answer, equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1,3\}}", r"\{1,3\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"a stray } brace, \boxed{4}", "4"),
        (r"an open { brace, \boxed{4}", "4"),
        (r"\boxed{1} and then \boxed{2", "1"),  # an unclosed box is no answer
        (r"\boxed{12", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 10_000 + "}" * 10_000, "\\boxed{" * 100_000, "{" * 10_000 + "\\boxed{1}"]
)
def test_extraction_is_linear_in_nested_braces(text):
    started = time.monotonic()
    boxed_answer(text)
    assert time.monotonic() - started < 5  # quadratic would be minutes


# The pairs that a string match or a popular grader gets wrong, then more of the same kinds.
EQUALITY = r"""
\frac{1+\sqrt5}{2} | (1+\sqrt5)/2 | yes
\frac{1}{x+1} | 1/x+1 | no
3^{x+1} | 3^x+1 | no
-1\frac{1}{2} | -3/2 | yes
204_5 | 2045 | no
6\text{ and }8 | 6 | no
x=5 | 5 | yes
x=5 | y=5 | no
7=11a+c | 11a+c | no
\text{second} | \text{minute} | no
-2,1 | 1,-2 | yes
32349 | 32,\!349 | yes
32349 | 32,349 | yes
a+b+c | c+b+a | yes
(-\infty,2) | (-∞,2) | yes
(1,2) | [1,2] | no
(1,3) | \{1,3\} | no
\pm2021 | 2021 | no
5\% | 0.05 | no
1/4 | 0.25 | yes
1/3 | 0.333333 | no
64 | 64\text{ square feet} | yes
\dfrac{3}{4} | \tfrac34 | yes
90^\circ | 90 | yes
10\text{ cm} | 10 | yes
\$18.90 | 18.90 | yes
(C) | \text{C} | yes
(3,-1) | (5,2) | no
(3,-1) | (-1,3) | no
(3,-1) | ( 3, -1 ) | yes
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2) | yes
(1,2,3) | (1,2) | no
(0,9) \cup (9,36) | (0,9)\cup(9,36) | yes
(0,9) \cup (9,36) | (0,9) | no
007 | 7 | yes
12 | 21 | no
+5 | 5 | yes
5. | 5 | yes
1,234 | 1,23,4 | no
\sqrt{2} | 1.41421356 | no
2^{10} | 1024 | yes
1 2 | 12 | no
\cot x | \cot(x) | yes
2\pi r | 2\pi\cdot r | yes
2\pi r | 2 \pi  r | yes
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | yes
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\3\end{pmatrix} | no
x \in [-2,7] | [-2,7] | yes
11\sqrt2 | 11\sqrt{2} | yes
"""


@pytest.mark.parametrize("line", EQUALITY.strip().splitlines())
def test_equality_against_the_table_in_both_directions(line):
    a, b, verdict = line.split(" | ")
    assert equal(a, b) is (verdict == "yes")
    assert equal(b, a) is (verdict == "yes")
    assert equal(a, a)
    assert equal(b, b)


def test_no_answer_equals_nothing():
    assert not equal(None, None)
    assert not equal(None, "5")
    assert not equal("", "")
    assert not equal("$", "$")  # nothing is left of it


BOMBS = [
    "9^{9^{9^9}}",
    "9^{9^{9^{9}}}+1",
    "\\frac{" * 50,
    "{" * 10_000 + "}" * 10_000,
    "10^{10^{10}}!",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_neither_hangs_nor_stops_the_checker(bomb):
    assert equal("1/3", "2/6")  # the child is up
    started = time.monotonic()
    assert not equal(bomb, "7")
    assert time.monotonic() - started < checker.CHECK_SECONDS + 1
    assert equal("1/2", "0.5")  # the next pair is answered


def test_a_child_that_hangs_or_dies_is_replaced_and_its_pair_is_not_equal(monkeypatch):
    assert equal(r"\sqrt{2}/2", r"1/\sqrt{2}")  # the child is up
    os.killpg(checker._child.pid, signal.SIGSTOP)  # it and its fork hang for good
    monkeypatch.setattr(checker, "CHECK_SECONDS", 0.5)
    hung = checker._child
    # pairs that no other test has asked about: verdicts are kept
    assert not equal(r"\sqrt{3}/3", r"1/\sqrt{3}")
    assert hung.poll() is not None
    monkeypatch.undo()
    assert equal(r"\sqrt{5}/5", r"1/\sqrt{5}")
    os.killpg(checker._child.pid, signal.SIGKILL)
    checker._child.wait()
    assert not equal(r"\sqrt{6}/6", r"1/\sqrt{6}")
    assert equal(r"\sqrt{7}/7", r"1/\sqrt{7}")


def test_a_pair_that_hangs_is_killed_by_the_kernel_and_kept(monkeypatch):
    """A bomb that no rule of shape knows, straight to the checker."""
    assert checker.same_value("1/\\pi", "\\frac{1}{\\pi}")
    child, started = checker._child, time.monotonic()
    assert checker.same_value("9^{9^{9^{9}}}", "7") is None
    first = time.monotonic() - started
    assert checker.CPU_SECONDS / 2 < first < checker.CHECK_SECONDS + 1
    assert checker.same_value("9^{9^{9^{9}}}", "7") is None
    assert time.monotonic() - started - first < 0.1  # the verdict is kept
    assert checker.same_value("2/\\pi", "\\frac{2}{\\pi}")
    assert checker._child is child  # and the child with sympy in it lives on


def test_equality_works_outside_the_main_thread():
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(equal(f"{i}/8", str(i / 8))))
        for i in range(1, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 7


@settings(max_examples=150, deadline=None)
@given(st.text(), st.text())
def test_nothing_that_a_model_can_write_raises(a, b):
    boxed_answer(a)
    boxed_answer("\\boxed{" + a)
    assert equal(a, b) == equal(b, a)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="\\{}[](),.^_$%0123456789xyfracsqrt ", max_size=30))
def test_nothing_that_looks_like_latex_raises(text):
    assert equal(text, "7") in (True, False)
    if equal(text, "7"):
        assert equal("7", text)
