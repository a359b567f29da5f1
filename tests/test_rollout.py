"""The transformers engine against transformers' own generate, and against its own claims.

It claims to sample from certain probabilities, and that its log-probabilities are the model's.
"""

import math
import random
from contextlib import nullcontext

import pytest
import torch

from conftest import truncated
from plumbing.decoding import TransformersEngine
from plumbing.errors import InputError
from plumbing.models import TINY_MODEL, load_base
from rollout import Rollout, Sampling
from tasks import load_sums

PROMPTS = [q.messages for q in load_sums(None)[1][:6]] + [
    [{"role": "user", "content": "What is 12 + 3? Be quick, please."}]
]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


def logits_after(model, prompt_ids, ids):
    """(|o|, V): what each of `ids` was drawn from."""
    return logits_of(model, prompt_ids + ids)[len(prompt_ids) - 1 : -1]


def logprobs_of(model, prompt_ids, ids, temperature=1.0):
    every = torch.log_softmax(logits_after(model, prompt_ids, ids) / temperature, -1)
    return every[range(len(ids)), ids]


@pytest.mark.parametrize("adapter", [True, False])
def test_greedy_equals_generate_token_for_token(engine, adapter):
    groups = engine.sample(PROMPTS, 1, Sampling(0, 40), policy=adapter)
    for prompt, (o,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([engine.encode(prompt)])
        with torch.no_grad(), nullcontext() if adapter else engine.model.disable_adapter():
            out = engine.model.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
        assert o.ids == out[0, ids.shape[1] :].tolist()
        assert o.prompt_ids == ids[0].tolist()


def test_results_stay_with_their_prompts_whatever_the_batching(policy):
    """Greedy: batches of one, and one big batch, whose rows were sorted, padded and dropped."""
    wide, narrow = TransformersEngine(*policy), TransformersEngine(*policy, batch_tokens=1)
    a, b = (engine.sample(PROMPTS, 3, Sampling(0, 30)) for engine in (wide, narrow))
    assert [[o.ids for o in group] for group in a] == [[o.ids for o in group] for group in b]
    assert [len(group) for group in a] == [3] * len(PROMPTS)
    for group, messages in zip(a, PROMPTS, strict=True):
        assert all(o.prompt_ids == wide.encode(messages) for o in group)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_tempered_model(engine, temperature):
    for group in engine.sample(PROMPTS, 2, Sampling(temperature, 20), seed=5):
        for o in group:
            expected = logprobs_of(engine.model, o.prompt_ids, o.ids, temperature)
            ours = torch.tensor(o.logprobs).double()
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_models_distribution(engine, temperature):
    n = 4000
    (group,) = engine.sample(PROMPTS[:1], n, Sampling(temperature, 1), seed=1)
    p = torch.softmax(logits_of(engine.model, group[0].prompt_ids)[-1] / temperature, -1)
    drawn = torch.tensor([o.ids[0] for o in group])
    counts = torch.bincount(drawn, minlength=len(p)).double()
    z = (counts - n * p) / (n * p * (1 - p)).sqrt().clamp(min=1)
    # In standard deviations; an untempered or truncated sampler is far outside.
    assert z.abs().max() < 5
    assert (counts[p > 0.01] > 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.6), (3, 0.9)])
def test_evaluation_samples_come_from_the_truncated_distribution(engine, top_k, top_p):
    """Temperature, then top-k, then top-p, as model cards mean it.

    Log-probabilities are of what is left.
    """
    sizes, sampling = [], Sampling(2.0, 12, top_k, top_p)
    for o in engine.sample(PROMPTS[:1], 40, sampling, seed=1)[0]:
        logits = logits_after(engine.model, o.prompt_ids, o.ids)
        for token, logprob, row in zip(o.ids, o.logprobs, logits, strict=True):
            left = truncated(row, 2.0, top_k, top_p)
            assert math.exp(logprob) == pytest.approx(left[token], rel=1e-3)
            sizes.append(len(left))
    assert 1 < max(sizes) < 100  # there was something left to choose from, and something cut off


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(engine):
    def draw(seed):
        groups = engine.sample(PROMPTS, 2, Sampling(max_new_tokens=20), seed=seed)
        return [[o.ids for o in group] for group in groups]

    torch.rand(3)  # global randomness does not matter
    first = draw(1)
    torch.rand(5)
    assert draw(1) == first
    assert draw(2) != first
    assert first[0][0] != first[0][1]  # the n rollouts of a prompt are different draws


