"""The judge's words as verdicts: the word alone counts; all else is unknown, and never made up."""

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubric_helpers import SIZES
from rubrics import healthbench_score, share_of_yes, verdict

NAN = math.nan
YES = ["yes", "Yes", "YES.", " yes \n", "**Yes**", "`yes`", '"Yes!"', "<verdict>yes</verdict>"]
YES += ["<verdict> YES </verdict>", "<Verdict>yes", "> yes", "yes\n\nIt does not.", "✓ yes"]
NO = ["no", "No", "NO!", "**no**", "<verdict>no</verdict>", "no\nyes", "- No.", "(no)"]
UNKNOWN = [None, "", " ", "\n", ".", "y", "n", "yep", "true", "1", "ja", "maybe", "I cannot say"]
UNKNOWN += ["yes and no", "yes/no", "yes, no", "no yes", "not yes", "not sure", "none", "know"]
UNKNOWN += ["yesterday", "eyes", "nothing", "Yes it does", "The answer is yes", "Answer: no"]
UNKNOWN += ["<verdict></verdict>", "<verdict>maybe</verdict>", "verdict yes", "<b>yes</b>"]
UNKNOWN += ["не yes", "ｙｅｓ", "n\u043e", "y\u200bes", "yes\x00no", "\x00", "😀", "!" * 100]


@pytest.mark.parametrize("raw", YES)
def test_the_word_yes_alone_is_yes(raw):
    assert verdict(raw) is True


@pytest.mark.parametrize("raw", NO)
def test_the_word_no_alone_is_no(raw):
    assert verdict(raw) is False


@pytest.mark.parametrize("raw", UNKNOWN)
def test_anything_else_is_unknown(raw):
    assert verdict(raw) is None


def test_a_letter_that_only_looks_like_one_of_yes_is_not_read_as_no():
    assert verdict("yeſ") is not False  # ſ, the long s, matches an s when case is ignored


@pytest.mark.parametrize(
    "raw",
    [
        lambda n: "!" * n,  # what a broken model repeats
        lambda n: "yes" + "!" * n + "x",
        lambda n: "<verdict>" * n,
        lambda n: "yes no " * n,
        lambda n: " " * n + "yes" + "\u200b" * n + "no",
    ],
)
def test_a_verdict_takes_linear_time(raw):
    for n in SIZES:
        started = time.process_time()
        assert verdict(raw(n)) is None
        assert time.process_time() - started < 5


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="yesnoYESNO<>/verdict \n.*!", max_size=12) | st.text())
def test_no_verdict_is_made_up(raw):
    words = re.findall(r"\w+", raw.strip().split("\n")[0].casefold())
    alone = {word for word in words if word != "verdict"}
    possible = {("yes",): (True, None), ("no",): (False, None)}.get((*alone,), (None,))
    assert verdict(raw) in possible


# ----------------------------------------------------------------------------- what becomes of them


def test_the_share_of_yes_leaves_out_what_is_unknown():
    assert share_of_yes([True, False, None, True, False, None]) == 0.5
    assert share_of_yes([False, None]) == 0
    assert math.isnan(share_of_yes([None, None]))
    assert math.isnan(share_of_yes([]))


@pytest.mark.parametrize(
    ("verdicts", "points", "score"),
    [
        ([True, True], [10, 5], 1.0),
        ([True, False], [10, 5], 2 / 3),
        ([False, False], [10, 5], 0.0),
        ([True, True, True], [10, 5, -6], 0.6),  # 15 - 6 of 15
        # A negative one that is not met costs nothing, and adds nothing.
        ([True, True, False], [10, 5, -6], 1.0),
        ([False, False, False], [10, 5, -6], 0.0),
        ([False, True], [4, -10], -2.5),  # not clipped: only a mean over questions is
        ([True, True], [4, -10], -1.5),
        ([True, None], [10, 5], 1.0),  # unknown: left out of both sums
        ([None, False], [10, 5], 0.0),
        ([True, None], [10, -5], 1.0),
        ([None, True], [10, -5], NAN),  # no positive one is left
        ([True, False], [-5, -3], NAN),
        ([None, None], [10, 5], NAN),
        ([], [], NAN),
        ([True, False], [0.5, 1.5], 0.25),
    ],
)
def test_healthbench_score_against_sums_by_hand(verdicts, points, score):
    assert healthbench_score(verdicts, points) == pytest.approx(score, nan_ok=True)


def test_a_verdict_too_few_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="zip"):
        healthbench_score([True], [10, 5])
