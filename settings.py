"""The command line: every flag with its help, what it defaults to, and the ranks and engines that it asks for.

A setting comes from the command line, else from the task (tasks.TASKS), else from DEFAULTS; `settle` puts them together.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

import torch
from peft import PeftModel

import runs
from rollout import TransformersEngine, VLLMEngine
from rubrics import REWARDS, anchor_judge, server_judge
from synthesize import AGGREGATORS
from tasks import RANK, TASKS, WORLD, InputError, gather, one_line

# What no task changes. A task's own defaults are in tasks.TASKS; what the command line says goes before both.
DEFAULTS = {
    "task": "sums", "method": "grpo", "data": None, "seed": 0,
    "group_size": 8, "beta": 1e-3, "kl": "loss", "temperature": 1.0, "clip": 0.2,
    "loss": "token", "updates_per_step": 1, "mask_truncated": False, "aggregator": "synthesis", "reward": "match",
    "micro_batch_tokens": 4096, "eval_questions": 500, "engine": "auto", "engine_args": {}, "sleep": False,
    "importance_cap": 2.0, "length_limit": None, "judge": "anchor", "judge_url": "https://api.openai.com/v1",
    "judge_model": None, "judge_concurrency": 32, "validate_every": 0, "validation_questions": 100, "patience": 5,
}  # fmt: skip

# What a method changes in the task's settings, and what CaT-SFT does not read.
METHODS = {"grpo": {}, "sft": {"validate_every": 5}}
SFT_IGNORES = {"beta", "kl", "clip", "updates_per_step", "importance_cap", "mask_truncated", "length_limit"}

# What `evaluate.py` takes of all flags: what is asked, who answers, who judges.
EVALUATION = {
    "task", "data", "split", "model", "seed", "group-size", "max-new-tokens", "reward", "judge", "judge-url",
    "judge-model", "judge-concurrency", "engine", "engine-args", "eval-sampling", "eval-questions", "out",
}  # fmt: skip

# How the final table samples: the paper's settings, by a part of the model's name (its table of hyper-parameters).
EVAL_SAMPLING = {
    "gemma": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "llama": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


def number(kind, low, what, strict=False, high=sys.float_info.max):
    """An argparse type: a `kind` from (`strict`: above) `low` to `high`, or one sentence that says so."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value if strict else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def json_object(text):
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object like '{{\"name\": 1}}'")
    return value


def eval_sampling(given: dict, model: str, temperature: float) -> dict:
    """The final table's sampling: what --eval-sampling says over the model family's. Raises InputError.

    >>> eval_sampling({"temperature": 0.6}, "Qwen/Qwen3-4B", 1.0)
    {'temperature': 0.6, 'top_k': 20, 'top_p': 0.8}
    """
    family = next((f for f in EVAL_SAMPLING if f in Path(model).name.lower()), None)
    settings = EVAL_SAMPLING.get(family, {"temperature": temperature, "top_k": 0, "top_p": 1.0}) | given
    if len(settings) > 3 or not all(isinstance(value, int | float) for value in settings.values()):
        raise InputError(f"--eval-sampling {json.dumps(given)}: it takes numbers for temperature, top_k and top_p")
    if not (0 <= settings["temperature"] <= 2 and settings["top_k"] in range(10**9) and 0 < settings["top_p"] <= 1):
        raise InputError(
            f"--eval-sampling {json.dumps(given)}: temperature is 0 to 2, top_k a count, top_p above 0, at most 1"
        )
    return settings


