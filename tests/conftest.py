"""Parts that several tests share: the real tiny model, with an adapter that does something."""

import os

# The tests fetch nothing; one that meant to would fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# They compare with float32 on the CPU, on machines with a GPU too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from plumbing.decoding import TransformersEngine
from plumbing.models import TINY_MODEL, add_lora, load_base


def shift(model, seed, scale=0.02):
    """Give the LoRA new weights: its B is not 0 then, so that pi_t differs from pi_0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_policy():
    """(PeftModel, tokenizer) of the tiny model, with a shifted LoRA."""
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=8, seed=0)
    shift(model, 1)
    return model, tokenizer


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def engine(policy):
    return TransformersEngine(*policy)


def truncated(row, temperature, top_k, top_p):
    """{token: probability} that `row` (V,) of logits leaves, as model cards mean it.

    Temperature first, then top-k, then top-p.
    """
    p, order = torch.softmax(row / temperature, -1).sort(descending=True)
    p[top_k or len(p) :] = 0
    p = p / p.sum()
    p[p.cumsum(0) - p >= top_p] = 0  # the token that crosses top_p is still in
    return {int(k): float(x) for k, x in zip(order, p / p.sum(), strict=True) if x > 0}
