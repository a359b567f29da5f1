"""Where the questions q come from, and the settings that suit them.

A task is a function that loads questions, and a few settings. The table TASKS is at the end: a task
of your own is one more line.

Some questions carry a label: the true answer, or the physicians' rubric. Labels are for evaluation.
The loop never sees them, because `without_labels` takes them off before it.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from plumbing.data import hub_file, read_jsonl
from plumbing.errors import InputError

VALIDATION_QUESTIONS = 100  # kept back with --validate-every, but at most one in ten


@dataclass(frozen=True)
class Question:
    """One question q. `messages` is the chat that the policy answers.

    `boxed`: the answer is to end in \\boxed{}, so that answers can be compared without a judge
    (`load_questions` says so). `answer` and `rubric` are the labels. Without one, they are None.
    """

    messages: list[dict[str, str]]
    answer: str | None = None
    rubric: tuple[tuple[str, float], ...] | None = None  # the physicians': (criterion, points)
    id: str = ""
    boxed: bool = True

    @property
    def conversation(self) -> str:
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def without_labels(questions: Sequence[Question], oracle: bool = False) -> list[Question]:
    """The questions as the loop gets them: nothing in them says what is right.

    `oracle`: the physicians' rubrics stay, for --reward physician. That is the one reward that
    reads labels, and it is here to be compared with.
    """
    return [replace(q, answer=None, rubric=q.rubric if oracle else None) for q in questions]


@dataclass(frozen=True)
class Task:
    """How to load a task, and the defaults of the settings that depend on it."""

    # (data file, boxed) -> (questions to train on, held-out ones)
    load: Callable[[Path | None, bool], tuple[list[Question], list[Question]]]
    settings: dict = field(default_factory=dict)  # a value, or a function that finds it


def ask(problem: str, boxed: bool = True) -> list[dict[str, str]]:
    """The chat for a problem in words; `boxed`: to be answered in \\boxed{}."""
    instruction = "\n\nReason step by step, and put your final answer within \\boxed{}."
    return [{"role": "user", "content": problem + instruction * boxed}]


# -------------------------------------------------------------------------------------------- sums


def sums_part(a: int, b: int) -> str:
    """Which part of the world a + b belongs to: "taught" (the stand-in saw it), "train" or "test".

    A checksum decides, so that the maker of the stand-in (tests/make_tiny.py) and this file agree
    without a list of 81 million sums.
    """
    return ("train", "test", "taught", "taught")[zlib.crc32(f"{a}+{b}".encode()) % 4]


def sums_messages(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} + {b}?"}]


def load_sums(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """Sums of two four-digit numbers: 4096 to train on, 500 held out, the same in every run."""
    if data:
        raise InputError(
            "--task sums makes its own questions: leave --data out, or use --task jsonl"
        )
    rng, wanted = random.Random(0), {"train": 4096, "test": 500}
    parts: dict[str, dict] = {"train": {}, "test": {}}  # dicts: each sum once
    while any(len(parts[name]) < wanted[name] for name in wanted):
        a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
        name = sums_part(a, b)
        if name in parts and len(parts[name]) < wanted[name]:
            parts[name][a, b] = Question(sums_messages(a, b), str(a + b))
    return list(parts["train"].values()), list(parts["test"].values())


# ------------------------------------------------------------------------------------------- files


def load_math500(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """MATH-500. As in the paper and TTRL, the policy trains on the very questions of the test."""
    data = data or hub_file("HuggingFaceH4/MATH-500", "test.jsonl")
    return of_rows(read_jsonl(data, "problem"), "problem")


def load_jsonl(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """Anyone's questions: {"prompt": ..., "answer": ... (optional)}.

    They are trained and tested on the same. With `boxed` they are asked for their final answer in
    \\boxed{}, else as they stand.
    """
    if data is None:
        wanted = 'a JSONL file of {"prompt": ..., "answer": ... (optional)}'
        raise InputError(f"--task jsonl wants --data FILE, {wanted}")
    return of_rows(read_jsonl(data, "prompt"), "prompt", boxed)


def of_rows(rows: list[dict], name: str, boxed: bool = True) -> tuple[list, list]:
    """Problems with optional answers, to train and to test on."""
    questions = []
    for row in rows:
        answer = row.get("answer")
        answer = None if answer is None else str(answer)
        questions.append(Question(ask(row[name], boxed), answer))
    return questions, questions


def load_healthbench(data: Path | None, boxed: bool = True) -> tuple[list, list]:
    """HealthBench: conversations that end with a user's turn, and physicians' rubrics.

    One in ten (500) is held out, by a split that is the same whatever --seed is.
    """
    data = data or hub_file("openai/healthbench", "2025-05-07-06-14-12_oss_eval.jsonl")
    questions = []
    for number, row in enumerate(read_jsonl(data, "prompt_id"), start=1):
        try:
            messages = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
            rubric = tuple((r["criterion"], float(r["points"])) for r in row["rubrics"])
        except (KeyError, TypeError, ValueError):
            wanted = "wants HealthBench's prompt and rubrics"
            raise InputError(f"{data}, row {number}: {wanted}; mend or remove it") from None
        questions.append(Question(messages, rubric=rubric, id=row["prompt_id"]))
    random.Random(0).shuffle(questions)
    held_out = max(1, len(questions) // 10)
    return questions[held_out:], questions[:held_out]


# ------------------------------------------------------------------------------------------- tasks


def hub_model() -> tuple[str, str]:
    """(model, why): one of the paper's models where there is a GPU, else one for a CPU."""
    if torch.cuda.is_available():
        return "Qwen/Qwen3-4B", "the paper's model, because a GPU was found"
    return "Qwen/Qwen2.5-0.5B-Instruct", "a small model, because no GPU was found"


