"""Algorithm 1 as it is taken: who is asked for what, in which order, and what the update gets."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import grpo
import rewards
import train
from plumbing.logprobs import token_logprobs
from plumbing.settings import config, settle
from synthesize import AGGREGATORS
from tasks import load_sums, without_labels


class Spy:
    """The real engine, and what it was asked, in order."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []
        self.encode, self.context = engine.encode, engine.context

    def sample(self, prompts, n, sampling, *, policy=True, **options):
        who = "pi_t" if policy else "pi_0"
        self.calls.append((who, len(prompts), n, sampling.temperature, sampling.max_new_tokens))
        return self.engine.sample(prompts, n, sampling, policy=policy, **options)

    def sleep(self):
        self.calls.append("sleep")

    def sync(self):
        self.calls.append("sync")


@pytest.fixture
def taken(engine, policy):
    """A step of three questions, with the real functions of the run."""
    given = {"group_size": 4, "temperature": 0.9, "max_new_tokens": 48, "length_limit": 38}
    cfg = config(settle({"engine": "transformers", **given})[1])
    spy = Spy(engine)
    weights = [p for p in policy[0].parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    update = partial(grpo.update, policy[0], optimizer, cfg=cfg.grpo, logprobs=token_logprobs)
    learnt_from, before = [], [w.detach().clone() for w in weights]

    def noted(groups, R):
        spy.calls.append("update")
        learnt_from.append((groups, R))
        return update(groups, R)

    questions = without_labels(load_sums(None)[0][:3])
    reward = partial(rewards.match, judge=None)
    step = train.cat_step(cfg, 0, questions, spy, AGGREGATORS["synthesis"], reward, noted)
    moved = any(not torch.equal(w, was) for w, was in zip(weights, before, strict=True))
    return SimpleNamespace(step=step, calls=spy.calls, learnt_from=learnt_from, moved=moved)


def test_each_stage_of_the_algorithm_asks_whom_it_should(taken):
    """The policy explores, the frozen anchor writes references, and the new weights are synced
    after the update.
    """
    explored, reconciled = ("pi_t", 3, 4, 0.9, 48), ("pi_0", 3, 1, 0.9, 48)
    assert taken.calls == [explored, reconciled, "sleep", "update", "sync"]


def test_the_update_gets_the_rollouts_with_their_rewards_less_the_length_penalty(taken):
    ((groups, R),) = taken.learnt_from
    step = taken.step
    assert groups is step.groups
    assert R is step.R
    lengths = torch.tensor([[len(o.ids) for o in group] for group in groups])  # (3, 4)
    assert 0 < int((lengths > 38).sum()) < 12  # some are too long, and some are not
    assert torch.equal(R, step.rewards.values - (lengths > 38).float())
    agree = rewards.match(None, groups, step.references).values
    assert torch.equal(step.rewards.values, agree)
    assert taken.moved
    assert {"loss", "kl", "grad_norm", "update/skipped"} <= step.numbers.keys()
