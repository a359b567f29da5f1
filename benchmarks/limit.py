"""What share of a GRPO step is work that cannot be left out: each half of a step beside the least that would do its work.

    python benchmarks/limit.py --model DIR_OR_ID [--prompts 2] [--prompt-tokens 210] [--n 8] [--new-tokens 64]

A step is engine.sample, rewards and advantages, and `update` with a KL term: what train.py does. Its limit is

sampling  The engine's own throughput. transformers: a bare loop over the model's forward pass, with greedy tokens and no
          log-probabilities, masks, end tokens or texts. vLLM: llm.generate alone.
update    Every token once through the policy, forward and backward, and once through the reference, on plain rows that
          share nothing, and the head with a softmax at each completion token: no entropy, metrics, clipping, optimizer.

Both run in one process and take turns (A B A B ...), because the machine's speed drifts: a share is taken within a turn.
The limits are those of these libraries on this machine (LoRA on, and not merged into the base), not of the hardware.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from against_trl import LORA, prompts_of, reward_of, shape_flags
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo import update
from rewards import advantages
from rollout import TransformersEngine, VLLMEngine
from settings import vllm_options
from tasks import add_lora, load_base

CHUNK = 128  # positions whose logits exist at a time: all at once can be slower, and does not fit for long completions


def timed(f) -> tuple[float, object]:
    """(seconds, result). A GPU works behind the program's back: without waiting for it only launches would be timed."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    result = f()
    wait()
    return time.perf_counter() - started, result


class Buffer(DynamicLayer):
    """A layer's keys and values, with room for those to come: a DynamicLayer copies all that it has for each new token."""

    def __init__(self, prompt: DynamicLayer, room: int):
        super().__init__()
        self.used, self.is_initialized = prompt.keys.shape[2], True
        self.keys, self.values = (
            torch.nn.functional.pad(x, (0, 0, 0, room)) for x in (prompt.keys, prompt.values)
        )

    def update(self, keys, values, *_):
        self.keys[:, :, self.used : self.used + 1], self.values[:, :, self.used : self.used + 1] = (
            keys,
            values,
        )
        self.used += 1
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used


@torch.inference_mode()
def bare_decoding(model, prompts: torch.Tensor, n: int, new_tokens: int, buffered: bool) -> None:
    base = (
        model.get_base_model()
    )  # its layers hold the LoRA; peft's wrapper around it would only cost time
    cache = DynamicCache(config=base.config)
    # Prompts of one length need no mask, and attention without one is faster.
    logits = base(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    if buffered:
        cache.layers = [
            Buffer(layer, new_tokens) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
    cache.batch_repeat_interleave(n)
    token = logits[:, -1].argmax(-1, keepdim=True).repeat_interleave(n, dim=0)
    for _ in range(new_tokens - 1):  # the last token is never read
        logits = base(
            input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)


def plain_batches(s: argparse.Namespace, vocabulary: int, device) -> list[tuple]:
    """(ids (rows, width), positions with logits, targets) of micro-batches with as many tokens as a step needs: each
    prompt once, each completion once, no padding. Rows are as long as a prompt with a completion, as nearly as it goes."""
    new = s.prompts * s.n * s.new_tokens
    total = s.prompts * s.prompt_tokens + new
    rows = max(1, round(total / (s.prompt_tokens + s.new_tokens)))
    width = (
        total // rows
    )  # rounded down: what is left out makes the limit harder to beat, not easier
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, width), generator=generator)
    targets = torch.randint(10, vocabulary, (new,), generator=generator)
    where = torch.linspace(
        0, rows * width - 1, new
    ).long()  # which tokens learn does not matter to the time
    batches, per_batch = [], max(1, s.micro_batch_tokens // width)
    for first in range(0, rows, per_batch):
        part = ids[first : first + per_batch]
        inside = (where >= first * width) & (where < first * width + part.numel())
        batches.append(
            tuple(x.to(device) for x in (part, where[inside] - first * width, targets[inside]))
        )
    return batches


def bare_update(model, batches: list[tuple]) -> None:
    base = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()

    def states_of(ids, where):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[where]

    def logprobs_of(
        h, y
    ):  # dtype: the conversion to float32 is part of the kernel, not a copy of the logits
        return torch.log_softmax(head(h), dim=-1, dtype=torch.float32).gather(-1, y[:, None])

    model.zero_grad(set_to_none=True)
    for ids, where, targets in batches:
        with torch.no_grad(), model.disable_adapter():
            for h, y in zip(states_of(ids, where).split(CHUNK), targets.split(CHUNK), strict=True):
                logprobs_of(h, y)
        states, rows = states_of(ids, where), []
        for h, y in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            h = h.detach().requires_grad_()
            rows += torch.autograd.grad(
                -logprobs_of(h, y).sum(), h
            )  # the head's backward pass; a chunk's logits then go
        states.backward(torch.cat(rows))  # the network's, once
    model.zero_grad(set_to_none=True)


def arguments() -> argparse.Namespace:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    parser.add_argument("--model", required=True, help="tiny, a folder or a Hugging Face id")
    shape_flags(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base model"
    )
    parser.add_argument(
        "--turns", type=int, default=5, help="turns that count, after one that warms up"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=4096, help="of the update and of its limit"
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="in both",
    )
    parser.add_argument(
        "--vllm", action="store_true", help="sample with vLLM instead of transformers"
    )
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default={},
        help="JSON for vLLM, like gpu_memory_utilization",
    )
    return parser.parse_args()


