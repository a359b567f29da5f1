"""CaT-SFT: imitate the pseudo-references instead of being rewarded for agreeing with them.

    python recipes/cat_sft.py [flags of train.py]

The paper's baseline (section 4). The initial policy pi_0 explores and reconciles; the policy is
trained by cross-entropy on the references s:

    loss = -1/|s| sum_t log pi_t(s_t | q, s_<t)

What differs from train.py: who explores (pi_0 instead of pi_t), and the update. Cross-entropy needs
no code of its own: it is the policy gradient of a sample with advantage 1, without a KL. What
departs from the paper: it makes its data set first and runs over it. Here each step draws new
rollouts, at a constant learning rate. Validation is on the references' cross-entropy and reads no
label.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from grpo import policy_step
from plumbing import ranks
from plumbing.answers import boxed_answer
from plumbing.draws import seed_of
from rewards import Rewards
from rollout import Rollout
from synthesize import AGGREGATORS, Anchor


def references_of(cfg, where, questions, engine, aggregate) -> tuple[list, list, list]:
    """(groups, references, targets), all by pi_0: Q groups of G, Q, and what is to be imitated.

    A target is (the chat of q, its reference as a rollout). A reference that was cut off, or that
    should end with an answer and does not, is none: nobody should imitate it.
    """
    prompts, seed = [q.messages for q in questions], seed_of(cfg.seed, where, "rollouts")
    groups = engine.sample(prompts, cfg.group_size, cfg.sampling, policy=False, seed=seed)
    anchor = Anchor(engine, cfg.sampling, seed=(cfg.seed, where, "anchor"))
    # Rank 0's for all: the answer checker gives up by the clock, and so not everywhere alike.
    references, targets = ranks.gather(aggregate(questions, groups, anchor))[0], []
    for q, group, s in zip(questions, groups, references, strict=True):
        answered = not q.boxed or boxed_answer(s.text) is not None
        if s.ids and s.finish_reason == "stop" and answered:
            nothing = [0.0] * len(
                s.ids
            )  # no engine's log-probabilities: no weights are made of them
            target = Rollout(s.text, s.ids, nothing, s.finish_reason, group[0].prompt_ids)
            targets.append((q.messages, target))
    return groups, references, targets


def sft_step(cfg, step, questions, engine, aggregate, reward, update) -> train.Step:
    """One step of CaT-SFT on Q questions; its parameters are those of train.cat_step."""
    groups, references, targets = references_of(cfg, step, questions, engine, aggregate)
    engine.sleep()
    numbers = update([[s] for _, s in targets], torch.ones(len(targets), 1))
    engine.sync()
    R = torch.full((len(questions), cfg.group_size), math.nan)  # nobody is rewarded
    not_measured = ("frac_reward_zero_std", "sampling/logp_difference_mean")
    numbers |= dict.fromkeys((*not_measured, "sampling/logp_difference_max"))
    numbers["loss"] = numbers["nll"]  # the policy gradient's own loss is always -1
    return train.Step(groups, references, Rewards(R), R, numbers)


def imitate(model, optimizer, groups, rewards, cfg, logprobs, **sums) -> dict[str, float]:
    """Cross-entropy on the only rollout of each group; in the place of grpo.update."""
    rollouts = [o for group in groups for o in group]
    plain = {"beta": 0.0, "temperature": 1.0, "importance_cap": None, "updates_per_step": 1}
    A = torch.ones(len(rollouts))
    return policy_step(model, optimizer, rollouts, A, replace(cfg, **plain), logprobs, **sums)


def validator(cfg, engine, judge, questions):
    """Scores the policy by minus the cross-entropy of the validation questions' references."""
    aggregate, targets = AGGREGATORS[cfg.aggregator], []
    if questions:
        *_, targets = references_of(cfg, "validation", questions, engine, aggregate)

    def validate() -> float | None:
        prompts, ids = [chat for chat, _ in targets], [s.ids for _, s in targets]
        logprobs = engine.score(prompts, ids, policy=True)
        return sum(map(sum, logprobs)) / sum(map(len, logprobs)) if logprobs else None

    return validate


METHOD = train.Method(
    "sft", "recipes/cat_sft.py", __doc__.split("\n")[0], sft_step, imitate, validator,
    settings={"validate_every": 5},
    ignores=frozenset({"beta", "kl", "updates_per_step", "length_limit"}),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(train.main(method=METHOD))
