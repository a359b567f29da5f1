"""The engine that samples with the trainer's own model, so that it runs wherever PyTorch runs."""

from contextlib import nullcontext
from functools import partial

import torch
from transformers import DynamicCache, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from grpo import micro_batches
from plumbing.errors import NOT_FINITE
from plumbing.logprobs import token_logprobs
from rollout import Engine, Rollout


class TransformersEngine(Engine):
    """One model is trainer, policy and anchor, so there is nothing to sync.

    `batch_tokens` bounds the tokens (prompt and completion, all rows) that are in flight together,
    which bounds the KV cache: 24 KB a token for a 0.5B model in float32. The n rollouts of one
    prompt always run together.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 65_536):
        super().__init__(model, tokenizer, model.config.get_text_config().max_position_embeddings)
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def _sample(self, encoded, n, sampling, policy, seed, choices) -> list[list[Rollout]]:
        """A function of its arguments and the weights: all randomness is a generator of its own."""
        truncate = LogitsProcessorList()
        truncate += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        truncate += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        draw = partial(
            draw_tokens,
            temperature=sampling.temperature,
            truncate=truncate,
            generator=torch.Generator(self.model.device).manual_seed(seed),
        )
        held_to = [encode(text) for text in choices]
        allow = partial(only_allowed, held_to, self.stop_ids) if choices else None
        results: list[list[Rollout]] = [[] for _ in encoded]
        self.model.eval()
        with nullcontext() if policy else self.model.disable_adapter():
            # Prompts of like length run together: short ones are not padded to the longest of all.
            pending = sorted(range(len(encoded)), key=lambda q: len(encoded[q]))
            while pending:
                width = len(encoded[pending[-1]]) + sampling.max_new_tokens
                count = max(1, self.batch_tokens // (n * width))
                # The longest first: what is too large for the memory fails at once.
                pending, batch = pending[:-count], pending[-count:]
                prompts = [encoded[q] for q in batch]
                rows = self._generate(prompts, n, sampling.max_new_tokens, draw, allow)
                for q, row in zip((q for q in batch for _ in range(n)), rows, strict=True):
                    results[q].append(self.rollout(*row, encoded[q]))
        return results

    def _generate(self, prompts, n, max_new_tokens, draw, allow) -> list[tuple[list, list]]:
        """(ids, log-probabilities) of B*n rows; row b*n + i is the i-th completion of prompts[b].

        Each prompt is read ONCE; its keys and values are then shared out to its n rollouts.
        transformers' generate() with num_return_sequences=n reads it n times.
        """
        device, pad = self.model.device, self.stop_ids[0]  # padding is masked by position, not id
        width = max(map(len, prompts))
        # Padded on the left, so that every row's next token goes into the same column.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        mask = torch.tensor(mask, device=device)  # (B, width)
        cache = DynamicCache(config=self.model.config)
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, width)
        forward = partial(self.model, past_key_values=cache, use_cache=True, logits_to_keep=1)
        output = forward(input_ids=ids, attention_mask=mask, position_ids=position)
        cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, dim=0)  # (B*n, V)
        mask = mask.repeat_interleave(n, dim=0)  # (B*n, width)
        position = mask.sum(-1, keepdim=True)  # (B*n, 1), of the next token
        stop = torch.tensor(self.stop_ids, device=device)
        rows = torch.arange(len(prompts) * n, device=device)  # whose completion a live row is
        completions = [([], []) for _ in rows]
        for step in range(max_new_tokens):
            if allow:
                allow(logits, [completions[i][0] for i in rows.tolist()])
            token, logprob = draw(logits)  # (rows, 1) each
            sampled = zip(rows.tolist(), token[:, 0].tolist(), logprob[:, 0].tolist(), strict=True)
            for row, t, lp in sampled:
                completions[row][0].append(t)
                completions[row][1].append(lp)
            live = ~torch.isin(token[:, 0], stop)  # (rows,)
            if step + 1 == max_new_tokens or not live.any():
                break
            if not live.all():  # rows that have ended leave: a long straggler runs alone
                keep = live.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            output = forward(input_ids=token, attention_mask=mask, position_ids=position)
            logits, position = output.logits[:, -1], position + 1
        return completions

    @torch.no_grad()
    def _score(self, encoded, completions, policy) -> list[list[float]]:
        scores: list[list[float]] = [[] for _ in encoded]
        pairs = zip(encoded, completions, strict=True)
        given = [Rollout("", o, [], "stop", q) for q, o in pairs]  # only their ids are read
        with nullcontext() if policy else self.model.disable_adapter():
            for rows in micro_batches(given, self.batch_tokens // 8):
                logprobs, _, _ = token_logprobs(self.model, [given[i] for i in rows], 1.0)
                for i, row in zip(rows, logprobs.tolist(), strict=True):
                    scores[i] = row[: len(completions[i])]
        return scores


def draw_tokens(logits, temperature, truncate, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of `logits` (rows, V), and its log-probability: (rows, 1) each."""
    logprobs = torch.log_softmax(truncate(None, logits.float() / (temperature or 1.0)), dim=-1)
    if logprobs.isnan().any():
        raise FloatingPointError(NOT_FINITE)
    if temperature == 0:
        token = logprobs.argmax(-1, keepdim=True)
    else:
        # Where the cumulated probability passes one random number. torch.multinomial would draw V.
        cumulated = logprobs.double().exp_().cumsum(-1)  # (rows, V)
        shape, options = (len(logits), 1), {"dtype": torch.double, "device": logits.device}
        drawn = torch.rand(*shape, generator=generator, **options)
        token = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)
    return token, logprobs.gather(-1, token)


def only_allowed(choices: list[list[int]], stop_ids: list[int], logits, begun: list) -> None:
    """Leaves of `logits` (rows, V) only what continues or ends one of the choices, in place.

    `begun` are the tokens that each row has so far.
    """
    for row, so_far in enumerate(begun):
        rests = [ids[len(so_far) :] for ids in choices if ids[: len(so_far)] == so_far]
        others = torch.ones_like(logits[row], dtype=torch.bool)  # (V,)
        others[[token for rest in rests for token in rest[:1] or stop_ids]] = False
        logits[row] = logits[row].masked_fill(others, -torch.inf)
