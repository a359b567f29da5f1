"""From questions to rollouts: o_1..o_G ~ pi_t(. | q)      (paper, section 3, "exploration").

An ENGINE turns prompts into text. This project asks it for five things:

    engine.sample(prompts, n, sampling)                 n rollouts of each prompt, from pi_t
    engine.sample(prompts, n, sampling, policy=False)   the same from the frozen anchor pi_0
    engine.score(prompts, completions)                  log-probabilities of given completions
    engine.sleep()                                      give GPU memory to the trainer
    engine.sync()                                       from now on, pi_t has the newest weights

Policy and anchor share ONE base. The policy pi_t is the base with a LoRA adapter on; the anchor
pi_0 is the base with it off. That is the initial policy, because a new LoRA adds zero. So the
anchor, which is also the reference policy of the KL, needs no weights of its own.

Token ids come out, beside the text, and the trainer sees exactly these. Decoding them to text and
encoding the text again can give other ids, which nobody sampled.

The engine in this file is vLLM. The other one, for machines without it, samples with the
trainer's own model: plumbing/decoding.py. Tests compare the two.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import set_seed

from plumbing.errors import NOT_FINITE, EngineError, InputError, one_line

# A chat: [{"role": "user", "content": "..."}, ...]
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Rollout:
    """One completion o_i of a prompt q, and what the engine knows about it.

    Its log-probabilities are at the sampling temperature. The trainer computes them again with its
    own kernels; the difference is logged, and corrected for (grpo.micro_batch_loss).
    """

    text: str  # decoded, without special tokens
    ids: list[int]  # completion token ids, (|o|,); an end-of-sequence token counts as one of them
    logprobs: list[float]  # nats, (|o|,)
    finish_reason: str  # "stop": it ended by itself; "length": cut off at max_new_tokens
    prompt_ids: list[int]  # (|q|,), with the chat template applied


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. Training leaves top_k and top_p off; evaluation does as the paper does.

    With top_k or top_p on, samples come from another distribution than the one that is trained.
    """

    temperature: float = 1.0  # 0 is greedy
    max_new_tokens: int = 512
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off


