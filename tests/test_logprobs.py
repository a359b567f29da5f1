"""Log-probabilities of given tokens: the definition in grpo.py, and its faster equal.

What is said of values and gradients holds for both. The truth is one plain forward pass of each
rollout by itself.
"""

import pytest
import torch

from grpo_helpers import (
    ANSWERS,
    COMPLETIONS,
    FAST,
    PLAIN,
    PROMPTS,
    REPEATED,
    batch,
    both,
    distance,
    gemma,
    gradient,
    one_step,
    plain_logprobs,
    rollouts_of,
    tiny,
    with_lora,
)  # fmt: skip

models = pytest.mark.parametrize("base", [tiny, gemma])
checkpointed = pytest.mark.parametrize("checkpointing", [False, True])


@both
def test_they_equal_the_plain_forward_pass(policy, token_logprobs):
    model, _ = policy
    logprobs, mask, entropy = token_logprobs(model, batch(), 0.7)
    assert logprobs.shape == mask.shape == entropy.shape == (4, 6)
    for i, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        # alone, without padding, through the model's own head
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double() / 0.7
        every, n = torch.log_softmax(logits[len(prompt) - 1 : -1], -1), len(ids)
        expected = every[range(n), ids]
        torch.testing.assert_close(logprobs[i, :n].double(), expected, rtol=1e-4, atol=1e-4)
        expected = -(every.exp() * every).sum(-1)
        torch.testing.assert_close(entropy[i, :n].double(), expected, rtol=1e-4, atol=1e-4)
        # The end token counts (its id 3 is also the padding's), and nothing after it does.
        assert mask[i].tolist() == [1.0] * n + [0.0] * (6 - n)
        assert logprobs[i, n:].tolist() == entropy[i, n:].tolist() == [0.0] * (6 - n)


def set_chunk(monkeypatch, token_logprobs, size):
    monkeypatch.setitem(token_logprobs.__globals__, "LOGIT_CHUNK", size)


@both
def test_chunks_change_neither_values_nor_gradients(policy, monkeypatch, token_logprobs):
    model = policy[0].double()
    results = []
    for chunk in (1, 4, 1024):
        set_chunk(monkeypatch, token_logprobs, chunk)
        model.zero_grad()
        logprobs, _, _ = token_logprobs(model, batch(), 1.0)
        (logprobs * torch.arange(6)).sum().backward()
        results.append((logprobs.detach(), gradient(model)))
    for logprobs, grads in results[1:]:
        torch.testing.assert_close(logprobs, results[0][0])
        torch.testing.assert_close(grads, results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("token_logprobs", "times"), [(PLAIN, 2), (FAST, 1)], ids=["plain", "fast"]
)
def test_logits_exist_for_a_chunk_at_a_time(policy, monkeypatch, token_logprobs, times):
    """Every tensor with a vocabulary dimension has LOGIT_CHUNK rows, in the backward pass too.

    The definition computes logits again there; the faster one has taken the derivatives already.
    """
    model, _ = policy
    set_chunk(monkeypatch, token_logprobs, 5)
    head, seen, kept = model.get_base_model().get_output_embeddings(), [], []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))

    def keep(tensor):
        if tensor.data_ptr() != head.weight.data_ptr():
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _, _ = token_logprobs(model, batch(), 1.0)
    # 15 completion tokens, and no token of a prompt
    assert [tuple(s) for s in seen] == [(5, head.out_features)] * 3
    assert kept  # for the backward pass ...
    assert not [s for s in kept if head.out_features in s]  # ... but no row of the vocabulary
    logprobs.sum().backward()
    hook.remove()
    assert sum(s[0] for s in seen) == 15 * times
    assert max(s[0] for s in seen) == 5


def values_and_gradients(model, token_logprobs, rollouts, weight):
    """(log-probabilities, entropies, the gradient of their weighted sum)."""
    model.zero_grad()
    logprobs, mask, entropy = token_logprobs(model, rollouts, 0.8)
    (logprobs * weight * mask).sum().backward()
    return logprobs.detach(), entropy, gradient(model)