def parser_of(description: str, only: set[str] | None = None) -> argparse.ArgumentParser:
    """A parser with every flag, or with those in `only`. A setting that is not given is not in its result."""
    count, positive = number(int, 1, "a whole number from 1 up"), number(float, 0, "a number above 0", strict=True)
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)

    def flag(name, text, paper=None, **options):
        if only and name not in only:
            return
        key = name.replace("-", "_")
        by_task = [f"{t.settings[key]} for {task}" for task, t in TASKS.items() if key in t.settings and key != "model"]
        general = [] if (value := DEFAULTS.get(key)) is None or value is False or value == {} else [str(value)]
        text += f"; default: {', '.join(general + by_task)}" if general + by_task else ""
        parser.add_argument(f"--{name}", help=text + (f"; the paper: {paper}" if paper else ""), **options)

    flag("task", "where the questions come from", choices=list(TASKS))
    flag("data", "JSONL file: MATH-500's or HealthBench's, or lines of {prompt, answer (optional)}; default: from the hub")
    flag("split", "questions to train on: those of the final table without labels (test-time training), or others: the "
         "task's own, or one half of all", choices=("test-time", "held-out"))  # fmt: skip
    flag("model", "policy and anchor: tiny, a Hugging Face id, or a local folder; default: tiny for sums, else "
         "Qwen/Qwen3-4B on a GPU or Qwen/Qwen2.5-0.5B-Instruct on a CPU", "Gemma 3 4B, Qwen 3 4B, Llama 3.1 8B")  # fmt: skip
    flag("method", "GRPO on agreement with the references, or CaT-SFT: cross-entropy on those of the initial policy",
         choices=list(METHODS))  # fmt: skip
    flag("steps", "training steps", "at most 1000", type=count)
    flag("seed", "of everything random", type=number(int, 0, "a whole number from 0 up", high=2**63 - 1))
    flag("group-size", "G, rollouts per question", "8", type=number(int, 2, "a whole number from 2 up"))
    flag("prompts-per-step", "Q, questions per step", "32", type=count)
    flag("max-new-tokens", "longest rollout and longest reference", "1536 for MATH-500", type=count)
    flag("temperature", "of rollouts and references", "1.0 Gemma, 0.7 Qwen and Llama",
         type=number(float, 0, "a number above 0, at most 2", strict=True, high=2))  # fmt: skip
    flag("aggregator", "how a reference is made from rollouts", "synthesis", choices=list(AGGREGATORS))
    flag("reward", "how a rollout is compared with the reference", "match for maths, else rubric", choices=list(REWARDS))
    flag("length-limit", "tokens above which a rollout's reward is lowered by 1; otherwise none", type=count)
    flag("judge", "who marks rollouts: the frozen anchor, or a server that speaks the OpenAI protocol", "GPT-4o",
         choices=("anchor", "server"))  # fmt: skip
    flag("judge-url", "of that server; the key is read from OPENAI_API_KEY")
    flag("judge-model", "the judge's name there; default: none, so --judge server wants it")
    flag("judge-concurrency", "calls to that server at a time", type=count)
    flag("validate-every", "steps between validations, which keep the best adapter and read labels (not with sft); 0: none",
         "early stopping on HealthBench and for CaT-SFT", type=number(int, 0, "a whole number from 0 up"))  # fmt: skip
    flag("validation-questions", "how many training questions are kept for validation, at most one in ten", type=count)
    flag("patience", "validations without a better score before the run ends", type=count)
    flag("lr", "learning rate of AdamW, constant", "5e-7, full fine-tuning", type=positive)
    flag("lora-rank", "rank of the LoRA; its alpha is twice that", "no LoRA", type=int, choices=(8, 16, 32, 64, 128))
    flag("beta", "coefficient of the KL to the initial policy", "1e-3", type=number(float, 0, "a number from 0 up"))
    flag("kl", "where that KL acts: a term of the loss (k3), or taken off the reward", "reward", choices=("loss", "reward"))
    flag("clip", "epsilon, the clip ratio; acts only with several updates per step", type=positive)
    flag("loss", "mean over all tokens of the step, or over each sequence first", "sequence", choices=("token", "sequence"))
    flag("updates-per-step", "optimizer steps on each batch of rollouts", type=count)
    flag("mask-truncated", "leave rollouts that were cut off out of the loss; default: they count", action="store_true")
    flag("micro-batch-tokens", "tokens per forward and backward pass: memory, not results", type=count)
    flag("gradient-checkpointing", "recompute each layer in the backward pass: one more forward pass, far less memory",
         action=argparse.BooleanOptionalAction)  # fmt: skip
    flag("importance-cap", "C: a token's gradient is weighted by min(C, trainer's / engine's probability); 0: no weights",
         type=number(float, 0, "a number from 0 up"))  # fmt: skip
    flag("engine", "what samples: vllm, transformers, or auto: vllm where it is installed for the device that trains",
         choices=("auto", "vllm", "transformers"))  # fmt: skip
    flag("engine-args", "JSON for vllm.LLM, like '{\"gpu_memory_utilization\": 0.5}'; default: none", type=json_object)
    flag("sleep", "free vLLM's GPU memory during the update; default: it keeps it", action="store_true")
    flag("eval-sampling", "JSON with temperature, top_k and top_p of the final table; default: the paper's by the model's "
         "name, else --temperature, untruncated", type=json_object)  # fmt: skip
    flag("eval-questions", "how many held-out questions the final table takes; fewer is faster", type=count)
    flag("out", "the run's folder; default: runs/ plus task, model and time", type=Path)
    flag("resume", "continue the run in --out with its settings; --steps may be raised; default: no", action="store_true")
    return parser


