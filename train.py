"""Compute as Teacher: `python train.py` teaches a model from its own parallel answers, without labels.

`cat_step` is the paper's Algorithm 1. In each step, with Q questions q and group size G:

    1. explore             the policy pi_t samples o_1..o_G for each q              rollout.py
    2. reference           the frozen anchor pi_0 reconciles them into s            synthesize.py
    3. reward              R(o_i; s), shape (Q, G)                                  rewards.py
    4. update              GRPO on the advantages of R, with a KL to pi_0           grpo.py

`sft_step` is CaT-SFT (--method sft), the baseline that imitates s instead. Nothing reads a label, unless --reward
physician asks for that oracle. Labels, where a task has them, are read by evaluate.py for the curve and the final table,
and by --validate-every to choose the step.

Under torchrun several ranks take each step together: engine.sample and update share out its work and know all of it.
"""

import argparse
import math
import random
import shlex
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from evaluate import compare, correct, describe, save_comparison
from grpo import sequence_kl, update
from rewards import Rewards, advantages, penalise_length
from rollout import EngineError
from rubrics import MAX_UNKNOWN, REWARDS, JudgeError, physician_scores
from settings import load_engine, parser_of, settle
from synthesize import AGGREGATORS, Anchor, check_aggregators, explore_with_anchor
from tasks import RANK, WORLD, InputError, RankError, add_lora, gather, load_base, load_questions, seed_of

# Mean nats a token between engine and trainer above which a step warns. Rounding alone is far below: about 1e-6 in
# float32 and 0.01 in bf16.
MISMATCH = 0.05


def cat_step(s: argparse.Namespace, step: int, batch: list, engine, judge, policy, optimizer):
    """One step of Algorithm 1 on Q questions: (groups, references, rewards, what happened in numbers)."""
    sampling = {"temperature": s.temperature, "max_new_tokens": s.max_new_tokens}
    clock = [time.perf_counter()]

    # 1. Explore: o_1..o_G ~ pi_t(. | q) for each q.                                         Q groups of G rollouts
    groups = engine.sample([q.messages for q in batch], s.group_size, seed=seed_of(s.seed, step, "rollouts"), **sampling)
    clock.append(time.perf_counter())

    # 2. Reference estimation: s from o_1..o_G, by the frozen anchor pi_0.                   Q references
    anchor = Anchor(engine, partial(seed_of, s.seed, step, "anchor"), **sampling)
    references = AGGREGATORS[s.aggregator](batch, groups, anchor, boxed(s))
    clock.append(time.perf_counter())

    # 3. Reward derivation: R(o_i; s).                                                       (Q, G)
    rewards = REWARDS[s.reward](groups, references, batch, anchor.sample, judge)
    rewards = gather(rewards)[0]  # of rank 0 for all: the answer checker gives up by the clock, not everywhere alike
    penalise_length(rewards, groups, s.length_limit)
    rollouts, kl = [o for group in groups for o in group], None
    if s.kl == "reward" and s.beta:  # R - beta KL, the paper's setting; the default has the KL in the loss
        kl = sequence_kl(policy, rollouts, temperature=s.temperature, token_budget=s.micro_batch_tokens)  # (Q*G,)
    penalty = None if kl is None else s.beta * kl.view(rewards.values.shape)  # (Q, G)
    advantage = advantages(rewards.values, penalty)  # (Q, G)
    clock.append(time.perf_counter())

    # 4. GRPO: one clipped step on the LoRA; from here on the engine samples from the new pi_t.
    engine.sleep()
    numbers = update(
        policy, optimizer, rollouts, advantage.flatten(), clip=s.clip, beta=s.beta if s.kl == "loss" else 0.0,
        form=s.loss, temperature=s.temperature, updates=0 if doubted(rewards.stats) else s.updates_per_step,
        mask_truncated=s.mask_truncated, importance_cap=s.importance_cap or None, token_budget=s.micro_batch_tokens,
    )  # fmt: skip
    engine.sync()
    clock.append(time.perf_counter())

    if kl is not None:
        numbers["kl"] = float(kl.sum()) / sum(len(o.ids) for o in rollouts)
    numbers = describe(batch, groups, references, rewards, advantage) | numbers | {"step_time": clock[-1] - clock[0]}
    phases = ("time/rollouts", "time/references", "time/rewards", "time/update")
    numbers |= {name: clock[i + 1] - clock[i] for i, name in enumerate(phases)}
    return groups, references, rewards, numbers


