"""What a run starts from: questions q, held-out ones, the settings that suit a task, and the model.

An answer, where a question has one, is carried along for evaluation. Training reads `Question.messages` and nothing else.
"""

import argparse
import json
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

TINY_MODEL = Path(__file__).resolve().parent / "models" / "tiny"
huggingface_hub.logging.set_verbosity_error()  # without a network: our sentence, not its retries


class InputError(Exception):
    """Something a person can put right: one sentence, with the way out. Ends the program with exit status 2."""


def one_line(error: Exception) -> str:
    """An error of a library, short enough to end a sentence with."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# torchrun starts WORLD copies of a program, and tells each in the environment which RANK it has. Alone: rank 0 of 1.
RANK = int(os.environ["RANK"]) if torch.distributed.is_torchelastic_launched() else 0
WORLD = int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


class RankError(RuntimeError):
    """Another rank has died, and this one cannot go on without it."""


def exchange(collective: Callable, *given) -> None:
    """A collective of torch.distributed: a rank waits in it until all have come, so all must come equally often."""
    try:
        collective(*given)
    except RuntimeError as error:
        if RANK:  # rank 0 says it for all; why it died, the dead one has said itself, if it could
            raise SystemExit(1) from error
        raise RankError("another rank has died or does not answer") from error


def gather(value, alike: str = "") -> list:
    """`value` of every rank, in their order; gather(value)[0] is rank 0's. Raises RankError. With `alike`, a word for
    what it is, it has to be the same everywhere: else raises InputError."""
    values = [value] * WORLD
    if WORLD > 1:
        exchange(torch.distributed.all_gather_object, values, value)
    if alike and any(other != value for other in values):
        raise InputError(f"the ranks do not have the same {alike}: start all alike, with an --out that all machines share")
    return values


@dataclass(frozen=True)
class Question:
    """One question q. `messages` is the chat that the policy answers; the rest are labels, for evaluation alone: the true
    `answer`, or the physicians' `rubric` of (criterion, points)."""

    messages: list[dict[str, str]]
    answer: str | None = None
    rubric: tuple[tuple[str, float], ...] | None = None
    id: str = ""

    @property
    def conversation(self) -> str:
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def seed_of(seed: int, *where) -> int:
    """A seed for one place in the run, like (step, "rollouts"). Nothing random carries over from step to step, so a
    resumed run needs no random state: it draws what the unbroken one would have drawn."""
    return random.Random(f"{seed}/{where}").getrandbits(62)


@dataclass(frozen=True)
class Task:
    """A task: how to load it, and the defaults of the settings that depend on it."""

    load: Callable[[Path | None, bool], tuple[list[Question], list[Question]]]  # data file, boxed -> (train, test)
    settings: dict = field(default_factory=dict)  # setting -> value, or a function that finds it


def ask(problem: str, boxed: bool = True) -> list[dict[str, str]]:
    """The chat for a problem in words; `boxed`: to be answered in \\boxed{}."""
    instruction = "\n\nReason step by step, and put your final answer within \\boxed{}."
    return [{"role": "user", "content": problem + instruction * boxed}]


# ------------------------------------------------------------------------------------------------- sums


def sums_part(a: int, b: int) -> str:
    """Which part of the world a + b belongs to: "taught" (the tiny model saw it), "train" or "test" (it never did). A
    checksum decides, so that tests/make_tiny.py and this file agree without a list of 81 million sums."""
    return ("train", "test", "taught", "taught")[zlib.crc32(f"{a}+{b}".encode()) % 4]


def sums_messages(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} + {b}?"}]


