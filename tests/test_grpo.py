"""The GRPO step, rule by rule, against formulas in float64 that share no code with grpo.py."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import grpo
from grpo import micro_batches, policy_loss, sequence_kl, token_logprobs, update
from rewards import advantages
from rollout import Rollout
from tasks import TINY_MODEL, add_lora, load_base

PROMPTS = [[0, 10, 11, 12, 3, 1], [0, 10, 11, 3, 1], [0, 20, 21, 22, 23, 3, 1], [0, 10, 3, 1]]
COMPLETIONS = [[30, 31, 3], [40, 41, 42, 43, 44, 3], [50, 3], [60, 61, 62, 63]]


def batch(model=None, temperature=1.0):
    """Four rollouts of different lengths; the last was cut off, the third's end token is also the padding token."""
    rollouts = []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        logprobs = [0.0] * len(ids)
        if model is not None:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[
                    0, len(prompt) - 1 : -1
                ]
            chosen = torch.log_softmax(logits.double() / temperature, -1)[range(len(ids)), ids]
            logprobs = chosen.tolist()
        rollouts.append(Rollout("", ids, logprobs, "stop" if ids[-1] == 3 else "length", prompt))
    return rollouts


A = torch.tensor([1.2, -0.7, 0.4, -0.9])


# ------------------------------------------------------------------------------------------------- advantages


def test_advantages_are_the_standardised_rewards_of_each_group():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    expected = [
        [(r - statistics.mean(g)) / statistics.stdev(g) for r in g]
        for g in rewards.double().tolist()
    ]
    torch.testing.assert_close(
        advantages(rewards).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 8, 12])
def test_equal_rewards_have_no_advantage(value, size):
    assert torch.equal(advantages(torch.full((3, size), value)), torch.zeros(3, size))
    noisy = torch.full((3, size), value)
    noisy[:, 0] += 5e-7  # rounding, not preference
    assert torch.equal(advantages(noisy), torch.zeros(3, size))


def test_a_kl_penalty_shifts_rewards_but_never_makes_a_preference_of_its_own():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    penalty = torch.tensor([[0.1, 0.0, 0.3, 0.0], [0.1, 0.0, 0.3, 0.0]])
    shaped = [0.9, 0.0, 0.7, 0.0]
    scale = statistics.stdev([1, 0, 1, 0])
    expected = torch.tensor([[(r - statistics.mean(shaped)) / scale for r in shaped], [0.0] * 4])
    torch.testing.assert_close(advantages(rewards, penalty), expected)


# ------------------------------------------------------------------------------------------------- log-probabilities


def test_token_logprobs_equal_the_plain_forward_pass(policy):
    model, _ = policy
    logprobs, mask, entropy = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=0.7)
    assert logprobs.shape == mask.shape == entropy.shape == (4, 6)
    for i, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        # alone, without padding, through the model's own head
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double() / 0.7
        every = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        torch.testing.assert_close(
            logprobs[i, : len(ids)].double(), every[range(len(ids)), ids], rtol=1e-4, atol=1e-4
        )
        expected = -(every.exp() * every).sum(-1)
        torch.testing.assert_close(entropy[i, : len(ids)].double(), expected, rtol=1e-4, atol=1e-4)
        assert mask[i].tolist() == [1.0] * len(ids) + [0.0] * (
            6 - len(ids)
        )  # the end token (id 3 = padding) included


def test_chunks_change_neither_values_nor_gradients(policy, monkeypatch):
    model = policy[0].double()
    results = []
    for chunk in (1, 4, 1024):
        monkeypatch.setattr(grpo, "LOGIT_CHUNK", chunk)
        model.zero_grad()
        logprobs, _, _ = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)
        (logprobs * torch.arange(6)).sum().backward()
        results.append((logprobs.detach(), gradient(model)))
    for logprobs, grads in results[1:]:
        torch.testing.assert_close(logprobs, results[0][0])
        torch.testing.assert_close(grads, results[0][1], rtol=1e-5, atol=1e-6)