@models
@checkpointed
@pytest.mark.parametrize(
    ("prompts", "passes"),
    [(REPEATED, 2), ([*PROMPTS, [0, 20, 3, 1], [0, 7, 7, 7, 3, 1]], 1)],
    ids=["shared", "unshared"],
)
def test_the_faster_one_equals_the_definition(base, checkpointing, prompts, passes):
    """To 1e-7, where prompts are read once for several completions, and where all differ."""
    base = base()
    model = with_lora(base, 0.1, checkpointing)
    weight, calls = torch.linspace(-1, 1, 6, dtype=torch.double), []
    hook = base.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        FAST(model, rollouts_of(prompts, ANSWERS), 0.8)
    hook.remove()
    assert len(calls) == passes  # two: the prompts, and then what follows them
    plain, fast = (
        values_and_gradients(model, f, rollouts_of(prompts, ANSWERS), weight) for f in (PLAIN, FAST)
    )
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.dtype == theirs.dtype == torch.double
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) < 1e-7


@models
@checkpointed
@both
def test_completions_of_one_prompt_get_the_values_and_gradients_of_those_read_alone(
    base, checkpointing, token_logprobs
):
    base = base()
    model = with_lora(base, 0.1, checkpointing)
    weight = torch.linspace(-1, 1, 6, dtype=torch.double)
    rollouts, alone = rollouts_of(REPEATED, ANSWERS), []
    for o in rollouts:
        alone.append(plain_logprobs(model, o))
        (alone[-1] * weight[: len(o.ids)]).sum().backward()
    grad_alone = gradient(model)

    model.zero_grad()
    read, first = [], base.get_decoder().layers[0].mlp
    hook = first.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[:2].numel()))
    logprobs, mask, _ = token_logprobs(model, rollouts, 1.0)
    # The faster one reads three prompts of at most 7 tokens but the last, and six tails of at most
    # 1 + 6 - 1; the definition six rows of at most 6 + 5.
    assert sum(read) == (3 * 6 + 6 * 6 if token_logprobs is FAST else 6 * 11)
    (logprobs * weight * mask).sum().backward()
    hook.remove()
    for i, expected in enumerate(alone):
        ours = logprobs[i, : len(expected)]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    # Models compute their norms in float32 even here, so rounding is 1e-9 and more.
    assert distance(gradient(model), grad_alone) < 1e-7
    with torch.no_grad():
        again, _, _ = token_logprobs(model, rollouts, 1.0)
    torch.testing.assert_close(again, logprobs.detach())


@pytest.mark.parametrize(("length", "read"), [(8, [(1, 5), (2, 8)]), (10, [(2, 6 + 9)])])
def test_a_prompt_is_shared_only_where_that_saves_a_fifth_of_the_tokens(policy, length, read):
    """6 of 28 tokens are; 6 of 32 are not worth a second pass and slower attention."""
    model, _ = policy
    seen, first = [], model.get_base_model().get_decoder().layers[0].mlp
    hook = first.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[:2])))
    FAST(model, rollouts_of([PROMPTS[0]] * 2, [[30] * length] * 2), 1.0)
    hook.remove()
    assert seen == read


@checkpointed
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_step_with_either_has_the_same_gradient(checkpointing, beta):
    model, rollouts = with_lora(tiny(), 0.1, checkpointing), rollouts_of(REPEATED, ANSWERS)
    A = torch.tensor([1.2, -0.7, 0.4, -0.9, 0.3, 2.0])
    settings = {"beta": beta, "token_budget": 40, "temperature": 0.8, "importance_cap": 2.0}
    (numbers, (plain,)), (others, (fast,)) = (
        one_step(model, rollouts, A, token_logprobs=f, **settings) for f in (PLAIN, FAST)
    )
    assert distance(fast, plain) < 1e-7
    for name, value in numbers.items():
        near = None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)
        assert others[name] == near, name


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient():
    grads, calls = [], []
    for checkpointing in (False, True):
        base, count = tiny(), []
        model = with_lora(base, checkpointing=checkpointing)
        first = base.get_decoder().layers[0].mlp
        first.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        rollouts, A = batch(), torch.tensor([1.2, -0.7, 0.4, -0.9])
        grads.append(one_step(model, rollouts, A, beta=0.0, token_budget=10_000)[1][0])
        calls.append(len(count))
    assert calls == [1, 2]
    assert distance(grads[1], grads[0]) < 1e-9
