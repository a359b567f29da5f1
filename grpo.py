"""GRPO by hand: advantages, token log-probabilities, the loss, and one update of the LoRA (paper, section 3; DeepSeekMath).

Shapes: Q questions in a step, G rollouts of each, B rollouts in a micro-batch, T tokens in its longest completion,
N completion tokens in a micro-batch, V vocabulary, H hidden size.

Symbols: R rewards, A advantages, o_i a completion of |o_i| tokens, pi_t the policy (`logprobs`), pi_old the policy
that sampled (`old_logprobs`), pi_0 the reference policy (`ref_logprobs`), beta the KL coefficient, epsilon the clip ratio.
"""

from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

EQUAL_REWARDS = 1e-6  # a smaller spread in a group is rounding, not preference
LOGIT_CHUNK = 1024  # completion tokens whose logits exist at a time: 1024 x 152k x 4 bytes is 0.6 GB


def add_lora(base, rank: int, seed: int, checkpointing: bool = False):
    """The policy: `base` with a trainable LoRA on every linear layer but the output head; B = 0, so pi_t starts as pi_0.

    The adapter is float32 (peft casts it) over a base of any dtype: in bf16 an AdamW step of 1e-5 rounds to nothing.
    No dropout: it would make the ratio pi_t / pi_old differ from 1 with equal weights. No bias: vLLM refuses it.

    `checkpointing` keeps only each layer's input for the backward pass and computes the layer again there: far less
    memory, for one more forward pass.
    """
    torch.manual_seed(seed)  # of A's random initial values
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # nothing is random
    return get_peft_model(base, config)