def test_logits_exist_for_a_chunk_at_a_time(policy, monkeypatch):
    """The largest tensor with a vocabulary dimension has LOGIT_CHUNK rows, in the backward pass too."""
    model, _ = policy
    monkeypatch.setattr(grpo, "LOGIT_CHUNK", 5)
    head, seen = model.get_base_model().get_output_embeddings(), []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    logprobs, _, _ = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)
    logprobs.sum().backward()
    hook.remove()
    assert (
        sum(s[0] for s in seen) == 15
    )  # completion tokens, no prompt token; nothing is computed again going backward
    assert max(s[0] for s in seen) == 5


# Two prompts of different lengths, with three completions and one; a third prompt with two.
GROUPS = [PROMPTS[0]] * 3 + [PROMPTS[2]] + [PROMPTS[3]] * 2
ANSWERS = [*COMPLETIONS[:3], [70, 71, 72], [80, 3], COMPLETIONS[1]]


def gemma():
    """A model of two layers, the first of which sees 4 tokens back; random weights."""
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("load", [lambda: load_base(str(TINY_MODEL))[0], gemma])
def test_completions_that_share_a_prompt_get_the_values_and_gradients_of_those_that_do_not(
    load, checkpointing
):
    base = load().double()
    model = add_lora(base, 8, seed=0, checkpointing=checkpointing).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    weight = torch.linspace(-1, 1, 6, dtype=torch.double)

    alone = []
    for prompt, ids in zip(GROUPS, ANSWERS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        alone.append(torch.log_softmax(logits, -1)[range(len(ids)), ids])
        (alone[-1] * weight[: len(ids)]).sum().backward()
    grad_alone = gradient(model)

    model.zero_grad()
    read = []
    hook = (
        base.get_decoder()
        .layers[0]
        .mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    )
    logprobs, mask, _ = token_logprobs(model, GROUPS, ANSWERS, temperature=1.0)
    assert (
        sum(read) == 3 * 6 + 6 * 6
    )  # three prompts of at most 7 tokens but the last; six tails of at most 1 + 6 - 1
    (logprobs * weight * mask).sum().backward()
    hook.remove()
    for i, expected in enumerate(alone):
        torch.testing.assert_close(logprobs[i, : len(expected)], expected, rtol=1e-6, atol=1e-6)
    # Models compute their norms in float32 even here, so rounding is 1e-9 and more.
    assert (gradient(model) - grad_alone).norm() / grad_alone.norm() < 1e-7
    with torch.no_grad():
        again, _, _ = token_logprobs(model, GROUPS, ANSWERS, temperature=1.0)
    torch.testing.assert_close(again, logprobs.detach())


@pytest.mark.parametrize(("length", "read"), [(8, [(1, 5), (2, 8)]), (10, [(2, 6 + 9)])])
def test_a_prompt_is_shared_only_where_that_saves_a_fifth_of_the_tokens(policy, length, read):
    """6 of 28 tokens are; 6 of 32 are not worth a second pass and slower attention."""
    model, _ = policy
    seen = []
    first = model.get_base_model().get_decoder().layers[0].mlp
    hook = first.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    token_logprobs(model, [PROMPTS[0]] * 2, [[30] * length] * 2, temperature=1.0)
    hook.remove()
    assert seen == read


# ------------------------------------------------------------------------------------------------- the loss


def reference_loss(logp, old, ref, a, lengths, *, clip, beta, form):
    """DeepSeekMath Eq. 3 and the paper's Eq. 6, one token at a time, in float64."""
    losses = []
    for i, n in enumerate(lengths):
        row = []
        for t in range(n):
            ratio = torch.exp(logp[i, t] - old[i, t])
            clipped = min(max(ratio.item(), 1 - clip), 1 + clip)
            flat = torch.tensor(clipped * a[i], dtype=torch.float64)
            surrogate = ratio * a[i] if ratio.item() * a[i] <= clipped * a[i] else flat
            d = ref[i, t] - logp[i, t]
            row.append(-surrogate + beta * (torch.exp(d) - d - 1))
        losses.append(row)
    if form == "token":
        return sum(x for row in losses for x in row) / sum(lengths)
    return sum(sum(row) / len(row) for row in losses) / len(losses)


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_equal_the_formula_in_float64(form, beta):
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 6, 2, 4]
    logp, old, ref = (
        -3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.tensor([[float(t < n) for t in range(6)] for n in lengths])
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, sums = policy_loss(
        ours,
        old,
        ref if beta else None,
        A.double(),
        mask,
        clip=0.2,
        beta=beta,
        form=form,
        total_tokens=15,
        total_rollouts=4,
    )
    expected = reference_loss(
        theirs, old, ref, A.double().tolist(), lengths, clip=0.2, beta=beta, form=form
    )
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    ratios = [
        (torch.exp(logp - old)[i, t].item(), A[i].item())
        for i, n in enumerate(lengths)
        for t in range(n)
    ]
    assert (
        sums["clip_ratio"] == sum((r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in ratios) > 0
    )


def test_k3_is_masked_before_it_is_averaged():
    """Padding holds a log-probability of 0 for both, but even garbage there must not reach the loss."""
    logp = torch.tensor([[-1.0, -1.0, 7.0]])
    ref = torch.tensor([[-1.0, -2.0, -9.0]])
    loss, sums = policy_loss(
        logp, logp, ref, torch.zeros(1), torch.tensor([[1.0, 1.0, 0.0]]),
        clip=0.2, beta=1.0, form="token", total_tokens=2, total_rollouts=1,
    )  # fmt: skip
    assert loss.item() == pytest.approx((math.exp(-1) + 1 - 1) / 2)
    assert sums["kl"] == pytest.approx(math.exp(-1))


# ------------------------------------------------------------------------------------------------- the update


class Recorder(torch.optim.SGD):
    """A real optimizer that also keeps each step's gradient."""

    def step(self, closure=None):
        self.gradients = getattr(self, "gradients", [])
        self.gradients.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def one_update(model, rollouts, advantage, lr=0.0, **settings):
    optimizer = Recorder([p for p in model.parameters() if p.requires_grad], lr=lr)
    numbers = update(model, optimizer, rollouts, advantage, max_grad_norm=1e9, **settings)
    steps = getattr(optimizer, "gradients", [])
    return numbers, [torch.cat([g.flatten() for g in step]) for step in steps]


@pytest.mark.parametrize("form", ["token", "sequence"])
def test_the_gradient_of_an_update_equals_float64_autograd(policy, form):
    """The whole of `update` (padding, micro-batches, chunks, adapter on and off) against a float64 copy of the model."""
    model, _ = policy
    rollouts = batch()
    _, (ours,) = one_update(
        model, rollouts, A, form=form, beta=0.05, temperature=0.7, token_budget=20
    )

    model.double()
    model.zero_grad()

    def logp(o):
        logits = (
            model(input_ids=torch.tensor([o.prompt_ids + o.ids])).logits[
                0, len(o.prompt_ids) - 1 : -1
            ]
            / 0.7
        )
        return torch.log_softmax(logits, -1)[range(len(o.ids)), o.ids]

    losses = []
    for o, a in zip(rollouts, A.double(), strict=True):
        new = logp(o)
        with torch.no_grad(), model.disable_adapter():
            d = logp(o) - new.detach()
        d = d + new.detach() - new
        losses.append(-torch.exp(new - new.detach()) * a + 0.05 * (torch.exp(d) - d - 1))
    loss = torch.cat(losses).sum() / 15 if form == "token" else sum(x.mean() for x in losses) / 4
    loss.backward()
    expected = gradient(model)
    assert (ours.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("updates", [1, 2])
def test_importance_weights_are_truncated_and_weigh_the_surrogate_alone(policy, updates):
    """min(C, trainer's / engine's probability) on every token of the surrogate, not on the KL; against float64 autograd."""
    model = policy[0].double()
    off = torch.linspace(-1.5, 1.5, 15, dtype=torch.float64).split([len(o.ids) for o in batch()])
    exact = [
        token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0][0].detach()
        for o in batch()
    ]
    rollouts = [
        replace(o, logprobs=(x + d).tolist()) for o, x, d in zip(batch(), exact, off, strict=True)
    ]
    settings = {"importance_cap": 2.0, "beta": 0.05, "updates": updates, "token_budget": 20}
    ours = one_update(model, rollouts, A, **settings)[1][-1]

    model.zero_grad()
    losses = []
    for o, a, d in zip(rollouts, A.double(), off, strict=True):
        new = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0][0]
        with torch.no_grad(), model.disable_adapter():
            ref = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0][0]
        weights = torch.exp(-d).clamp(max=2.0)
        losses.append(
            -weights * torch.exp(new - new.detach()) * a
            + 0.05 * (torch.exp(ref - new) - (ref - new) - 1)
        )
    (torch.cat(losses).sum() / 15).backward()
    expected = gradient(model)
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert any((torch.exp(-d) > 2).any() for d in off)  # some weights are truncated
    unweighted = one_update(model, rollouts, A, **settings | {"importance_cap": None})[1][-1]
    assert (unweighted - expected).norm() / expected.norm() > 0.1


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient():
    grads, calls = [], []
    for checkpointing in (False, True):
        base, _ = load_base(str(TINY_MODEL))
        model = add_lora(base, 8, seed=0, checkpointing=checkpointing).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        count = []
        base.get_decoder().layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.append(1)
        )
        grads.append(one_update(model, batch(), A, beta=0.0, token_budget=10_000)[1][0])
        calls.append(len(count))
    assert calls == [1, 2]
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 1e-9


