"""The transformers engine held to a few texts: a judge's yes and no, the number of an attempt."""

import math

import pytest
import torch

from plumbing.decoding import TransformersEngine
from rollout import Sampling
from test_rollout import PROMPTS, logits_after

CHOICES = ("1", "10", "yes", "yes please")


def choice_probabilities(engine, messages, temperature):
    """{choice: probability} under the model held to CHOICES: a product over tokens.

    From plain forward passes.
    """
    prompt = engine.encode(messages)
    spelled = [[*engine.tokenizer.encode(c), engine.tokenizer.eos_token_id] for c in CHOICES]
    probabilities = {}
    for choice, ids in zip(CHOICES, spelled, strict=True):
        p = 1.0
        for t, row in enumerate(logits_after(engine.model, prompt, ids) / temperature):
            allowed = sorted({other[t] for other in spelled if other[:t] == ids[:t]})
            p *= float(torch.softmax(row[allowed], -1)[allowed.index(ids[t])])
        probabilities[choice] = p
    return probabilities


def test_choices_come_as_often_as_the_model_that_is_held_to_them_says(engine):
    n, temperature = 2000, 3.0  # at 1 "yes" would be too rare to count
    (group,) = engine.sample(PROMPTS[:1], n, Sampling(temperature, 10), seed=1, choices=CHOICES)
    probabilities = choice_probabilities(engine, PROMPTS[0], temperature)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert min(probabilities.values()) * n > 10
    for choice, p in probabilities.items():
        ours = [o for o in group if o.text == choice]
        assert abs(len(ours) - n * p) < 5 * math.sqrt(n * p * (1 - p))
        spelled = (*engine.tokenizer.encode(choice), engine.tokenizer.eos_token_id)
        assert {tuple(o.ids) for o in ours} == {spelled}
        assert math.exp(sum(ours[0].logprobs)) == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_choices_are_the_only_texts_whatever_the_batching(policy, temperature):
    spread = []
    for batch_tokens in (1, 65_536):
        engine = TransformersEngine(*policy, batch_tokens=batch_tokens)
        groups = engine.sample(PROMPTS, 20, Sampling(temperature, 10), seed=1, choices=CHOICES)
        flat = [o for group in groups for o in group]
        assert len(flat) == 20 * len(PROMPTS)
        assert {o.text for o in flat} <= set(CHOICES)
        assert {o.finish_reason for o in flat} == {"stop"}
        spread.append([[o.text for o in group] for group in groups])
    if temperature == 0:
        assert spread[0] == spread[1]
        assert all(len(set(texts)) == 1 for texts in spread[0])
    else:
        assert len({text for texts in spread[0] for text in texts}) > 1


def test_choices_do_not_stay_for_the_next_call(engine):
    sampling = Sampling(max_new_tokens=20)
    free = engine.sample(PROMPTS, 2, sampling, seed=1)
    engine.sample(PROMPTS, 2, sampling, seed=1, choices=CHOICES)
    assert engine.sample(PROMPTS, 2, sampling, seed=1, choices=()) == free
    assert not {o.text for group in free for o in group} & set(CHOICES)


def test_a_choice_may_end_with_any_end_token(engine):
    """Qwen 2.5 has two, and its chats end with the larger.

    Were only the first one allowed, "1" would lose to "10".
    """

    def ones():
        sampling = Sampling(max_new_tokens=8)
        (group,) = engine.sample(PROMPTS[:1], 400, sampling, choices=("1", "10"), seed=1)
        return sum(o.text == "1" for o in group)

    with_one = ones()
    engine.stop_ids = [2, 3]
    assert engine.tokenizer.eos_token_id == 3
    assert abs(with_one - ones()) < 25
