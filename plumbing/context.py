"""Rollouts that are together too long for the anchor's context are cut to fit it."""

import bisect
from collections.abc import Callable, Sequence
from functools import partial

CUT = "\n[... cut here ...]\n"


def fit(engine, texts: Sequence[str], prompt: Callable, new_tokens: int) -> tuple[list, int]:
    """(`prompt(texts)` with room for `new_tokens` in the context, how many texts were cut for it).

    Texts are cut in the middle, evenly: to the greatest length in tokens that all of them can
    have, marker included. Shorter ones stay whole. The middle goes first because a solution states
    its problem at the start and its answer at the end. plumbing/checks.py has made sure before the
    first step that markers alone fit.
    """
    room = engine.context - new_tokens
    if len(engine.encode(prompt(texts))) <= room:
        return prompt(texts), 0
    decode = partial(engine.tokenizer.decode, skip_special_tokens=True)
    encode = partial(engine.tokenizer.encode, add_special_tokens=False)
    *encoded, marker = [encode(text) for text in [*texts, CUT]]

    def at_most(limit: int) -> list[str]:  # a text that is shorter than the marker would only grow
        kept = limit - len(marker)
        return [
            text
            if len(ids) <= limit
            else decode(ids[: kept // 2]) + CUT + decode(ids[len(ids) - (kept + 1) // 2 :])
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def too_long(limit: int) -> bool:
        return len(engine.encode(prompt(at_most(limit)))) > room

    limits = range(len(marker) + 1, max(map(len, encoded)))
    limit = len(marker) + bisect.bisect_left(limits, True, key=too_long)  # the last that fits
    return prompt(at_most(limit)), sum(len(ids) > limit for ids in encoded)
