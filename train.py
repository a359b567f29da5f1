"""Compute as Teacher: `python train.py` teaches a model from its own parallel answers, without labels.

`cat_step` is the paper's Algorithm 1. For each step, with Q questions q and group size G:

    1. explore             the policy pi_t samples o_1..o_G for each q              rollout.py
    2. reference           the frozen anchor pi_0 reconciles them into s            synthesize.py
    3. reward              R(o_i; s), shape (Q, G)                                  rewards.py
    4. update              GRPO on the advantages of R, with a KL to pi_0           grpo.py

It reads no label, unless --reward physician asks for that oracle. Labels, where a task has them, are read by evaluate.py
for the curve and the final table, and by --validate-every to choose the step.
"""

import argparse
import itertools
import math
import random
import resource
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import transformers
from tqdm import tqdm

import runs
from evaluate import correct, describe, final_table, format_table, healthbench_mean, mean_and_error
from grpo import add_lora, advantages, sequence_kl, update
from rewards import penalise_length
from rollout import EngineError, TransformersEngine, VLLMEngine
from rubrics import MAX_UNKNOWN, REWARDS, JudgeError, anchor_judge, physician_scores, server_judge
from settings import parse_arguments, settle
from synthesize import AGGREGATORS, synthesis_messages
from tasks import TASKS, TINY_MODEL, InputError, load_base

# Mean nats a token between engine and trainer above which a step warns. Rounding alone is far below: about 1e-6 in
# float32 and 0.01 in bf16.
MISMATCH = 0.05


def seed_of(seed: int, *where) -> int:
    """A seed for one place in the run, like (step, "rollouts"). Nothing random carries over from step to step, so a
    resumed run needs no random state: it draws what the unbroken one would have drawn."""
    return random.Random(f"{seed}/{where}").getrandbits(62)


def batch_of(questions: list, size: int, step: int, seed: int) -> list:
    """The `size` questions of a step: consecutive ones of an endless list, each pass over the data in a new order."""
    batch, orders = [], {}
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(questions))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/epoch {epoch}").sample(range(len(questions)), len(questions))
        batch.append(questions[orders[epoch][i]])
    return batch


def cat_step(s: argparse.Namespace, step: int, batch: list, engine, judge, policy, optimizer):
    """One step of Algorithm 1 on Q questions: (groups, references, rewards, what happened in numbers)."""
    sampling = {"temperature": s.temperature, "max_new_tokens": s.max_new_tokens}
    clock = [time.perf_counter()]

    # 1. Explore: o_1..o_G ~ pi_t(. | q) for each q.                                         Q groups of G rollouts
    groups = engine.sample([q.messages for q in batch], s.group_size, seed=seed_of(s.seed, step, "rollouts"), **sampling)
    clock.append(time.perf_counter())

    # 2. Reference estimation: s from o_1..o_G, by the frozen anchor pi_0.                   Q references
    ask_anchor = anchor_sampler(engine, sampling, s.seed, step)
    references = AGGREGATORS[s.aggregator](groups, ask_anchor, boxed(s))
    clock.append(time.perf_counter())

    # 3. Reward derivation: R(o_i; s).                                                       (Q, G)
    rewards = REWARDS[s.reward](groups, references, batch, ask_anchor, judge)
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


