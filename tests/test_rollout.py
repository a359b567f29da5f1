"""The transformers engine against transformers' own generate, and against the probabilities it claims to sample from."""

import math
import random
from contextlib import nullcontext

import pytest
import torch

from conftest import truncated
from rollout import Rollout, TransformersEngine
from tasks import TINY_MODEL, InputError, load_base, load_sums

PROMPTS = [q.messages for q in load_sums(None)[1][:6]] + [
    [{"role": "user", "content": "What is 12 + 3? Be quick, please."}]
]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("adapter", [True, False])
def test_greedy_equals_generate_token_for_token(engine, adapter):
    rollouts = [
        group[0]
        for group in engine.sample(PROMPTS, 1, policy=adapter, temperature=0, max_new_tokens=40)
    ]
    for prompt, o in zip(PROMPTS, rollouts, strict=True):
        ids = torch.tensor([engine.encode(prompt)])
        with torch.no_grad():
            if adapter:
                out = engine.model.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
            else:
                with engine.model.disable_adapter():
                    out = engine.model.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
        assert o.ids == out[0, ids.shape[1] :].tolist()
        assert o.prompt_ids == ids[0].tolist()


def test_results_stay_with_their_prompts_whatever_the_batching(policy):
    """Greedy: batches of one and one big batch, whose rows have been sorted, padded and dropped, give the same."""
    wide, narrow = TransformersEngine(*policy), TransformersEngine(*policy, batch_tokens=1)
    a = wide.sample(PROMPTS, 3, temperature=0, max_new_tokens=30)
    b = narrow.sample(PROMPTS, 3, temperature=0, max_new_tokens=30)
    assert [[o.ids for o in group] for group in a] == [[o.ids for o in group] for group in b]
    assert [len(group) for group in a] == [3] * len(PROMPTS)
    for group, messages in zip(a, PROMPTS, strict=True):
        assert all(o.prompt_ids == wide.encode(messages) for o in group)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_tempered_model(engine, temperature):
    for group in engine.sample(PROMPTS, 2, temperature=temperature, max_new_tokens=20, seed=5):
        for o in group:
            logits = (
                logits_of(engine.model, o.prompt_ids + o.ids)[len(o.prompt_ids) - 1 : -1]
                / temperature
            )
            expected = torch.log_softmax(logits, -1)[range(len(o.ids)), o.ids]
            torch.testing.assert_close(
                torch.tensor(o.logprobs).double(), expected, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_models_distribution(engine, temperature):
    n = 4000
    group = engine.sample(PROMPTS[:1], n, temperature=temperature, max_new_tokens=1, seed=1)[0]
    probabilities = torch.softmax(
        logits_of(engine.model, group[0].prompt_ids)[-1] / temperature, -1
    )
    counts = torch.bincount(
        torch.tensor([o.ids[0] for o in group]), minlength=len(probabilities)
    ).double()
    z = (counts - n * probabilities) / (n * probabilities * (1 - probabilities)).sqrt().clamp(min=1)
    assert (
        z.abs().max() < 5
    )  # in standard deviations; an untempered or truncated sampler is far outside
    likely = probabilities > 0.01
    assert (counts[likely] > 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.6), (3, 0.9)])
def test_evaluation_samples_come_from_the_truncated_distribution(engine, top_k, top_p):
    """Temperature, then top-k, then top-p, as the model cards mean it; log-probabilities are of what is left."""
    sizes = []
    for o in engine.sample(
        PROMPTS[:1], 40, temperature=2.0, top_k=top_k, top_p=top_p, max_new_tokens=12, seed=1
    )[0]:
        logits = logits_of(engine.model, o.prompt_ids + o.ids)[len(o.prompt_ids) - 1 : -1]
        for token, logprob, row in zip(o.ids, o.logprobs, logits, strict=True):
            left = truncated(row, 2.0, top_k, top_p)
            assert math.exp(logprob) == pytest.approx(left[token], rel=1e-3)
            sizes.append(len(left))
    assert 1 < max(sizes) < 100  # there was something left to choose from, and something cut off


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(engine):
    torch.rand(3)  # global randomness does not matter
    draw = lambda seed: [
        [o.ids for o in group] for group in engine.sample(PROMPTS, 2, max_new_tokens=20, seed=seed)
    ]  # noqa: E731
    first = draw(1)
    torch.rand(5)
    assert draw(1) == first
    assert draw(2) != first
    assert first[0][0] != first[0][1]  # the n rollouts of a prompt are different draws


def test_rollouts_end_at_any_end_token_and_keep_it(engine):
    """A model with two end tokens. The one that ended a rollout is its last id and is not in its text."""
    engine.stop_ids = [3, 198]
    line_end = engine.tokenizer.encode("\n")
    engine.stop_ids = sorted({3, *line_end})
    for group in engine.sample(PROMPTS, 4, max_new_tokens=25, seed=2):
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
    group = engine.sample(PROMPTS[:1], 2, policy=False, max_new_tokens=10, seed=3)[0]
    for o in group:
        expected = torch.log_softmax(
            logits_of(base, o.prompt_ids + o.ids)[len(o.prompt_ids) - 1 : -1], -1
        )
        torch.testing.assert_close(
            torch.tensor(o.logprobs).double(),
            expected[range(len(o.ids)), o.ids],
            rtol=1e-3,
            atol=1e-3,
        )
    ids = engine.encode(PROMPTS[0])
    assert not torch.allclose(logits_of(engine.model, ids), logits_of(base, ids))


