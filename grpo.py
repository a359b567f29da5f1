"""GRPO by hand: token log-probabilities, the loss, and one update of the LoRA (paper, section 3; DeepSeekMath).

Shapes: Q questions in a step, G rollouts of each, B rollouts in a micro-batch, T tokens in its longest completion,
N completion tokens in a micro-batch, V vocabulary, H hidden size.

Symbols: R rewards, A advantages, o_i a completion of |o_i| tokens, pi_t the policy (`logprobs`), pi_old the policy
that sampled (`old_logprobs`), pi_0 the reference policy (`ref_logprobs`), beta the KL coefficient, epsilon the clip ratio.
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tasks import RANK, WORLD, exchange, gather

LOGIT_CHUNK = 128  # completion tokens whose logits exist at a time: 128 x 152k x 4 bytes is 78 MB
WORTH_SHARING = 0.2  # of a batch's tokens: reading prompts once costs a pass more, and attention kernels without a mask


def _chunk_logprobs(hidden, targets, head, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies), (n,) each, of `targets` (n,) after states `hidden` (n, H)."""
    needs_grad = torch.is_grad_enabled()
    state = hidden.detach().requires_grad_(needs_grad)
    logits = head(state)  # (n, V)
    with torch.no_grad():
        # At least float32, whatever the base is in; and divided by T, because what was sampled at T is scored at T.
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = torch.log_softmax(scaled, dim=-1)  # (n, V)
        probs = torch.exp(logprobs, out=scaled)  # (n, V)
        entropy = -torch.linalg.vecdot(probs, logprobs)  # (n,)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]  # (n,)
    if needs_grad:
        # A log-probability depends on its own state alone, so its derivatives are one row, (onehot - probs) / T through
        # the head, and are taken now: nothing with V columns waits for the loss, or is computed twice.
        slopes = probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(chosen)[:, None]) / temperature  # (n, V)
        (state_grad,) = torch.autograd.grad(logits, state, slopes.to(logits.dtype))  # (n, H)
        zero = (hidden - state.detach()).to(chosen.dtype)  # (n, H); adds nothing to the value, state_grad to the gradient
        chosen = chosen + (zero * state_grad.to(chosen.dtype)).sum(-1)
    return chosen, entropy


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of prefixes, (D, heads, P, d): read first, then put before those of B suffixes.

    Unlike its parent's, `update` adds nothing to what it keeps, so a layer can be computed again in the backward pass.
    """

    rows: torch.Tensor | None = None  # (B,), which prefix each suffix follows; None while prefixes are read

    def update(self, keys, values, *_):
        if self.rows is None:
            if not self.is_initialized:  # what is computed again would keep the memory of its graph
                self.keys, self.values, self.is_initialized = keys, values, True
            return keys, values
        before = self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)  # (B, heads, P, d) each
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def _hidden_states(decoder, prefixes: list[tuple], suffixes: list[list[int]]) -> torch.Tensor:
    """Hidden states (B, W, H) of `suffixes`, each read after its prefix. Equal prefixes are read ONCE for all of them.

    A prefix's keys and values then take gradients from all its suffixes, and their sum is the gradient of the whole.
    """
    device, width = decoder.device, max(map(len, suffixes))
    # On the right, padding is seen by no real token, because attention is causal.
    ids = torch.tensor([suffix + [0] * (width - len(suffix)) for suffix in suffixes], device=device)  # (B, W)
    if not any(prefixes):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state
    distinct, longest = list(dict.fromkeys(prefixes)), max(map(len, prefixes))
    # On the left, because a sliding window counts columns, and suffixes follow in the next one.
    padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)  # (D, P)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)  # (D, P)
    cache = Cache(layer_class_to_replicate=_PrefixLayer)
    decoder(input_ids=padded, attention_mask=mask, position_ids=mask.cumsum(1) - mask, past_key_values=cache)
    rows = torch.tensor([distinct.index(p) for p in prefixes], device=device)  # (B,)
    shared = Cache(layers=[copy(layer) for layer in cache.layers])
    for layer in shared.layers:
        layer.rows = rows
    mask = torch.cat([mask[rows], mask.new_ones(ids.shape)], dim=1)  # (B, P + W)
    position = mask.cumsum(1)[:, longest:] - 1  # (B, W)
    return decoder(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=shared).last_hidden_state


def token_logprobs(model, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, temperature: float):
    """log pi(o_{i,t} | q, o_{i,<t}) for B sequences of token ids: (logprobs, mask, entropy), each (B, T).

    `mask` is 1.0 on the completion's tokens. It comes from LENGTHS: many models pad with their end-of-sequence token,
    so a mask made from ids would drop the very token that teaches a model to stop. Zeros where the mask is 0.

    Memory: the backbone runs on whole sequences, but logits exist for completion tokens only, LOGIT_CHUNK at a time.
    8 x 1024 tokens of a 152k vocabulary would be 5 GB of float32.
    """
    base, lengths = model.get_base_model(), [len(c) for c in completions]
    kinds = {type(layer) for layer in DynamicCache(config=base.get_decoder().config).layers}
    saved = sum(map(len, prompts)) - sum(map(len, set(map(tuple, prompts))))
    total = sum(map(len, [*prompts, *completions]))
    shared = saved > WORTH_SHARING * total and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    # A prompt's last token is read with each completion, whose first token it predicts; its others can be read once.
    prefixes = [tuple(p[:-1]) if shared else () for p in prompts]
    suffixes = [p[len(prefix) :] + c[:-1] for p, prefix, c in zip(prompts, prefixes, completions, strict=True)]
    hidden = _hidden_states(base.get_decoder(), prefixes, suffixes)  # (B, W, H)
    # A state predicts the token after it, and the last |o_i| of a suffix are those that predict the completion.
    states = torch.cat([h[len(x) - n : len(x)] for h, x, n in zip(hidden, suffixes, lengths, strict=True)])  # (N, H)
    targets = torch.tensor([i for c in completions for i in c], dtype=torch.long, device=model.device)  # (N,)
    chunks = [
        _chunk_logprobs(h, y, base.get_output_embeddings(), temperature)
        for h, y in zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True)
    ]
    flat = (torch.cat(parts).split(lengths) for parts in zip(*chunks, strict=True))
    logprobs, entropy = (pad_sequence(values, batch_first=True) for values in flat)  # (B, T) each
    mask = pad_sequence([torch.ones(n, device=model.device) for n in lengths], batch_first=True)  # (B, T)
    return logprobs, mask, entropy


def policy_loss(
    logprobs: torch.Tensor,  # (B, T), with gradient
    old_logprobs: torch.Tensor,  # (B, T), of pi_old
    ref_logprobs: torch.Tensor | None,  # (B, T), of pi_0; None where beta is 0
    advantage: torch.Tensor,  # (B,)
    mask: torch.Tensor,  # (B, T)
    *,
    clip: float,
    beta: float,
    form: str,
    total_tokens: int,
    total_rollouts: int,
    weights: torch.Tensor | None = None,  # (B, T), of importance
) -> tuple[torch.Tensor, dict[str, float]]:
    """One micro-batch's share of the loss, and sums for the log.

    The clipped surrogate with a KL term, for every token (DeepSeekMath, Eq. 3; the paper's Eq. 6):

        ratio  = pi_t / pi_old
        L_i,t  = -min(ratio * A_i, clip(ratio, 1 - epsilon, 1 + epsilon) * A_i) + beta * k3

    `form` "token" (default): sum of L_i,t over all tokens / tokens in the whole step. Every token weighs the same.
    `form` "sequence" (Eq. 6): mean over |o_i| first, then over rollouts. A token of a long answer then weighs less, so
    long wrong answers are punished less than short ones, and answers grow.

    `weights` multiply the surrogate, not the KL, which is a regulariser of pi_t wherever it is taken.

    Both forms divide by counts of the WHOLE step, taken before it is cut into micro-batches: then the gradients of the
    micro-batches add up to the gradient of the step, however it was cut.
    """
    a = advantage[:, None]  # (B, 1)
    ratio = torch.exp(logprobs - old_logprobs)  # (B, T)
    per_token = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)  # (B, T)
    if weights is not None:
        per_token = weights * per_token
    clipped = ((ratio < 1 - clip) & (a < 0)) | ((ratio > 1 + clip) & (a > 0))  # (B, T): no gradient here
    sums = {"clip_ratio": float((clipped * mask).sum())}
    if ref_logprobs is not None:
        d = ref_logprobs - logprobs  # (B, T)
        # k3 estimates KL(pi_t || pi_0) without bias and is never negative. Its GRADIENT, (1 - pi_0 / pi_t) grad log pi_t, is
        # in expectation that of the forward KL(pi_0 || pi_t): it pulls towards covering pi_0; the minimum is the same.
        k3 = torch.exp(d) - d - 1  # (B, T)
        per_token = per_token + beta * k3
        sums["kl"] = float((k3 * mask).sum().detach())
    per_token = per_token * mask  # before any mean: a padded position counts in no sum
    if form == "token":
        return per_token.sum() / total_tokens, sums
    return (per_token.sum(dim=1) / mask.sum(dim=1)).sum() / total_rollouts, sums


def micro_batches(lengths: Sequence[int], token_budget: int, prompts: Sequence[list[int]] | None = None) -> Iterator[list]:
    """Indices of sequences of like length, in batches of at most `token_budget` tokens with padding (one at least).

    With `prompts`, `lengths` are those of their completions. Completions of a prompt then stay together and it counts
    once; token_logprobs may read it for each if that is at most WORTH_SHARING of all tokens.

    >>> list(micro_batches([5, 1, 4, 2], token_budget=8))
    [[1, 3], [2], [0]]
    """
    keys = [tuple(p) for p in prompts] if prompts else [()] * len(lengths)
    longest: dict[tuple, int] = {}  # completion of each prompt: prompts of like size are neighbours
    for key, length in zip(keys, lengths, strict=True):
        longest[key] = max(length, longest.get(key, 0))
    batch: list[int] = []
    for i in sorted(range(len(keys)), key=lambda i: (len(keys[i]) + longest[keys[i]], keys[i], lengths[i])):
        distinct = {keys[j] for j in [*batch, i]}
        tokens = len(distinct) * max(map(len, distinct)) + (len(batch) + 1) * max(lengths[j] for j in [*batch, i])
        if batch and tokens > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def sequence_kl(model, rollouts: Sequence, *, temperature: float, token_budget: int) -> torch.Tensor:
    """sum_t log pi_t - log pi_0 of each rollout, (len(rollouts),): an estimate of its KL in nats, for --kl reward."""
    kl = torch.zeros(len(rollouts))
    cuts = list(micro_batches([len(o.ids) for o in rollouts], token_budget, [o.prompt_ids for o in rollouts]))
    for rows in cuts[RANK::WORLD]:
        ids = [rollouts[i].prompt_ids for i in rows], [rollouts[i].ids for i in rows]
        with model.disable_adapter():
            ref_logprobs, _, _ = token_logprobs(model, *ids, temperature=temperature)
        kl[rows] = (token_logprobs(model, *ids, temperature=temperature)[0] - ref_logprobs).sum(dim=1).cpu()
    return sum(gather(kl))


def update(
    model,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence,  # Q*G of them
    advantage: torch.Tensor,  # (Q*G,)
    *,
    clip: float = 0.2,
    beta: float = 1e-3,
    form: str = "token",
    temperature: float = 1.0,
    updates: int = 1,
    mask_truncated: bool = False,
    importance_cap: float | None = None,
    max_grad_norm: float = 1.0,
    token_budget: int = 4096,
) -> dict[str, float]:
    """`updates` optimizer steps, or none, on one batch of rollouts. Returns numbers for the log, averages of the step.

    `rollouts` are as in rollout.py; the batch is cut into micro-batches of at most `token_budget` tokens.
    `beta` 0 means no KL term in the loss: then pi_0 is never run, and rollouts whose advantage is 0 (all rewards of
    their group were equal) are skipped, because their gradient is exactly 0. They still count in the denominators.
    `mask_truncated` takes rollouts that were cut off out of the loss and its denominators: their end is not their own.

    `importance_cap` C weights each token's surrogate by min(C, pi_old / pi_engine), truncated importance sampling: an
    engine with other kernels samples from a slightly other policy than the one whose gradient is taken. None: no weights.

    Several ranks are given the same batch, and each takes its share of the micro-batches. Their gradients add up like those
    of micro-batches, because the denominators are of the whole step: N ranks take the step that one would.

    A loss or gradient that is not finite leaves weights and optimizer as they were and is reported in `update/skipped`.
    """
    kept = [i for i, o in enumerate(rollouts) if not (mask_truncated and o.finish_reason == "length")]
    total_tokens, total_rollouts = sum(len(rollouts[i].ids) for i in kept), len(kept)
    used = [rollouts[i] for i in kept if beta or advantage[i] != 0]
    used_advantage = advantage[[i for i in kept if beta or advantage[i] != 0]].to(model.device)
    cuts = list(micro_batches([len(o.ids) for o in used], token_budget, [o.prompt_ids for o in used]))
    mine, trained = cuts[RANK::WORLD], [p for p in model.parameters() if p.requires_grad]

    def logprobs_of(rows):
        prompts, completions = [used[i].prompt_ids for i in rows], [used[i].ids for i in rows]
        return token_logprobs(model, prompts, completions, temperature=temperature)

    # With one update, pi_old IS pi_t and exp(logprobs - logprobs.detach()) is 1 with the right gradient. With
    # several, pi_old's numbers are the trainer's own: an engine's differ by its kernels, and a ratio would not start at 1.
    with torch.no_grad():
        old = [logprobs_of(rows)[0] if updates > 1 else None for rows in mine]

    sums = dict.fromkeys(("tokens", "kl", "clip_ratio", "entropy", "nll", "sampling/logp_difference_mean"), 0.0)
    losses, norms, largest_difference, skipped = [], [], 0.0, 0
    model.eval()  # no dropout anywhere in the base either; gradients flow all the same
    for _ in range(updates if cuts else 0):
        for p in trained:
            p.grad = torch.zeros_like(p)  # also on a rank without micro-batches
        loss_sum = 0.0
        for rows, old_logprobs in zip(mine, old, strict=True):
            logprobs, mask, entropy = logprobs_of(rows)
            old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
            engine_logprobs = pad_sequence([torch.tensor(used[i].logprobs) for i in rows], batch_first=True)  # (B, T)
            difference = old_logprobs - engine_logprobs.to(mask)  # (B, T); 0 where the mask is
            weights = None if importance_cap is None else difference.exp().clamp(max=importance_cap)  # (B, T)
            with torch.no_grad(), model.disable_adapter():
                ref_logprobs = logprobs_of(rows)[0] if beta else None
            loss, parts = policy_loss(
                logprobs, old_logprobs, ref_logprobs, used_advantage[rows], mask, clip=clip, beta=beta, form=form,
                total_tokens=total_tokens, total_rollouts=total_rollouts, weights=weights,
            )  # fmt: skip
            loss.backward()  # gradients of the micro-batches add up
            loss_sum += float(loss.detach())
            largest_difference = max(largest_difference, float(difference.abs().max()))
            parts |= {"tokens": mask.sum(), "entropy": entropy.sum(), "nll": -(logprobs.detach() * mask).sum()}
            for name, value in (parts | {"sampling/logp_difference_mean": difference.abs().sum()}).items():
                sums[name] += float(value)
        losses.append(sum(gather(loss_sum)))
        if WORLD > 1:  # and so do those of the ranks; through the CPU, as settings.join says
            grads = [p.grad for p in trained]
            flat = torch.nn.utils.parameters_to_vector(grads).cpu()
            exchange(torch.distributed.all_reduce, flat)
            torch.nn.utils.vector_to_parameters(flat.to(model.device), grads)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)))
        if math.isfinite(losses[-1]) and math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    optimizer.zero_grad(set_to_none=True)  # the gradients' memory is the sampler's until the next update
    everyone = gather((sums, largest_difference))
    sums = {name: sum(part[name] for part, _ in everyone) for name in sums}
    tokens = sums.pop("tokens")  # None, not 0, for what no token was there to measure
    return {name: value / tokens if tokens and (beta or name != "kl") else None for name, value in sums.items()} | {
        "loss": sum(losses) / max(updates, 1),
        "grad_norm": sum(norms) / max(updates, 1),
        "sampling/logp_difference_max": max(largest for _, largest in everyone) if tokens else None,
        "update/skipped": skipped,
    }
