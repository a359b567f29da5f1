"""Which engine and which judge a run gets."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from plumbing import ranks
from plumbing.decoding import TransformersEngine
from plumbing.errors import one_line
from plumbing.judges import anchor_judge, server_judge
from rollout import VLLMEngine


def installed_engine() -> tuple[str, str]:
    """(engine, why) for --engine auto: vLLM where it is installed for the device that trains."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed: pip install -r requirements-gpu.txt"
    try:
        from vllm.platforms import current_platform

        found = current_platform.device_type
    except Exception as error:  # noqa: BLE001 -- half an installation fails in many ways
        return "transformers", f"vLLM is installed and cannot be imported: {one_line(error)}"
    if found != device:
        where = f"for {found or 'no device that is here'}, and the model is on the {device}"
        return "transformers", f"vLLM is installed {where}"
    return "vllm", f"it is installed for the {device}"


def load_engine(cfg, policy, tokenizer, out: Path) -> tuple:
    """(engine, judge) that the settings name, `policy` being the trainer's PeftModel.

    With several ranks, each has an engine of its own, and they share the prompts out. A server is
    asked by rank 0 alone: a call is paid for once, whatever the ranks.
    """
    if cfg.engine == "vllm":
        # Under torchrun vLLM must not start workers of its own: it is on this rank's GPU.
        alone = {"distributed_executor_backend": "external_launcher"} if ranks.WORLD > 1 else {}
        engine = VLLMEngine(policy, tokenizer, alone | cfg.engine_args)
    else:
        engine = TransformersEngine(policy, tokenizer)
    engine = engine if ranks.WORLD == 1 else ranks.SharedEngine(engine)
    judge: Callable = anchor_judge(engine)
    if cfg.judge_model:
        where, cache = (cfg.judge_url, cfg.judge_model), out / "judge.jsonl"
        judge = ranks.of_rank_0(server_judge(*where, cache, max_tokens=cfg.judge_max_tokens))
    return engine, judge