def start_engine(s: argparse.Namespace, model, tokenizer, prompts: list[list[int]]) -> tuple:
    """(engine, its limits by name, what to call before each timing); rollouts end at --new-tokens and not before."""
    if not s.vllm:
        engine, ids = (
            TransformersEngine(model, tokenizer),
            torch.tensor(prompts, device=model.device),
        )
        engine.stop_ids = [len(tokenizer) + 10**6]  # never sampled
        # Which cache is faster depends on the machine and on the lengths.
        names = {"a preallocated cache": True, "DynamicCache": False}
        return (
            engine,
            {k: partial(bare_decoding, model, ids, s.n, s.new_tokens, v) for k, v in names.items()},
            lambda: None,
        )
    engine = VLLMEngine(model, tokenizer, vllm_options(model, s.engine_args))
    engine.stop_ids, generate = [], engine.llm.generate

    def endless(inputs, params, **more):
        params.ignore_eos = True
        return generate(inputs, params, **more)

    engine.llm.generate = endless
    bare = engine.vllm.SamplingParams(
        n=s.n, max_tokens=s.new_tokens, ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    alone = lambda: generate(inputs, bare, lora_request=engine.adapter, use_tqdm=False)  # noqa: E731 -- as the others
    # A step has new weights and reads its prompts anew: neither side may find them in the cache from the turn before.
    return engine, {"llm.generate": alone}, engine.llm.reset_prefix_cache


def main() -> None:
    s = arguments()
    base, tokenizer = load_base(s.model)
    base.to(getattr(torch, s.dtype))
    model = add_lora(base, LORA["r"], 0, s.gradient_checkpointing)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0
    )
    prompts = [
        tokenizer(text).input_ids for text in prompts_of(tokenizer, s.prompts, s.prompt_tokens)
    ]
    engine, limits, forget = start_engine(s, model, tokenizer, prompts)
    engine.encode = lambda ids: ids  # the prompts are ids already
    batches = plain_batches(s, base.get_input_embeddings().num_embeddings, model.device)

    def advantage_of(groups):
        return advantages(
            torch.tensor([[reward_of(o.ids) for o in group] for group in groups])
        ).flatten()

    turns = []
    for turn in range(s.turns + 1):
        now = {}
        forget()
        now["sampling"], groups = timed(
            partial(engine.sample, prompts, s.n, max_new_tokens=s.new_tokens, seed=turn)
        )
        for name, limit in limits.items():
            forget()
            now[name], _ = timed(limit)
        rollouts = [o for group in groups for o in group]
        assert all(
            len(o.ids) == s.new_tokens and len(o.prompt_ids) == s.prompt_tokens for o in rollouts
        )
        now["rest"], advantage = timed(partial(advantage_of, groups))
        step = partial(
            update,
            model,
            optimizer,
            rollouts,
            advantage,
            beta=1e-3,
            token_budget=s.micro_batch_tokens,
        )
        now["update"], _ = timed(step)
        now["bare update"], _ = timed(partial(bare_update, model, batches))
        now["rest"] += timed(engine.sync)[0]
        print(
            f"turn {turn}",
            *(f"{name} {value:.3f}" for name, value in now.items()),
            file=sys.stderr,
            flush=True,
        )
        turns.append(now)
    seconds = {
        name: [now[name] for now in turns[1:]] for name in turns[0]
    }  # the first turn warmed up

    # One limit for all turns: the fastest of each turn would be fast by luck as well.
    fastest = min(limits, key=lambda name: statistics.median(seconds[name]))
    ours, least = (
        [seconds["sampling"], seconds["update"]],
        [seconds[fastest], seconds["bare update"]],
    )
    ours.append([sum(parts) for parts in zip(*ours, seconds["rest"], strict=True)])
    least.append([sum(parts) for parts in zip(*least, strict=True)])
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{s.model}, {s.dtype}, {'vLLM' if s.vllm else 'transformers'}, checkpointing {s.gradient_checkpointing}, {device}"
    )
    print(f"{s.prompts} x {s.n} rollouts of {s.new_tokens} tokens after {s.prompt_tokens}")
    print(
        f"limits: {fastest}; an update that reads {sum(ids.numel() for ids, *_ in batches)} tokens"
    )
    print(f"seconds, medians of {s.turns} turns (and their ranges)\n")
    print(
        f"{'':9s} {'this project':26s} {'limit':26s} {'limit / this project':26s} of the fastest turns"
    )
    for name, a, b in zip(("sampling", "update", "step"), ours, least, strict=True):
        share = [y / x for x, y in zip(a, b, strict=True)]
        cells = [
            f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (a, b, share)
        ]
        # Other work on the machine can only add to a time, so the fastest turns are the cleanest.
        print(f"{name:9s} {cells[0]:26s} {cells[1]:26s} {cells[2]:26s} {min(b) / min(a):.3f}")
    print(
        f"rest      {statistics.median(seconds['rest']):.3f}, of the step: rewards, advantages, engine.sync"
    )


if __name__ == "__main__":
    main()
