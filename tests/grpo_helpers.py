"""Rollouts, a recording optimizer and a second model for the tests of the GRPO step."""

from unittest.mock import patch

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import grpo
from conftest import shift
from grpo import GRPOConfig, policy_step
from plumbing import logprobs
from plumbing.models import TINY_MODEL, add_lora, load_base
from rollout import Rollout

# The definition, and what the trainer passes in. What is said of log-probabilities holds for both.
PLAIN, FAST = grpo.token_logprobs, logprobs.token_logprobs
both = pytest.mark.parametrize("token_logprobs", [PLAIN, FAST], ids=["plain", "fast"])

PROMPTS = [[0, 10, 11, 12, 3, 1], [0, 10, 11, 3, 1], [0, 20, 21, 22, 23, 3, 1], [0, 10, 3, 1]]
COMPLETIONS = [[30, 31, 3], [40, 41, 42, 43, 44, 3], [50, 3], [60, 61, 62, 63]]
A = torch.tensor([1.2, -0.7, 0.4, -0.9])  # advantages of `batch()`

# Two prompts of different lengths, with three completions and one; a third prompt with two.
REPEATED = [PROMPTS[0]] * 3 + [PROMPTS[2]] + [PROMPTS[3]] * 2
ANSWERS = [*COMPLETIONS[:3], [70, 71, 72], [80, 3], COMPLETIONS[1]]


def rollouts_of(prompts, completions):
    """Rollouts whose engine claims a log-probability of 0 for every token."""
    return [
        Rollout("", ids, [0.0] * len(ids), "stop" if ids[-1] == 3 else "length", prompt)
        for prompt, ids in zip(prompts, completions, strict=True)
    ]


def batch():
    """Four rollouts of different lengths.

    The last was cut off, and the third's end token is also the padding token.
    """
    return rollouts_of(PROMPTS, COMPLETIONS)


def in_float32(token_logprobs):
    """Of a float64 model too: sequence_kl keeps a KL in float32, and takes nothing else."""
    return lambda *given: [values.float() for values in token_logprobs(*given)]


def plain_logprobs(model, o, temperature=1.0):
    """log pi(o_t), (|o|,): alone, without padding, through the model's own head."""
    logits = model(input_ids=torch.tensor([o.prompt_ids + o.ids]), use_cache=False).logits[0]
    every = torch.log_softmax(logits[len(o.prompt_ids) - 1 : -1].double() / temperature, -1)
    return every[range(len(o.ids)), o.ids]


def in_pi_0(model, o, temperature=1.0):
    with torch.no_grad(), model.disable_adapter():
        return plain_logprobs(model, o, temperature)


def tiny():
    return load_base(str(TINY_MODEL))[0]


def gemma():
    """A model of two layers, the first of which sees 4 tokens back; random weights."""
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, head_dim=8, num_key_value_heads=2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def with_lora(base, scale=0.02, checkpointing=False):
    """A float64 policy on `base`, with a shifted LoRA."""
    model = add_lora(base.double(), 8, seed=0, checkpointing=checkpointing).double()
    shift(model, 1, scale)
    return model


class Recorder(torch.optim.SGD):
    """A real optimizer that also keeps each step's gradient."""

    def step(self, closure=None):
        self.gradients = getattr(self, "gradients", [])
        self.gradients.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def distance(ours, theirs):
    """The distance between two tensors, relative to the size of the second."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def recorded(model, step, lr=0.0):
    """(numbers, the gradient of each optimizer step) of `step(optimizer)`, without clipping."""
    optimizer = Recorder([p for p in model.parameters() if p.requires_grad], lr=lr)
    with patch.object(grpo, "MAX_GRAD_NORM", 1e9):
        numbers = step(optimizer)
    steps = getattr(optimizer, "gradients", [])
    return numbers, [torch.cat([g.flatten() for g in step]) for step in steps]


def one_step(model, rollouts, A, lr=0.0, token_logprobs=FAST, **settings):
    """`recorded` of policy_step; without importance weights, if `settings` do not have a cap."""
    cfg = GRPOConfig(**{"importance_cap": None} | settings)
    given = rollouts, A, cfg, token_logprobs
    return recorded(model, lambda optimizer: policy_step(model, optimizer, *given), lr)


def one_update(model, groups, rewards, lr=0.0, token_logprobs=FAST, **settings):
    """The same of grpo.update."""
    cfg = GRPOConfig(**{"importance_cap": None} | settings)
    given = groups, rewards, cfg, token_logprobs
    return recorded(model, lambda optimizer: grpo.update(model, optimizer, *given), lr)
