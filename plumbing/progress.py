"""What happens between two steps: numbers, log, checkpoint, validation, warnings, and the end.

The loop in train.py makes steps. A `Progress` says which step is next, and keeps what it made.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from grpo import advantages
from plumbing import folder, ranks
from plumbing.errors import InputError, JudgeError
from rewards import MAX_UNKNOWN

PATIENCE = 5  # validations without a better score before the run ends
IN_A_ROW = 3  # steps that teach nothing, for one reason, before the run ends
# Mean nats a token between engine and trainer above which a step warns. Rounding alone is far
# below: about 1e-6 in float32 and 0.01 in bf16.
MISMATCH = 0.05
LESS_MEMORY = (
    ": add --gradient-checkpointing, a smaller --micro-batch-tokens, or with vLLM "
    "--engine-args '{\"enable_sleep_mode\": true}'"
)
PHASES = ("rollouts", "references", "rewards", "update")


class Stopwatch:
    """The seconds of a step's four phases, seen from outside: the loop need not know of it."""

    def __init__(self):
        self.marks: list[float] = []

    def around(self, function: Callable) -> Callable:
        """`function`, with the time noted before and after it."""

        def watched(*given):
            self.marks.append(time.perf_counter())
            result = function(*given)
            self.marks.append(time.perf_counter())
            return result

        return watched

    def start(self) -> None:
        self.marks = [time.perf_counter()]

    def stop(self) -> dict[str, float]:
        """The step's time, and that of its phases if there were references and then rewards."""
        began, *inner, end = *self.marks, time.perf_counter()
        numbers = {"step_time": end - began}
        if len(inner) == 4:
            ends = (inner[0], inner[1], inner[3], end)
            for phase, start, stop in zip(PHASES, (began, *ends), ends, strict=False):
                numbers[f"time/{phase}"] = stop - start
        return numbers


class Progress:
    """A run's state: what the next step needs, and what a resumed run takes up.

    `watch(questions, groups, references)` gives numbers that need labels, and the labels, for the
    log alone (evaluate.py owns it); `validate()` scores the policy. Raises InputError, JudgeError
    and FloatingPointError.
    """

    def __init__(self, cfg, out: Path, policy, optimizer, watch: Callable):
        self.cfg, self.out, self.policy, self.optimizer = cfg, out, policy, optimizer
        self.watch, self.validate, self.clock = watch, lambda: None, Stopwatch()
        self.state = {"step": 0, "num_tokens": 0, "skipped_in_a_row": 0, "doubted_in_a_row": 0}
        self.state |= {"best_score": -math.inf, "since_best": 0}

    def begin(self, settings: dict, resume: bool, split: dict[str, list]) -> None:
        """Make the run's folder, or take up the run that is in it, and say what will happen."""
        if resume:
            loaded = folder.load_checkpoint(self.out, self.policy, self.optimizer)
            self.state = ranks.gather(loaded or self.state, "checkpoint")[0]
        if ranks.RANK == 0 and resume:
            folder.drop_lines_after(self.out, self.state["step"])
            folder.write_config(self.out, settings)  # --steps may have been raised
        if not resume:
            folder.create(self.out, settings)
        ranks.gather(None)  # rank 0 has made it
        if not self.out.exists():
            what = f"rank {ranks.RANK} does not see {self.out}"
            way_out = "on several machines --out must be on a file system they share"
            raise InputError(f"{what}: {way_out}")
        if ranks.RANK == 0 and any(q.id for q in split["test"]):
            ids = {name: [q.id for q in part] for name, part in split.items()}
            folder.write_json(self.out / "split.json", ids)
        cfg, tested = self.cfg, len(split["test"])
        others = "of the same" if cfg.split == "test-time" else "others"
        print(
            f"task {cfg.task}: trains on {len(split['train'])} questions without labels; the final "
            f"table asks {tested} {others}\nrun {self.out}: {cfg.model} on "
            f"{self.policy.device.type}, rollouts by {cfg.engine}, references by {cfg.aggregator}\n"
            f"{cfg.steps} steps of {cfg.prompts_per_step} questions x {cfg.group_size} rollouts, "
            f"learning rate {cfg.lr:g}",
            flush=True,
        )

    def steps(self) -> Iterator[int]:
        """The steps that are left, behind a progress bar; fewer if validation gets no better."""
        # Rank 0 speaks for all: where the others' words go, nobody reads.
        log = sys.stderr if ranks.RANK == 0 else sys.stdout
        left, total = range(self.state["step"], self.cfg.steps), self.cfg.steps
        self.bar = tqdm(left, initial=left.start, total=total, unit="step", file=log)
        for step in self.bar:
            if self.cfg.validate_every and self.state["since_best"] >= PATIENCE:
                self.bar.write(f"stopping early: no better validation score in the last {PATIENCE}")
                return
            self.clock.start()
            yield step

    def keep(self, step: int, questions: list, made) -> None:
        """Measure, log and save what a step `made` (train.Step), warn, and end what is broken."""
        times = self.clock.stop()  # before the log's own work
        seen, labels = self.watch(questions, made.groups, made.references)
        numbers = measures(made) | seen | made.numbers | times
        state = self.state
        state["step"] = step + 1
        state["num_tokens"] += sum(len(o.ids) for group in made.groups for o in group)
        state["num_tokens"] += sum(s.tokens for s in made.references)
        numbers["num_tokens"] = state["num_tokens"]
        better = False
        if self.cfg.validate_every and (step + 1) % self.cfg.validate_every == 0:
            score = ranks.gather(self.validate())[0]
            better = score is not None and score > state["best_score"]
            numbers["validation/score"] = score
            state["since_best"] = 0 if better else state["since_best"] + 1
            state["best_score"] = score if better else state["best_score"]
        unknown = numbers.get("judge/unknown_rate", 0.0)
        for name, bad in (
            ("skipped", numbers["update/skipped"]),
            ("doubted", unknown > MAX_UNKNOWN),
        ):
            state[f"{name}_in_a_row"] = state[f"{name}_in_a_row"] + 1 if bad else 0
        if ranks.RANK == 0:
            folder.append(self.out / "rollouts.jsonl", rows_of(step, questions, made, labels))
            folder.append(self.out / "metrics.jsonl", [{"step": step, **numbers}])
            folder.save_checkpoint(self.out, state, self.policy, self.optimizer, better)
        self.say(step, numbers, unknown)

    def say(self, step: int, numbers: dict, unknown: float) -> None:
        shown = {"reward": "reward", "agreement": "reference/majority_agreement"}
        values = {short: numbers.get(name) for short, name in shown.items()}
        known = {k: f"{v:.2f}" for k, v in values.items() if v is not None and not math.isnan(v)}
        self.bar.set_postfix(known)
        warn = f"WARNING: step {step}: "
        if unknown > MAX_UNKNOWN:
            what = f"{unknown:.0%} of the verdicts are unknown: no update"
            self.bar.write(warn + what, self.bar.fp)
        if (difference := numbers.get("sampling/logp_difference_mean") or 0.0) > MISMATCH:
            what = (
                f"engine and trainer differ by {difference:.2g} nats a token, more than {MISMATCH}"
            )
            self.bar.write(f"{warn}{what}: other weights, or too much rounding", self.bar.fp)
        if self.state["doubted_in_a_row"] >= IN_A_ROW:
            where = f"its answers are in {self.out}/rollouts.jsonl"
            raise JudgeError(
                f"too few verdicts could be read in {IN_A_ROW} steps in a row: {where}"
            )
        if self.state["skipped_in_a_row"] >= IN_A_ROW:
            what = f"the loss or its gradient was not finite in {IN_A_ROW} steps in a row"
            where = f"{self.out}/checkpoint holds the last step"
            raise FloatingPointError(f"{what}, the last one step {step}: lower --lr; {where}")

    def end(self) -> bool:
        """Save the best adapter, or the newest; whether this process has one to show.

        Also after Ctrl-C, perhaps in the middle of an update: weights come from the checkpoint.
        """
        if ranks.RANK or not self.load_best():
            return False
        self.policy.save_pretrained(self.out / "adapter", save_embedding_layers=False)
        return True

    def load_best(self) -> dict | None:
        return folder.load_checkpoint(self.out, self.policy, self.optimizer, best=True)

    def best(self) -> None:
        """Every rank puts the adapter back that the run is judged by."""
        ranks.gather(None)  # rank 0 has written the last checkpoint
        ranks.gather(self.load_best(), "checkpoint")