def train(
    s: argparse.Namespace, out: Path, questions: list, engine, judge, policy, optimizer, state: dict, validate
) -> None:
    """Steps state["step"]..s.steps. After each, the run's folder holds all that the next one needs."""
    bar = tqdm(range(state["step"], s.steps), initial=state["step"], total=s.steps, unit="step")
    for step in bar:
        batch = batch_of(questions, s.prompts_per_step, step, s.seed)
        groups, references, rewards, numbers = cat_step(s, step, batch, engine, judge, policy, optimizer)
        state["step"] = step + 1
        state["num_tokens"] += sum(len(o.ids) for group in groups for o in group) + sum(r.tokens for r in references)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if numbers["update/skipped"] else 0
        numbers["num_tokens"] = state["num_tokens"]
        better = False
        if s.validate_every and (step + 1) % s.validate_every == 0:
            numbers["validation/score"] = score = validate()
            better = score is not None and score > state["best_score"]
            state |= {"best_score": score, "since_best": 0} if better else {"since_best": state["since_best"] + 1}
        state["doubted_in_a_row"] = state["doubted_in_a_row"] + 1 if doubted(numbers) else 0
        runs.log_step(out, step, numbers, batch, groups, references, rewards)
        runs.save_checkpoint(out, state, policy, optimizer, better)
        shown = {"reward": numbers["reward"], "agreement": numbers["reference/majority_agreement"]}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None and value == value})
        if doubted(numbers):
            share = f"{numbers['judge/unknown_rate']:.0%}"
            bar.write(f"WARNING: step {step}: {share} of the verdicts are unknown: no update", sys.stderr)
        if state["doubted_in_a_row"] >= 3:
            raise JudgeError(f"too few verdicts could be read in 3 steps in a row: its answers are in {out}/rollouts.jsonl")
        if s.validate_every and state["since_best"] >= s.patience:
            bar.write(f"stopping early: no better validation score in the last {s.patience}")
            return
        if (difference := numbers["sampling/logp_difference_mean"] or 0.0) > MISMATCH:
            warning = f"engine and trainer differ by {difference:.2g} nats a token, more than {MISMATCH}"
            bar.write(f"WARNING: step {step}: {warning}: other weights, or too much rounding", sys.stderr)
        if state["skipped_in_a_row"] >= 3:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in 3 steps in a row, the last one step {step}: lower --lr"
            )


def doubted(numbers: dict) -> bool:
    """Whether so many of a step's verdicts are unknown that the rest may not stand for them."""
    return numbers.get("judge/unknown_rate", 0.0) > MAX_UNKNOWN


def boxed(s: argparse.Namespace) -> bool:
    """Whether answers are to end in \\boxed{}: only then can they be compared without a judge."""
    return s.reward == "match"


def anchor_sampler(engine, settings: dict, seed: int, where):
    """What asks pi_0: prompts -> one completion each. Asked again, it draws anew."""
    calls = itertools.count()

    def sample(prompts):
        drawn = engine.sample(prompts, 1, policy=False, seed=seed_of(seed, where, "anchor", next(calls)), **settings)
        return [group[0] for group in drawn]

    return sample


def check_context(s: argparse.Namespace, engine, questions: list) -> None:
    """Refuse before the first step what would not fit in the middle of a run. Raises InputError."""
    longest = max(len(engine.encode(q.messages)) for q in questions) + s.max_new_tokens
    if s.aggregator == "synthesis":  # the anchor reads all G rollouts, at worst all of full length, and writes its own
        frame = len(engine.encode(synthesis_messages([""] * s.group_size, boxed(s))))
        longest = max(longest, frame + (s.group_size + 1) * s.max_new_tokens)
    if longest > engine.context:
        raise InputError(
            f"--max-new-tokens {s.max_new_tokens} and --group-size {s.group_size} can need {longest} tokens at once; "
            f"the context of {s.model} has {engine.context}: lower one of them"
        )