def test_the_gradient_does_not_depend_on_micro_batches(policy):
    model = policy[0].double()  # the rule is about the formula: in float32 rounding alone is 1e-6
    grads = [one_update(model, batch(), A, token_budget=budget)[1][0] for budget in (1, 25, 10_000)]
    for g in grads[1:]:
        assert (g - grads[0]).norm() / grads[0].norm() < 1e-9


def test_rollouts_without_advantage_are_skipped_when_beta_is_0_and_still_counted(
    policy, monkeypatch
):
    model, _ = policy
    advantage = torch.tensor([1.0, -1.0, 0.0, 0.0])
    with_kl = one_update(model, batch(), advantage, beta=1e-12)[1][0]  # not 0: nothing is skipped
    forwards = []
    monkeypatch.setattr(
        grpo,
        "token_logprobs",
        lambda m, p, c, **k: forwards.append(len(c)) or token_logprobs(m, p, c, **k),
    )
    without = one_update(model, batch(), advantage, beta=0.0)[1][0]
    assert forwards == [2]  # the two that matter, and no pass for pi_0
    assert (with_kl - without).norm() / without.norm() < 1e-5
    forwards.clear()
    numbers, steps = one_update(model, batch(), torch.zeros(4), beta=0.0)
    assert forwards == []
    assert steps == []
    assert numbers["update/skipped"] == 0


