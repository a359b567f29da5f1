"""The frozen anchor with the real tiny model: what it answers, against plain forward passes."""

import pytest

import synthesize
from aggregator_helpers import (
    ASKS_THE_ANCHOR,
    SUMS,
    anchor_of,
    logprobs_of,
    record,
    rescale_lora,
    sampled,
    surprise_of,
)
from synthesize import AGGREGATORS, Reference, synthesis


@pytest.mark.parametrize("name", ASKS_THE_ANCHOR)
def test_the_frozen_anchor_is_asked_whatever_the_policy_has_become(engine, name):
    groups = sampled(engine, SUMS[:6])
    before = AGGREGATORS[name](SUMS[:6], groups, anchor_of(engine))
    rescale_lora(engine, 40)
    assert sampled(engine, SUMS[:6]) != groups
    assert AGGREGATORS[name](SUMS[:6], groups, anchor_of(engine)) == before


def test_asked_again_the_anchor_draws_anew(engine):
    groups = sampled(engine, SUMS[:3])
    anchor, again = (anchor_of(engine, temperature=3.0) for _ in range(2))
    first, second = (synthesis(SUMS[:3], groups, anchor) for _ in range(2))
    assert first != second
    assert [synthesis(SUMS[:3], groups, again) for _ in range(2)] == [first, second]
    for s in first:
        assert s.tokens == len(s.ids) > 0
        assert s.text == engine.tokenizer.decode(s.ids, skip_special_tokens=True)
        assert s.finish_reason == ("stop" if s.ids[-1] in engine.stop_ids else "length")


def test_another_place_in_the_run_is_another_draw(engine):
    groups = sampled(engine, SUMS[:3])
    drawn = [
        synthesis(SUMS[:3], groups, anchor_of(engine, seed, temperature=3.0)) for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("size", [9, 1])
def test_self_bon_takes_the_rollout_whose_number_the_anchor_finds_likeliest(engine, size):
    # Hot, for variety: of sums it mostly takes the first.
    groups = sampled(engine, SUMS[:12], size, temperature=6.0)
    references, picks = synthesize.self_bon(SUMS[:12], groups, anchor_of(engine)), []
    digits = [engine.tokenizer.encode(str(n + 1), add_special_tokens=False) for n in range(size)]
    assert all(len(ids) == 1 for ids in digits)  # so the first token decides
    for group in groups:
        blocks = [f"<attempt {n}>\n{o.text}\n</attempt>" for n, o in enumerate(group, start=1)]
        asked = [{"role": "user", "content": "\n\n".join([synthesize.BEST_PROMPT, *blocks])}]
        picks.append(int(logprobs_of(engine, asked)[0, [ids[0] for ids in digits]].argmax()))
    picked = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    assert [(s.text, s.ids) for s in references] == [(o.text, o.ids) for o in picked]
    assert {s.tokens for s in references} == {2}  # the number, and the end
    assert len(set(picks)) > 1 or size == 1


def test_min_perplexity_finds_the_rollout_that_the_anchor_finds_likeliest(engine):
    rescale_lora(engine, 10)  # a policy whose own choice would be another
    groups = sampled(engine, SUMS[:6], 5)

    def likeliest(q, group, policy):
        return min(group, key=lambda o: surprise_of(engine, q.messages, o.ids, policy))

    pairs = [*zip(SUMS[:6], groups, strict=True)]
    expected, by_policy = ([likeliest(*pair, policy) for pair in pairs] for policy in (False, True))
    assert expected != by_policy
    references = synthesize.min_perplexity(SUMS[:6], groups, anchor_of(engine))
    assert references == [Reference(o.text, o.ids, o.finish_reason) for o in expected]


def test_mutual_predictability_finds_the_rollout_that_the_anchor_expects_after_the_others(
    engine, monkeypatch
):
    rescale_lora(engine, 10)
    groups, calls = sampled(engine, SUMS[:6], 5), record(engine, monkeypatch, "score")
    references = synthesize.mutual_predictability(SUMS[:6], groups, anchor_of(engine))
    (prompts,) = calls
    flat = [o for group in groups for o in group]
    values = [
        surprise_of(engine, [{"role": "user", "content": p}], o.ids)
        for p, o in zip(prompts, flat, strict=True)
    ]
    best = [min(range(5 * g, 5 * g + 5), key=values.__getitem__) for g in range(6)]
    assert references == [Reference(flat[i].text, flat[i].ids, flat[i].finish_reason) for i in best]
    assert len({i % 5 for i in best}) > 1