def run(out: Path, settings: dict, resume: bool) -> None:
    """One whole run: load, train, compare, plot."""
    s, started = argparse.Namespace(**settings), time.perf_counter()
    task = TASKS[s.task]
    train_questions, test_questions = task.load(s.data and Path(s.data), boxed(s))
    test_questions = test_questions[: s.eval_questions]
    kept = min(s.validation_questions, len(train_questions) // 10) if s.validate_every else 0
    if s.validate_every and not kept:
        raise InputError(
            f"{len(train_questions)} questions are too few to keep one in ten for validation: --validate-every 0"
        )
    train_questions, validation = train_questions[kept:], train_questions[:kept]
    if any(q.answer is None and q.rubric is None for q in validation):
        raise InputError("--validate-every reads labels, and these questions have none: take --validate-every 0")
    if s.prompts_per_step > len(train_questions):
        raise InputError(f"--prompts-per-step {s.prompts_per_step} is more than there are questions: {len(train_questions)}")
    base, tokenizer = load_base(str(TINY_MODEL) if s.model == "tiny" else s.model)
    policy = add_lora(base, s.lora_rank, s.seed, s.gradient_checkpointing)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=s.lr, weight_decay=0.0)
    vllm = s.engine == "vllm"
    engine = VLLMEngine(policy, tokenizer, s.engine_args, s.sleep) if vllm else TransformersEngine(policy, tokenizer)
    check_context(s, engine, train_questions + validation + test_questions)
    judge = anchor_judge(engine)
    if s.judge == "server":
        judge = server_judge(s.judge_url, s.judge_model, out / "judge.jsonl", concurrency=s.judge_concurrency)
    state = {"step": 0, "num_tokens": 0, "skipped_in_a_row": 0, "doubted_in_a_row": 0}
    state |= {"best_score": -math.inf, "since_best": 0}
    if resume:
        state = runs.load_checkpoint(out, policy, optimizer) or state
        engine.sync()
        runs.drop_lines_after(out, state["step"])
        runs.write_config(out, settings)  # --steps may have been raised
    else:
        runs.create(out, settings)
    split = {"train": train_questions, "validation": validation, "test": test_questions}
    if any(q.id for q in test_questions):
        runs.write_json(out / "split.json", {name: [q.id for q in part] for name, part in split.items()})
    print(
        f"task {s.task}: {task.protocol}\nrun {out}: {s.model} on {policy.device.type}, rollouts by {s.engine}, "
        f"references by {s.aggregator}\n{s.steps} steps of {s.prompts_per_step} questions x {s.group_size} rollouts, "
        f"learning rate {s.lr:g}",
        flush=True,
    )

    sampling = s.eval_sampling | {"max_new_tokens": s.max_new_tokens}
    sample_policy = partial(engine.sample, policy=True, seed=seed_of(s.seed, "after"), **sampling)
    judged = bool(test_questions) and test_questions[0].rubric is not None
    score = partial(physician_scores, judge=judge) if judged else correct

    def validate() -> float | None:
        texts = [[o.text for o in group] for group in sample_policy([q.messages for q in validation], 1)]
        scores = score(validation, texts)  # (validation questions, 1)
        mean, _ = (healthbench_mean if judged else mean_and_error)(scores)
        return mean if float(scores.isnan().float().mean()) <= MAX_UNKNOWN else None  # too few were scored

    try:
        train(s, out, train_questions, engine, judge, policy, optimizer, state, validate)
    finally:  # also after Ctrl-C, perhaps in the middle of an update: the adapter is that of a completed step
        if runs.load_checkpoint(out, policy, optimizer, best=True):
            policy.save_pretrained(out / "adapter", save_embedding_layers=False)
            runs.plot(out)

    print(f"comparing on {len(test_questions)} questions ...", flush=True)
    engine.sync()  # the best adapter may not be the last
    rows = final_table(
        test_questions,
        partial(engine.sample, policy=False, seed=seed_of(s.seed, "before"), **sampling),
        sample_policy,
        lambda groups: AGGREGATORS[s.aggregator](groups, anchor_sampler(engine, sampling, s.seed, "final"), boxed(s)),
        s.group_size,
        score,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux; without the answer checker's 0.3 GiB
    minutes = (time.perf_counter() - started) / 60
    result = {"rows": rows, "questions": len(test_questions), "minutes": minutes, "peak_gib": peak}
    runs.write_json(out / "results.json", result)
    print(f"\n{format_table(rows, len(test_questions), judged)}\n")
    print(f"{minutes:.1f} minutes, peak memory {peak:.2f} GiB; {out}/ holds the run")


def resume_command(out: Path) -> str:
    return shlex.join(["python", sys.argv[0], "--resume", "--out", str(out)])


def main(argv: list[str] | None = None) -> int:
    given = parse_arguments(argv, __doc__.split("\n")[0])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # without a network: our sentence, not its retries
    out = given.get("out")
    try:
        out, settings, resume = settle(given)
        run(out, settings, resume)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (EngineError, JudgeError) as error:
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
