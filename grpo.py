"""GRPO (DeepSeekMath, arXiv 2402.03300): rewards -> advantages -> loss -> an update of the LoRA.

    A_i   = (R_i - mean R) / std R                                   in each group of G rollouts
    ratio = pi_t(o_i,t | q, o_i,<t) / pi_old(o_i,t | q, o_i,<t)
    L_i,t = -min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) + beta k3         (paper, Eq. 6)

Shapes: Q questions in a step, G rollouts of each. A micro-batch has B rollouts, T tokens in the
longest completion, N in all completions, W in the longest row; V vocabulary, H hidden size.
pi_t is the policy, pi_old the policy before this step's updates, pi_0 the initial policy (`ref_`).
This file works alone, with torch and a PeftModel. `logprobs` may be a faster `token_logprobs`;
`add_up(tensors)` sums each tensor over all processes IN PLACE (for one process: does nothing).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

LOGIT_CHUNK = 128  # completion tokens whose logits exist at a time: 128 x 152k x 4 B is 78 MB
EQUAL_REWARDS = 1e-6  # a smaller spread in a group is rounding, not preference
MAX_GRAD_NORM = 1.0  # gradients of a larger norm are scaled down to it
GAP = "sampling/logp_difference"  # |trainer's - engine's log-probability| of a sampled token
AVERAGES = ("kl", "clip_ratio", "entropy", "nll", f"{GAP}_mean")  # over tokens


@dataclass(frozen=True)
class GRPOConfig:
    """Hyper-parameters of an update. Those with a flag of train.py say so; edit the others here."""

    beta: float = 1e-3  # coefficient of the KL to pi_0 (--beta; the paper: 1e-3)
    kl: str = "loss"  # where the KL acts (--kl): "loss", or "reward", the paper's setting
    loss: str = "token"  # what is averaged (--loss): "token", or "sequence" as in the paper's Eq. 6
    clip: float = 0.2  # epsilon; without effect in the first update on a batch
    updates_per_step: int = 1  # optimizer steps on each batch of rollouts (--updates-per-step)
    temperature: float = 1.0  # of the rollouts: what was sampled at T is scored at T
    importance_cap: float | None = 2.0  # C in `micro_batch_loss`; None: off (not in the paper)
    mask_truncated: bool = False  # ignore rollouts that were cut off, in the denominators too
    token_budget: int = 4096  # tokens per micro-batch, a prompt once (--micro-batch-tokens)


def advantages(rewards: torch.Tensor, penalty: torch.Tensor | None = None) -> torch.Tensor:
    """A_i = (R_i - mean R) / std R within each group. `rewards` (Q, G) -> (Q, G).

    A group of equal rewards has A = 0. That is tested on max - min, not left to an epsilon in the
    denominator: eight copies of 0.3 in float32 can have std 1e-8, and 1e-8 / 1e-8 is not small.
    `penalty` (Q, G) is beta times each rollout's KL, for kl="reward". It is taken off R but left
    out of std R: else, in a group of equal rewards, the KL's noise would be scaled up to size 1.

    >>> advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]]))
    tensor([[ 0.8660, -0.8660,  0.8660, -0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)  # (Q,)
    shaped = rewards if penalty is None else rewards - penalty  # (Q, G)
    centred = shaped - shaped.mean(dim=1, keepdim=True)  # (Q, G)
    scale = rewards.std(dim=1, keepdim=True)  # (Q, 1), with n - 1, as TRL and verl do
    differ = spread >= EQUAL_REWARDS  # (Q,); False for NaN
    return torch.where(differ[:, None], centred / scale, torch.zeros_like(centred))


def token_logprobs(model, rollouts: Sequence, temperature: float):
    """log pi(o_i,t | q, o_i,<t) of B rollouts: (logprobs, mask, entropy), each (B, T), in nats.

    A rollout has `prompt_ids` and `ids`. `mask` is 1.0 on the latter; on padding all three are 0.
    The mask comes from LENGTHS: many models pad with their end-of-sequence token, and a mask made
    from ids would drop the token that teaches a model to stop. Logits exist for completion tokens
    only, in chunks that are computed again going backward: 8 x 1024 x 152k would be 5 GB.
    """
    base, lengths = model.get_base_model(), [len(o.ids) for o in rollouts]
    # Padding on the right is seen by no real token, because attention is causal.
    rows = [torch.tensor(o.prompt_ids + o.ids[:-1]) for o in rollouts]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (B, W)
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, W, H)
    # A state predicts the NEXT token: that of the prompt's last token predicts o_i,1.
    pairs = zip(hidden, rollouts, strict=True)
    states = torch.cat([h[len(o.prompt_ids) - 1 :][: len(o.ids)] for h, o in pairs])  # (N, H)
    targets = torch.tensor([i for o in rollouts for i in o.ids], device=model.device)  # (N,)

    def of_chunk(states, targets):
        logits = base.get_output_embeddings()(states)  # (chunk, V)
        wide = torch.promote_types(logits.dtype, torch.float32)  # bf16 is too coarse to sum over V
        every = torch.log_softmax(logits.to(wide) / temperature, dim=-1)  # (chunk, V)
        entropy = -(every.detach().exp() * every.detach()).sum(-1)  # (chunk,)
        return every.gather(-1, targets[:, None])[:, 0], entropy

    chunks = zip(states.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True)
    parts = [checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in chunks]
    flat = (torch.cat(values).split(lengths) for values in zip(*parts, strict=True))
    logprobs, entropy = (pad_sequence(values, batch_first=True) for values in flat)  # (B, T) each
    mask = pad_sequence([logprobs.new_ones(n) for n in lengths], batch_first=True)  # (B, T)
    return logprobs, mask, entropy


def policy_loss(logprobs, old_logprobs, ref_logprobs, A, mask, cfg: GRPOConfig, weights=None):
    """(loss, sums for the log): L_i,t of one micro-batch, added up and not yet averaged.

    All are (B, T), but A is (B,); `ref_logprobs` is None if beta is 0. `weights` multiply the
    surrogate alone: the KL regularises pi_t wherever it is taken. cfg.loss "token" sums over
    tokens; the caller divides by those of the WHOLE step. "sequence" (Eq. 6) sums each rollout's
    mean, and the caller divides by rollouts. A token of a long answer then weighs less, so long
    wrong answers are punished less than short ones, and answers grow.
    """
    A = A[:, None]  # (B, 1)
    ratio = torch.exp(logprobs - old_logprobs)  # (B, T)
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A)  # (B, T)
    if weights is not None:
        per_token = weights * per_token
    clipped = ((ratio < 1 - cfg.clip) & (A < 0)) | ((ratio > 1 + cfg.clip) & (A > 0))  # (B, T)
    sums = {"clip_ratio": (clipped * mask).sum()}  # their surrogate has no gradient
    if ref_logprobs is not None:
        # k3's VALUE estimates KL(pi_t || pi_0) without bias and is never negative. Its GRADIENT is
        # (1 - pi_0 / pi_t) grad log pi_t. Averaged over pi_t: 0 - E_pi_0[grad log pi_t], which is
        # grad KL(pi_0 || pi_t): the OTHER KL is descended. Both are least where pi_t = pi_0.
        d = ref_logprobs - logprobs  # (B, T)
        k3 = torch.exp(d) - d - 1  # (B, T)
        per_token = per_token + cfg.beta * k3
        sums["kl"] = (k3 * mask).sum().detach()
    per_token = per_token * mask  # before any sum, so that padding counts in none
    if cfg.loss == "token":
        return per_token.sum(), sums
    return (per_token.sum(dim=1) / mask.sum(dim=1)).sum(), sums


