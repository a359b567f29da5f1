"""What each technique of a step is worth: every one is taken out alone, and the step is measured
with and without it.

    python benchmarks/changes.py --model DIR_OR_ID [--prompts 2] [--prompt-tokens 210] [--n 8]
    [--new-tokens 64]

Within a turn the step runs once as it is and once for each technique without it; ratios are taken
within a turn, because the machine's speed drifts. Taken out means that the form it replaced is
put back in its place, for this program alone."""

import argparse
import statistics
import time
from dataclasses import replace
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint
from work import endless_engine, load_trainer, prompts_of, rewards_of, shape_flags

import grpo
from plumbing import logprobs
from rollout import Sampling

HIDDEN_STATES = logprobs.hidden_states


def every_prompt_again(decoder, prompts, tails):
    """Each completion reads its prompt itself; token_logprobs wants the states of the tails
    alone.
    """
    states = HIDDEN_STATES(
        decoder, [()] * len(prompts), [list(p) + t for p, t in zip(prompts, tails, strict=True)]
    )
    return [h[len(p) :] for h, p in zip(states, prompts, strict=True)]


def computed_twice(hidden, targets, head, temperature):
    """Logits under activation checkpointing: computed once going forward, and again going
    backward.
    """

    def logprobs_of(states):
        every = torch.log_softmax(head(states).float() / temperature, dim=-1)
        entropy = -(every.exp() * every).sum(-1).detach()
        return every.gather(-1, targets[:, None])[:, 0], entropy

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
    model, tokenizer, optimizer = load_trainer(s.model)
    engine, sampling = endless_engine(model, tokenizer), Sampling(max_new_tokens=s.new_tokens)
    texts = prompts_of(tokenizer, s.prompts, s.prompt_tokens)
    groups = engine.sample([tokenizer(text).input_ids for text in texts], s.n, sampling)
    rewards, cfg = rewards_of(groups), grpo.GRPOConfig(importance_cap=None)
    silent = s.prompts // 2  # groups that agree

    def update(beta: float = 1e-3, agree: int = 0):
        given = torch.cat([torch.zeros_like(rewards[:agree]), rewards[agree:]])
        settings = replace(cfg, beta=beta)
        grpo.update(model, optimizer, groups, given, settings, logprobs.token_logprobs)

    # name: what puts the form before the technique back in its place
    without = {
        "update: a prompt is read once for its completions": ("hidden_states", every_prompt_again),
        "update: the head's derivatives are taken at once": ("chunk_logprobs", computed_twice),
    }
    vocabulary = model.get_base_model().get_input_embeddings().num_embeddings
    rows = torch.log_softmax(torch.randn(s.prompts * s.n, vocabulary), dim=-1)

    def draw():  # as plumbing/decoding.py does
        cumulated = rows.double().exp_().cumsum(-1)
        drawn = torch.rand(len(rows), 1, dtype=torch.double) * cumulated[:, -1:]
        torch.searchsorted(cumulated, drawn, right=True)

    ratios: dict[str, list[float]] = {}

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    for turn in range(s.turns + 1):
        measured = {}
        for name, (technique, before) in without.items():
            now = seconds(update)
            with mock.patch.object(logprobs, technique, before):
                measured[name] = seconds(update) / now
        name = "sampling, the draw alone: one random number a token"
        measured[name] = seconds(lambda: torch.multinomial(rows.exp(), 1)) / seconds(draw)
        if silent:
            name = f"update, beta 0: groups that agree are left out ({silent} of {s.prompts})"
            measured[name] = seconds(lambda: update(0.0)) / seconds(lambda: update(0.0, silent))
        for name, ratio in measured.items() if turn else ():  # the first turn warms up
            ratios.setdefault(name, []).append(ratio)
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:60s} {statistics.median(values):.2f} times faster ({spread})")


if __name__ == "__main__":
    main()
