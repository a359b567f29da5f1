"""The base model and its LoRA: what it starts as, and which models are refused."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from plumbing.errors import InputError
from plumbing.models import TINY_MODEL, add_lora, load_base


def test_lora_trains_only_float32_adapters_and_starts_as_the_base():
    base, _ = load_base(str(TINY_MODEL))
    base.bfloat16()
    ids = torch.tensor([[0, 10, 11, 12, 3, 1]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = add_lora(base, rank=8, seed=0)
        assert torch.equal(before, model(input_ids=ids).logits)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in trainable.items())
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.bias, config.modules_to_save) == (0.0, "none", None)


def test_models_that_cannot_work_are_refused_in_a_sentence(tmp_path, policy):
    with pytest.raises(InputError, match="cannot load the model"):
        load_base(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="cannot load the model"):
        load_base("nobody/no-such-model")
    model, tokenizer = policy
    tokenizer.chat_template = None
    base = model.unload()
    base.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no chat template"):
        load_base(str(tmp_path / "plain"))


def test_a_model_that_rescales_its_logits_is_refused(tmp_path):
    _, tokenizer = load_base(str(TINY_MODEL))
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, logit_scale=0.0625, pad_token_id=3, bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="after the output head"):
        load_base(str(tmp_path))
