"""Advantages, the loss, and how rollouts are cut into micro-batches: against plain formulas.

The formulas share no code with grpo.py, and are in float64.
"""

import itertools
import math
import statistics

import pytest
import torch

from grpo import GRPOConfig, advantages, micro_batches, policy_loss
from grpo_helpers import PROMPTS, REPEATED, A, rollouts_of

# ------------------------------------------------------------------------------------- advantages


def test_advantages_are_the_standardised_rewards_of_each_group():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    expected = [
        [(r - statistics.mean(g)) / statistics.stdev(g) for r in g]
        for g in rewards.double().tolist()
    ]
    expected = torch.tensor(expected).double()
    torch.testing.assert_close(advantages(rewards).double(), expected, rtol=1e-4, atol=1e-5)


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


# --------------------------------------------------------------------------------------- the loss


def reference_loss(logp, old, ref, a, lengths, cfg):
    """DeepSeekMath Eq. 3 and the paper's Eq. 6, one token at a time."""
    losses = []
    for i, n in enumerate(lengths):
        row = []
        for t in range(n):
            ratio = torch.exp(logp[i, t] - old[i, t])
            clipped = min(max(ratio.item(), 1 - cfg.clip), 1 + cfg.clip)
            flat = torch.tensor(clipped * a[i], dtype=torch.float64)
            surrogate = ratio * a[i] if ratio.item() * a[i] <= clipped * a[i] else flat
            d = ref[i, t] - logp[i, t]
            row.append(-surrogate + cfg.beta * (torch.exp(d) - d - 1))
        losses.append(row)
    if cfg.loss == "token":
        return sum(x for row in losses for x in row) / sum(lengths)
    return sum(sum(row) / len(row) for row in losses) / len(losses)


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_equal_the_formula_in_float64(form, beta):
    generator = torch.Generator().manual_seed(3)
    lengths, cfg = [3, 6, 2, 4], GRPOConfig(clip=0.2, beta=beta, loss=form)
    logp, old, ref = (
        -3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.tensor([[float(t < n) for t in range(6)] for n in lengths])
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, sums = policy_loss(ours, old, ref if beta else None, A.double(), mask, cfg)
    loss = loss / (15 if form == "token" else 4)  # it is a sum, and the step divides
    expected = reference_loss(theirs, old, ref, A.double().tolist(), lengths, cfg)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    ratios = [
        (torch.exp(logp - old)[i, t].item(), A[i].item())
        for i, n in enumerate(lengths)
        for t in range(n)
    ]
    clipped = sum((r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in ratios)
    assert sums["clip_ratio"] == clipped > 0


def test_k3_is_masked_before_it_is_averaged():
    """Padding holds a log-probability of 0 for both, but not even garbage may reach the loss."""
    logp = torch.tensor([[-1.0, -1.0, 7.0]])
    ref = torch.tensor([[-1.0, -2.0, -9.0]])
    mask, cfg = torch.tensor([[1.0, 1.0, 0.0]]), GRPOConfig(beta=1.0)
    loss, sums = policy_loss(logp, logp, ref, torch.zeros(1), mask, cfg)
    assert loss.item() / 2 == pytest.approx((math.exp(-1) + 1 - 1) / 2)
    assert sums["kl"] == pytest.approx(math.exp(-1))


# ---------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("budget", [1, 7, 12, 100])
def test_micro_batches_hold_every_sequence_once_and_keep_the_budget(budget):
    lengths = [5, 1, 9, 4, 2, 7, 7, 3]
    rollouts = rollouts_of([[]] * 8, [[30] * n for n in lengths])
    cuts = list(micro_batches(rollouts, budget))
    assert sorted(i for rows in cuts for i in rows) == list(range(8))
    for rows in cuts:
        assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget


@pytest.mark.parametrize("budget", [1, 12, 20, 30, 100])
def test_micro_batches_keep_completions_of_a_prompt_together_and_count_it_once(budget):
    lengths, prompts = [3, 6, 2, 3, 2, 6, 6], [*REPEATED, PROMPTS[0]]
    cuts = list(micro_batches(rollouts_of(prompts, [[30] * n for n in lengths]), budget))
    assert sorted(i for rows in cuts for i in rows) == list(range(7))
    for rows in cuts:
        distinct = {tuple(prompts[i]) for i in rows}
        padded = len(distinct) * max(map(len, distinct)) + len(rows) * max(lengths[i] for i in rows)
        assert len(rows) == 1 or padded <= budget
    order = [tuple(prompts[i]) for rows in cuts for i in rows]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == 2  # three prompts, each in one piece
    if budget == 100:
        assert len(cuts) == 1


def test_micro_batches_of_like_size_keep_their_order():
    """Few cuts: what is of one size is together, and the smallest come first."""
    rollouts = rollouts_of([[1]] * 4, [[30] * n for n in (5, 1, 4, 2)])
    assert list(micro_batches(rollouts, 9)) == [[1, 3], [2], [0]]