def test_rollouts_end_at_any_end_token_and_keep_it(engine):
    """A model with two end tokens.

    The one that ended a rollout is its last id and is not in its text.
    """
    line_end = engine.tokenizer.encode("\n")
    engine.stop_ids = sorted({3, *line_end})
    for group in engine.sample(PROMPTS, 4, Sampling(max_new_tokens=25), seed=2):
        for o in group:
            assert not any(i in engine.stop_ids for i in o.ids[:-1])
            assert o.finish_reason == ("stop" if o.ids[-1] in engine.stop_ids else "length")
            assert o.finish_reason == "stop" or len(o.ids) == 25
            assert len(o.ids) == len(o.logprobs)
            assert "<|end|>" not in o.text


def test_the_generation_config_may_name_several_end_tokens(policy):
    model, tokenizer = policy
    model.generation_config.eos_token_id = [7, 3]
    assert TransformersEngine(model, tokenizer).stop_ids == [3, 7]
    model.generation_config.eos_token_id = 3
    assert TransformersEngine(model, tokenizer).stop_ids == [3]


def test_the_anchor_is_the_base_and_the_adapter_is_on_again_afterwards(engine):
    base, _ = load_base(str(TINY_MODEL))
    sampling = Sampling(max_new_tokens=10)
    for o in engine.sample(PROMPTS[:1], 2, sampling, policy=False, seed=3)[0]:
        expected = logprobs_of(base, o.prompt_ids, o.ids)
        ours = torch.tensor(o.logprobs).double()
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    ids = engine.encode(PROMPTS[0])
    assert not torch.allclose(logits_of(engine.model, ids), logits_of(base, ids))


@pytest.mark.parametrize("adapter", [True, False])
def test_score_gives_the_logprobs_of_a_given_completion(engine, adapter):
    sampling = Sampling(max_new_tokens=12)
    o = engine.sample(PROMPTS[:1], 1, sampling, policy=adapter, seed=4)[0][0]
    given = engine.tokenizer.encode("ones: 1+2=3")
    sampled, other = engine.score([PROMPTS[0]] * 2, [o.ids, given], policy=adapter)
    assert sampled == pytest.approx(o.logprobs, abs=1e-3)
    assert len(other) == len(given)
    assert all(lp <= 0 and math.isfinite(lp) for lp in other)


@pytest.mark.parametrize("adapter", [True, False])
def test_scores_of_very_different_lengths_stay_in_order(policy, adapter):
    """Through many micro-batches, against one plain forward pass each."""
    engine, draw = TransformersEngine(*policy, batch_tokens=8 * 500), random.Random(0)
    prompts = [
        [{"role": "user", "content": "1 + 2 " * draw.choice((1, 3, 40, 150))}] for _ in range(30)
    ]
    completions = [
        [draw.randrange(4, 400) for _ in range(draw.choice((1, 2, 9, 60)))] for _ in prompts
    ]
    scores = engine.score(prompts, completions, policy=adapter)
    assert [len(row) for row in scores] == [len(ids) for ids in completions]
    for messages, ids, row in zip(prompts, completions, scores, strict=True):
        with nullcontext() if adapter else engine.model.disable_adapter():
            expected = logprobs_of(engine.model, engine.encode(messages), ids)
        assert row == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_prompt_that_does_not_fit_the_context_is_refused(engine):
    with pytest.raises(InputError, match="do not fit"):
        engine.sample(PROMPTS[:1], 1, Sampling(max_new_tokens=engine.context))


def test_a_rollout_is_frozen():
    with pytest.raises(AttributeError):
        Rollout("", [1], [0.0], "stop", [1]).text = "other"