class Engine:
    """What all engines share. A subclass adds `_sample`, `_score`, and `sync` if it needs one.

    `model` is the trainer's PeftModel. `context` is the longest prompt with its completion, in
    tokens. `stop_ids` are the tokens that end a completion.
    """

    def __init__(self, model, tokenizer, context: int):
        self.model, self.tokenizer, self.context = model, tokenizer, context
        # Many models end with any of several tokens. The generation config lists them all.
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = sorted({i for i in [*ends, tokenizer.eos_token_id] if i is not None})

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn."""
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False,
            enable_thinking=False,  # Qwen 3 thinks unless it is told not to (paper: thinking off)
        )  # fmt: skip

    def sample(
        self, prompts: Sequence[Messages], n: int, sampling: Sampling, *,
        policy: bool = True, seed: int = 0, choices: Sequence[str] = (),
    ) -> list[list[Rollout]]:  # fmt: skip
        """`n` rollouts of each prompt: result[q][i] is the i-th of prompts[q].

        `policy=False` samples from the anchor pi_0. `choices`, if there are any, are the only
        texts that are allowed: a judge is held to "yes" and "no", for example.

        Raises InputError if a prompt and `max_new_tokens` do not fit the context, EngineError if
        the engine fails, and FloatingPointError if the model's logits are not finite.
        """
        encoded = [self.encode(messages) for messages in prompts]
        longest = max(map(len, encoded), default=0)
        if longest + sampling.max_new_tokens > self.context:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit "
                f"the context of {self.context} tokens: lower --max-new-tokens or --group-size "
                "(the anchor reads all rollouts at once)"
            )
        return self._sample(encoded, n, sampling, policy, seed, choices)

    def score(
        self, prompts: Sequence[Messages], completions: Sequence[list[int]], *, policy: bool = True
    ) -> list[list[float]]:
        """Log-probabilities (nats, temperature 1) of completions[i] after prompts[i], (|o_i|,)."""
        return self._score([self.encode(messages) for messages in prompts], completions, policy)

    def rollout(self, ids: list[int], logprobs: list[float], prompt_ids: list[int]) -> Rollout:
        """What was sampled, as a Rollout. Raises FloatingPointError."""
        if any(map(math.isnan, logprobs)):
            raise FloatingPointError(NOT_FINITE)
        # The last id tells, not the length: a rollout can end by itself at the last allowed token.
        reason = "stop" if ids[-1] in self.stop_ids else "length"
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Rollout(text, ids, logprobs, reason, prompt_ids)

    def sleep(self) -> None:
        """Free what memory can be freed until the next `sync`. Most engines have none to free."""

    def sync(self) -> None:
        """From now on `policy=True` means the newest weights. A shared model needs no sync."""


class VLLMEngine(Engine):
    """Samples with vLLM, in this process.

    Several times faster than decoding with the trainer's model, at the price of vLLM's own copy of
    the base and a KV cache. Every request carries the newest LoRA (the policy) or none (the
    anchor), so one vLLM serves both. `given` are options of vllm.LLM that override ours.
    Raises InputError if vLLM does not start, and EngineError if it fails later.
    """

    def __init__(self, model, tokenizer, given: dict):
        options = {**vllm_options(model), **given}
        self.sleeps, self.asleep, self.version = options.get("enable_sleep_mode"), False, 0
        try:
            import vllm  # here, because it is not installed everywhere

            self.vllm, self.llm = vllm, vllm.LLM(**options)
            super().__init__(model, tokenizer, self.llm.model_config.max_model_len)
            self.sync()
        except Exception as error:  # noqa: BLE001 -- each cause raises its own
            raise InputError(
                f"vLLM cannot start {options['model']}: change its options with --engine-args, "
                "like '{\"gpu_memory_utilization\": 0.3}', or take --engine transformers "
                f"({one_line(error)})"
            ) from None

    def sleep(self) -> None:
        if self.sleeps:
            with failures_named():
                self.llm.sleep(level=1)  # level 2 would lose the weights
                self.asleep = True

    def sync(self) -> None:
        """Load the trainer's adapter, under a name, a number and a path that are new each time.

        Under a name it knows, vLLM would keep the old adapter, and reuse prefixes that were cached
        with the old weights. It reads adapters from a folder only, so this one is saved to one.
        """
        self.version += 1
        with failures_named(), tempfile.TemporaryDirectory() as folder:
            if self.asleep:
                torch.cuda.empty_cache()  # for the KV cache
                self.llm.wake_up()
                self.asleep = False
            self.model.save_pretrained(folder, save_embedding_layers=False)
            request = self.vllm.lora.request.LoRARequest
            self.adapter = request(f"policy-{self.version}", self.version, folder)
            self.llm.llm_engine.add_lora(self.adapter)

    def _generate(self, prompts: list[list[int]], policy: bool, seed: int = 0, **params) -> list:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        lora = self.adapter if policy else None
        with failures_named():
            # vLLM draws from its workers' global generators, so these are seeded before each call.
            self.llm.collective_rpc(lambda _: set_seed(seed % 2**32))
            params = self.vllm.SamplingParams(**params, detokenize=False)
            return self.llm.generate(inputs, params, lora_request=lora, use_tqdm=False)

    def _sample(self, encoded, n, sampling, policy, seed, choices) -> list[list[Rollout]]:
        held_to = self.vllm.sampling_params.StructuredOutputsParams
        only = held_to(choice=list(choices)) if choices else None
        # Greedy: the n answers are all the same. vLLM takes only n=1; its answer is repeated.
        copies = n if sampling.temperature == 0 else 1
        outputs = self._generate(
            encoded, policy, seed, n=n // copies, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
            stop_token_ids=self.stop_ids, logprobs=0, structured_outputs=only,
        )  # fmt: skip
        return [
            [
                self.rollout([*o.token_ids], logprobs_of(o.token_ids, o.logprobs), prompt_ids)
                for o in output.outputs * copies
            ]
            for prompt_ids, output in zip(encoded, outputs, strict=True)
        ]

    def _score(self, encoded, completions, policy) -> list[list[float]]:
        # vLLM scores prompts (at temperature 1), so the completion is made part of the prompt.
        whole = [q + o for q, o in zip(encoded, completions, strict=True)]
        outputs = self._generate(whole, policy, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        return [
            logprobs_of(o, output.prompt_logprobs[len(q) :])
            for q, o, output in zip(encoded, completions, outputs, strict=True)
        ]


def logprobs_of(ids: Sequence[int], tables: Sequence[dict]) -> list[float]:
    """vLLM gives each position a table {token id: log-probability}: those of `ids`, (|o|,)."""
    return [table[i].logprob for i, table in zip(ids, tables, strict=True)]


def vllm_options(model) -> dict:
    """What vllm.LLM is started with, to sample from the PeftModel `model`."""
    lora, cpu = model.peft_config["default"], model.device.type == "cpu"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: seeds reach it
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or it binds our threads as well
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine gets a part of the GPU's memory; the rest is the trainer's.
    memory = {"kv_cache_memory_bytes": 2 << 30} if cpu else {"gpu_memory_utilization": 0.45}
    return memory | {
        "model": model.get_base_model().name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "enable_lora": True,
        "max_lora_rank": lora.r,
        "lora_target_modules": sorted(lora.target_modules),  # not the output head
        "max_loras": 1,  # only the newest adapter is kept
        "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer's are
        "max_model_len": -1,  # the model's own, or as much as the KV cache can hold
        "use_tqdm_on_load": False,
    }


@contextmanager
def failures_named():
    """vLLM raises anything at all; the trainer wants to know that it was vLLM."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"vLLM failed: {one_line(error)}") from error