def installed_engine() -> tuple[str, str]:
    """(engine, why) for --engine auto: vLLM where it is installed for the device that trains, else transformers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed: pip install -r requirements-gpu.txt"
    try:
        from vllm.platforms import current_platform

        found = current_platform.device_type
    except Exception as error:  # noqa: BLE001 -- half an installation fails in many ways
        return "transformers", f"vLLM is installed and cannot be imported: {one_line(error)}"
    if found != device:
        return "transformers", f"vLLM is installed for {found or 'no device that is here'}, and the model is on the {device}"
    return "vllm", f"it is installed for the {device}"


def check(settings: dict) -> None:
    """Puts an engine in the place of "auto". Raises InputError for settings that do not go together, or differ by rank."""
    if settings["engine"] == "auto":
        settings["engine"], why = installed_engine()
        print(f"engine: {settings['engine']} ({why}; --engine takes another)", flush=True)
    if settings["engine"] == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install -r requirements-gpu.txt, or take --engine transformers")
    if settings["engine"] == "transformers" and (settings["engine_args"] or settings["sleep"]):
        raise InputError("--engine-args and --sleep are for vLLM, and the engine is transformers: leave them out")
    if WORLD > 1 and any("parallel" in key or "executor" in key for key in settings["engine_args"]):
        raise InputError("each rank has an engine of its own on one GPU: to split an engine, start without torchrun")
    if settings["judge"] == "server" and not settings["judge_model"]:
        raise InputError("--judge server wants --judge-model, the name of the judge at --judge-url")
    if settings["task"] == "healthbench" and settings["reward"] == "match":
        raise InputError("--reward match compares boxed answers, and HealthBench has none: take another")
    if settings["task"] != "healthbench" and settings["reward"] == "physician":
        raise InputError("--reward physician wants physicians' rubrics, which only --task healthbench has: take another")
    gather(settings, "settings")  # else each would train a policy of its own, without a word


def join() -> None:
    """Meet the other ranks that torchrun has started; each takes the GPU of its number on its machine. Raises InputError.

    By gloo, on GPUs too: what they exchange is little beside a step's minutes, and tests need no GPU. The time-out is for a
    rank that is slow, or asks a judge. gloo's threads must not outlive Python: they end at exit, after vLLM's own groups.
    """
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise InputError(f"this machine has {gpus} GPUs, and every rank wants its own: --nproc-per-node is at most {gpus}")
    if gpus:
        torch.cuda.set_device(local)  # "cuda" means this one from now on
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=2))
    weakref.finalize(join, lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- rank 0 speaks for all, until the end


def settle(given: dict, start: dict | None = None) -> tuple[Path, dict, bool]:
    """(the run's folder, all settings, resuming?) from what the command line gave. Raises InputError.

    `start`: settings to start from instead of the defaults, those of the run whose adapter is evaluated.
    """
    out, resume = given.pop("out", None), given.pop("resume", False)
    if WORLD > 1:
        join()
    for path in ("data", "model"):  # a run can be resumed from another folder
        if path in given and Path(given[path]).exists():
            given[path] = str(Path(given[path]).resolve())
    if resume and out is None:
        raise InputError("--resume wants --out DIR, the folder of the run to continue")
    start = runs.saved_settings(out) if resume else start
    if start:  # of an older version, which had fewer settings
        start = DEFAULTS | TASKS[start["task"]].settings | start
    if resume and start.get("evaluation"):
        raise InputError(f"{out} holds an evaluation, which cannot be continued: start it anew with another --out")
    if start and given.get("engine") == "transformers":  # what was said to vLLM is not for it
        start |= {"engine_args": {}, "sleep": False}
    if resume:
        for key, value in given.items():
            if key not in runs.MAY_CHANGE and start.get(key) != value:
                flag = "--" + key.replace("_", "-")
                raise InputError(f"{out} was started with {flag} {start.get(key)}: leave {flag} out, or start a new run")
        if (ranks := start.get("ranks", 1)) != WORLD:  # each draws with a seed of its own
            raise InputError(f"{out} was started on {ranks} ranks, and not on {WORLD}: resume it on as many")
        start |= given
        check(start)
        return out, start, True
    task = TASKS[given.get("task", DEFAULTS["task"])]
    settings = {**(start or DEFAULTS | task.settings | METHODS[given.get("method", "grpo")]), **given}
    if callable(settings["model"]):
        settings["model"], why = settings["model"]()
        print(f"model: {settings['model']} ({why}; --model names another)")
    settings["eval_sampling"] = eval_sampling(settings.get("eval_sampling", {}), settings["model"], settings["temperature"])
    check(settings)
    if settings["method"] == "sft" and start is None and (ignored := sorted(SFT_IGNORES & given.keys())):
        raise InputError(f"--{ignored[0].replace('_', '-')} does nothing with --method sft: leave it out")
    name = f"{settings['task']}-{Path(settings['model']).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings |= {"ranks": WORLD} if WORLD > 1 else {}
    return gather(out or Path("runs") / name)[0], settings, False  # the clocks of two ranks may differ


def saved_policy(base, run: Path):
    """`base` with a run's trained adapter. Raises InputError."""
    try:
        return PeftModel.from_pretrained(base, run / "adapter")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {run}/adapter: give --adapter the folder of a run ({one_line(error)})") from None


def vllm_options(model, given: dict, sleep: bool = False) -> dict:
    """What vllm.LLM is started with to sample from the PeftModel `model`: `given` (--engine-args) over what suits it."""
    cpu, lora = model.device.type == "cpu", model.peft_config["default"]
    if cpu and sleep:
        raise InputError("--sleep frees GPU memory, and there is no GPU here: leave it out")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that seeds reach its sampler
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else the trainer's threads are bound as well
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return {
        "model": model.get_base_model().name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "enable_lora": True,
        "max_lora_rank": lora.r,
        "lora_target_modules": sorted(lora.target_modules),  # not the output head: its LoRA would spoil `score`
        "max_loras": 1,  # the newest alone; the one before is dropped when it comes
        "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer's
        "max_model_len": -1,  # the model's own, or what the KV cache can hold
        "enable_sleep_mode": sleep,
        "use_tqdm_on_load": False,
        **({"distributed_executor_backend": "external_launcher"} if WORLD > 1 else {}),  # on this rank's GPU
        **({"kv_cache_memory_bytes": 2 << 30} if cpu else {"gpu_memory_utilization": 0.45}),  # the rest trains
    } | given


def load_engine(s: argparse.Namespace, policy, tokenizer, out: Path) -> tuple:
    """(engine, judge) that the settings name."""
    engine = TransformersEngine(policy, tokenizer)
    if s.engine == "vllm":
        engine = VLLMEngine(policy, tokenizer, vllm_options(policy, s.engine_args, s.sleep))
    if s.judge == "server":
        judge = server_judge(s.judge_url, s.judge_model, out / "judge.jsonl", concurrency=s.judge_concurrency)
        return engine, lambda calls: gather(judge(calls) if RANK == 0 else None)[0]  # asked once, whatever the ranks
    return engine, anchor_judge(engine)