def sft_step(s: argparse.Namespace, step: int, batch: list, engine, judge, policy, optimizer):
    """One step of CaT-SFT on Q questions (paper, its baseline): explore with pi_0, make references, imitate them.

    Cross-entropy on s needs no code of its own: it is the policy gradient of a sample with advantage 1, without KL.
    """
    started, sampling = time.perf_counter(), {"temperature": s.temperature, "max_new_tokens": s.max_new_tokens}
    groups, references, targets = explore_with_anchor(s, step, batch, engine, sampling)
    engine.sleep()
    numbers = update(
        policy, optimizer, [o for _, o in targets], torch.ones(len(targets)), beta=0.0, form=s.loss,
        token_budget=s.micro_batch_tokens,
    )  # fmt: skip
    engine.sync()
    nothing = torch.full((len(batch), s.group_size), math.nan)  # nobody is rewarded
    rewards = Rewards(nothing)
    numbers = describe(batch, groups, references, rewards, nothing) | numbers
    numbers |= {"loss": numbers["nll"], "step_time": time.perf_counter() - started}
    numbers |= dict.fromkeys(("frac_reward_zero_std", "sampling/logp_difference_mean", "sampling/logp_difference_max"))
    return groups, references, rewards, numbers


def batch_of(questions: list, size: int, step: int, seed: int) -> list:
    """The `size` questions of a step: consecutive ones of an endless list, each pass over the data in a new order."""
    batch, orders = [], {}
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(questions))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/epoch {epoch}").sample(range(len(questions)), len(questions))
        batch.append(questions[orders[epoch][i]])
    return batch


def train(
    s: argparse.Namespace, out: Path, questions: list, engine, judge, policy, optimizer, state: dict, validate
) -> None:
    """Steps state["step"]..s.steps. After each, the run's folder holds all that the next one needs."""
    log = sys.stderr if RANK == 0 else sys.stdout  # where other ranks' words are dropped: rank 0 speaks for all
    bar = tqdm(range(state["step"], s.steps), initial=state["step"], total=s.steps, unit="step", file=log)
    for step in bar:
        if s.validate_every and state["since_best"] >= s.patience:
            bar.write(f"stopping early: no better validation score in the last {s.patience}")
            return
        batch = batch_of(questions, s.prompts_per_step, step, s.seed)
        groups, references, rewards, numbers = STEPS[s.method](s, step, batch, engine, judge, policy, optimizer)
        state["step"] = step + 1
        state["num_tokens"] += sum(len(o.ids) for group in groups for o in group) + sum(r.tokens for r in references)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if numbers["update/skipped"] else 0
        numbers["num_tokens"] = state["num_tokens"]
        better = False
        if s.validate_every and (step + 1) % s.validate_every == 0:
            numbers["validation/score"] = score = gather(validate())[0]
            better = score is not None and score > state["best_score"]
            state |= {"best_score": score, "since_best": 0} if better else {"since_best": state["since_best"] + 1}
        state["doubted_in_a_row"] = state["doubted_in_a_row"] + 1 if doubted(numbers) else 0
        if RANK == 0:
            runs.log_step(out, step, numbers, batch, groups, references, rewards)
            runs.save_checkpoint(out, state, policy, optimizer, better)
        shown = {"reward": numbers["reward"], "agreement": numbers["reference/majority_agreement"]}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None and value == value})
        if doubted(numbers):
            share = f"{numbers['judge/unknown_rate']:.0%}"
            bar.write(f"WARNING: step {step}: {share} of the verdicts are unknown: no update", log)
        if state["doubted_in_a_row"] >= 3:
            raise JudgeError(f"too few verdicts could be read in 3 steps in a row: its answers are in {out}/rollouts.jsonl")
        if (difference := numbers["sampling/logp_difference_mean"] or 0.0) > MISMATCH:
            warning = f"engine and trainer differ by {difference:.2g} nats a token, more than {MISMATCH}"
            bar.write(f"WARNING: step {step}: {warning}: other weights, or too much rounding", log)
        if state["skipped_in_a_row"] >= 3:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in 3 steps in a row, the last one step {step}: lower --lr"
            )


STEPS = {"grpo": cat_step, "sft": sft_step}


def doubted(numbers: dict) -> bool:
    """Whether so many of a step's verdicts are unknown that the rest may not stand for them."""
    return numbers.get("judge/unknown_rate", 0.0) > MAX_UNKNOWN


def boxed(s: argparse.Namespace) -> bool:
    """Whether answers are to end in \\boxed{}: only then can they be compared without a judge."""
    return s.reward == "match"


def validator(s: argparse.Namespace, engine, judge, questions: list):
    """What scores the policy on the validation questions, higher is better; None if too few verdicts could be read.

    For CaT-SFT that is minus the cross-entropy of their references, which reads no label; else the true score.
    """
    sampling = s.eval_sampling | {"max_new_tokens": s.max_new_tokens}
    judged = bool(questions) and questions[0].rubric is not None
    targets = []
    if s.method == "sft" and questions:
        as_trained = {"temperature": s.temperature, "max_new_tokens": s.max_new_tokens}
        _, _, targets = explore_with_anchor(s, "validation", questions, engine, as_trained)

    def validate() -> float | None:
        if s.method == "sft":
            logprobs = engine.score([q for q, _ in targets], [o.ids for _, o in targets], policy=True)
            return sum(map(sum, logprobs)) / sum(map(len, logprobs)) if logprobs else None
        drawn = engine.sample([q.messages for q in questions], 1, seed=seed_of(s.seed, "after"), **sampling)
        answers = [[o.text for o in group] for group in drawn]
        scores = physician_scores(questions, answers, judge) if judged else correct(questions, answers)  # (questions, 1)
        mean = float(scores.nanmean())
        return mean if float(scores.isnan().float().mean()) <= MAX_UNKNOWN else None  # too few were scored

    return validate


