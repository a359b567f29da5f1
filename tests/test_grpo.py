"""An optimizer step on rollouts with advantages, rule by rule: against autograd in float64.

The truth shares no code with grpo.py: each rollout by itself through the model's own head.
"""

from dataclasses import replace

import pytest
import torch

from grpo import MAX_GRAD_NORM, GRPOConfig, policy_step, sequence_kl
from grpo_helpers import (
    FAST,
    A,
    Recorder,
    batch,
    both,
    distance,
    gradient,
    in_pi_0,
    one_step,
    plain_logprobs,
)


def k3(new, ref):
    return torch.exp(ref - new) - (ref - new) - 1


@both
@pytest.mark.parametrize("form", ["token", "sequence"])
def test_the_gradient_of_a_step_equals_float64_autograd(policy, form, token_logprobs):
    """The whole of it: padding, micro-batches, chunks, adapter on and off."""
    model, _ = policy
    settings = {"loss": form, "beta": 0.05, "temperature": 0.7, "token_budget": 20}
    _, (ours,) = one_step(model, batch(), A, token_logprobs=token_logprobs, **settings)

    model.double()
    model.zero_grad()
    losses = []
    for o, a in zip(batch(), A.double(), strict=True):
        new, ref = plain_logprobs(model, o, 0.7), in_pi_0(model, o, 0.7)
        losses.append(-torch.exp(new - new.detach()) * a + 0.05 * k3(new, ref))
    loss = torch.cat(losses).sum() / 15 if form == "token" else sum(x.mean() for x in losses) / 4
    loss.backward()
    assert distance(ours, gradient(model)) < 1e-5


@both
@pytest.mark.parametrize("updates", [1, 2])
def test_importance_weights_are_truncated_and_weigh_the_surrogate_alone(
    policy, updates, token_logprobs
):
    """min(C, trainer's / engine's probability) on every token of the surrogate, not on the KL."""
    model = policy[0].double()
    off = torch.linspace(-1.5, 1.5, 15, dtype=torch.float64).split([len(o.ids) for o in batch()])
    with torch.no_grad():
        exact = [plain_logprobs(model, o) for o in batch()]
    rollouts = [
        replace(o, logprobs=(x + d).tolist()) for o, x, d in zip(batch(), exact, off, strict=True)
    ]
    settings = {"beta": 0.05, "updates_per_step": updates, "token_budget": 20}
    settings |= {"token_logprobs": token_logprobs}
    ours = one_step(model, rollouts, A, importance_cap=2.0, **settings)[1][-1]

    model.zero_grad()
    losses = []
    for o, a, d in zip(rollouts, A.double(), off, strict=True):
        new, ref = plain_logprobs(model, o), in_pi_0(model, o)
        weights = torch.exp(-d).clamp(max=2.0)
        losses.append(-weights * torch.exp(new - new.detach()) * a + 0.05 * k3(new, ref))
    (torch.cat(losses).sum() / 15).backward()
    expected = gradient(model)
    assert distance(ours, expected) < 1e-5
    assert any((torch.exp(-d) > 2).any() for d in off)  # some weights are truncated
    unweighted = one_step(model, rollouts, A, importance_cap=None, **settings)[1][-1]
    assert distance(unweighted, expected) > 0.1


@both
def test_the_gradient_does_not_depend_on_micro_batches(policy, token_logprobs):
    model = policy[0].double()  # the rule is about the formula: in float32 rounding alone is 1e-6
    grads = [
        one_step(model, batch(), A, token_budget=budget, token_logprobs=token_logprobs)[1][0]
        for budget in (1, 25, 10_000)
    ]
    for g in grads[1:]:
        assert distance(g, grads[0]) < 1e-9


def test_rollouts_without_advantage_are_skipped_when_beta_is_0_and_still_counted(policy):
    model, forwards = policy[0], []

    def counting(model, rollouts, temperature):
        forwards.append(len(rollouts))
        return FAST(model, rollouts, temperature)

    some = torch.tensor([1.0, -1.0, 0.0, 0.0])
    with_kl = one_step(model, batch(), some, beta=1e-12)[1][0]  # not 0: nothing is skipped
    without = one_step(model, batch(), some, beta=0.0, token_logprobs=counting)[1][0]
    assert forwards == [2]  # the two that matter, and no pass for pi_0
    assert distance(with_kl, without) < 1e-5
    forwards.clear()
    none = torch.zeros(4)
    numbers, steps = one_step(model, batch(), none, beta=0.0, token_logprobs=counting)
    assert forwards == []
    assert steps == []
    assert numbers["update/skipped"] == 0


def test_several_updates_take_their_ratio_to_the_trainers_old_logprobs(policy):
    """The engine's log-probabilities do not matter; and the second ratio differs from 1."""
    model, _ = policy
    wrong = [replace(o, logprobs=[-20.0] * len(o.ids)) for o in batch()]
    numbers, steps = one_step(model, wrong, A, updates_per_step=2, lr=0.0)
    # Nothing moved: the same ratio, 1, and the same gradient.
    torch.testing.assert_close(steps[0], steps[1])
    assert numbers["clip_ratio"] == 0
    numbers, steps = one_step(model, wrong, A, updates_per_step=3, lr=0.02, clip=1e-4)
    assert numbers["clip_ratio"] > 0.1  # it moved away from the old policy: tokens are clipped
    assert len(steps) == 3


