"""Rollouts that together exceed the anchor's context are cut evenly, and no more than needed."""

import argparse
import random
from functools import partial

import pytest

import synthesize
from aggregator_helpers import (
    ASKS_THE_ANCHOR,
    ATTEMPT,
    SUMS,
    anchor_of,
    record,
    sums,
    written,
)
from plumbing.checks import check_room
from plumbing.context import CUT
from plumbing.errors import InputError
from synthesize import AGGREGATORS, synthesis_messages
from tasks import Question


def long_texts(boxed):
    """Texts of very different lengths."""
    draw, signs = random.Random(1), "0123456789 =+\n" if boxed else "<&>ab \n"
    return [
        f"start {n} " + "".join(draw.choices(signs, k=k)) + f" end {n}"
        for n, k in enumerate((450, 20, 250, 550, 125))
    ]


@pytest.mark.parametrize("boxed", [True, False])
def test_texts_that_do_not_fit_are_cut_evenly_in_the_middle_and_no_more_than_needed(engine, boxed):
    """Against the truth by trying every limit."""
    texts, new = long_texts(boxed), engine.context - 900
    prompt = partial(synthesis_messages, boxed=boxed)
    encoded = [engine.tokenizer.encode(t, add_special_tokens=False) for t in texts]

    marker = len(engine.tokenizer.encode(CUT, add_special_tokens=False))

    def limited(limit):
        kept = limit - marker
        ends = [(ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]) for ids in encoded]
        cut = [CUT.join(map(engine.tokenizer.decode, pair)) for pair in ends]
        rows = zip(cut, encoded, texts, strict=True)
        return prompt([c if len(ids) > limit else t for c, ids, t in rows])

    def fits(limit):
        return len(engine.encode(limited(limit))) + new <= engine.context

    greatest = max(filter(fits, range(marker, max(map(len, encoded)))))
    messages, count = anchor_of(engine, max_new_tokens=new).shown(texts, prompt)
    assert messages == limited(greatest)
    assert count == messages[0]["content"].count(CUT) == sum(len(ids) > greatest for ids in encoded)
    assert 2 <= count < len(texts)
    shown = messages[0]["content"]
    assert all(f"start {n} " in shown and f" end {n}\n" in shown for n in range(5))
    # Room for `new` goes before max_new_tokens.
    assert anchor_of(engine).shown(texts, prompt, new) == (messages, count)


def test_what_fits_is_shown_whole_to_the_last_token(engine):
    texts, prompt = long_texts(True)[1:3], synthesis_messages
    room = len(engine.encode(prompt(texts)))
    assert anchor_of(engine).shown(texts, prompt, engine.context - room) == (prompt(texts), 0)
    messages, count = anchor_of(engine).shown(texts, prompt, engine.context - room + 1)
    assert (count, messages != prompt(texts)) == (1, True)
    assert texts[0] in messages[0]["content"]  # the shorter


@pytest.mark.parametrize("name", ASKS_THE_ANCHOR)
@pytest.mark.parametrize(("size", "boxed"), [(40, True), (5, False)])
def test_rollouts_of_any_length_are_aggregated(engine, monkeypatch, name, size, boxed):
    if name == "mutual-predictability":  # which reads all of them once for each
        size = min(size, 12)
    text = "ones: 1+2=3\n" * 150 if boxed else "if a < b && c > d:\n" * 150
    rows = [f"{n} {text} {n}" for n in range(size)], ["short"] * size
    groups = [written(engine, row) for row in rows]
    calls = [record(engine, monkeypatch, method) for method in ("sample", "score")]
    anchor = anchor_of(engine, max_new_tokens=24)
    references = AGGREGATORS[name](sums(2, boxed), groups, anchor)
    others = size - (name == "mutual-predictability")  # nobody is shown itself
    assert [s.cut for s in references] == [0 if name == "min-ppl" else others, 0]
    sampled_from, scored = calls
    (prompts,) = sampled_from + scored
    lengths = [len(engine.encode([{"role": "user", "content": p}])) for p in prompts]
    assert max(lengths) + (8 if name == "self-bon" else 24) <= engine.context
    assert name == "min-ppl" or max(lengths) > engine.context - 300  # the room is used


def test_many_short_texts_stay_whole_where_cutting_the_long_one_is_enough(engine):
    """The marker is longer than what it would replace in a short text."""
    short = "\n".join(["ones: 1+2=3"] * 4)
    texts = ["ones: 1+2=3\n" * 400, *[short] * 30]
    messages, count = anchor_of(engine).shown(texts, synthesis_messages, 973)
    assert ATTEMPT.findall(messages[0]["content"])[1:] == [short] * 30
    assert count == 1


def test_self_bon_has_room_for_its_number(engine):
    group = written(engine, ["ones: 1+2=3\n" * 150] * 2)
    (s,) = synthesize.self_bon(SUMS[:1], [group], anchor_of(engine, max_new_tokens=2))
    assert s.cut == 2


@pytest.mark.parametrize(
    ("name", "prompt", "reward"),
    [("self-bon", "1 + 1", "match"), ("synthesis-question", "<" * 300, "rubric")],
)
def test_the_largest_group_that_is_let_through_never_overflows(engine, name, prompt, reward):
    questions = [Question([{"role": "user", "content": prompt}], boxed=reward == "match")]

    def refused(size):
        settings = {"group_size": size, "max_new_tokens": 64, "reward": reward, "model": "tiny"}
        try:
            check_room(argparse.Namespace(**settings), engine, questions, [name])
        except InputError:
            return True
        return False

    size = next(size for size in range(2, 200) if refused(size + 1))
    assert not refused(size)
    groups = [written(engine, ["ones: 1+2=3\n" * 60] * size)]
    (s,) = AGGREGATORS[name](questions, groups, anchor_of(engine, max_new_tokens=64))
    assert s.cut == size
