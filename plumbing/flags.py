"""The command line: every flag with its help and its default.

--task is read first, so that --help shows the defaults of that task.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from plumbing.errors import InputError
from plumbing.settings import DEFAULTS
from rewards import REWARDS
from synthesize import AGGREGATORS
from tasks import TASKS

# Flags of former versions, and what to do instead.
IN_GRPO = "it is a field of GRPOConfig in grpo.py now: change it there"
REMOVED = {
    "--clip": IN_GRPO,
    "--importance-cap": IN_GRPO,
    "--mask-truncated": IN_GRPO,
    "--judge": "it follows from --judge-model: a server judges where one is named, else the anchor",
    "--judge-concurrency": "it is CONCURRENCY in plumbing/judges.py now: change it there",
    "--validation-questions": "it is VALIDATION_QUESTIONS in tasks.py now: change it there",
    "--patience": "it is PATIENCE in plumbing/progress.py now: change it there",
    "--sleep": "say --engine-args '{\"enable_sleep_mode\": true}' instead",
    "--method": "CaT-SFT is a program of its own now: python recipes/cat_sft.py, with these flags",
}
UNSET = object()


def number(kind, low, what, strict=False, high=sys.float_info.max):
    """An argparse type: a `kind` from (`strict`: above) `low` to `high`, or a sentence."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value if strict else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def json_object(text):
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object like '{{\"name\": 1}}'")
    return value


COUNT = number(int, 1, "a whole number from 1 up")
NATURAL = number(int, 0, "a whole number from 0 up", high=2**63 - 1)
FLAGS = {
    "task": ("where the questions come from", {"choices": TASKS}),
    "data": (
        "JSONL file: MATH-500's or HealthBench's, or lines of {prompt, answer (optional)}; without "
        "it, the file comes from the hub",
        {},
    ),
    "split": (
        "questions to train on: those of the final table, without labels (test-time training), or "
        "others: the task's own, or one half of all",
        {"choices": ("test-time", "held-out")},
    ),
    "model": (
        "policy and anchor: tiny, a Hugging Face id, or a local folder. The paper: Gemma 3 4B, "
        "Qwen 3 4B, Llama 3.1 8B",
        {},
    ),
    "steps": ("training steps. The paper: at most 1000", {"type": COUNT}),
    "seed": ("of everything random", {"type": NATURAL}),
    "group_size": (
        "G, rollouts per question. The paper: 8",
        {"type": number(int, 2, "a whole number from 2 up")},
    ),
    "prompts_per_step": ("Q, questions per step. The paper: 32", {"type": COUNT}),
    "max_new_tokens": (
        "longest rollout and longest reference. The paper: 1536 for MATH-500",
        {"type": COUNT},
    ),
    "temperature": (
        "of rollouts and references. The paper: 1.0 for Gemma, 0.7 for Qwen and Llama",
        {"type": number(float, 0, "a number above 0, at most 2", strict=True, high=2)},
    ),
    "aggregator": (
        "how a reference is made from rollouts. The paper: synthesis",
        {"choices": AGGREGATORS},
    ),
    "reward": (
        "how a rollout is compared with its reference. The paper: match for maths, else rubric",
        {"choices": REWARDS},
    ),
    "length_limit": (
        "tokens above which a rollout's reward is lowered by 1; without it, none is",
        {"type": COUNT},
    ),
    "judge_url": (
        "server of the judge, which speaks the OpenAI protocol; its key is read from "
        "OPENAI_API_KEY",
        {},
    ),
    "judge_model": (
        "the judge's name on that server; without it, the frozen anchor judges. The paper: GPT-4o",
        {},
    ),
    "judge_max_tokens": (
        "longest answer of that server; a model that thinks first needs thousands, and its verdict "
        "is still a first line that is yes or no alone",
        {"type": COUNT},
    ),
    "validate_every": (
        "steps between validations, which read labels, keep the best adapter, and end a run that "
        "gets no better; 0: none. The paper: on HealthBench and for CaT-SFT",
        {"type": NATURAL},
    ),
    "lr": (
        "learning rate of AdamW, constant. The paper: 5e-7, full fine-tuning",
        {"type": number(float, 0, "a number above 0", strict=True)},
    ),
    "lora_rank": (
        "rank of the LoRA; its alpha is twice that. The paper: no LoRA",
        {"type": int, "choices": (8, 16, 32, 64, 128)},
    ),
    "beta": (
        "coefficient of the KL to the initial policy. The paper: 1e-3",
        {"type": number(float, 0, "a number from 0 up")},
    ),
    "kl": (
        "where that KL acts: a term of the loss (k3), or taken off the reward. The paper: reward",
        {"choices": ("loss", "reward")},
    ),
    "loss": (
        "mean over all tokens of the step, or over each sequence first. The paper: sequence",
        {"choices": ("token", "sequence")},
    ),
    "updates_per_step": ("optimizer steps on each batch of rollouts", {"type": COUNT}),
    "micro_batch_tokens": (
        "tokens per forward and backward pass: memory, not results",
        {"type": COUNT},
    ),
    "gradient_checkpointing": (
        "recompute each layer in the backward pass: one more forward pass, far less memory",
        {"action": argparse.BooleanOptionalAction},
    ),
    "engine": (
        "what samples: vllm, transformers, or auto: vllm where it is installed for the device that "
        "trains",
        {"choices": ("auto", "vllm", "transformers")},
    ),
    "engine_args": (
        "JSON for vllm.LLM, like '{\"gpu_memory_utilization\": 0.5}'",
        {"type": json_object},
    ),
    "eval_sampling": (
        "JSON with temperature, top_k and top_p of the final table; what is left out is the "
        "paper's by the model's name, else --temperature, untruncated",
        {"type": json_object},
    ),
    "eval_questions": (
        "how many questions the final table takes; fewer is faster",
        {"type": COUNT},
    ),
    "out": (
        "the run's folder; without it, runs/ plus task, model and time",
        {"type": Path},
    ),
    "resume": (
        "continue the run in --out with its settings; --steps may be raised",
        {"action": "store_true"},
    ),
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default == {} or action.dest in ("help", "resume"):
            return action.help
        return super()._get_help_string(action)


def parse(
    argv: Sequence[str] | None,
    description: str,
    only: set[str] | None = None,
    add: Callable = lambda parser: None,
    more: dict | None = None,
) -> dict:
    """What the command line gives: a setting that is not given is not in the result.

    `only`: the flags to take; default: all. `add` adds others to the parser. `more`: defaults that
    go before the task's. Raises InputError for a flag that is gone.
    """
    argv = sys.argv[1:] if argv is None else argv
    for flag in (word.split("=")[0] for word in argv):
        if flag in REMOVED:
            raise InputError(f"{flag} is gone: {REMOVED[flag]}")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", choices=list(TASKS), default=DEFAULTS["task"])
    task = first.parse_known_args(argv)[0].task
    values = DEFAULTS | TASKS[task].settings | (more or {})
    model = values.get("model")
    values["model"] = model()[0] if callable(model) else model

    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    names = [name for name in FLAGS if only is None or name in only]
    for name in names:
        text, options = FLAGS[name]
        parser.add_argument("--" + name.replace("_", "-"), help=text, **options)
    parser.set_defaults(**{name: values[name] for name in names if name in values})
    add(parser)
    unset = argparse.Namespace(**dict.fromkeys(names, UNSET))  # argparse fills in no default then
    given = vars(parser.parse_args(argv, unset))
    return {name: value for name, value in given.items() if value is not UNSET}
