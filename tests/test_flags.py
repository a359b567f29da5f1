"""The command line: every flag explained with its task's default; what former flags became."""

import dataclasses
import inspect
import re

import pytest

import evaluate
import grpo
import tasks
import train
from plumbing import flags, judges, progress
from plumbing.settings import DEFAULTS, EVALUATION, MAY_CHANGE, config, settle
from recipes import cat_sft
from run_helpers import ROOT, refused

# The flags of the version before this one, which people have in their scripts.
FORMER = """task method data split model steps seed group-size prompts-per-step max-new-tokens
temperature aggregator reward length-limit judge judge-url judge-model judge-concurrency
validate-every validation-questions patience lr lora-rank beta kl clip loss updates-per-step
importance-cap mask-truncated micro-batch-tokens gradient-checkpointing engine engine-args sleep
eval-sampling eval-questions out resume""".split()

# What is said of those that are gone, and whether what it names is there.
FIELDS = {field.name for field in dataclasses.fields(grpo.GRPOConfig)}
GONE = {
    "--clip 0.1": ("GRPOConfig in grpo.py", "clip" in FIELDS),
    "--importance-cap 3": ("GRPOConfig in grpo.py", "importance_cap" in FIELDS),
    "--mask-truncated": ("GRPOConfig in grpo.py", "mask_truncated" in FIELDS),
    "--judge server": ("follows from --judge-model", "judge_model" in flags.FLAGS),
    "--judge-concurrency 4": ("CONCURRENCY in plumbing/judges.py", judges.CONCURRENCY == 32),
    "--validation-questions 50": (
        "VALIDATION_QUESTIONS in tasks.py",
        tasks.VALIDATION_QUESTIONS == 100,
    ),
    "--patience 2": ("PATIENCE in plumbing/progress.py", progress.PATIENCE == 5),
    "--sleep": ("--engine-args '{\"enable_sleep_mode\": true}'", "engine_args" in flags.FLAGS),
    "--method sft": ("python recipes/cat_sft.py", (ROOT / "recipes" / "cat_sft.py").exists()),
}


@pytest.mark.parametrize("given", GONE)
@pytest.mark.parametrize("form", ["apart", "with ="])
def test_a_flag_that_is_gone_says_what_to_do_instead(given, form, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = given.split() if form == "apart" else [given.replace(" ", "=")]
    instead, is_there = GONE[given]
    assert is_there
    assert train.main(["--seed", "1", *arguments, "--steps", "1"]) == 2
    shown = capsys.readouterr()
    (error,) = shown.err.strip().splitlines()
    assert error.startswith(f"train.py: error: {given.split()[0]} is gone: ")
    assert instead in error
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (evaluate.main, "evaluate.py"),
        (lambda argv: train.main(argv, cat_sft.METHOD), "recipes/cat_sft.py"),
    ],
)
def test_the_other_programs_say_it_too(program, name, capsys):
    error = refused(program, ["--judge", "server"], capsys)
    assert error.startswith(f"{name}: error: --judge is gone: it follows from --judge-model")


def test_every_former_flag_is_there_or_says_what_became_of_it():
    assert len(FORMER) == 39
    there = {name.replace("_", "-") for name in flags.FLAGS}
    gone = {name.removeprefix("--") for name in flags.REMOVED}
    assert there | gone == {*FORMER, "judge-max-tokens"}
    assert there & gone == set()
    assert gone == {given.split()[0].removeprefix("--") for given in GONE}
    assert len(there) <= 32


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_setting_has_a_default(task):
    known = DEFAULTS | tasks.TASKS[task].settings
    assert known.keys() == flags.FLAGS.keys() - {"out", "resume"}
    assert flags.FLAGS.keys() >= EVALUATION
    assert flags.FLAGS.keys() >= MAY_CHANGE