def load_sums(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """Sums of two four-digit numbers: 4096 to train on and 500 held out, the same ones in every run."""
    if data:
        raise InputError("--task sums makes its own questions: leave --data out, or use --task jsonl")
    rng, parts, wanted = random.Random(0), {"train": {}, "test": {}}, {"train": 4096, "test": 500}
    while any(len(parts[name]) < wanted[name] for name in wanted):
        a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
        part = parts.get(sums_part(a, b))
        if part is not None and len(part) < wanted[sums_part(a, b)]:
            part[a, b] = Question(sums_messages(a, b), str(a + b))  # a dict: each sum once
    return list(parts["train"].values()), list(parts["test"].values())


# ------------------------------------------------------------------------------------------------- files


def read_jsonl(path: Path, needed: str) -> list[dict]:
    """The objects of a JSONL file, each with a non-empty text under `needed`. Raises InputError with the line's number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give --data an existing JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give --data a JSONL file") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); mend or remove that line") from None
        if not isinstance(row, dict) or not isinstance(row.get(needed), str) or not row[needed].strip():
            raise InputError(f'{path}, line {number}: wants an object with a text "{needed}"; mend or remove that line')
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no questions; each line wants an object with a text {needed!r}")
    return rows


def hub_file(repository: str, name: str) -> Path:
    """A data file from the Hugging Face hub. Raises InputError."""
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # noqa: BLE001 -- offline, a proxy, a time-out: each library below raises its own
        raise InputError(
            f"cannot fetch {repository} from the Hugging Face hub ({type(error).__name__}): connect to the network, or "
            f"give the file with --data {name}"
        ) from None


def load_math500(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """MATH-500. As in the paper (and TTRL), the policy trains on the very questions it is tested on, without labels."""
    data = data or hub_file("HuggingFaceH4/MATH-500", "test.jsonl")
    questions = [Question(ask(row["problem"]), _text(row.get("answer"))) for row in read_jsonl(data, "problem")]
    return questions, questions


def load_jsonl(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """Anyone's questions: {"prompt": ...} with an optional "answer". Trained and tested on the same, as MATH-500.

    `boxed`: they have a final answer, and are asked for it in \\boxed{}; else they are asked as they stand.
    """
    if data is None:
        raise InputError('--task jsonl wants --data FILE, a JSONL file of {"prompt": ..., "answer": ... (optional)}')
    questions = [Question(ask(row["prompt"], boxed), _text(row.get("answer"))) for row in read_jsonl(data, "prompt")]
    return questions, questions


def load_healthbench(data: Path | None, boxed: bool = True) -> tuple[list[Question], list[Question]]:
    """HealthBench: conversations that end with a user's turn, and physicians' rubrics. One in ten (500) is held out."""
    data = data or hub_file("openai/healthbench", "2025-05-07-06-14-12_oss_eval.jsonl")
    questions = []
    for number, row in enumerate(read_jsonl(data, "prompt_id"), start=1):
        try:
            messages = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
            rubric = tuple((r["criterion"], float(r["points"])) for r in row["rubrics"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{data}, row {number}: wants HealthBench's prompt and rubrics; mend or remove it") from None
        questions.append(Question(messages, rubric=rubric, id=row["prompt_id"]))
    random.Random(0).shuffle(questions)  # a fixed split: the same whatever --seed is
    held_out = max(1, len(questions) // 10)
    return questions[held_out:], questions[:held_out]


def _text(answer) -> str | None:
    return None if answer is None else str(answer)


# ------------------------------------------------------------------------------------------------- models


def load_base(name: str) -> tuple:
    """(model, tokenizer) of "tiny", a hub id or a local folder: bf16 on a GPU, float32 on a CPU. Raises InputError."""
    gpu, name = torch.cuda.is_available(), str(TINY_MODEL) if name == "tiny" else name
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if gpu else torch.float32)
    except Exception as error:  # noqa: BLE001 -- no such id, offline, a proxy, a broken file: each raises its own
        raise InputError(
            f"cannot load the model {name!r}: give --model a folder with a causal language model, or the id of one on "
            f"the Hugging Face hub and a network that reaches it ({one_line(error)})"
        ) from None
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {name!r} has no chat template: give --model an instruct model")
    model = model.to("cuda" if gpu else "cpu").eval()
    # cuDNN's attention is PyTorch's first choice on an H100, and with a mask its gradients can be NaN (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # The trainer applies the output head to chosen positions itself. A model that does more to its logits (soft-capping,
    # a scale) would be trained on wrong probabilities, so it is refused, by trying it.
    ids = torch.tensor([tokenizer.encode("1 + 1 = 2")], device=model.device)
    with torch.no_grad():
        direct = model.get_output_embeddings()(model.get_decoder()(input_ids=ids).last_hidden_state)
        if not torch.allclose(direct, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            raise InputError(f"{name!r} changes its logits after the output head, which grpo.py does not do: use another")
    return model, tokenizer


def add_lora(base, rank: int, seed: int, checkpointing: bool = False):
    """The policy: `base` with a trainable LoRA on every linear layer but the output head; B = 0, so pi_t starts as pi_0.

    The adapter is float32 (peft casts it) over a base of any dtype: in bf16 an AdamW step of 1e-5 rounds to nothing.
    No dropout: it would make the ratio pi_t / pi_old differ from 1 with equal weights. No bias: vLLM refuses it.

    `checkpointing` computes each layer again in the backward pass, from its input: far less memory, one more forward pass.
    """
    torch.manual_seed(seed)  # of A's random initial values
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    if checkpointing:
        for layer in (module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return get_peft_model(base, config)


def hub_model() -> tuple[str, str]:
    """(model, why): one of the paper's models where there is a GPU, else one that a CPU can train."""
    if torch.cuda.is_available():
        return "Qwen/Qwen3-4B", "the paper's model, because a GPU was found"
    return "Qwen/Qwen2.5-0.5B-Instruct", "a small model, because no GPU was found"


# For models from the hub: a LoRA, and the memory for it on one device.
LORA = {"model": hub_model, "lr": 3e-5, "lora_rank": 32, "gradient_checkpointing": True}

# A task of your own is one more line: a loader (data file -> train, test) and the settings that suit it.
TASKS = {
    "sums": Task(
        load_sums,
        {
            "model": lambda: ("tiny", "the stand-in that is part of this repository"),
            "steps": 60,  # more gain little and risk what the README's "How it fails" shows
            "split": "held-out",  # the tiny model was taught neither half
        }
        | {"prompts_per_step": 16, "max_new_tokens": 64, "lr": 5e-4, "lora_rank": 16, "gradient_checkpointing": False},
    ),
    "math500": Task(
        load_math500, LORA | {"steps": 1000, "prompts_per_step": 32, "max_new_tokens": 1536, "split": "test-time"}
    ),
    "jsonl": Task(load_jsonl, LORA | {"steps": 200, "prompts_per_step": 16, "max_new_tokens": 1024, "split": "test-time"}),
    "healthbench": Task(
        load_healthbench,
        LORA
        | {"steps": 1000, "prompts_per_step": 32, "max_new_tokens": 1024, "reward": "rubric", "length_limit": 750}
        | {"validate_every": 20, "eval_questions": 100, "split": "held-out"},
    ),
}


def load_questions(s: argparse.Namespace) -> tuple[list[Question], list[Question]]:
    """(train, test) of a run's settings. Raises InputError.

    --split test-time trains on the very questions of the final table, without their labels. held-out takes the task's
    own held-out questions, or one half of all where it has none; the halves are the same whatever --seed is.
    """
    train, test = TASKS[s.task].load(s.data and Path(s.data), s.reward == "match")
    if s.split == "test-time":
        train = test
    elif train is test:
        shuffled = random.Random(0).sample(test, len(test))
        train, test = shuffled[: len(test) // 2], shuffled[len(test) // 2 :]
    return train, test[: s.eval_questions]
