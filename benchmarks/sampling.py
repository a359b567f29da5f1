"""Rollouts per second: this project's transformers engine against
generate(num_return_sequences=n), side by side.

    python benchmarks/sampling.py --model DIR_OR_ID [--prompts 1] [--prompt-tokens 200] [--n 8]
    [--new-tokens 64]

Both sample the same number of tokens (no end token) from the same model in the same process,
taking turns, because the machine's speed drifts. The ratio is taken within each turn, then its
median and its range are printed."""

import argparse
import statistics
import time

import torch
from work import endless_engine, load_trainer, shape_flags

from rollout import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a Hugging Face id")
    shape_flags(parser)
    parser.add_argument("--turns", type=int, default=5, help="times that each is measured")
    s = parser.parse_args()
    model, tokenizer, _ = load_trainer(s.model)
    engine = endless_engine(model, tokenizer)
    sampling = Sampling(max_new_tokens=s.new_tokens)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 300, (s.prompts, s.prompt_tokens), generator=generator).to(
        model.device
    )

    def ours() -> int:
        groups = engine.sample(prompts.tolist(), s.n, sampling)
        return sum(len(o.ids) for group in groups for o in group)

    @torch.no_grad()
    def generate() -> int:
        out = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0,
            num_return_sequences=s.n, max_new_tokens=s.new_tokens, min_new_tokens=s.new_tokens,
        )  # fmt: skip
        return out[:, s.prompt_tokens :].numel()

    seconds = {ours: [], generate: []}
    for turn in range(s.turns + 1):
        for f in (ours, generate):
            started = time.perf_counter()
            tokens = f()
            if turn:  # the first turn warms up
                seconds[f].append(time.perf_counter() - started)
            assert tokens == s.prompts * s.n * s.new_tokens
    ratios = [b / a for a, b in zip(seconds[ours], seconds[generate], strict=True)]
    threads = torch.get_num_threads()
    shape = f"{s.prompts} x {s.n} rollouts of {s.new_tokens} tokens after {s.prompt_tokens}"
    print(f"{shape}, {threads} threads")
    for name, f in (("generate", generate), ("ours", ours)):
        median = statistics.median(seconds[f])
        print(f"{name:9s} {median:7.2f} s  {tokens / median:7.0f} tokens/s")
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f} in {s.turns} turns"
    print(f"ratio     {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