def micro_batches(rollouts: Sequence, token_budget: int) -> Iterator[list[int]]:
    """Indices of rollouts of like size, in batches of at most `token_budget` tokens, padded.

    Rollouts of one prompt stay together. The prompt counts once: a fast `logprobs` reads it once.
    """
    pairs = [(tuple(o.prompt_ids), len(o.ids)) for o in rollouts]
    longest = dict(sorted(pairs, key=lambda pair: pair[1]))  # of a prompt's lengths, the last stays
    order = [(len(p) + longest[p], p, n) for p, n in pairs]
    batch: list[int] = []
    for i in sorted(range(len(order)), key=order.__getitem__):
        rows = [*batch, i]
        distinct = {pairs[j][0] for j in rows}
        size = len(distinct) * max(map(len, distinct)) + len(rows) * max(pairs[j][1] for j in rows)
        if batch and size > token_budget:
            yield batch
            rows = [i]
        batch = rows
    if batch:
        yield batch


@torch.no_grad()
def sequence_kl(model, rollouts: Sequence, cfg: GRPOConfig, logprobs: Callable) -> torch.Tensor:
    """sum_t log pi_t - log pi_0 of each rollout, (len(rollouts),), in nats: its KL, estimated."""
    kl = torch.zeros(len(rollouts))
    for rows in micro_batches(rollouts, cfg.token_budget):
        batch = [rollouts[i] for i in rows]
        with model.disable_adapter():  # pi_0 is the base without its LoRA
            ref_logprobs, _, _ = logprobs(model, batch, cfg.temperature)
        kl[rows] = (logprobs(model, batch, cfg.temperature)[0] - ref_logprobs).sum(dim=1).to(kl)
    return kl


