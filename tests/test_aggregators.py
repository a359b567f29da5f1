"""Selection without a model, or with one of known probabilities: outcomes that are known by hand.

What the real anchor makes of real rollouts is in test_anchor.py.
"""

import inspect

import pytest

import synthesize
from aggregator_helpers import ATTEMPT, SUMS, KnownModel, anchor_of, group, sampled, sums
from rollout import Rollout
from synthesize import AGGREGATORS, Reference, answer_classes, majority


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (("1", "2", "2"), 1),
        (("7", r"\frac{1}{2}", "0.5", "7", "1/2"), 1),  # equal answers are grouped by meaning
        (("3", "4", "4", "3"), 0),  # a tie goes to the first to appear
        (("5", "6", "7"), 0),
        ((None, "8", None, None), 1),  # rollouts without an answer do not vote
        (("9",), 0),
        (("2", "2", "2"), 0),
    ],
)
def test_majority(answers, winner):
    (reference,) = majority(SUMS[:1], [group(*answers)])
    assert reference.text.startswith(f"rollout {winner}:")


def test_majority_of_no_answers_is_an_empty_reference():
    assert majority(SUMS[:2], [group(None, None), group(None)]) == [Reference("")] * 2


def test_answers_are_classed_by_meaning_in_order_of_appearance():
    classes = answer_classes(group(None, "0.5", "3", r"\frac{1}{2}", None, "3.0", "1/2", "4"))
    assert [[int(o.text[8]) for o in c] for c in classes] == [[1, 3, 6], [2, 5], [7]]
    assert answer_classes(group(None)) == []


def test_single_takes_the_first():
    cut_off = Rollout("cut off", [5, 6, 7], [0.0] * 3, "length", [1])
    first, second = synthesize.single(SUMS[:2], [group("1", "2"), [cut_off, *group("4")]])
    assert first == Reference("rollout 0: \\boxed{1}", [1, 2], "stop")
    assert second == Reference("cut off", [5, 6, 7], "length")


def test_the_lowest_perplexity_is_a_mean_over_tokens_given_the_question():
    # Means of 2, 1, 1.55 and 1 nats; sums of 2, 5, 3.1 and 2.
    table = {10: [-2.0], 11: [-1.0] * 5, 12: [-0.1, -3.0], 13: [-1.0] * 2}
    rollouts = [Rollout(f"text {i}", [i] * len(table[i]), [], "stop", [1]) for i in table]
    likes_12 = SUMS[1].messages[0]["content"]
    model = KnownModel(
        lambda prompt, ids: [-0.5] if prompt == likes_12 and ids[0] == 12 else table[ids[0]]
    )
    chosen = synthesize.min_perplexity(SUMS[:2], [rollouts, rollouts], anchor_of(model))
    assert [s.text for s in chosen] == ["text 11", "text 12"]  # of two equals the first
    assert [s.ids for s in chosen] == [[11] * 5, [12] * 2]
    assert model.prompts == [q.messages[0]["content"] for q in SUMS[:2] for _ in rollouts]


def test_each_rollout_is_predicted_from_all_others_and_never_from_itself():
    groups = [
        [Rollout(f"g{g} text {i}", [10 * g + i], [], "stop", [1]) for i in range(5)]
        for g in range(2)
    ]
    model = KnownModel(lambda prompt, ids: [{3: -0.5, 11: -0.2}.get(ids[0], -1.0)])

    def ask(seed):
        return synthesize.mutual_predictability(SUMS[:2], groups, anchor_of(model, seed))

    assert [s.text for s in ask(0)] == ["g0 text 3", "g1 text 1"]
    shown = [ATTEMPT.findall(prompt) for prompt in model.prompts]
    for (g, i), attempts in zip(((g, i) for g in range(2) for i in range(5)), shown, strict=True):
        assert sorted(attempts) == [f"g{g} text {j}" for j in range(5) if j != i]
    assert any(attempts != sorted(attempts) for attempts in shown)
    questions = [*(q.conversation for q in SUMS[:2]), "What is"]
    assert not any(question in prompt for question in questions for prompt in model.prompts)
    ask(0), ask(1)
    assert model.prompts[10:20] == model.prompts[:10] != model.prompts[20:]


def test_the_most_predictable_rollout_is_the_one_that_others_say_too():
    def reason(t):
        return "length" if t == "b" else "stop"

    said = ["a", "b", "c", "b", "c", "d", "b"]
    rollouts = [Rollout(f"says {t}", [ord(t)] * 2, [], reason(t), [1]) for t in said]
    # A model that copies.
    model = KnownModel(lambda prompt, ids: [float(prompt.count(f"says {chr(ids[0])}")) - 10] * 2)
    (s,) = synthesize.mutual_predictability(SUMS[:1], [rollouts], anchor_of(model))
    assert (s.text, s.finish_reason, s.cut) == ("says b", "length", 0)
    (s,) = synthesize.mutual_predictability(SUMS[:1], [rollouts[:3]], anchor_of(model))
    assert s.text == "says a"  # none is said twice: the first of equals


# ------------------------------------------------------------------------------- all that there are


def test_every_aggregator_has_the_same_signature_and_returns_a_reference_for_each_group(engine):
    groups = sampled(engine, sums(100), 3)
    for name, aggregate in AGGREGATORS.items():
        parameters = list(inspect.signature(aggregate).parameters)
        assert parameters[:3] == ["questions", "groups", "anchor"]
        for boxed in (True, False):
            references = aggregate(sums(100, boxed), groups, anchor_of(engine))
            assert [type(s) for s in references] == [Reference] * 100
            pairs = zip(references, groups, strict=True)
            new = [s.text and s.text not in [o.text for o in g] for s, g in pairs]
            assert any(new) == name.startswith("synthesis")  # the others return what one said


@pytest.mark.parametrize("name", AGGREGATORS)
def test_one_rollout_and_identical_rollouts(engine, name):
    alone = [g[:1] for g in sampled(engine, SUMS[:2], 1)]
    assert all(map(answer_classes, alone))
    for groups in (alone, [g * 4 for g in alone]):
        references = AGGREGATORS[name](SUMS[:2], groups, anchor_of(engine))
        assert len(references) == 2
        if not name.startswith("synthesis"):  # whichever is chosen, it is this one
            assert [s.ids for s in references] == [g[0].ids for g in alone]
