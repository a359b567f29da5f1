"""Token log-probabilities, faster: each prompt is read once, and nothing is computed twice.

`token_logprobs` here equals grpo.token_logprobs, which is the definition (a test holds them to 1e-7
in float64). What is faster, measured in benchmarks/README.md: completions of a prompt attend to one
copy of its keys and values; and the head's derivatives are taken while the logits are there.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from grpo import LOGIT_CHUNK

# Share of a batch's tokens that sharing prompts must save. It costs a pass more, and the attention
# kernels that take no mask.
WORTH_SHARING = 0.2


def token_logprobs(model, rollouts: Sequence, temperature: float):
    """As grpo.token_logprobs: (logprobs, mask, entropy) of B rollouts, each (B, T)."""
    base, lengths = model.get_base_model(), [len(o.ids) for o in rollouts]
    prompts = [o.prompt_ids for o in rollouts]
    kinds = {type(layer) for layer in DynamicCache(config=base.get_decoder().config).layers}
    saved = sum(map(len, prompts)) - sum(map(len, set(map(tuple, prompts))))
    worth = saved > WORTH_SHARING * (sum(map(len, prompts)) + sum(lengths))
    shared = worth and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    # A prompt's last token is read with each completion, whose first token it predicts; its others
    # can be read once.
    prefixes = [tuple(p[:-1]) if shared else () for p in prompts]
    suffixes = [
        o.prompt_ids[len(p) :] + o.ids[:-1] for o, p in zip(rollouts, prefixes, strict=True)
    ]
    hidden = hidden_states(base.get_decoder(), prefixes, suffixes)  # (B, W, H)
    # A state predicts the token after it: the last |o_i| of a suffix predict the completion.
    spans = zip(hidden, suffixes, lengths, strict=True)
    states = torch.cat([h[len(x) - n : len(x)] for h, x, n in spans])  # (N, H)
    targets = torch.tensor([i for o in rollouts for i in o.ids], device=model.device)  # (N,)
    chunks = zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True)
    parts = [chunk_logprobs(h, y, base.get_output_embeddings(), temperature) for h, y in chunks]
    flat = (torch.cat(values).split(lengths) for values in zip(*parts, strict=True))
    logprobs, entropy = (pad_sequence(values, batch_first=True) for values in flat)  # (B, T) each
    mask = pad_sequence([logprobs.new_ones(n) for n in lengths], batch_first=True)  # (B, T)
    return logprobs, mask, entropy


def chunk_logprobs(hidden, targets, head, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies), (n,) each, of `targets` (n,) after states `hidden` (n, H)."""
    needs_grad = torch.is_grad_enabled()
    state = hidden.detach().requires_grad_(needs_grad)
    logits = head(state)  # (n, V)
    with torch.no_grad():
        # At least float32, whatever the base is in.
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = torch.log_softmax(scaled, dim=-1)  # (n, V)
        probs = torch.exp(logprobs, out=scaled)  # (n, V)
        entropy = -torch.linalg.vecdot(probs, logprobs)  # (n,)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]  # (n,)
    if needs_grad:
        # A log-probability depends on its own state alone, so its derivatives are one row,
        # (onehot - probs) / T through the head. They are taken now: nothing with V columns waits
        # for the loss, or is computed twice.
        onehot = torch.ones_like(chosen)[:, None]
        slopes = probs.neg_().scatter_add_(1, targets[:, None], onehot) / temperature  # (n, V)
        (state_grad,) = torch.autograd.grad(logits, state, slopes.to(logits.dtype))  # (n, H)
        # Zeros, (n, H): they add nothing to the value, and state_grad to the gradient.
        zero = (hidden - state.detach()).to(chosen.dtype)
        chosen = chosen + (zero * state_grad.to(chosen.dtype)).sum(-1)
    return chosen, entropy


class PrefixLayer(DynamicLayer):
    """One layer's keys and values of D prefixes, (D, heads, P, d), put before those of B suffixes.

    Unlike its parent's, `update` adds nothing to what it keeps, so that a layer can be computed
    again in the backward pass (gradient checkpointing).
    """

    rows: torch.Tensor | None = None  # (B,), whose prefix a suffix follows; None: prefixes are read

    def update(self, keys, values, *_):
        if self.rows is None:
            if not self.is_initialized:  # what is computed again would keep its graph's memory
                self.keys, self.values, self.is_initialized = keys, values, True
            return keys, values
        before = self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def hidden_states(decoder, prefixes: list[tuple], suffixes: list[list[int]]) -> torch.Tensor:
    """Hidden states (B, W, H) of `suffixes`, each read after its prefix; equal prefixes once.

    A prefix's keys and values take gradients from all its suffixes, and their sum is the gradient
    of the whole.
    """
    device, width = decoder.device, max(map(len, suffixes))
    # On the right, padding is seen by no real token, because attention is causal.
    ids = torch.tensor([suffix + [0] * (width - len(suffix)) for suffix in suffixes], device=device)
    if not any(prefixes):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state
    distinct, longest = list(dict.fromkeys(prefixes)), max(map(len, prefixes))
    # On the left, because a sliding window counts columns, and suffixes follow in the next one.
    padding = [longest - len(p) for p in distinct]
    pairs = list(zip(padding, distinct, strict=True))
    padded = torch.tensor([[0] * n + list(p) for n, p in pairs], device=device)  # (D, P)
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in pairs], device=device)  # (D, P)
    position, cache = mask.cumsum(1) - mask, Cache(layer_class_to_replicate=PrefixLayer)
    decoder(input_ids=padded, attention_mask=mask, position_ids=position, past_key_values=cache)
    rows = torch.tensor([distinct.index(p) for p in prefixes], device=device)  # (B,)
    shared = Cache(layers=[copy(layer) for layer in cache.layers])
    for layer in shared.layers:
        layer.rows = rows
    mask = torch.cat([mask[rows], mask.new_ones(ids.shape)], dim=1)  # (B, P + W)
    position = mask.cumsum(1)[:, longest:] - 1  # (B, W)
    given = {"attention_mask": mask, "position_ids": position, "past_key_values": shared}
    return decoder(input_ids=ids, **given).last_hidden_state  # (B, W, H)