def micro_batch_loss(model, rollouts, A, cfg: GRPOConfig, logprobs: Callable, old_logprobs=None):
    """`policy_loss` of one micro-batch, under pi_t, pi_old and pi_0: (loss, sums, old_logprobs).

    pi_t is the model as it is, pi_0 the same without the LoRA. In the first update pi_old IS pi_t:
    exp(new - new.detach()) has value 1 and gradient grad log pi_t. Later updates are given the
    first one's `old_logprobs`. They are the trainer's; the engine's kernels round differently, so
    each token's surrogate is weighted by min(C, pi_old / pi_engine), with C = importance_cap.
    """
    new, mask, entropy = logprobs(model, rollouts, cfg.temperature)  # (B, T) each
    old_logprobs = new.detach() if old_logprobs is None else old_logprobs
    sampled = pad_sequence([torch.tensor(o.logprobs) for o in rollouts], True).to(mask)  # (B, T)
    gap = old_logprobs - sampled  # (B, T), to the engine's
    weights = None if cfg.importance_cap is None else gap.exp().clamp(max=cfg.importance_cap)
    with torch.no_grad(), model.disable_adapter():
        ref_logprobs = logprobs(model, rollouts, cfg.temperature)[0] if cfg.beta else None
    loss, sums = policy_loss(new, old_logprobs, ref_logprobs, A, mask, cfg, weights)
    sums |= {"tokens": mask.sum(), "nll": -(new.detach() * mask).sum(), "entropy": entropy.sum()}
    sums |= {f"{GAP}_mean": gap.abs().sum(), f"{GAP}_max": gap.abs().max()}
    return loss, {name: float(value) for name, value in sums.items()}, old_logprobs


