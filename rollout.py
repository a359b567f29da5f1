"""From prompts to rollouts o_1..o_G, and log-probabilities of given text: one small interface, engines behind it.

    engine.sample(prompts, n, policy=True, ...)   n rollouts for each prompt, from pi_t
    engine.sample(prompts, n, policy=False, ...)  the same from the frozen anchor pi_0
    engine.score(prompts, completions, ...)       log-probabilities of given completions
    engine.sync()                                 from now on, `policy=True` means the newest weights

The anchor is the policy's own base model with the LoRA adapter switched off: pi_0 costs no second copy.

Token ids go in and token ids come out. The trainer sees exactly the ids that were sampled, because decoding them to
text and encoding that again can give other tokens, whose probabilities nobody sampled from.
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper, set_seed
from transformers.cache_utils import DynamicLayer

from grpo import micro_batches, token_logprobs
from tasks import RANK, WORLD, InputError, gather, one_line

NOT_FINITE = "the model's logits are not finite: lower --lr, or raise --beta"
Messages = Sequence[dict[str, str]]  # a chat: [{"role": "user", "content": "..."}, ...]


@dataclass(frozen=True)
class Rollout:
    """One completion o_i of a prompt q. Its log-probabilities are the engine's own, at the sampling temperature."""

    text: str  # decoded, without special tokens
    ids: list[int]  # completion token ids, (|o|,); the end-of-sequence token included where one was sampled
    logprobs: list[float]  # nats, (|o|,)
    finish_reason: str  # "stop": ended by itself; "length": cut off at max_new_tokens
    prompt_ids: list[int]  # (|q|,), the chat template applied


class EngineError(RuntimeError):
    """An engine failed in the middle of a run; the last checkpoint is whole."""


class Engine:
    """What the engines share. `model` is the trainer's PeftModel, `context` the longest prompt with its completion."""

    def __init__(self, model, tokenizer, context: int):
        self.model, self.tokenizer, self.context = model, tokenizer, context
        # Some models end with any of several tokens (<|eot_id|> and <|end_of_text|>): the generation config lists them.
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = sorted({i for i in [*ends, tokenizer.eos_token_id] if i is not None})

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn. Qwen 3 thinks unless told not to (paper: thinking off)."""
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
        )

    def sample(
        self, prompts: Sequence[Messages], n: int, *, policy: bool = True, temperature: float = 1.0,
        max_new_tokens: int = 512, top_k: int = 0, top_p: float = 1.0, seed: int = 0, choices: Sequence[str] = (),
    ) -> list[list[Rollout]]:  # fmt: skip
        """`n` rollouts for each of `prompts`: result[q][i] is the i-th of prompts[q], whatever order they ran in.

        `policy=False` samples from the anchor pi_0. `temperature` 0 is greedy. `top_k` (0: off) and `top_p` are for
        evaluation alone: truncated samples come from another distribution than the one whose gradient is taken.
        `choices` are the only texts that are allowed, if there are any. Of several ranks each samples its share of the
        prompts, with a seed of its own, and all get all rollouts.

        Raises InputError if a prompt and `max_new_tokens` do not fit the model's context, and FloatingPointError if the
        logits are not finite.
        """
        ids = [self.encode(messages) for messages in prompts]
        longest = max(map(len, ids), default=0)
        if longest + max_new_tokens > self.context:
            raise InputError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of {self.context} "
                f"tokens: lower --max-new-tokens or --group-size (the anchor reads all rollouts at once)"
            )
        share = self._sample(ids[RANK::WORLD], n, policy, temperature, max_new_tokens, top_k, top_p, seed + RANK, choices)
        return self._of_all_ranks(share)

    def score(self, prompts: Sequence[Messages], completions: Sequence[list[int]], *, policy: bool = True) -> list:
        """Log-probabilities (nats, temperature 1) of each token of completions[i] after prompts[i], (|o_i|,) each."""
        share = self._score([self.encode(q) for q in prompts[RANK::WORLD]], completions[RANK::WORLD], policy)
        return self._of_all_ranks(share)

    def _of_all_ranks(self, share: list) -> list:
        """One list again of what was dealt out to the ranks: the first of each, then the second of each, ..."""
        shares = gather(share)
        return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]

    def rollout(self, ids: list[int], logprobs: list[float], prompt_ids: list[int]) -> Rollout:
        if any(map(math.isnan, logprobs)):
            raise FloatingPointError(NOT_FINITE)
        reason = "stop" if ids[-1] in self.stop_ids else "length"
        return Rollout(self.tokenizer.decode(ids, skip_special_tokens=True), ids, logprobs, reason, prompt_ids)

    def sleep(self) -> None:
        """Free what memory can be freed until the next `sync`."""

    def sync(self) -> None:
        """From now on `policy=True` means the trainer's newest weights. Here there is one model, so nothing to do."""


