"""Compute as Teacher: `python train.py` teaches a model from its own parallel answers.

`cat_step` below is Algorithm 1 of the paper. The names in it are the paper's:

    q      a question, without its label                            tasks.Question
    o_i    a rollout: one answer of the policy pi_t to q            rollout.Rollout
    s      the pseudo-reference, made of o_1..o_G                   synthesize.Reference
    R      the reward of o_i, for agreeing with s                   rewards.Rewards
    A      the advantage of o_i within its group                    grpo.advantages
    pi_0   the anchor: the initial policy, frozen. It writes s, and the KL is taken to it
    pi_J   the judge, used where nothing can be checked             rubrics.mark

Policy and anchor are one model: pi_t has a LoRA on, pi_0 is the same base with the LoRA off.

No label reaches a reward or a gradient: `without_labels` removes them before the loop starts (the
reward `physician`, an oracle to compare with, keeps its own). evaluate.py keeps the labels, for the
true accuracy in the log and for the validation score that picks the adapter to keep.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

import grpo
from plumbing import checks, flags, ranks
from plumbing.draws import batch_of, seed_of
from plumbing.engines import load_engine
from plumbing.errors import exit_status
from plumbing.logprobs import token_logprobs
from plumbing.models import add_lora, load_base
from plumbing.progress import LESS_MEMORY, Progress, resume_hint
from plumbing.settings import config, settle
from rewards import REWARDS, Rewards, over_length
from rollout import Engine, Rollout
from synthesize import AGGREGATORS, Anchor, Reference
from tasks import Question, load_questions, without_labels


@dataclass
class Step:
    """What one step made, for the log."""

    groups: list[list[Rollout]]  # Q groups of G
    references: list[Reference]  # Q
    rewards: Rewards
    R: torch.Tensor  # (Q, G), rewards.values after the length limit
    numbers: dict[str, float]  # of the update


def cat_step(
    cfg, step: int, questions: Sequence[Question], engine: Engine,
    aggregate: Callable, reward: Callable, update: Callable,
) -> Step:  # fmt: skip
    """One step of Algorithm 1, on Q questions without labels.

    `aggregate` is an aggregator of synthesize.py, usually `synthesis`. `reward` is a reward of
    rewards.py, usually `match` or `rubric`, with its judge filled in. `update` is grpo.update,
    with the policy, its optimizer and its hyper-parameters cfg.grpo filled in (see `run`).
    """
    # 1. Explore. The policy answers every question G times: o_1..o_G ~ pi_t(. | q).
    prompts = [q.messages for q in questions]
    seed = seed_of(cfg.seed, step, "rollouts")
    groups = engine.sample(prompts, cfg.group_size, cfg.sampling, seed=seed)  # Q groups of G

    # 2. Estimate the reference. The anchor reads the rollouts, not the question, and reconciles
    #    them: s ~ pi_0(. | o_1..o_G). It can be right where every single rollout is wrong.
    anchor = Anchor(engine, cfg.sampling, seed=(cfg.seed, step, "anchor"))
    references = aggregate(questions, groups, anchor)  # Q of them

    # 3. Derive rewards. How well does each rollout agree with its reference? R(o_i; s).
    rewards = reward(questions, groups, references, anchor)  # .values is (Q, G)
    R = rewards.values - over_length(groups, cfg.length_limit)  # (Q, G); NaN: not known

    # 4. Update. R -> advantages A (Q, G) -> one clipped GRPO step on the LoRA, with a KL to pi_0.
    #    From `sync` on, the engine samples from the new pi_t.
    engine.sleep()
    numbers = update(groups, R)
    engine.sync()
    return Step(groups, references, rewards, R, numbers)


@dataclass(frozen=True)
class Method:
    """What is trained, and how. A recipe (recipes/) is another one of these."""

    name: str = "grpo"
    program: str = "train.py"
    about: str = __doc__.split("\n")[0]
    take_step: Callable = cat_step
    update: Callable = grpo.update
    validator: Callable | None = None  # None: the true score, evaluate.validator
    settings: dict = field(default_factory=dict)  # defaults that differ from the task's
    ignores: frozenset = frozenset()  # settings that it does not read


def run(given: dict, method: Method) -> None:
    """One whole run: load, train, evaluate. Raises InputError and what a step raises."""
    import evaluate  # the watcher and the final table; no step calls it

    started = time.perf_counter()
    out, settings, resume = settle(given, method=method.name, more=method.settings)
    given["out"] = out  # so that a run that fails can say how to go on
    cfg = config(settings)
    labelled = load_questions(cfg)
    checks.check_questions(cfg, labelled, reads_labels=method.validator is None)
    questions = without_labels(labelled["train"], oracle=cfg.reward == "physician")

    base, tokenizer = load_base(cfg.model)
    policy = add_lora(base, cfg.lora_rank, cfg.seed, cfg.gradient_checkpointing)
    weights = [p for p in policy.parameters() if p.requires_grad]  # the LoRA's alone
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=0.0)
    engine, judge = load_engine(cfg, policy, tokenizer, out)
    checks.check_room(
        cfg, engine, [q for part in labelled.values() for q in part], [cfg.aggregator]
    )

    validator = method.validator or evaluate.validator
    progress = Progress(cfg, out, policy, optimizer, watch=evaluate.watcher(labelled["train"]))
    progress.begin(settings, resume, labelled)
    progress.validate = validator(cfg, engine, judge, labelled["validation"])
    engine.sync()  # a resumed run's policy is not the initial one
    # `around` notes the time before and after a call, for time/... in the log.
    aggregate = progress.clock.around(AGGREGATORS[cfg.aggregator])
    reward = progress.clock.around(partial(REWARDS[cfg.reward], judge=judge))
    # `logprobs` is the faster version of grpo.token_logprobs. `shared` passes in `add_up`: with
    # several processes, each updates on its share of the questions and gradients are summed.
    update = partial(method.update, policy, optimizer, cfg=cfg.grpo, logprobs=token_logprobs)
    update = ranks.shared(update)

    try:
        for step in progress.steps():
            batch = batch_of(questions, cfg.prompts_per_step, step, cfg.seed)
            made = method.take_step(cfg, step, batch, engine, aggregate, reward, update)
            progress.keep(step, batch, made)
    finally:  # also after Ctrl-C
        if progress.end():
            evaluate.pictures(out)

    print(f"comparing on {len(labelled['test'])} questions ...", flush=True)
    progress.best()  # the adapter with the best validation score, or the last one
    engine.sync()
    evaluate.final_table(cfg, settings, labelled["test"], engine, judge, out, started)


def main(argv: Sequence[str] | None = None, method: Method | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 1 or 130 for a run that stopped."""
    method, given = method or Method(), {}

    def work() -> None:
        taken = set(flags.FLAGS) - method.ignores
        given.update(flags.parse(argv, method.about, taken, more=method.settings))
        run(given, method)

    return exit_status(method.program, work, lambda: resume_hint(given.get("out")), LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