def policy_step(
    model, optimizer, rollouts: Sequence, A: torch.Tensor, cfg: GRPOConfig,
    logprobs: Callable = token_logprobs, add_up: Callable = lambda tensors: None,
) -> dict[str, float]:  # fmt: skip
    """Optimizer steps on rollouts with advantages A (len(rollouts),). Returns numbers for the log.

    Every micro-batch in every process divides by the WHOLE step's counts, so gradients need only
    adding up. With beta 0, a rollout with A = 0 has none: it is not run, but still counted. If the
    loss or gradient is NaN or infinite, the weights stay as they are (`update/skipped` counts it).
    """
    cut_off = {"length"} if cfg.mask_truncated else ()
    kept = [i for i, o in enumerate(rollouts) if o.finish_reason not in cut_off]
    used = [i for i in kept if cfg.beta or A[i] != 0]
    counts = torch.tensor([sum(len(rollouts[i].ids) for i in kept), len(kept), len(used)]).double()
    add_up([counts])  # tokens, rollouts, rollouts with a gradient: of all processes
    denominator = float(counts[0 if cfg.loss == "token" else 1])
    rollouts, A = [rollouts[i] for i in used], A[used].to(model.device)
    batches = list(micro_batches(rollouts, cfg.token_budget))
    trained = [p for p in model.parameters() if p.requires_grad]
    old: list = [None] * len(batches)
    sums, done, largest = Counter(), Counter(), 0.0  # a Counter's `update` ADDS
    model.eval()  # no dropout in the base either; gradients flow all the same
    for _ in range(cfg.updates_per_step if counts[2] else 0):
        loss_sum = torch.zeros(1, dtype=torch.double)
        for p in trained:
            p.grad = torch.zeros_like(p)
        for k, rows in enumerate(batches):
            batch = [rollouts[i] for i in rows]
            loss, parts, old[k] = micro_batch_loss(model, batch, A[rows], cfg, logprobs, old[k])
            (loss / denominator).backward()
            loss_sum += float(loss.detach() / denominator)
            largest = max(largest, parts.pop(f"{GAP}_max"))
            sums.update(parts)
        add_up([p.grad for p in trained])
        add_up([loss_sum])
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        if finite := bool(loss_sum.isfinite() & norm.isfinite().cpu()):
            optimizer.step()
        done.update(loss=float(loss_sum), grad_norm=float(norm), skipped=not finite)
    optimizer.zero_grad(set_to_none=True)  # their memory is the sampler's until the next update
    totals = torch.tensor([sums[name] for name in ("tokens", *AVERAGES)], dtype=torch.double)
    add_up([totals])
    # Without any token, an average is None and not 0.
    averages = (totals[1:] / totals[0]).tolist() if totals[0] else [None] * len(AVERAGES)
    numbers = dict(zip(AVERAGES, averages, strict=True)) | ({} if cfg.beta else {"kl": None})
    numbers |= {name: done[name] / cfg.updates_per_step for name in ("loss", "grad_norm")}
    numbers |= {f"{GAP}_max": largest if totals[0] else None, "update/skipped": done["skipped"]}
    return numbers


def update(
    model, optimizer, groups: Sequence[Sequence], rewards: torch.Tensor, cfg: GRPOConfig,
    logprobs: Callable = token_logprobs, add_up: Callable = lambda tensors: None,
) -> dict[str, float]:  # fmt: skip
    """Rewards (Q, G) of Q groups of G rollouts -> advantages -> `policy_step`, numbers for the log.

    NaN means "not known": one NaN leaves its question out, all G rollouts, from R and KL alike.
    """
    known = [i for i in range(len(groups)) if not rewards[i].isnan().any()]
    rollouts, kl, penalty = [o for i in known for o in groups[i]], None, None
    if cfg.kl == "reward" and cfg.beta:  # R - beta KL, as in the paper
        kl = sequence_kl(model, rollouts, cfg, logprobs)  # (Q*G,)
        penalty, cfg = cfg.beta * kl.view(rewards[known].shape), replace(cfg, beta=0.0)  # (Q, G)
    A = advantages(rewards[known], penalty) if known else rewards[known]  # (Q, G)
    numbers = policy_step(model, optimizer, rollouts, A.flatten(), cfg, logprobs, add_up)
    if kl is not None:
        total = torch.tensor([float(kl.sum()), sum(len(o.ids) for o in rollouts)]).double()
        add_up([total])
        numbers["kl"] = float(total[0] / total[1]) if total[1] else None
    return numbers