class _BufferLayer(DynamicLayer):
    """One layer's keys and values with room for `room` new tokens. DynamicLayer copies all of them for every token."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.used = room, 0

    def update(self, keys, values, *_):
        start, self.used = self.used, self.used + keys.shape[2]
        if start == 0:  # the prompts: (B, heads, P + room, d)
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, self.room)) for x in (keys, values))
        self.keys[:, :, start : self.used], self.values[:, :, start : self.used] = keys, values
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used


class TransformersEngine(Engine):
    """Samples with the trainer's own model, so that it runs wherever PyTorch runs.

    `batch_tokens` bounds the tokens (prompt and completion, all rows) that are in flight together, which bounds the KV
    cache: 24 KB a token for a 0.5B model in float32. The n rollouts of one prompt always run together.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 65_536):
        super().__init__(model, tokenizer, model.config.get_text_config().max_position_embeddings)
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def _sample(self, encoded, n, policy, temperature, max_new_tokens, top_k, top_p, seed, choices) -> list[list[Rollout]]:
        """The result is a function of the arguments and the weights: all randomness is a generator seeded with `seed`."""
        truncate = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
        truncate += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        allowed = [self.tokenizer.encode(text, add_special_tokens=False) for text in choices]
        generator = torch.Generator(self.model.device).manual_seed(seed)
        results: list[list[Rollout]] = [[] for _ in encoded]
        self.model.eval()
        with nullcontext() if policy else self.model.disable_adapter():
            # Prompts of like length run together: short ones are not padded to the longest of the whole batch.
            pending = sorted(range(len(encoded)), key=lambda q: len(encoded[q]))
            while pending:
                width = len(encoded[pending[-1]]) + max_new_tokens
                count = max(1, self.batch_tokens // (n * width))
                pending, batch = pending[:-count], pending[-count:]  # the longest first: too large fails at once
                todo = [encoded[q] for q in batch]
                rows = self._generate(todo, n, temperature, truncate, allowed, max_new_tokens, generator)
                for q, (ids, logprobs) in zip((q for q in batch for _ in range(n)), rows, strict=True):
                    results[q].append(self.rollout(ids, logprobs, encoded[q]))
        return results

    def _generate(self, prompts, n, temperature, truncate, allowed, max_new_tokens, generator) -> list[tuple[list, list]]:
        """Sample rows B*n, row b*n + i being the i-th completion of prompts[b]: (ids, log-probabilities) each."""
        device, pad = self.model.device, self.stop_ids[0]  # any id will do: padding is masked by position, not by id
        width = max(map(len, prompts))
        # Padded on the left, so that every row's next token goes into the same column.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # (B, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, width)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [_BufferLayer(max_new_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        # Each prompt is read ONCE; its keys and values are then shared out to its n rollouts. generate() with
        # num_return_sequences=n reads it n times.
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, width)
        step_with = partial(self.model, past_key_values=cache, use_cache=True, logits_to_keep=1)
        output = step_with(input_ids=ids, attention_mask=mask, position_ids=position)
        cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, dim=0)  # (B*n, V)
        mask = mask.repeat_interleave(n, dim=0)  # (B*n, width)
        position = mask.sum(-1, keepdim=True)  # (B*n, 1), of the next token
        stop = torch.tensor(self.stop_ids, device=device)
        rows = torch.arange(len(prompts) * n, device=device)  # which completion each live row belongs to
        completions = [([], []) for _ in rows]
        for step in range(max_new_tokens):
            for row, i in enumerate(rows.tolist() if allowed else []):  # only what continues or ends one of the choices
                begun = [ids[step:] for ids in allowed if ids[:step] == completions[i][0]]
                others = torch.ones_like(logits[row], dtype=torch.bool)  # (V,)
                others[[token for rest in begun for token in rest[:1] or self.stop_ids]] = False
                logits[row] = logits[row].masked_fill(others, -torch.inf)
            logprobs = torch.log_softmax(truncate(None, logits.float() / (temperature or 1.0)), dim=-1)  # (rows, V)
            if logprobs.isnan().any():
                raise FloatingPointError(NOT_FINITE)
            if temperature == 0:
                token = logprobs.argmax(-1, keepdim=True)  # (rows, 1)
            else:
                # Where the cumulated probability passes one random number; torch.multinomial would draw V of them.
                cumulated = logprobs.double().exp_().cumsum(-1)  # (rows, V)
                drawn = torch.rand(len(rows), 1, generator=generator, dtype=torch.double, device=device)
                token = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)  # (rows, 1)
            chosen = logprobs.gather(-1, token)  # (rows, 1)
            for row, t, lp in zip(rows.tolist(), token[:, 0].tolist(), chosen[:, 0].tolist(), strict=True):
                completions[row][0].append(t)
                completions[row][1].append(lp)
            live = ~torch.isin(token[:, 0], stop)  # (rows,)
            if step + 1 == max_new_tokens or not live.any():
                break
            if not live.all():  # rows that have ended leave the batch: a long straggler runs alone, not with all
                keep = live.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            output = step_with(input_ids=token, attention_mask=mask, position_ids=position)
            logits, position = output.logits[:, -1], position + 1
        return completions

    @torch.no_grad()
    def _score(self, encoded, completions, policy) -> list[list[float]]:
        scores = [[] for _ in encoded]
        with nullcontext() if policy else self.model.disable_adapter():
            for rows in micro_batches([len(o) for o in completions], self.batch_tokens // 8, encoded):
                batch = [encoded[i] for i in rows], [completions[i] for i in rows]
                for i, logprobs in zip(rows, token_logprobs(self.model, *batch, temperature=1.0)[0].tolist(), strict=True):
                    scores[i] = logprobs[: len(completions[i])]
        return scores


class VLLMEngine(Engine):
    """Samples with vLLM in this process: several times faster, for a second copy of the base and a KV cache of its own.

    Policy and anchor are one engine: a request carries the newest LoRA or none. `options` are those of vllm.LLM
    (settings.vllm_options). Raises InputError if vLLM does not start, and EngineError if it fails later.
    """

    def __init__(self, model, tokenizer, options: dict):
        self.sleeps, self.asleep, self.version = options["enable_sleep_mode"], False, 0
        try:
            import vllm

            self.vllm, self.llm = vllm, vllm.LLM(**options)
            super().__init__(model, tokenizer, self.llm.model_config.max_model_len)
            self.sync()
        except Exception as error:  # noqa: BLE001 -- too little memory, an unknown option or model: each raises its own
            raise InputError(
                f"vLLM cannot start {options['model']}: change its options with --engine-args, like "
                f"'{{\"gpu_memory_utilization\": 0.3}}', or take --engine transformers ({one_line(error)})"
            ) from None

    @contextmanager
    def _failures_named(self):
        try:
            yield
        except Exception as error:
            raise EngineError(f"vLLM failed: {one_line(error)}") from error

    def sleep(self) -> None:
        if self.sleeps:
            with self._failures_named():
                self.llm.sleep(level=1)  # weights to main memory, KV cache dropped; level 2 would lose the weights
            self.asleep = True

    def sync(self) -> None:
        """Load the trainer's adapter. Its name, number and path are new each time: vLLM takes an adapter of a known name
        for the old one, and its cached prefixes, computed with the old weights, for valid."""
        self.version += 1
        # There is no supported way to hand over tensors; this copy on disk is gone at once.
        with self._failures_named(), tempfile.TemporaryDirectory() as folder:
            if self.asleep:
                torch.cuda.empty_cache()  # what the trainer's allocator holds on to, the KV cache needs
                self.llm.wake_up()
                self.asleep = False
            self.model.save_pretrained(folder, save_embedding_layers=False)
            self.adapter = self.vllm.lora.request.LoRARequest(f"policy-{self.version}", self.version, folder)
            self.llm.llm_engine.add_lora(self.adapter)

    def _generate(self, prompts: list[list[int]], policy: bool, seed: int = 0, **params) -> list:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        with self._failures_named():
            self.llm.collective_rpc(lambda _: set_seed(seed % 2**32))  # it draws from its workers' global generators
            params = self.vllm.SamplingParams(**params, detokenize=False)
            return self.llm.generate(inputs, params, lora_request=self.adapter if policy else None, use_tqdm=False)

    def _sample(self, encoded, n, policy, temperature, max_new_tokens, top_k, top_p, seed, choices) -> list[list[Rollout]]:
        only = self.vllm.sampling_params.StructuredOutputsParams(choice=list(choices)) if choices else None
        copies = n if temperature == 0 else 1  # of a greedy answer: vLLM wants to be asked for it once
        outputs = self._generate(
            encoded, policy, seed, n=n // copies, temperature=temperature, top_k=top_k, top_p=top_p,
            max_tokens=max_new_tokens, stop_token_ids=self.stop_ids, logprobs=0, structured_outputs=only,
        )  # fmt: skip
        return [
            [self.rollout([*o.token_ids], self._chosen(o.token_ids, o.logprobs), ids) for o in output.outputs * copies]
            for ids, output in zip(encoded, outputs, strict=True)
        ]

    def _score(self, encoded, completions, policy) -> list[list[float]]:
        """vLLM gives log-probabilities of a prompt, so the completion is made part of it."""
        pairs = list(zip(encoded, completions, strict=True))
        outputs = self._generate([q + o for q, o in pairs], policy, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        return [self._chosen(o, output.prompt_logprobs[len(q) :]) for (q, o), output in zip(pairs, outputs, strict=True)]

    def _chosen(self, ids, tables) -> list[float]:
        return [table[i].logprob for i, table in zip(ids, tables, strict=True)]