def run(out: Path, settings: dict, resume: bool) -> None:
    """One whole run: load, train, compare, plot."""
    s, started = argparse.Namespace(**settings), time.perf_counter()
    train_questions, test_questions = load_questions(s)
    kept = min(s.validation_questions, len(train_questions) // 10) if s.validate_every else 0
    if s.split == "test-time" and s.method == "grpo" and (s.validate_every or s.reward == "physician"):
        raise InputError(
            "with --split test-time the validation's and the physicians' labels would be those of the final table: "
            "take --split held-out, or --validate-every 0 and another --reward"
        )
    if s.validate_every and not kept:
        raise InputError(
            f"{len(train_questions)} questions are too few to keep one in ten for validation: --validate-every 0"
        )
    train_questions, validation = train_questions[kept:], train_questions[:kept]
    if s.method == "grpo" and any(q.answer is None and q.rubric is None for q in validation):
        raise InputError("--validate-every reads labels, and these questions have none: take --validate-every 0")
    gather(zlib.crc32(repr(train_questions + validation + test_questions).encode()), "questions")
    if s.prompts_per_step > len(train_questions):
        raise InputError(f"--prompts-per-step {s.prompts_per_step} is more than there are questions: {len(train_questions)}")
    base, tokenizer = load_base(s.model)
    policy = add_lora(base, s.lora_rank, s.seed, s.gradient_checkpointing)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=s.lr, weight_decay=0.0)
    engine, judge = load_engine(s, policy, tokenizer, out)
    check_aggregators(s, engine, train_questions + validation + test_questions, [s.aggregator])
    state = {"step": 0, "num_tokens": 0, "skipped_in_a_row": 0, "doubted_in_a_row": 0}
    state |= {"best_score": -math.inf, "since_best": 0}
    if resume:
        state = gather(runs.load_checkpoint(out, policy, optimizer) or state, "checkpoint")[0]
        engine.sync()
    if RANK == 0 and resume:
        runs.drop_lines_after(out, state["step"])
        runs.write_config(out, settings)  # --steps may have been raised
    elif RANK == 0:
        runs.create(out, settings)
    gather(None)  # rank 0 has made it
    if not out.exists():
        raise InputError(f"rank {RANK} does not see {out}: on several machines --out must be on a file system they share")
    split = {"train": train_questions, "validation": validation, "test": test_questions}
    if RANK == 0 and any(q.id for q in test_questions):
        runs.write_json(out / "split.json", {name: [q.id for q in part] for name, part in split.items()})
    print(
        f"task {s.task}: trains on {len(train_questions)} questions without labels; the final table asks "
        f"{len(test_questions)} {'of the same' if s.split == 'test-time' else 'others'}\n"
        f"run {out}: {s.model} on {policy.device.type}, rollouts by {s.engine}, "
        f"references by {s.aggregator}\n{s.steps} steps of {s.prompts_per_step} questions x {s.group_size} rollouts, "
        f"learning rate {s.lr:g}",
        flush=True,
    )

    try:
        train(s, out, train_questions, engine, judge, policy, optimizer, state, validator(s, engine, judge, validation))
    finally:  # also after Ctrl-C, perhaps in the middle of an update: the adapter is that of a completed step
        if RANK == 0 and runs.load_checkpoint(out, policy, optimizer, best=True):
            policy.save_pretrained(out / "adapter", save_embedding_layers=False)
            runs.plot(out)

    print(f"comparing on {len(test_questions)} questions ...", flush=True)
    gather(None)  # rank 0 has written the last checkpoint
    gather(runs.load_checkpoint(out, policy, optimizer, best=True), "checkpoint")
    engine.sync()  # the best adapter may not be the last
    names = list(dict.fromkeys(["majority", s.aggregator] if boxed(s) else [s.aggregator]))
    results = compare(s, test_questions, engine, judge, names, [s.group_size], trained=True)
    if RANK == 0:
        save_comparison(out, settings, results, started)


def resume_command(out: Path) -> str:
    start = "torchrun, with its options as before," if WORLD > 1 else "python"
    return f"{start} {shlex.join([sys.argv[0], '--resume', '--out', str(out)])}"


def main(argv: list[str] | None = None) -> int:
    given = vars(parser_of(__doc__.split("\n")[0]).parse_args(argv))
    out = given.get("out")
    try:
        out, settings, resume = settle(given)
        run(out, settings, resume)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (EngineError, JudgeError, RankError) as error:
        print(f"train.py: stopped: {error}; every completed step is saved. To go on: {resume_command(out)}", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}; {out}/checkpoint holds the last step", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        way_out = "add --gradient-checkpointing, --sleep or a smaller --micro-batch-tokens to"
        print(f"train.py: stopped: out of GPU memory: {way_out} {resume_command(out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; every completed step is saved. To go on: {resume_command(out)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
