"""What tests of reference estimation share: rollouts of given texts, an anchor, and the truth."""

import re
from contextlib import nullcontext
from dataclasses import replace

import torch

from rollout import Rollout, Sampling
from synthesize import AGGREGATORS, Anchor
from tasks import load_sums

SUMS = load_sums(None)[1]
ATTEMPT = re.compile(r"<(?:attempt|response)(?: \d+)?>\n(.*?)\n</(?:attempt|response)>", re.DOTALL)
ASKS_THE_ANCHOR = [name for name in AGGREGATORS if name not in ("majority", "single")]


def sums(count: int, boxed: bool = True) -> list:
    """Questions of the sums; without `boxed` as if nobody had asked for a box."""
    return [replace(q, boxed=boxed) for q in SUMS[:count]]


def group(*answers):
    texts = [
        "no answer" if a is None else f"rollout {i}: \\boxed{{{a}}}" for i, a in enumerate(answers)
    ]
    return [Rollout(text, [1, 2], [0.0, 0.0], "stop", [1]) for text in texts]


def anchor_of(engine, seed=0, temperature=1.0, max_new_tokens=48):
    return Anchor(engine, Sampling(temperature, max_new_tokens), seed=(seed,))


def sampled(engine, questions, n=4, temperature=1.0):
    """Groups of `n` rollouts of the policy."""
    prompts = [q.messages for q in questions]
    return engine.sample(prompts, n, Sampling(temperature, max_new_tokens=48), seed=0)


def written(engine, texts):
    """Rollouts of given texts; their ids are the first few tokens, as if they were sampled."""
    encoded = [engine.tokenizer.encode(text, add_special_tokens=False)[:24] for text in texts]
    return [Rollout(t, ids, [], "stop", [1]) for t, ids in zip(texts, encoded, strict=True)]


def rescale_lora(engine, factor):
    for name, parameter in engine.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(factor)


def logprobs_of(engine, messages, completion=(), policy=False):
    """Log-probabilities from a plain forward pass, a row of the vocabulary for each token.

    They are of each token of the completion, and of the one after it.
    """
    prompt = engine.encode(messages)
    with torch.no_grad(), nullcontext() if policy else engine.model.disable_adapter():
        logits = engine.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 :].double(), -1)


def surprise_of(engine, messages, completion, policy=False):
    rows = logprobs_of(engine, messages, completion, policy)
    return -sum(float(rows[t, i]) for t, i in enumerate(completion)) / len(completion)


def record(engine, monkeypatch, name):
    """The prompts that engine.`name` is given from now on, one list a call.

    The real method goes on working.
    """
    calls, real = [], getattr(engine, name)

    def recorded(prompts, *args, **kwargs):
        calls.append([messages[0]["content"] for messages in prompts])
        return real(prompts, *args, **kwargs)

    monkeypatch.setattr(engine, name, recorded)
    return calls


class KnownModel:
    """An engine whose model has known log-probabilities: logprobs(prompt's text, completion)."""

    context = 10**9

    def __init__(self, logprobs):
        self.logprobs, self.prompts = logprobs, []

    def encode(self, messages):
        return messages[0]["content"].split()

    def score(self, prompts, completions, *, policy):
        assert not policy
        shown = [messages[0]["content"] for messages in prompts]
        self.prompts += shown
        return [self.logprobs(text, ids) for text, ids in zip(shown, completions, strict=True)]
