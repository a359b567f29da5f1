"""What each technique of a step is worth: every one is taken out alone, and the step is measured with and without it.

    python benchmarks/changes.py --model DIR_OR_ID [--prompts 2] [--prompt-tokens 210] [--n 8] [--new-tokens 64]

Within a turn the step runs once as it is and once for each technique without it; ratios are taken within a turn, because
the machine's speed drifts. Taken out means that the form it replaced is put back in its place, for this program alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from against_trl import prompts_of, reward_of, shape_flags
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import rollout
from rewards import advantages
from tasks import add_lora, load_base

HIDDEN_STATES = grpo._hidden_states


def every_prompt_again(decoder, prompts, tails):
    """Each completion reads its prompt itself; token_logprobs wants the states of the tails alone."""
    states = HIDDEN_STATES(
        decoder, [()] * len(prompts), [list(p) + t for p, t in zip(prompts, tails, strict=True)]
    )
    return [h[len(p) :] for h, p in zip(states, prompts, strict=True)]


def chunk_computed_twice(hidden, targets, head, temperature):
    """Logits under activation checkpointing: computed once going forward, and again going backward."""

    def logprobs_of(states):
        logits = head(states).float() / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(
            -1
        ).detach()

    return checkpoint(logprobs_of, hidden, use_reentrant=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="tiny, a folder or a Hugging Face id")
    shape_flags(parser)
    parser.add_argument(
        "--turns", type=int, default=3, help="turns that count, after one that warms up"
    )
    s = parser.parse_args()
    base, tokenizer = load_base(s.model)
    model = add_lora(base, 16, 0)
    engine = rollout.TransformersEngine(model, tokenizer)
    engine.stop_ids = [len(tokenizer) + 10**6]  # never sampled
    engine.encode = lambda text: tokenizer(text).input_ids
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0
    )
    prompts = prompts_of(tokenizer, s.prompts, s.prompt_tokens)

    def sampling():
        return engine.sample(prompts, s.n, max_new_tokens=s.new_tokens)

    groups = sampling()
    advantage = advantages(
        torch.tensor([[reward_of(o.ids) for o in group] for group in groups])
    ).flatten()
    rollouts = [o for group in groups for o in group]

    def update(beta: float = 1e-3, silent: int = 0):
        some = torch.cat(
            [torch.zeros(silent), advantage[silent:]]
        )  # `silent` rollouts without advantage
        grpo.update(model, optimizer, rollouts, some, beta=beta)

    # name: what puts the form before the technique back in its place
    without = {
        "update: a prompt is read once for its completions": mock.patch.object(
            grpo, "_hidden_states", every_prompt_again
        ),
        "update: the head's derivatives are taken at once": mock.patch.object(
            grpo, "_chunk_logprobs", chunk_computed_twice
        ),
        "sampling: room for keys and values": mock.patch.object(
            rollout, "_BufferLayer", lambda _: DynamicLayer()
        ),  # noqa: PT008
    }
    logprobs = torch.log_softmax(
        torch.randn(s.prompts * s.n, base.get_input_embeddings().num_embeddings), dim=-1
    )

    def draw():  # as rollout.py does
        cumulated = logprobs.double().exp_().cumsum(-1)
        torch.searchsorted(
            cumulated,
            torch.rand(len(logprobs), 1, dtype=torch.double) * cumulated[:, -1:],
            right=True,
        )

    silent = s.prompts // 2 * s.n
    ratios: dict[str, list[float]] = {}

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    for turn in range(s.turns + 1):
        measured = {}
        for name, before in without.items():
            work = update if name.startswith("update") else sampling
            now = seconds(work)
            with before:
                measured[name] = seconds(work) / now
        name = "sampling, the draw alone: one random number a token"
        measured[name] = seconds(lambda: torch.multinomial(logprobs.exp(), 1)) / seconds(draw)
        if silent:
            name = (
                f"update, beta 0: groups that agree are left out ({s.prompts // 2} of {s.prompts})"
            )
            measured[name] = seconds(lambda: update(0.0)) / seconds(lambda: update(0.0, silent))
        for name, ratio in measured.items() if turn else ():  # the first turn warms up
            ratios.setdefault(name, []).append(ratio)
    for name, values in ratios.items():
        print(
            f"{name:60s} {statistics.median(values):.2f} times faster ({min(values):.2f} to {max(values):.2f})"
        )


if __name__ == "__main__":
    main()
