"""From rewards (Q, G) to a step: advantages, what is not known, and a KL in the reward.

The truth is autograd in float64, each rollout by itself, and the standard library's statistics.
"""

import math
import statistics

import pytest
import torch

import grpo
from grpo import GRPOConfig
from grpo_helpers import (
    COMPLETIONS,
    FAST,
    PROMPTS,
    both,
    distance,
    gradient,
    in_float32,
    in_pi_0,
    one_update,
    plain_logprobs,
    rollouts_of,
)

# Three questions of two rollouts.
GROUPS = [
    rollouts_of([PROMPTS[0]] * 2, COMPLETIONS[:2]),
    rollouts_of([PROMPTS[2]] * 2, [COMPLETIONS[2], [70, 71, 72]]),
    rollouts_of([PROMPTS[3]] * 2, [[80, 3], COMPLETIONS[3]]),
]
R = torch.tensor([[1.0, 0.0], [0.25, 0.75], [1.0, 1.0]])
FLAT = [o for group in GROUPS for o in group]
TOKENS = sum(len(o.ids) for o in FLAT)
UNKNOWN = float("nan")


def expected_gradient(model, rewards, shaped, loss="token", temperature=1.0):
    """The policy gradient with A = (shaped - its mean) / (the rewards' deviation), per group."""
    losses = []
    for group, given, values in zip(GROUPS, rewards, shaped, strict=True):
        for o, value in zip(group, values, strict=True):
            spread = statistics.stdev(given)
            a = (value - statistics.mean(values)) / spread if spread else 0.0
            new = plain_logprobs(model, o, temperature)
            losses.append(-torch.exp(new - new.detach()) * a)
    model.zero_grad()
    in_tokens = torch.cat(losses).sum() / TOKENS
    (in_tokens if loss == "token" else sum(x.mean() for x in losses) / len(FLAT)).backward()
    return gradient(model)


@both
@pytest.mark.parametrize("form", ["token", "sequence"])
def test_rewards_become_advantages_within_their_groups(policy, form, token_logprobs):
    model = policy[0].double()
    settings = {"loss": form, "beta": 0.0, "token_budget": 30, "token_logprobs": token_logprobs}
    _, (ours,) = one_update(model, GROUPS, R, **settings)
    expected = expected_gradient(model, R.tolist(), R.tolist(), form)
    assert distance(ours, expected) < 1e-6  # advantages are float32


@both
@pytest.mark.parametrize("form", ["token", "sequence"])
def test_a_kl_in_the_reward_equals_the_formula_in_float64(policy, form, token_logprobs):
    """R - beta KL, centred in each group and divided by the deviation of R alone."""
    model, beta = policy[0].double(), 0.3
    settings = {"kl": "reward", "beta": beta, "loss": form, "temperature": 0.8, "token_budget": 30}
    settings |= {"token_logprobs": in_float32(token_logprobs)}
    numbers, (ours,) = one_update(model, GROUPS, R, **settings)
    with torch.no_grad():
        kl = [
            [(plain_logprobs(model, o, 0.8) - in_pi_0(model, o, 0.8)).sum().item() for o in group]
            for group in GROUPS
        ]
    shaped = (R.double() - beta * torch.tensor(kl).double()).tolist()
    expected = expected_gradient(model, R.tolist(), shaped, form, 0.8)
    assert distance(ours, expected) < 1e-5  # a KL is float32
    plain = expected_gradient(model, R.tolist(), R.tolist(), form, 0.8)
    assert distance(plain, expected) > 0.01  # the KL matters here
    assert numbers["kl"] == pytest.approx(sum(map(sum, kl)) / TOKENS, rel=1e-5)


def test_a_kl_in_the_reward_adds_none_to_the_loss(policy):
    """pi_0 is asked once, for the reward; and rollouts of equal rewards are left out."""
    model, asked = policy[0], []

    def counting(model, rollouts, temperature):
        asked.append((len(rollouts), torch.is_grad_enabled()))
        return FAST(model, rollouts, temperature)

    one_update(model, GROUPS, R, kl="reward", beta=0.3, token_logprobs=counting)
    assert sum(n for n, grad in asked if not grad) == 2 * 6  # pi_t and pi_0, for the reward
    assert sum(n for n, grad in asked if grad) == 4


@pytest.mark.parametrize("kl", ["loss", "reward"])
@pytest.mark.parametrize("form", ["token", "sequence"])
def test_a_question_with_an_unknown_reward_is_left_out(policy, kl, form):
    """As if it had not been asked: nothing of it in the loss, its KL or the denominators."""
    model, _ = policy
    settings = {"kl": kl, "beta": 0.05, "loss": form, "token_budget": 30}
    partly = torch.tensor([[1.0, 0.0], [0.25, UNKNOWN], [0.5, 1.0]])
    numbers, (ours,) = one_update(model, GROUPS, partly, **settings)
    without = GROUPS[::2], partly[::2]
    expected, (theirs,) = one_update(model, *without, **settings)
    assert distance(ours, theirs) < 1e-9
    assert numbers == pytest.approx(expected, rel=1e-9)
    whole, _ = one_update(model, GROUPS, partly.nan_to_num(0.75), **settings)
    assert whole["nll"] != pytest.approx(expected["nll"], rel=0.01)


@pytest.mark.parametrize("kl", ["loss", "reward"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_step_without_a_known_reward_changes_nothing(policy, kl, beta):
    """Not even by its KL, and no moment of the optimizer."""
    model, _ = policy
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given = GRPOConfig(kl=kl, beta=beta), FAST
    grpo.update(model, optimizer, GROUPS, R, *given)  # moments that could go on moving the weights
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    numbers = grpo.update(model, optimizer, GROUPS, torch.full((3, 2), UNKNOWN), *given)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(
        torch.equal(old[k], new[k])
        for old, new in zip(moments, optimizer.state.values(), strict=True)
        for k in old
    )
    assert numbers["update/skipped"] == 0
    assert numbers["loss"] == numbers["grad_norm"] == 0
    assert numbers["sampling/logp_difference_max"] is None
    # What no token was there to measure is not called 0.
    for name in ("kl", "clip_ratio", "entropy", "nll", "sampling/logp_difference_mean"):
        assert numbers[name] is None or math.isnan(numbers[name]), name


def test_a_reward_of_one_group_moves_no_other(policy):
    """Advantages are of a group: a constant added to all rewards of one changes nothing."""
    model = policy[0].double()
    _, (ours,) = one_update(model, GROUPS, R, beta=0.0)
    _, (shifted,) = one_update(model, GROUPS, R + torch.tensor([[3.0], [0.0], [-2.0]]), beta=0.0)
    assert distance(shifted, ours) < 1e-6
