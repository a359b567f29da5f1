"""What share of a GRPO step is work that cannot be left out: each half of a step beside the least
that would do its work.

    python benchmarks/limit.py --model DIR_OR_ID [--prompts 2] [--prompt-tokens 210] [--n 8]
    [--new-tokens 64]

A step is engine.sample, rewards and advantages, and `update` with a KL term: what train.py does.
Its limit is

sampling  The engine's own throughput. transformers: a bare loop over the model's forward pass, with
          greedy tokens and no log-probabilities, masks, end tokens or texts. vLLM: llm.generate.
update    Every token once through the policy, forward and backward, and once through the reference,
          on plain rows that share nothing, and the head with a softmax at each completion token: no
          entropy, metrics, clipping, optimizer.

Both run in one process and take turns (A B A B ...), because the machine's speed drifts: a share
is taken within a turn. The limits are those of these libraries on this machine (LoRA on, and not
merged into the base), not of the hardware."""

import argparse
import json
import statistics
import sys
import time
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from work import endless_engine, load_trainer, prompts_of, rewards_of, shape_flags, trainer_flags

from grpo import GRPOConfig, update
from plumbing.logprobs import token_logprobs
from rollout import Sampling

# Positions whose logits exist at a time: all at once can be slower, and does not fit for long
# completions.
CHUNK = 128


def timed(f) -> tuple[float, object]:
    """(seconds, result). A GPU works behind the program's back: without waiting for it only
    launches would be timed.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    result = f()
    wait()
    return time.perf_counter() - started, result


class Buffer(DynamicLayer):
    """A layer's keys and values, with room for those to come: a DynamicLayer copies all that it
    has for each new token.
    """

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
    """(ids (rows, width), positions with logits, targets) of micro-batches with as many tokens as
    a step needs: each prompt once, each completion once, no padding. Rows are as long as a prompt
    with a completion, as nearly as it goes.
    """
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
    shape_flags(parser)
    parser.add_argument(
        "--turns", type=int, default=5, help="turns that count, after one that warms up"
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
    trainer_flags(parser, micro_batch_tokens=4096)
    return parser.parse_args()


def limits_of(s: argparse.Namespace, engine, prompts: list[list[int]]) -> tuple:
    """(the limits of sampling by name, what to call before each timing)."""
    if not s.vllm:
        ids = torch.tensor(prompts, device=engine.model.device)
        bare = partial(bare_decoding, engine.model, ids, s.n, s.new_tokens)
        # Which cache is faster depends on the machine and on the lengths.
        caches = {"a preallocated cache": True, "DynamicCache": False}
        return {name: partial(bare, kept) for name, kept in caches.items()}, lambda: None
    params = engine.vllm.SamplingParams(n=s.n, max_tokens=s.new_tokens, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]

    def generate():
        engine.llm.generate(inputs, params, lora_request=engine.adapter, use_tqdm=False)

    # A step has new weights and reads its prompts anew: neither side may find them in the cache
    # from the turn before.
    return {"llm.generate": generate}, engine.llm.reset_prefix_cache


def main() -> None:
    s = arguments()
    model, tokenizer, optimizer = load_trainer(s.model, s.dtype, s.gradient_checkpointing)
    texts = prompts_of(tokenizer, s.prompts, s.prompt_tokens)
    prompts = [tokenizer(text).input_ids for text in texts]
    engine = endless_engine(model, tokenizer, s.vllm, s.engine_args)
    limits, forget = limits_of(s, engine, prompts)
    vocabulary = model.get_base_model().get_input_embeddings().num_embeddings
    batches = plain_batches(s, vocabulary, model.device)
    sampling, cfg = (
        Sampling(max_new_tokens=s.new_tokens),
        GRPOConfig(token_budget=s.micro_batch_tokens, importance_cap=None),
    )
    turns = []
    for turn in range(s.turns + 1):
        now = {}
        forget()
        drawn = partial(engine.sample, prompts, s.n, sampling, seed=turn)
        now["sampling"], groups = timed(drawn)
        for name, limit in limits.items():
            forget()
            now[name], _ = timed(limit)
        sizes = {(len(o.prompt_ids), len(o.ids)) for group in groups for o in group}
        assert sizes == {(s.prompt_tokens, s.new_tokens)}
        now["rest"], rewards = timed(partial(rewards_of, groups))
        step = partial(update, model, optimizer, groups, rewards, cfg, logprobs=token_logprobs)
        now["update"], _ = timed(step)
        now["bare update"], _ = timed(partial(bare_update, model, batches))
        now["rest"] += timed(engine.sync)[0]
        shown = (f"{name} {value:.3f}" for name, value in now.items())
        print(f"turn {turn}", *shown, file=sys.stderr, flush=True)
        turns.append(now)
    # the first warmed up
    report(s, turns[1:], list(limits), sum(ids.numel() for ids, *_ in batches))


def report(s: argparse.Namespace, turns: list[dict], limits: list[str], tokens: int) -> None:
    seconds = {name: [now[name] for now in turns] for name in turns[0]}
    # One limit for all turns: the fastest of each turn would be fast by luck as well.
    fastest = min(limits, key=lambda name: statistics.median(seconds[name]))
    ours = [seconds["sampling"], seconds["update"]]
    least = [seconds[fastest], seconds["bare update"]]
    ours.append([sum(parts) for parts in zip(*ours, seconds["rest"], strict=True)])
    least.append([sum(parts) for parts in zip(*least, strict=True)])
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    engine = "vLLM" if s.vllm else "transformers"
    print(f"{s.model}, {s.dtype}, {engine}, checkpointing {s.gradient_checkpointing}, {device}")
    print(f"{s.prompts} x {s.n} rollouts of {s.new_tokens} tokens after {s.prompt_tokens}")
    print(f"limits: {fastest}; an update that reads {tokens} tokens")
    print(f"seconds, medians of {s.turns} turns (and their ranges)\n")
    titles = (f"{title:26s}" for title in ("this project", "limit", "limit / this project"))
    print(" " * 9, *titles, "of the fastest turns")
    for name, a, b in zip(("sampling", "update", "step"), ours, least, strict=True):
        share = [y / x for x, y in zip(a, b, strict=True)]
        spread = [(statistics.median(v), min(v), max(v)) for v in (a, b, share)]
        cells = [f"{f'{m:.3f} ({low:.3f} to {high:.3f})':26s}" for m, low, high in spread]
        # Other work on the machine can only add to a time, so the fastest turns are the cleanest.
        print(f"{name:9s}", *cells, f"{min(b) / min(a):.3f}")
    rest = statistics.median(seconds["rest"])
    print(f"rest      {rest:.3f}, of the step: rewards, engine.sync")


if __name__ == "__main__":
    main()
