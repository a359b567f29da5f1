"""The base model from a folder or the hub, and the LoRA that makes it a policy."""

from functools import partial
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing.errors import InputError, one_line

TINY_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny"


def load_base(name: str) -> tuple:
    """(model, tokenizer) of "tiny", a hub id or a local folder: bf16 on a GPU, float32 on a CPU.

    Raises InputError.
    """
    gpu, name = torch.cuda.is_available(), str(TINY_MODEL) if name == "tiny" else name
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = torch.bfloat16 if gpu else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # noqa: BLE001 -- no such id, offline, a broken file: each its own
        raise InputError(
            f"cannot load the model {name!r}: give --model a folder with a causal language model, "
            "or the id of one on the Hugging Face hub and a network that reaches it "
            f"({one_line(error)})"
        ) from None
    if tokenizer.chat_template is None:
        way_out = "give --model an instruct model"
        raise InputError(f"the tokenizer of {name!r} has no chat template: {way_out}")
    model = model.to("cuda" if gpu else "cpu").eval()
    # cuDNN's attention is PyTorch's first choice on an H100, and with a mask its gradients can be
    # NaN (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # The trainer applies the output head to chosen positions itself. A model that does more to its
    # logits (soft-capping, a scale) would be trained on wrong probabilities. Trying shows it.
    ids = torch.tensor([tokenizer.encode("1 + 1 = 2")], device=model.device)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        direct = model.get_output_embeddings()(hidden)
        if not torch.allclose(direct, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            what = "changes its logits after the output head, which grpo.py does not do"
            raise InputError(f"{name!r} {what}: use another")
    return model, tokenizer


def add_lora(base, rank: int, seed: int, checkpointing: bool = False) -> PeftModel:
    """The policy: `base` with a trainable LoRA on every linear layer but the output head.

    B = 0 at the start, so pi_t starts as pi_0. The adapter is float32 (peft casts it) over a base
    of any dtype: in bf16 an AdamW step of 1e-5 rounds to nothing. No dropout, because it would make
    pi_t / pi_old differ from 1 with equal weights. No bias, because vLLM refuses it.

    `checkpointing` computes each layer again in the backward pass, from its input: far less memory,
    one more forward pass.
    """
    torch.manual_seed(seed)  # of A's random initial values
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for layer in base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(checkpoint, layer.forward, **options)
    return get_peft_model(base, config)


def saved_policy(base, run: Path) -> PeftModel:
    """`base` with a run's trained adapter. Raises InputError."""
    try:
        return PeftModel.from_pretrained(base, run / "adapter")
    except (OSError, ValueError, RuntimeError) as error:
        way_out = "give --adapter the folder of a run"
        raise InputError(f"cannot load {run}/adapter: {way_out} ({one_line(error)})") from None
