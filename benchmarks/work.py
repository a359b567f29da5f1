"""The work of one step, the same in every benchmark: prompts, rewards, LoRA, and an engine that
never ends early. Light to import, because TRL runs in an environment of its own.
"""

import argparse
import random
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "lora_dropout": 0.0,
    "bias": "none",
}
sys.path.insert(0, str(ROOT))


def shape_flags(parser: argparse.ArgumentParser) -> None:
    """The size of a step."""
    parser.add_argument("--prompts", type=int, default=2, help="different prompts a step")
    parser.add_argument("--prompt-tokens", type=int, default=210, help="length of each")
    parser.add_argument("--n", type=int, default=8, help="rollouts a prompt, G")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens a rollout")


def trainer_flags(parser: argparse.ArgumentParser, micro_batch_tokens: int) -> None:
    """What trains, and how; the same in every benchmark of an update."""
    switch = argparse.BooleanOptionalAction
    add, dtypes = parser.add_argument, ("float32", "bfloat16")
    add("--model", required=True, help="tiny, a folder or a Hugging Face id")
    add("--dtype", default="float32", choices=dtypes, help="of the base model")
    add("--micro-batch-tokens", type=int, default=micro_batch_tokens, help="of the update")
    add("--gradient-checkpointing", action=switch, default=False, help="of the model")


def prompts_of(tokenizer, count: int, tokens: int) -> list[str]:
    """`count` texts that are `tokens` tokens long, and stay so when they are encoded again."""
    words, texts = "add the numbers first then second and write all of it down".split(), []
    for k in range(count):
        drawn = " ".join(random.Random(k).choices(words, k=tokens))
        text = tokenizer.decode(tokenizer(drawn).input_ids[:tokens], skip_special_tokens=True)
        same = len(tokenizer(text).input_ids) == tokens
        assert same, "this tokenizer does not keep the length of the prompts"
        texts.append(text)
    return texts


def reward_of(ids: list[int]) -> float:
    """Something that differs between rollouts and costs nothing."""
    return sum(i % 2 for i in ids) / len(ids)


def rewards_of(groups):
    """(Q, G) rewards of groups of rollouts."""
    import torch

    return torch.tensor([[reward_of(o.ids) for o in group] for group in groups])


def load_trainer(name: str, dtype: str = "float32", checkpointing: bool = False, lr: float = 1e-5):
    """(PeftModel, tokenizer, optimizer), as train.py makes them."""
    import torch

    from plumbing.models import add_lora, load_base

    base, tokenizer = load_base(name)
    base.to(getattr(torch, dtype))
    model = add_lora(base, LORA["r"], 0, checkpointing)
    weights = [p for p in model.parameters() if p.requires_grad]
    return model, tokenizer, torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


def endless_engine(model, tokenizer, vllm: bool = False, engine_args: dict | None = None):
    """An engine that takes token ids as prompts, and whose rollouts all have the same length."""
    if vllm:
        from rollout import VLLMEngine

        engine = VLLMEngine(model, tokenizer, engine_args or {})
        engine.stop_ids, generate = [], engine.llm.generate

        def endless(inputs, params, **more):
            params.ignore_eos = True
            return generate(inputs, params, **more)

        engine.llm.generate = endless
    else:
        from plumbing.decoding import TransformersEngine

        engine = TransformersEngine(model, tokenizer)
        engine.stop_ids = [len(tokenizer) + 10**6]  # never sampled
    engine.encode = lambda ids: ids
    return engine


def process_peak_gib() -> float:
    """The process's high-water mark of main memory, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