def test_the_defaults_of_an_update_are_those_of_the_dataclass():
    cfg = config(settle({"engine": "transformers"})[1])
    assert cfg.grpo == grpo.GRPOConfig()
    given = {"beta": 0.5, "kl": "reward", "loss": "sequence", "updates_per_step": 3}
    given |= {"temperature": 0.7, "micro_batch_tokens": 99, "engine": "transformers"}
    ours = grpo.GRPOConfig(0.5, "reward", "sequence", 0.2, 3, 0.7, 2.0, False, 99)
    assert config(settle(given)[1]).grpo == ours
    assert [*inspect.signature(grpo.GRPOConfig).parameters][:4] == ["beta", "kl", "loss", "clip"]


def help_of(program, arguments, capsys):
    """{flag: its text} of --help."""
    with pytest.raises(SystemExit) as stop:
        program([*arguments, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    parts = re.split(r"\n  (?=--[a-z]|-h, )", text)[1:]
    return {part.split()[0].rstrip(","): " ".join(part.split()) for part in parts}


# Read off the paper and the README, and not off the table that they are held in.
MATH500 = {
    "--task": "sums", "--split": "test-time", "--model": "Qwen/Qwen2.5-0.5B-Instruct",
    "--steps": "1000", "--seed": "0", "--group-size": "8", "--prompts-per-step": "32",
    "--max-new-tokens": "1536", "--temperature": "1.0", "--aggregator": "synthesis",
    "--reward": "match", "--judge-url": "https://api.openai.com/v1", "--validate-every": "0",
    "--judge-max-tokens": "8", "--lr": "3e-05", "--lora-rank": "32", "--beta": "0.001",
    "--kl": "loss", "--loss": "token",
    "--updates-per-step": "1", "--micro-batch-tokens": "4096", "--gradient-checkpointing": "True",
    "--engine": "auto", "--eval-questions": "500",
}  # fmt: skip
SUMS = MATH500 | {
    "--split": "held-out", "--model": "tiny", "--steps": "60",
    "--prompts-per-step": "16", "--max-new-tokens": "64", "--lr": "0.0005", "--lora-rank": "16",
    "--gradient-checkpointing": "False",
}  # fmt: skip
# Without a value there is nothing to show; "default: None" would explain nothing.
WITHOUT = ["--data", "--length-limit", "--judge-model", "--engine-args", "--eval-sampling"]
WITHOUT += ["--out", "--resume"]


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], SUMS), (["--task", "math500"], MATH500)], ids=["sums", "math"]
)
def test_help_explains_every_flag_with_the_defaults_of_the_task(arguments, expected, capsys):
    shown = help_of(train.main, arguments, capsys)
    shown.pop("-h")
    assert shown.keys() == {*expected, *WITHOUT}
    found = {flag: re.findall(r"\(default: ([^)]*)\)", text) for flag, text in shown.items()}
    said = {flag: values for flag, values in found.items() if values}
    assert said == {flag: [value] for flag, value in expected.items()}
    for text in shown.values():
        words = re.sub(r"\(default: [^)]*\)", "", text).split()
        assert len(words) >= 5, text


def test_help_has_the_papers_values(capsys):
    shown = help_of(train.main, [], capsys)
    for flag, value in {
        "--lr": "The paper: 5e-7", "--group-size": "The paper: 8",
        "--prompts-per-step": "The paper: 32", "--steps": "The paper: at most 1000",
        "--max-new-tokens": "The paper: 1536 for MATH-500", "--beta": "The paper: 1e-3",
        "--kl": "The paper: reward", "--loss": "The paper: sequence",
        "--aggregator": "The paper: synthesis", "--judge-model": "The paper: GPT-4o",
    }.items():  # fmt: skip
        assert value in shown[flag]


def test_help_of_the_other_programs_has_the_defaults_that_they_have(capsys):
    shown = help_of(evaluate.main, ["--task", "healthbench"], capsys)
    flags_of_it = {"--" + name.replace("_", "-") for name in EVALUATION}
    assert shown.keys() - {"-h"} == flags_of_it | {"--adapter", "--aggregators", "--sizes"}
    assert "(default: 100)" in shown["--eval-questions"]
    shown = help_of(lambda argv: train.main(argv, cat_sft.METHOD), [], capsys)
    assert "(default: 5)" in shown["--validate-every"]
    assert "(default: 60)" in shown["--steps"]