def test_several_updates_take_their_ratio_to_the_trainers_old_logprobs(policy):
    """Engine log-probabilities far off must not matter; and the second update's ratio must differ from 1."""
    model, _ = policy
    wrong = [replace(o, logprobs=[-20.0] * len(o.ids)) for o in batch()]
    numbers, steps = one_update(model, wrong, A, updates=2, lr=0.0, clip=0.2)
    torch.testing.assert_close(
        steps[0], steps[1]
    )  # nothing moved: the same ratio, 1, and the same gradient
    assert numbers["clip_ratio"] == 0
    numbers, steps = one_update(model, wrong, A, updates=3, lr=0.02, clip=1e-4)
    assert (
        numbers["clip_ratio"] > 0.1
    )  # the policy moved away from the old one, so tokens are clipped
    assert len(steps) == 3


def test_truncated_rollouts_can_be_left_out_of_loss_and_denominator(policy):
    model, _ = policy
    masked = one_update(model, batch(), A, mask_truncated=True)[1][0]
    alone = one_update(model, batch()[:3], A[:3])[1][0]
    everything = one_update(model, batch(), A)[1][0]
    torch.testing.assert_close(masked, alone)
    assert (masked - everything).norm() > 0.01 * everything.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mismatch_with_the_engine_is_measured_at_the_sampling_temperature(policy, temperature):
    model, _ = policy
    rollouts = batch(model, temperature)
    numbers, _ = one_update(model, rollouts, A, temperature=temperature)
    assert numbers["sampling/logp_difference_max"] < 1e-4
    off = [replace(rollouts[0], logprobs=[lp - 0.5 for lp in rollouts[0].logprobs]), *rollouts[1:]]
    numbers, _ = one_update(model, off, A, temperature=temperature)
    assert numbers["sampling/logp_difference_mean"] == pytest.approx(0.5 * 3 / 15, rel=1e-3)
    assert numbers["sampling/logp_difference_max"] == pytest.approx(0.5, rel=1e-3)


