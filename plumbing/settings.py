"""All settings of a run, put together from the command line, the task and the defaults.

A setting comes from the command line, else from the task (tasks.TASKS), else from DEFAULTS.
"""

import argparse
import time
from pathlib import Path

from grpo import GRPOConfig
from plumbing import folder, ranks
from plumbing.checks import check_settings
from plumbing.engines import installed_engine
from plumbing.errors import InputError
from plumbing.judges import probe
from plumbing.server import shown_url
from rollout import Sampling
from tasks import TASKS

# What no task changes. A task's own defaults are in tasks.TASKS; the command line goes before both.
DEFAULTS = {
    "task": "sums", "data": None, "seed": 0, "group_size": 8, "temperature": 1.0,
    "aggregator": "synthesis", "reward": "match", "length_limit": None,
    "judge_url": "https://api.openai.com/v1", "judge_model": None,
    "judge_max_tokens": 8, "validate_every": 0,
    "beta": 1e-3, "kl": "loss", "loss": "token", "updates_per_step": 1, "micro_batch_tokens": 4096,
    "engine": "auto", "engine_args": {}, "eval_sampling": {}, "eval_questions": 500,
}  # fmt: skip

# What `evaluate.py` takes of all flags: what is asked, who answers, who judges.
EVALUATION = {
    "task", "data", "split", "model", "seed", "group_size", "max_new_tokens", "reward", "judge_url",
    "judge_model", "judge_max_tokens", "engine", "engine_args", "eval_sampling", "eval_questions",
    "out",
}  # fmt: skip

# What a resumed run may change: how far it goes, what moves memory or work but not results (beyond
# rounding), and what a judge needs to answer at all.
MAY_CHANGE = {
    "steps", "eval_questions", "engine", "engine_args", "micro_batch_tokens",
    "gradient_checkpointing", "judge_url", "judge_max_tokens",
}  # fmt: skip

# How the final table samples: the paper's settings, by a part of the model's name.
EVAL_SAMPLING = {
    "gemma": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "llama": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


def eval_sampling(given: dict, model: str, temperature: float) -> dict:
    """The final table's sampling: what --eval-sampling says over the model family's.

    >>> eval_sampling({"temperature": 0.6}, "Qwen/Qwen3-4B", 1.0)
    {'temperature': 0.6, 'top_k': 20, 'top_p': 0.8}
    """
    family = next((f for f in EVAL_SAMPLING if f in Path(model).name.lower()), None)
    untruncated = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return EVAL_SAMPLING.get(family, untruncated) | given


def settle(given: dict, start: dict | None = None, method: str = "grpo", more=()) -> tuple:
    """(the run's folder, all settings, resuming?) from what the command line gave.

    `start`: settings to start from instead of the defaults, those of the run whose adapter is
    evaluated. `method` and `more`, its own defaults, are a recipe's. Raises InputError.
    """
    ranks.join()
    out, resume = given.pop("out", None), given.pop("resume", False)
    for path in ("data", "model"):  # a run can be resumed from another folder
        if path in given and Path(given[path]).exists():
            given[path] = str(Path(given[path]).resolve())
    if resume:
        return out, resumed(out, given, method), True
    task = TASKS[given.get("task", (start or DEFAULTS)["task"])]
    defaults = {"method": method, **DEFAULTS, **task.settings, **dict(more)}
    settings = defaults | (start or {}) | given
    if start and given.get("engine") == "transformers":  # what was said to vLLM is not for it
        settings["engine_args"] = {}
    if callable(settings["model"]):
        settings["model"], why = settings["model"]()
        print(f"model: {settings['model']} ({why}; --model names another)")
    sampling = eval_sampling(settings["eval_sampling"], settings["model"], settings["temperature"])
    settings["eval_sampling"] = sampling
    check(settings)
    name = f"{settings['task']}-{Path(settings['model']).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings |= {"ranks": ranks.WORLD} if ranks.WORLD > 1 else {}
    # The clocks of two ranks may differ, so the name is rank 0's.
    return ranks.gather(out or Path("runs") / name)[0], settings, False


def resumed(out: Path | None, given: dict, method: str) -> dict:
    """The settings of the run in `out`, and what of `given` may change. Raises InputError."""
    if out is None:
        raise InputError("--resume wants --out DIR, the folder of the run to continue")
    start = folder.saved_settings(out)
    start = DEFAULTS | TASKS[start["task"]].settings | start  # an older version had fewer settings
    if start.get("evaluation"):
        what = "holds an evaluation, which cannot be continued"
        raise InputError(f"{out} {what}: start it anew with another --out")
    if start["method"] != method:
        program = {"grpo": "train.py", "sft": "recipes/cat_sft.py"}.get(start["method"])
        raise InputError(f"{out} was started by {program}: resume it with that program")
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        if key not in MAY_CHANGE and start.get(key) != value:
            was = f"was started with {flag} {start.get(key)}"
            raise InputError(f"{out} {was}: leave {flag} out, or start a new run")
    for key, value in folder.FIXED.items():
        if key in start:
            was = f"was started with {key} {start[key]}, which is always {value} in this version"
            raise InputError(f"{out} {was}: start a new run, or resume it with its own version")
    if (then := start.get("ranks", 1)) != ranks.WORLD:  # each draws with a seed of its own
        was = f"was started on {then} ranks, and not on {ranks.WORLD}"
        raise InputError(f"{out} {was}: resume it on as many")
    if given.get("engine") == "transformers":
        start["engine_args"] = {}
    settings = start | given
    check(settings)
    return settings


def check(settings: dict) -> None:
    """Puts an engine in the place of "auto", hides secrets, and refuses what cannot go well.

    That is cheap, and the model is not loaded yet. A judge is asked once whether it is there.
    """
    settle_engine(settings)
    settings["judge_url"] = shown_url(settings["judge_url"])
    check_settings(settings)
    if model := settings["judge_model"]:
        asked = ranks.of_rank_0(probe)
        asked(settings["judge_url"], model, settings["judge_max_tokens"])


def settle_engine(settings: dict) -> None:
    """Puts an engine in the place of "auto"."""
    if settings["engine"] == "auto":
        settings["engine"], why = installed_engine()
        print(f"engine: {settings['engine']} ({why}; --engine takes another)", flush=True)


def config(settings: dict) -> argparse.Namespace:
    """The settings as `cfg`: one attribute each, and what the six files take together.

    cfg.sampling and cfg.final_sampling are rollout.Sampling, for training and for the final table;
    cfg.grpo is grpo.GRPOConfig.
    """
    cfg = argparse.Namespace(**settings)
    cfg.sampling = Sampling(cfg.temperature, cfg.max_new_tokens)
    cfg.final_sampling = Sampling(**cfg.eval_sampling, max_new_tokens=cfg.max_new_tokens)
    cfg.grpo = GRPOConfig(
        beta=cfg.beta, kl=cfg.kl, loss=cfg.loss, updates_per_step=cfg.updates_per_step,
        temperature=cfg.temperature, token_budget=cfg.micro_batch_tokens,
    )  # fmt: skip
    return cfg
