"""What is refused before the first step, because it would fail, or mislead, in the middle of a run.

Every function raises InputError with one sentence and the way out.
"""

import importlib.util
import json
import zlib
from collections.abc import Sequence

import torch

from plumbing import ranks
from plumbing.context import CUT
from plumbing.errors import InputError
from synthesize import best_messages, synthesis_messages


def check_settings(settings: dict) -> None:
    """Settings that do not go together, or that differ from rank to rank."""
    engine, given = settings["engine"], settings["engine_args"]
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        way_out = "pip install -r requirements-gpu.txt, or take --engine transformers"
        raise InputError(f"vLLM is not installed: {way_out}")
    if engine == "transformers" and given:
        raise InputError("--engine-args are for vLLM, and the engine is transformers: leave it out")
    if given.get("enable_sleep_mode") and not torch.cuda.is_available():
        what = "enable_sleep_mode frees GPU memory, and there is no GPU here"
        raise InputError(f"{what}: leave it out of --engine-args")
    if ranks.WORLD > 1 and any("parallel" in key or "executor" in key for key in given):
        what = "each rank has an engine of its own on one GPU"
        raise InputError(f"{what}: to split an engine, start without torchrun")
    if settings["task"] == "healthbench" and settings["reward"] == "match":
        what = "--reward match compares boxed answers, and HealthBench has none"
        raise InputError(f"{what}: take another")
    if settings["task"] != "healthbench" and settings["reward"] == "physician":
        what = "--reward physician wants physicians' rubrics, which only --task healthbench has"
        raise InputError(f"{what}: take another")
    sampling = settings["eval_sampling"]
    shown = f"--eval-sampling {json.dumps(sampling)}"
    known = {"temperature", "top_k", "top_p"}
    if set(sampling) != known or not all(isinstance(v, int | float) for v in sampling.values()):
        raise InputError(f"{shown}: it takes numbers for temperature, top_k and top_p")
    temperature, top_k, top_p = (sampling[name] for name in ("temperature", "top_k", "top_p"))
    if not (0 <= temperature <= 2 and top_k in range(10**9) and 0 < top_p <= 1):
        what = "temperature is 0 to 2, top_k a count, top_p above 0, at most 1"
        raise InputError(f"{shown}: {what}")
    ranks.gather(settings, "settings")  # else each would train a policy of its own, without a word


def check_questions(cfg, questions: dict[str, list], reads_labels: bool) -> None:
    """Questions that the settings cannot be used with. `reads_labels`: validation does."""
    train, validation = questions["train"], questions["validation"]
    rewarded = cfg.reward == "physician" and cfg.method == "grpo"
    leaks = (cfg.validate_every and reads_labels) or rewarded
    if cfg.split == "test-time" and leaks:
        raise InputError(
            "with --split test-time the validation's and the physicians' labels would be those of "
            "the final table: take --split held-out, or --validate-every 0 and another --reward"
        )
    if cfg.validate_every and not validation:
        few = f"{len(train)} questions are too few to keep one in ten for validation"
        raise InputError(f"{few}: --validate-every 0")
    if reads_labels and any(q.answer is None and q.rubric is None for q in validation):
        what = "--validate-every reads labels, and these questions have none"
        raise InputError(f"{what}: take --validate-every 0")
    if cfg.prompts_per_step > len(train):
        there = f"more than there are questions: {len(train)}"
        raise InputError(f"--prompts-per-step {cfg.prompts_per_step} is {there}")
    ranks.gather(zlib.crc32(repr(list(questions.values())).encode()), "questions")


def check_room(cfg, engine, questions: Sequence, aggregators: Sequence[str]) -> None:
    """What does not fit the context of the anchor.

    Rollouts are cut to fit it (plumbing/context.py). What cannot be cut is a question, the frame
    around the rollouts, and what is to be written.
    """
    boxed, cut = cfg.reward == "match", [CUT] * cfg.group_size
    if "majority" in aggregators and not boxed:
        what = "the aggregator majority counts boxed answers, which only --reward match asks for"
        raise InputError(f"{what}: take another")
    seen = {q.conversation for q in questions} if "synthesis-question" in aggregators else {""}
    frames = [synthesis_messages(cut, boxed, question) for question in seen]
    frames += [best_messages(cut, boxed), *(q.messages for q in questions)]
    longest = max(len(engine.encode(messages)) for messages in frames)
    # One token of room, because scoring with vLLM generates one.
    if longest + cfg.max_new_tokens >= engine.context:
        raise InputError(
            f"a question, or the frame around {cfg.group_size} rollouts, has {longest} tokens; "
            f"with --max-new-tokens {cfg.max_new_tokens} the context of {cfg.model}, "
            f"{engine.context}, is too short: lower it or --group-size"
        )