def test_numbers_are_averages_over_the_whole_step_not_the_last_micro_batch(policy):
    model, _ = policy
    whole, _ = one_update(model, batch(), A, token_budget=10_000)
    cut, _ = one_update(model, batch(), A, token_budget=1)
    assert whole.keys() == cut.keys()
    for name in whole:
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    kl = [k.item() for k in (token_kl(model, o) for o in batch())]
    assert whole["kl"] == pytest.approx(sum(kl) / 15, rel=1e-3)


def token_kl(model, o):
    with torch.no_grad():
        new = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0].double()
        with model.disable_adapter():
            ref = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0].double()
    return (torch.exp(ref - new) - (ref - new) - 1).sum()


def test_kl_for_the_reward_is_summed_over_each_rollout(policy):
    model, _ = policy
    kl = sequence_kl(model, batch(), temperature=1.0, token_budget=12)
    for i, o in enumerate(batch()):
        with torch.no_grad():
            new = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0]
            with model.disable_adapter():
                ref = token_logprobs(model, [o.prompt_ids], [o.ids], temperature=1.0)[0]
        assert kl[i].item() == pytest.approx((new - ref).sum().item(), abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(policy, bad):
    model, _ = policy
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    numbers = update(model, optimizer, batch(), torch.tensor([1.0, bad, 0.0, -1.0]))
    assert numbers["update/skipped"] == 1
    assert not optimizer.state
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_update_raises_what_was_rewarded_and_leaves_the_anchor_alone(policy):
    model, _ = policy
    rollouts = batch()
    with torch.no_grad(), model.disable_adapter():
        anchor = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)[0]
    before = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)[0].detach().sum(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    update(model, optimizer, rollouts, torch.tensor([1.0, 0.0, 0.0, 0.0]), beta=0.0)
    after = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)[0].detach().sum(1)
    assert after[0] > before[0]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(anchor, token_logprobs(model, PROMPTS, COMPLETIONS, temperature=1.0)[0])


def test_lora_trains_only_float32_adapters_and_starts_as_the_base(policy):
    base, _ = load_base(str(TINY_MODEL))
    base.bfloat16()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = add_lora(base, rank=8, seed=0)
        assert torch.equal(before, model(input_ids=ids).logits)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in trainable.items())
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.bias, config.modules_to_save) == (0.0, "none", None)


@pytest.mark.parametrize("budget", [1, 7, 12, 100])
def test_micro_batches_hold_every_sequence_once_and_keep_the_budget(budget):
    lengths = [5, 1, 9, 4, 2, 7, 7, 3]
    cuts = list(micro_batches(lengths, budget))
    assert sorted(i for rows in cuts for i in rows) == list(range(8))
    assert all(
        len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget for rows in cuts
    )


@pytest.mark.parametrize("budget", [1, 12, 20, 30, 100])
def test_micro_batches_keep_completions_of_a_prompt_together_and_count_it_once(budget):
    lengths, prompts = [3, 6, 2, 3, 2, 6, 6], [*GROUPS, PROMPTS[0]]
    cuts = list(micro_batches(lengths, budget, prompts))
    assert sorted(i for rows in cuts for i in rows) == list(range(7))
    for rows in cuts:
        distinct = {tuple(prompts[i]) for i in rows}
        padded = len(distinct) * max(map(len, distinct)) + len(rows) * max(lengths[i] for i in rows)
        assert len(rows) == 1 or padded <= budget
    order = [tuple(prompts[i]) for rows in cuts for i in rows]
    assert (
        sum(a != b for a, b in itertools.pairwise(order)) == 2
    )  # three prompts, each in one piece
    if budget == 100:
        assert len(cuts) == 1