def advantages(rewards: torch.Tensor, penalty: torch.Tensor | None = None) -> torch.Tensor:
    """A_i = (R_i - mean R) / std R within each group (paper, section 3). `rewards` (Q, G) -> (Q, G).

    A group whose rewards are all equal has A = 0. That is tested on max - min, not left to an epsilon in the
    denominator: eight times 0.3 in float32 has a tiny spread, and 1e-8 / 1e-8 is not small.

    `penalty` (Q, G) is beta times each rollout's KL estimate, for --kl reward (the paper's setting). It shifts
    rewards but does not count as spread: else a group of equal rewards would learn from the KL's noise, scaled up to 1.

    >>> advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]]))
    tensor([[ 0.8660, -0.8660,  0.8660, -0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)  # (Q,)
    shaped = rewards if penalty is None else rewards - penalty  # (Q, G)
    centred = shaped - shaped.mean(dim=1, keepdim=True)  # (Q, G)
    scale = rewards.std(dim=1, keepdim=True)  # (Q, 1); of the task's rewards alone; n - 1, as TRL and verl do
    differ = spread >= EQUAL_REWARDS  # (Q,); False where a reward is NaN, so such a group teaches nothing
    return torch.where(differ[:, None], centred / scale, torch.zeros_like(centred))


def _chunk_logprobs(hidden, targets, head, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head(hidden)  # (n, V)
    # At least float32, whatever the base is in; and divided by T, because what was sampled at T is scored at T.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = torch.log_softmax(logits, dim=-1)  # (n, V)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()  # (n,)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def token_logprobs(model, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, temperature: float):
    """log pi(o_{i,t} | q, o_{i,<t}) for B sequences of token ids: (logprobs, mask, entropy), each (B, T).

    `mask` is 1.0 on the completion's tokens. It comes from LENGTHS: many models pad with their end-of-sequence token,
    so a mask made from ids would drop the very token that teaches a model to stop. Zeros where the mask is 0.

    Memory: the backbone runs on whole sequences, but logits exist for completion tokens only, LOGIT_CHUNK at a time,
    and are computed again in the backward pass. 8 x 1024 tokens of a 152k vocabulary would be 5 GB of float32.
    """
    device = model.device
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    # Padding is on the right and attention is causal, so no real token sees it: no attention mask is needed.
    rows = [p + c + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, completions, strict=True)]
    ids = torch.tensor(rows, device=device)  # (B, width)
    base = model.get_base_model()
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, H)

    lengths = torch.tensor([len(c) for c in completions], device=device)  # (B,)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # (B, T)
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    # Position p predicts token p + 1: the completion's first token is predicted at the prompt's last position.
    position = torch.tensor([len(p) - 1 for p in prompts], device=device)[row] + t  # (N,)
    states, targets = hidden[row, position], ids[row, position + 1]  # (N, H), (N,)

    head = base.get_output_embeddings()
    chunks = [
        checkpoint(_chunk_logprobs, h, y, head, temperature, use_reentrant=False)
        for h, y in zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True)
    ]
    flat, flat_entropy = (torch.cat(parts) for parts in zip(*chunks, strict=True))  # (N,) each
    logprobs = flat.new_zeros(mask.shape).masked_scatter(mask, flat)  # (B, T)
    entropy = flat.new_zeros(mask.shape).masked_scatter(mask, flat_entropy)  # (B, T)
    return logprobs, mask.float(), entropy


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


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, in batches of at most `token_budget` tokens with padding (one at least).

    >>> list(micro_batches([5, 1, 4, 2], token_budget=8))
    [[1, 3], [2], [0]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > token_budget:  # sorted, so i is the longest: the batch's width
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def sequence_kl(model, rollouts: Sequence, *, temperature: float, token_budget: int) -> torch.Tensor:
    """sum_t log pi_t - log pi_0 of each rollout, (len(rollouts),): an estimate of its KL in nats, for --kl reward."""
    kl = torch.zeros(len(rollouts))
    for rows in micro_batches([len(o.prompt_ids) + len(o.ids) for o in rollouts], token_budget):
        prompts, completions = [rollouts[i].prompt_ids for i in rows], [rollouts[i].ids for i in rows]
        logprobs, _, _ = token_logprobs(model, prompts, completions, temperature=temperature)
        with model.disable_adapter():
            ref_logprobs, _, _ = token_logprobs(model, prompts, completions, temperature=temperature)
        kl[rows] = (logprobs - ref_logprobs).sum(dim=1).cpu()
    return kl


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

    A loss or gradient that is not finite leaves weights and optimizer as they were and is reported in `update/skipped`.
    """
    kept = [i for i, o in enumerate(rollouts) if not (mask_truncated and o.finish_reason == "length")]
    total_tokens, total_rollouts = sum(len(rollouts[i].ids) for i in kept), len(kept)
    used = [i for i in kept if beta or advantage[i] != 0]
    cuts = [
        [used[j] for j in rows]
        for rows in micro_batches([len(rollouts[i].prompt_ids) + len(rollouts[i].ids) for i in used], token_budget)
    ]

    def logprobs_of(rows):
        prompts, completions = [rollouts[i].prompt_ids for i in rows], [rollouts[i].ids for i in rows]
        return token_logprobs(model, prompts, completions, temperature=temperature)

    # With one update, pi_old IS pi_t and exp(logprobs - logprobs.detach()) is 1 with the right gradient. With
    # several, pi_old's numbers are the trainer's own: an engine's differ by its kernels, and a ratio would not start at 1.
    old: list[torch.Tensor | None] = [None] * len(cuts)
    if updates > 1:
        with torch.no_grad():
            old = [logprobs_of(rows)[0] for rows in cuts]

    sums = {"loss": 0.0, "nll": 0.0, "kl": 0.0, "clip_ratio": 0.0, "entropy": 0.0, "difference": 0.0, "grad_norm": 0.0}
    largest_difference, seen_tokens, skipped = 0.0, 0, 0
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()  # no dropout anywhere in the base either; gradients flow all the same
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True  # else it does not checkpoint; what is inside it stays without dropout
    for k in range(updates):
        optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for rows, old_logprobs in zip(cuts, old, strict=True):
            logprobs, mask, entropy = logprobs_of(rows)
            old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
            engine_logprobs = torch.zeros_like(mask)  # (B, T)
            for b, i in enumerate(rows):
                engine_logprobs[b, : len(rollouts[i].logprobs)] = torch.tensor(rollouts[i].logprobs)
            weights = None
            if importance_cap is not None:
                weights = torch.exp(old_logprobs - engine_logprobs).clamp(max=importance_cap)  # (B, T)
            ref_logprobs = None
            if beta:
                with torch.no_grad(), model.disable_adapter():
                    ref_logprobs = logprobs_of(rows)[0]
            loss, parts = policy_loss(
                logprobs,
                old_logprobs,
                ref_logprobs,
                advantage[rows].to(logprobs.device),
                mask,
                clip=clip,
                beta=beta,
                form=form,
                total_tokens=total_tokens,
                total_rollouts=total_rollouts,
                weights=weights,
            )
            loss.backward()  # gradients of the micro-batches add up
            loss_sum += float(loss.detach())
            for name, value in parts.items():
                sums[name] += value
            seen_tokens += int(mask.sum())
            sums["entropy"] += float(entropy.sum())
            sums["nll"] -= float((logprobs.detach() * mask).sum())
            if k == 0:
                difference = (old_logprobs - engine_logprobs).abs() * mask
                sums["difference"] += float(difference.sum())
                largest_difference = max(largest_difference, float(difference.max()))
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)) if cuts else 0.0
        sums["loss"] += loss_sum
        sums["grad_norm"] += grad_norm
        if not all(map(torch.isfinite, torch.tensor([loss_sum, grad_norm]))):
            skipped += 1
        elif cuts:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # the gradients' memory is the sampler's until the next update

    def per_token(name: str) -> float | None:  # None, not 0, for what no token was there to measure
        return sums[name] / seen_tokens if seen_tokens else None

    return {
        "loss": sums["loss"] / max(updates, 1),
        "grad_norm": sums["grad_norm"] / max(updates, 1),
        "kl": per_token("kl") if beta else None,
        "entropy": per_token("entropy"),
        "nll": per_token("nll"),
        "clip_ratio": per_token("clip_ratio"),
        "sampling/logp_difference_mean": sums["difference"] * updates / seen_tokens if seen_tokens else None,
        "sampling/logp_difference_max": largest_difference if seen_tokens else None,
        "update/skipped": skipped,
    }
