"""From prompts to rollouts o_1..o_G, and log-probabilities of given text: one small interface, engines behind it.

    engine.sample(prompts, n, policy=True, ...)   n rollouts for each prompt, from pi_t
    engine.sample(prompts, n, policy=False, ...)  the same from the frozen anchor pi_0
    engine.score(prompts, completions, ...)       log-probabilities of given completions
    engine.sync()                                 from now on, `policy=True` means the newest weights

The anchor is the policy's own base model with the LoRA adapter switched off: pi_0 costs no second copy.

Token ids go in and token ids come out. The trainer sees exactly the ids that were sampled, because decoding them to
text and encoding that again can give other tokens, whose probabilities nobody sampled from.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from grpo import token_logprobs
from tasks import InputError

Messages = Sequence[dict[str, str]]  # a chat: [{"role": "user", "content": "..."}, ...]


@dataclass(frozen=True)
class Rollout:
    """One completion o_i of a prompt q. Its log-probabilities are the engine's own, at the sampling temperature."""

    text: str  # decoded, without special tokens
    ids: list[int]  # completion token ids, (|o|,); the end-of-sequence token included where one was sampled
    logprobs: list[float]  # nats, (|o|,)
    finish_reason: str  # "stop": ended by itself; "length": cut off at max_new_tokens
    prompt_ids: list[int]  # (|q|,), the chat template applied


def load_base(name: str) -> tuple:
    """(model, tokenizer) of a Hugging Face id or a local folder: bf16 on a GPU, float32 on a CPU. Raises InputError."""
    gpu = torch.cuda.is_available()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if gpu else torch.float32)
    except Exception as error:  # noqa: BLE001 -- no such id, offline, a proxy, a broken file: each raises its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the model {name!r}: give --model a folder with a causal language model, or the id of one on "
            f"the Hugging Face hub and a network that reaches it ({reason})"
        ) from None
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {name!r} has no chat template: give --model an instruct model")
    model = model.to("cuda" if gpu else "cpu").eval()
    # The trainer applies the output head to chosen positions itself. A model that does more to its logits (soft-capping,
    # a scale) would be trained on wrong probabilities, so it is refused, by trying it.
    ids = torch.tensor([tokenizer.encode("1 + 1 = 2")], device=model.device)
    with torch.no_grad():
        direct = model.get_output_embeddings()(model.get_decoder()(input_ids=ids).last_hidden_state)
        if not torch.allclose(direct, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            raise InputError(f"{name!r} changes its logits after the output head, which grpo.py does not do: use another")
    return model, tokenizer


class TransformersEngine:
    """Samples with the trainer's own model, so that it runs wherever PyTorch runs.

    `model` is a PeftModel, `tokenizer` its tokenizer. `batch_tokens` bounds the tokens (prompt and completion, all
    rows) that are in flight together, which bounds the KV cache: 24 KB a token for a 0.5B model in float32. The n
    rollouts of one prompt always run together.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 65_536):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.context = model.config.get_text_config().max_position_embeddings
        # Some models end with any of several tokens (<|eot_id|> and <|end_of_text|>): the generation config lists them.
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = sorted({i for i in [*ends, tokenizer.eos_token_id] if i is not None})

    def sync(self) -> None:
        """Nothing to do: the trainer's model is the one that samples."""

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn. Qwen 3 thinks unless told not to (paper: thinking off)."""
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
        )

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Messages],
        n: int,
        *,
        policy: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
    ) -> list[list[Rollout]]:
        """`n` rollouts for each of `prompts`: result[q][i] is the i-th of prompts[q], whatever order they ran in.

        `policy=False` samples from the anchor pi_0. `temperature` 0 is greedy. No top-k, no top-p: truncated samples
        come from another distribution than the one whose gradient is taken. The result is a function of the
        arguments and the weights: the randomness is a generator of this call, seeded with `seed`.

        Raises InputError if a prompt and `max_new_tokens` do not fit the model's context, and FloatingPointError if the
        logits are not finite.
        """
        encoded = [self.encode(messages) for messages in prompts]
        longest = max(map(len, encoded))
        if longest + max_new_tokens > self.context:
            raise InputError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of "
                f"{self.context}: lower --max-new-tokens or --group-size (the anchor reads all rollouts at once)"
            )
        generator = torch.Generator(self.model.device).manual_seed(seed)
        results: list[list[Rollout]] = [[] for _ in prompts]
        self.model.eval()
        with nullcontext() if policy else self.model.disable_adapter():
            # Prompts of like length run together: short ones are not padded to the longest of the whole batch.
            pending = sorted(range(len(prompts)), key=lambda q: len(encoded[q]))
            while pending:
                width = len(encoded[pending[-1]]) + max_new_tokens
                count = max(1, self.batch_tokens // (n * width))
                pending, batch = pending[:-count], pending[-count:]  # the longest first: too large fails at once
                completions = self._generate([encoded[q] for q in batch], n, temperature, max_new_tokens, generator)
                for row, (ids, logprobs) in enumerate(completions):
                    q = batch[row // n]
                    reason = "stop" if ids[-1] in self.stop_ids else "length"
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    results[q].append(Rollout(text, ids, logprobs, reason, encoded[q]))
        return results

    def _generate(self, prompts, n, temperature, max_new_tokens, generator) -> list[tuple[list[int], list[float]]]:
        """Sample rows B*n, row b*n + i being the i-th completion of prompts[b]: (ids, log-probabilities) each."""
        device, pad = self.model.device, self.stop_ids[0]  # any id will do: padding is masked by position, not by id
        width = max(map(len, prompts))
        # Padded on the left, so that every row's next token goes into the same column.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # (B, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, width)
        cache = DynamicCache(config=self.model.config)
        # Each prompt is read ONCE; its keys and values are then shared out to its n rollouts. generate() with
        # num_return_sequences=n reads it n times.
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, dim=0)  # (B*n, V)
        mask = mask.repeat_interleave(n, dim=0)  # (B*n, width)
        position = mask.sum(-1, keepdim=True)  # (B*n, 1), of the next token
        stop = torch.tensor(self.stop_ids, device=device)
        rows = torch.arange(len(prompts) * n, device=device)  # which completion each live row belongs to
        completions = [([], []) for _ in rows]
        for step in range(max_new_tokens):
            logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (rows, V)
            if logprobs.isnan().any():
                raise FloatingPointError("the model's logits are not finite: lower --lr, or raise --beta")
            if temperature == 0:
                token = logprobs.argmax(-1, keepdim=True)  # (rows, 1)
            else:
                token = torch.multinomial(logprobs.exp(), 1, generator=generator)  # (rows, 1)
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
            output = self.model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            logits, position = output.logits[:, -1], position + 1
        return completions

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Messages], completions: Sequence[list[int] | str], *, policy: bool = True
    ) -> list[list[float]]:
        """Log-probabilities (nats, temperature 1) of each token of completions[i] after prompts[i], (|o_i|,) each.

        A completion is token ids, as in `Rollout.ids`, or a text, which is encoded as it stands.
        """
        self.model.eval()
        scores = []
        with nullcontext() if policy else self.model.disable_adapter():
            for messages, given in zip(prompts, completions, strict=True):
                ids = self.tokenizer.encode(given, add_special_tokens=False) if isinstance(given, str) else given
                logprobs, _, _ = token_logprobs(self.model, [self.encode(messages)], [ids], temperature=1.0)
                scores.append(logprobs[0].tolist())
        return scores