@both
@pytest.mark.parametrize("budget", [20, 10_000])
def test_the_second_update_equals_float64_autograd_at_the_moved_policy(
    policy, budget, token_logprobs
):
    """Its pi_old is the policy of the first update, whose log-probabilities cost no pass."""
    model = policy[0].double()
    passes, settings = [], {"beta": 0.0, "token_budget": budget}

    def counting(model, rollouts, temperature):
        passes.append(len(rollouts))
        return token_logprobs(model, rollouts, temperature)

    with torch.no_grad():
        old = [plain_logprobs(model, o) for o in batch()]
    more = {"lr": 0.02, "clip": 0.05, "updates_per_step": 2, "token_logprobs": counting}
    start = {name: p.detach().clone() for name, p in model.state_dict().items()}
    numbers, (first, second) = one_step(model, batch(), A, **settings, **more)
    assert sum(passes) == 2 * 4  # one pass of each rollout in each update

    model.load_state_dict(start)
    with torch.no_grad():
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, g in zip(trained, first.split([p.numel() for p in trained]), strict=True):
            p -= 0.02 * g.view(p.shape)
    model.zero_grad()
    losses, clipped = [], 0
    for o, a, before in zip(batch(), A.double(), old, strict=True):
        ratio = torch.exp(plain_logprobs(model, o) - before)
        bounded = ratio.clamp(1 - 0.05, 1 + 0.05)
        losses.append(-torch.where(ratio * a <= bounded * a, ratio * a, bounded * a))
        clipped += int((ratio * a > bounded * a).sum())
    (torch.cat(losses).sum() / 15).backward()
    assert distance(second, gradient(model)) < 1e-5
    assert numbers["clip_ratio"] == pytest.approx(clipped / 30)  # of both updates
    assert 0 < clipped < 15


def test_truncated_rollouts_can_be_left_out_of_loss_and_denominator(policy):
    model, _ = policy
    masked = one_step(model, batch(), A, mask_truncated=True)[1][0]
    alone = one_step(model, batch()[:3], A[:3])[1][0]
    everything = one_step(model, batch(), A)[1][0]
    torch.testing.assert_close(masked, alone)
    assert (masked - everything).norm() > 0.01 * everything.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mismatch_with_the_engine_is_measured_at_the_sampling_temperature(policy, temperature):
    model, _ = policy
    with torch.no_grad():
        exact = [plain_logprobs(model, o, temperature).tolist() for o in batch()]
    rollouts = [replace(o, logprobs=x) for o, x in zip(batch(), exact, strict=True)]
    numbers, _ = one_step(model, rollouts, A, temperature=temperature)
    assert numbers["sampling/logp_difference_max"] < 1e-4
    off = [replace(rollouts[0], logprobs=[lp - 0.5 for lp in rollouts[0].logprobs]), *rollouts[1:]]
    numbers, _ = one_step(model, off, A, temperature=temperature)
    assert numbers["sampling/logp_difference_mean"] == pytest.approx(0.5 * 3 / 15, rel=1e-3)
    assert numbers["sampling/logp_difference_max"] == pytest.approx(0.5, rel=1e-3)


def test_numbers_are_averages_over_the_whole_step_not_the_last_micro_batch(policy):
    model, _ = policy
    whole, _ = one_step(model, batch(), A, token_budget=10_000)
    cut, _ = one_step(model, batch(), A, token_budget=1)
    assert whole.keys() == cut.keys()
    for name in whole:
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    with torch.no_grad():
        kl = sum(k3(plain_logprobs(model, o), in_pi_0(model, o)).sum().item() for o in batch())
        nll = -sum(plain_logprobs(model, o).sum().item() for o in batch())
    assert whole["kl"] == pytest.approx(kl / 15, rel=1e-3)
    assert whole["nll"] == pytest.approx(nll / 15, rel=1e-4)


@both
def test_kl_for_the_reward_is_summed_over_each_rollout(policy, token_logprobs):
    model, _ = policy
    kl = sequence_kl(model, batch(), GRPOConfig(token_budget=12, temperature=0.8), token_logprobs)
    with torch.no_grad():
        for i, o in enumerate(batch()):
            expected = (plain_logprobs(model, o, 0.8) - in_pi_0(model, o, 0.8)).sum()
            assert kl[i].item() == pytest.approx(expected.item(), abs=1e-4)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(policy, bad):
    model, _ = policy
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bad_A = torch.tensor([1.0, bad, 0.0, -1.0])
    numbers = policy_step(model, optimizer, batch(), bad_A, GRPOConfig())
    assert numbers["update/skipped"] == 1
    assert not optimizer.state
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_long_gradient_is_scaled_down_and_logged_as_it_was(policy):
    model, cfg = policy[0], GRPOConfig(importance_cap=None)
    _, (whole,) = one_step(model, batch(), A * 100)
    optimizer = Recorder(trained(model), lr=0.0)
    numbers = policy_step(model, optimizer, batch(), A * 100, cfg)
    taken = torch.cat([g.flatten() for g in optimizer.gradients[0]])
    assert numbers["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)
    assert numbers["grad_norm"] > 2 * MAX_GRAD_NORM
    torch.testing.assert_close(taken, whole * MAX_GRAD_NORM / whole.norm(), rtol=1e-3, atol=1e-6)


def test_a_step_raises_what_was_rewarded_and_leaves_the_anchor_alone(policy):
    model, o = policy[0], batch()[0]
    anchor, before = in_pi_0(model, o), plain_logprobs(model, o).sum().item()
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    rewarded = torch.tensor([1.0, 0.0, 0.0, 0.0])
    cfg = GRPOConfig(beta=0.0, importance_cap=None)
    policy_step(model, optimizer, batch(), rewarded, cfg)
    assert plain_logprobs(model, o).sum().item() > before
    assert torch.equal(anchor, in_pi_0(model, o))