# For models from the hub: a LoRA, and the memory for it on one device. The paper trains all weights
# at 5e-7; a LoRA wants 10 to 100 times more.
HUB = {"model": hub_model, "lr": 3e-5, "lora_rank": 32, "gradient_checkpointing": True}
TEST_TIME = HUB | {"split": "test-time"}

TASKS = {
    "sums": Task(
        load_sums,
        {
            "model": lambda: ("tiny", "the stand-in that is part of this repository"),
            "steps": 60,  # more gain little and risk what the README's "How it fails" shows
            "split": "held-out",  # the stand-in was taught neither half
            "prompts_per_step": 16, "max_new_tokens": 64, "lr": 5e-4, "lora_rank": 16,
            "gradient_checkpointing": False,
        },
    ),
    "math500": Task(
        load_math500, TEST_TIME | {"steps": 1000, "prompts_per_step": 32, "max_new_tokens": 1536}
    ),
    "jsonl": Task(
        load_jsonl, TEST_TIME | {"steps": 200, "prompts_per_step": 16, "max_new_tokens": 1024}
    ),
    "healthbench": Task(
        load_healthbench,
        HUB
        | {"steps": 1000, "prompts_per_step": 32, "max_new_tokens": 1024, "split": "held-out"}
        | {"reward": "rubric", "length_limit": 750, "validate_every": 20, "eval_questions": 100},
    ),
}  # fmt: skip


def load_questions(cfg) -> dict[str, list[Question]]:
    """The questions of a run, with labels: {"train": ..., "validation": ..., "test": ...}.

    --split test-time trains on the very questions of the final table (without their labels, later).
    held-out takes the task's own held-out questions, or one half of all where it has none; the
    halves are the same whatever --seed is. Raises InputError.
    """
    boxed = cfg.reward == "match"
    train, test = TASKS[cfg.task].load(cfg.data and Path(cfg.data), boxed)
    if cfg.split == "test-time":
        train = test
    elif train is test:
        shuffled = random.Random(0).sample(test, len(test))
        train, test = shuffled[: len(test) // 2], shuffled[len(test) // 2 :]
    kept = min(VALIDATION_QUESTIONS, len(train) // 10) if cfg.validate_every else 0
    parts = {"train": train[kept:], "validation": train[:kept], "test": test[: cfg.eval_questions]}
    return {name: [replace(q, boxed=boxed) for q in part] for name, part in parts.items()}