@pytest.mark.parametrize("adapter", [True, False])
def test_score_gives_the_logprobs_of_a_given_completion(engine, adapter):
    o = engine.sample(PROMPTS[:1], 1, policy=adapter, max_new_tokens=12, seed=4)[0][0]
    given = engine.tokenizer.encode("ones: 1+2=3")
    sampled, other = engine.score([PROMPTS[0]] * 2, [o.ids, given], policy=adapter)
    assert sampled == pytest.approx(o.logprobs, abs=1e-3)
    assert len(other) == len(given)
    assert all(lp <= 0 and math.isfinite(lp) for lp in other)


def test_a_prompt_that_does_not_fit_the_context_is_refused(engine):
    with pytest.raises(InputError, match="do not fit"):
        engine.sample(PROMPTS[:1], 1, max_new_tokens=engine.context)


def test_a_rollout_is_frozen():
    with pytest.raises(AttributeError):
        Rollout("", [1], [0.0], "stop", [1]).text = "other"


def test_models_that_cannot_work_are_refused_in_a_sentence(tmp_path, policy):
    with pytest.raises(InputError, match="cannot load the model"):
        load_base(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="cannot load the model"):
        load_base("nobody/no-such-model")
    model, tokenizer = policy
    tokenizer.chat_template = None
    base = model.unload()
    base.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no chat template"):
        load_base(str(tmp_path / "plain"))


def test_a_model_that_rescales_its_logits_is_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    _, tokenizer = load_base(str(TINY_MODEL))
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        logit_scale=0.0625, pad_token_id=3, bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="after the output head"):
        load_base(str(tmp_path))


CHOICES = ("1", "10", "yes", "yes please")


def choice_probabilities(engine, messages, temperature):
    """{choice: probability} under the model held to CHOICES, from plain forward passes: a product over tokens."""
    prompt = engine.encode(messages)
    spelled = [[*engine.tokenizer.encode(c), engine.tokenizer.eos_token_id] for c in CHOICES]
    probabilities = {}
    for choice, ids in zip(CHOICES, spelled, strict=True):
        rows, p = logits_of(engine.model, prompt + ids)[len(prompt) - 1 : -1] / temperature, 1.0
        for t, row in enumerate(rows):
            allowed = sorted({other[t] for other in spelled if other[:t] == ids[:t]})
            p *= float(torch.softmax(row[allowed], -1)[allowed.index(ids[t])])
        probabilities[choice] = p
    return probabilities


def test_choices_come_as_often_as_the_model_that_is_held_to_them_says(engine):
    n, temperature = 2000, 3.0  # at 1 "yes" would be too rare to count
    group = engine.sample(
        PROMPTS[:1], n, temperature=temperature, max_new_tokens=10, seed=1, choices=CHOICES
    )[0]
    probabilities = choice_probabilities(engine, PROMPTS[0], temperature)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert min(probabilities.values()) * n > 10
    for choice, p in probabilities.items():
        ours = [o for o in group if o.text == choice]
        assert abs(len(ours) - n * p) < 5 * math.sqrt(n * p * (1 - p))
        assert {tuple(o.ids) for o in ours} == {
            (*engine.tokenizer.encode(choice), engine.tokenizer.eos_token_id)
        }
        assert math.exp(sum(ours[0].logprobs)) == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_choices_are_the_only_texts_whatever_the_batching(policy, temperature):
    spread = []
    for batch_tokens in (1, 65_536):
        engine = TransformersEngine(*policy, batch_tokens=batch_tokens)
        groups = engine.sample(
            PROMPTS, 20, temperature=temperature, max_new_tokens=10, seed=1, choices=CHOICES
        )
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
    free = engine.sample(PROMPTS, 2, max_new_tokens=20, seed=1)
    engine.sample(PROMPTS, 2, max_new_tokens=20, seed=1, choices=CHOICES)
    assert engine.sample(PROMPTS, 2, max_new_tokens=20, seed=1, choices=()) == free
    assert not {o.text for group in free for o in group} & set(CHOICES)


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
        prompt = engine.encode(messages)
        with nullcontext() if adapter else engine.model.disable_adapter():
            expected = torch.log_softmax(
                logits_of(engine.model, prompt + ids)[len(prompt) - 1 : -1], -1
            )
        assert row == pytest.approx(expected[range(len(ids)), ids].tolist(), abs=1e-4)


def test_a_choice_may_end_with_any_end_token(engine):
    """Qwen 2.5 has two, and its chats end with the larger: were only the first one allowed, "1" would lose to "10"."""
    one = engine.sample(PROMPTS[:1], 400, choices=("1", "10"), max_new_tokens=8, seed=1)[0]
    engine.stop_ids = [2, 3]
    two = engine.sample(PROMPTS[:1], 400, choices=("1", "10"), max_new_tokens=8, seed=1)[0]
    assert engine.tokenizer.eos_token_id == 3
    assert abs(sum(o.text == "1" for o in one) - sum(o.text == "1" for o in two)) < 25