def measures(made) -> dict:
    """The step in numbers that need no label (docs/metrics.md)."""
    rollouts, references = [o for group in made.groups for o in group], made.references
    silent = (advantages(made.R) == 0).all(dim=1)  # (Q,)
    return {
        "reward": float(made.R.nanmean()),
        "reward_std": float(made.R.std(dim=1).nanmean()),
        "frac_reward_zero_std": float(silent.float().mean()),
        "reference/clipped_ratio": mean(s.finish_reason == "length" for s in references),
        "reference/cut_rollouts": sum(s.cut for s in references) / len(rollouts),
        **made.rewards.stats,
        "completions/mean_length": mean(len(o.ids) for o in rollouts),
        "completions/clipped_ratio": mean(o.finish_reason == "length" for o in rollouts),
    }


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def rows_of(step: int, questions: list, made, labels: list[dict]) -> list[dict]:
    """What a reading group wants to read of a step; with a judge, every verdict."""
    rows = []
    for i, (q, group, s) in enumerate(zip(questions, made.groups, made.references, strict=True)):
        row = {"step": step, "question": q.messages, "rollouts": [o.text for o in group]}
        row |= {
            "reference": s.text,
            "rewards": [folder.finite_or_none(r) for r in made.R[i].tolist()],
            "tokens": [len(o.ids) for o in group],
            "cut_off": [o.finish_reason == "length" for o in (*group, s)],
            **{name: label for name, label in labels[i].items() if label is not None},
        }
        rows.append(row | (made.rewards.details[i] if made.rewards.details else {}))
    return rows


def resume_hint(out: Path | None) -> str:
    """How to go on with a run that stopped, to end a sentence with."""
    if out is None or not out.exists():
        return ""
    start = "torchrun, with its options as before," if ranks.WORLD > 1 else "python"
    command = f"{start} {shlex.join([sys.argv[0], '--resume', '--out', str(out)])}"
    return f"; every completed step is saved. To go on: {command}"
