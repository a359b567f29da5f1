"""Parts that several tests share: the real tiny model, with an adapter that does something."""

import os

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # the tests fetch nothing; one that meant to would fail at once
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # they compare with float32 on the CPU, on machines with a GPU too
)

import pytest
import torch

from plumbing.decoding import TransformersEngine
from plumbing.models import TINY_MODEL, add_lora, load_base


def tiny_policy():
    """(PeftModel, tokenizer) of the tiny model. LoRA's B is not 0 here, so that pi_t differs from pi_0."""
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model, tokenizer


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def engine(policy):
    return TransformersEngine(*policy)


def truncated(row, temperature, top_k, top_p):
    """{token: probability} that `row` (V,) of logits leaves: temperature, then top-k, then top-p, as model cards mean it."""
    p, order = torch.softmax(row / temperature, -1).sort(descending=True)
    p[top_k or len(p) :] = 0
    p = p / p.sum()
    p[p.cumsum(0) - p >= top_p] = 0  # the token that crosses top_p is still in
    return {int(k): float(x) for k, x in zip(order, p / p.sum(), strict=True) if x > 0}
