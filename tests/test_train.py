"""Whole runs of the real command on the real tiny model: what they write, survive, refuse, and never read."""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import train
from settings import DEFAULTS, eval_sampling, installed_engine
from tasks import TASKS, TINY_MODEL, load_base, load_sums

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--prompts-per-step 4 --group-size 4 --eval-questions 6 --max-new-tokens 48".split()
TIMES = re.compile("^(time/.*|step_time)$")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(out):
    return [
        {k: v for k, v in row.items() if not TIMES.match(k)} for row in lines(out / "metrics.jsonl")
    ]


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def results_of(out, kind):
    (row,) = (
        r for r in json.loads((out / "results.json").read_text())["rows"] if r["kind"] == kind
    )
    return row["values"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(*arguments, **options):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *map(str, arguments)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background makes its children ignore SIGINT.
    return subprocess.Popen(
        command,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*SMALL, "--steps", "6", "--out", str(out)]) == 0
    return out


# ------------------------------------------------------------------------------------------------- what a run is


def test_a_run_leaves_everything_that_a_reader_needs(straight, capsys):
    config = json.loads((straight / "config.json").read_text())
    assert set(config["settings"]) == {*DEFAULTS, *TASKS["sums"].settings, "eval_sampling"}
    assert config["settings"]["steps"] == 6
    assert set(config["versions"]) == {"torch", "transformers", "peft", "math-verify"}
    assert config["device"].startswith("CPU, ") == (
        not torch.cuda.is_available()
    )  # else the GPU's name
    assert "commit" in config
    assert [row["step"] for row in metrics(straight)] == list(range(6))
    rollouts = lines(straight / "rollouts.jsonl")
    assert len(rollouts) == 6 * 4
    for row in rollouts:
        assert len(row["rollouts"]) == len(row["rewards"]) == 4
        assert row["question"][0]["content"].startswith("What is")
        assert row["reference"]
    assert (straight / "curves.png").stat().st_size > 10_000
    assert (straight / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((straight / "results.json").read_text())["rows"]
    assert [r["generations"] for r in rows] == [1, 4, 5, 1, 5]
    assert all(0 <= value <= 1 for r in rows for value in r["values"])


def test_logged_rewards_can_be_computed_again_from_the_logged_texts(straight):
    from rewards import boxed_answer, equal

    rows = lines(straight / "rollouts.jsonl")
    for row in rows:
        target = boxed_answer(row["reference"])
        assert row["rewards"] == [
            float(equal(boxed_answer(text), target)) for text in row["rollouts"]
        ]
    for step, logged in enumerate(metrics(straight)):
        rewards = [r for row in rows if row["step"] == step for r in row["rewards"]]
        assert logged["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_the_readme_defines_every_metric(straight):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in lines(straight / "metrics.jsonl")[0]:
        assert f"`{name}`" in readme, name


def test_the_adapter_loads_with_peft_and_is_the_policy(straight):
    base, _ = load_base(str(TINY_MODEL))
    ids = torch.tensor([[0, 10, 11, 12, 3, 1]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, straight / "adapter")
        assert not torch.allclose(before, loaded(input_ids=ids).logits)
    saved = torch.load(straight / "checkpoint" / "state.pt", weights_only=True)["weights"]
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(straight, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        assert (
            train.main([*SMALL, "--steps", "2", "--seed", str(seed), "--out", str(tmp_path / name)])
            == 0
        )
    assert metrics(tmp_path / "again") == metrics(straight)[:2]
    assert metrics(tmp_path / "other") != metrics(straight)[:2]


def test_training_never_reads_labels(straight, tmp_path, monkeypatch):
    """Take the answers away, or deal them out at random: the weights are the same, bit for bit."""
    questions, test = load_sums(None)
    answers = [q.answer for q in questions]
    random.Random(0).shuffle(answers)
    worlds = {
        "removed": (
            [replace(q, answer=None) for q in questions],
            [replace(q, answer=None) for q in test],
        ),
        "shuffled": ([replace(q, answer=a) for q, a in zip(questions, answers, strict=True)], test),
    }
    for name, world in worlds.items():
        monkeypatch.setitem(
            TASKS, "sums", replace(TASKS["sums"], load=lambda data, boxed, world=world: world)
        )
        assert train.main([*SMALL, "--steps", "6", "--out", str(tmp_path / name)]) == 0
        assert same(adapter(tmp_path / name), adapter(straight)), name
    assert metrics(straight)[0]["accuracy/rollouts"] > 0.1
    assert metrics(tmp_path / "removed")[0]["accuracy/rollouts"] is None
    assert metrics(tmp_path / "shuffled")[0]["accuracy/rollouts"] == 0
    assert (
        sum(row["reward_std"] for row in metrics(straight)) > 0
    )  # there was something to learn from


@pytest.mark.parametrize(
    "options",
    [
        "--aggregator majority --kl reward --beta 0.01",
        "--aggregator single --loss sequence --beta 0",
        "--updates-per-step 2 --mask-truncated --temperature 0.8 --max-new-tokens 20 --micro-batch-tokens 100",
    ],
)
def test_every_option_trains(options, tmp_path):
    assert (
        train.main([*SMALL, "--steps", "2", *options.split(), "--out", str(tmp_path / "run")]) == 0
    )
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["update/skipped"] == 0 for row in rows)
    for row in rows:  # the trainer scores what was sampled, at the temperature it was sampled at
        assert (
            row["sampling/logp_difference_max"] is None
            or row["sampling/logp_difference_max"] < 1e-3
        )
    if "--kl reward" in options:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # pi_t starts as pi_0 ...
        assert rows[1]["kl"] != 0  # ... and has moved
    if "--beta 0" in options.split(" --kl")[0] and "single" in options:
        assert rows[0]["kl"] is None  # not measured, and not called 0


def test_it_teaches(tmp_path):
    """Thirty small steps raise the accuracy on sums that are new to every text and step."""
    arguments = "--steps 30 --prompts-per-step 12 --eval-questions 150 --seed 3".split()
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    before, after = results_of(tmp_path / "run", "initial"), results_of(tmp_path / "run", "trained")
    errors = [statistics.stdev(values) / math.sqrt(len(values)) for values in (before, after)]
    assert statistics.mean(after) > statistics.mean(before) + 3 * sum(errors)


def test_each_stage_of_the_algorithm_asks_whom_it_should(engine, policy):
    """The policy explores, the frozen anchor writes references, and the new weights are synced after the update."""
    calls = []

    class Spy:
        def sample(self, prompts, n, policy=True, **sampling):
            calls.append(("pi_t" if policy else "pi_0", len(prompts), n, sampling["temperature"]))
            return engine.sample(prompts, n, policy=policy, **sampling)

        def sleep(self):
            calls.append("sleep")

        def sync(self):
            calls.append("sync")

    Spy.encode, Spy.context = engine.encode, engine.context
    s = argparse.Namespace(
        **{**DEFAULTS, **TASKS["sums"].settings, "group_size": 4, "temperature": 0.9}
    )
    optimizer = torch.optim.AdamW([p for p in policy[0].parameters() if p.requires_grad], lr=1e-3)
    train.cat_step(s, 0, load_sums(None)[0][:3], Spy(), None, policy[0], optimizer)
    assert calls == [("pi_t", 3, 4, 0.9), ("pi_0", 3, 1, 0.9), "sleep", "sync"]


def test_sft_asks_only_the_anchor_and_imitates_its_references(engine, policy, monkeypatch):
    """CaT-SFT: rollouts and references come from pi_0, and the gradient is that of cross-entropy on whole references."""
    model, who, seen = policy[0], [], {}
    sample, update = engine.sample, train.update
    monkeypatch.setattr(
        engine,
        "sample",
        lambda *a, policy=True, **k: who.append(policy) or sample(*a, policy=policy, **k),
    )

    def spy(model, optimizer, targets, *arguments, **options):
        seen["targets"] = targets
        numbers = update(model, optimizer, targets, *arguments, **options)
        return numbers

    monkeypatch.setattr(train, "update", spy)
    # with plain SGD and a norm below the clip, the step of the weights IS the gradient
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    s = argparse.Namespace(
        **{
            **DEFAULTS,
            **TASKS["sums"].settings,
            "group_size": 4,
            "max_new_tokens": 48,
            "method": "sft",
        }
    )
    questions = load_sums(None)[0][:6]
    monkeypatch.setitem(train.sft_step.__globals__, "update", partial(spy, max_grad_norm=1e9))
    _, references, _, numbers = train.sft_step(
        s, 0, questions, engine, None, model, torch.optim.SGD(trainable.values(), lr=1.0)
    )
    assert who == [False, False]
    finished = [r for r in references if r.finish_reason == "stop" and "boxed" in r.text]
    assert [o.ids for o in seen["targets"]] == [r.ids for r in finished]
    step = {name: before[name] - p.detach() for name, p in trainable.items()}

    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(before[name])
    loss, tokens = 0.0, sum(len(o.ids) for o in seen["targets"])
    for o in seen["targets"]:
        logits = model(input_ids=torch.tensor([o.prompt_ids + o.ids])).logits[
            0, len(o.prompt_ids) - 1 : -1
        ]
        loss = (
            loss
            + torch.nn.functional.cross_entropy(
                logits.double(), torch.tensor(o.ids), reduction="sum"
            )
            / tokens
        )
    loss.backward()
    assert numbers["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, p in trainable.items():
        torch.testing.assert_close(step[name], p.grad, rtol=1e-3, atol=1e-5)


def test_sft_validates_without_labels_stops_early_and_teaches(tmp_path, capsys):
    unlabelled = tmp_path / "sums.jsonl"
    unlabelled.write_text(
        "\n".join(json.dumps({"prompt": f"What is {n} + 4321?"}) for n in range(1000, 1040))
    )
    arguments = f"--task jsonl --data {unlabelled} --model tiny --method sft --lr 1 --validate-every 1 --patience 2".split()
    out = tmp_path / "stops"
    assert train.main([*SMALL, *arguments, "--steps", "9", "--out", str(out)]) == 0
    scores = [row["validation/score"] for row in metrics(out)]
    assert len(scores) < 9
    assert max(scores[-2:]) <= max(scores[:-2])
    assert all(score < 0 for score in scores)
    assert "stopping early" in capsys.readouterr().out
    out = tmp_path / "teaches"
    arguments = "--method sft --steps 12 --lr 2e-3 --prompts-per-step 8 --max-new-tokens 64 --eval-questions 100".split()
    assert train.main([*arguments, "--validate-every", "0", "--out", str(out)]) == 0
    before, after = results_of(out, "initial"), results_of(out, "trained")
    assert statistics.mean(after) > statistics.mean(before) + 0.1
    assert metrics(out)[-1]["reward"] is None


# ------------------------------------------------------------------------------------------------- what it survives


def kill_after(process, out, steps, signal_number):
    deadline = time.monotonic() + 120
    while (
        not (out / "metrics.jsonl").exists()
        or len((out / "metrics.jsonl").read_bytes().splitlines()) < steps
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal_number)
    return process.communicate(timeout=60)


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    out = tmp_path / "run"
    process = start("--steps", 6, "--out", out)
    kill_after(process, out, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(lines_that_parse(out / "metrics.jsonl")) < 6
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert same(adapter(out), adapter(straight))
    assert metrics(out) == metrics(straight)
    assert len(lines(out / "rollouts.jsonl")) == 24


def lines_that_parse(path):
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    out = tmp_path / "run"
    process = start("--steps", 50, "--out", out)
    _, error = kill_after(
        process, out, 3, signal.SIGINT
    )  # the third line is logged: the second step is saved
    assert process.returncode == 130
    assert f"--resume --out {out}" in error
    assert "Traceback" not in error
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    done = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert done >= 2


def test_a_crash_between_log_and_checkpoint_does_the_step_again(straight, tmp_path):
    """The log is ahead of the checkpoint, and its last line is cut short: resuming drops both."""
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "3", "--out", str(out)]) == 0
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "reward": 0.9}\n{"step": 4, "rew')
    assert train.main(["--resume", "--steps", "6", "--out", str(out)]) == 0
    assert metrics(out) == metrics(straight)
    assert (
        json.loads((out / "config.json").read_text())["settings"]["steps"] == 6
    )  # a plain --resume goes as far


def test_a_run_killed_before_its_first_step_starts_over(straight, tmp_path):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    (out / "checkpoint" / "state.pt").unlink()
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert metrics(out) == metrics(straight)[:2]


def test_three_updates_in_a_row_that_are_not_finite_stop_the_run(tmp_path, capsys, monkeypatch):
    real = train.advantages
    monkeypatch.setattr(train, "advantages", lambda *given: real(*given) * float("nan"))
    assert train.main([*SMALL, "--steps", "9", "--out", str(tmp_path / "run")]) == 1
    assert [row["update/skipped"] for row in metrics(tmp_path / "run")] == [1, 1, 1]
    error = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in error
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["weights"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_policy_that_has_blown_up_stops_with_a_sentence(tmp_path, capsys):
    assert train.main([*SMALL, "--steps", "5", "--lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    assert "not finite" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what it refuses


def refused(arguments, capsys):
    try:
        status = train.main(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_an_existing_run_is_never_overwritten(straight, tmp_path, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert "--resume" in refused(["--out", str(straight)], capsys)
    assert (straight / "metrics.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    assert "exists" in refused(["--out", str(tmp_path / "file")], capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--group-size 1", "2 up"),
        ("--steps 0", "1 up"),
        ("--steps x", "1 up"),
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0"),
        ("--lr inf", "above 0"),
        ("--beta -1", "0 up"),
        ("--seed 99999999999999999999", "0 up"),
        ("--temperature 0", "above 0"),
        ("--lora-rank 7", "invalid choice"),
        ("--lora-rank 0", "invalid choice"),
        ("--task nothing", "invalid choice"),
        ("--aggregator nothing", "invalid choice"),
        ("--prompts-per-step 5000", "more than there are questions"),
        ("--task jsonl --model tiny", "--data"),
        ("--task jsonl --model tiny --data nowhere.jsonl", "cannot read"),
        ("--model nobody/nothing", "cannot load the model"),
        ("--max-new-tokens 4000", "context"),
        ("--group-size 400 --max-new-tokens 100", "context"),
        ("--resume", "--out"),
        ("--resume --out nowhere", "holds no run"),
        ("--out /proc/nowhere/run", "cannot write"),
        ("--temperature 2.1", "at most 2"),
        ("--engine nothing", "invalid choice"),
        ("--engine-args [1]", "not a JSON object"),
        ("--engine-args {", "not a JSON object"),
        ('--engine transformers --engine-args {"max_num_seqs":1}', "are for vLLM"),
        ("--engine transformers --sleep", "are for vLLM"),
        ('--eval-sampling {"top_q":1}', "takes numbers for"),
        ('--eval-sampling {"top_k":"many"}', "takes numbers for"),
        ('--eval-sampling {"top_p":0}', "above 0"),
        ("--importance-cap -1", "0 up"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(
    arguments, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(arguments.split(), capsys)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "a refused command leaves nothing behind"


def test_resuming_with_another_setting_is_refused(straight, capsys):
    assert "--lr" in refused(["--resume", "--out", str(straight), "--lr", "0.5"], capsys)


def test_what_changes_no_result_may_change_when_a_run_is_resumed(straight, tmp_path):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    again = ["--micro-batch-tokens", "200", "--gradient-checkpointing", "--engine", "auto"]
    assert train.main(["--resume", "--out", str(out), "--steps", "3", *again]) == 0
    expected = metrics(straight)[2]
    for name, value in metrics(out)[2].items():
        assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    saved = json.loads((out / "config.json").read_text())["settings"]
    assert saved["gradient_checkpointing"] is True
    assert saved["engine"] == installed_engine()[0]  # "auto" is settled when a run is resumed, too


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_auto_says_so_and_asking_for_it_is_refused(capsys, tmp_path):
    assert installed_engine()[0] == "transformers"
    assert "not installed" in installed_engine()[1]
    assert "requirements-gpu.txt" in refused(
        ["--engine", "vllm", "--out", str(tmp_path / "run")], capsys
    )


def test_the_final_table_samples_as_the_paper_does_for_its_models():
    """The paper's table of hyper-parameters; a part that is given goes before it."""
    table = {"google/gemma-3-4b-it": (1.0, 64, 0.95), "Qwen/Qwen3-4B": (0.7, 20, 0.8)}
    table |= {
        "meta-llama/Llama-3.1-8B-Instruct": (0.7, 50, 0.9),
        "tiny": (1.3, 0, 1.0),
        "/home/llama/mine": (1.3, 0, 1.0),
    }
    for name, values in table.items():
        assert tuple(eval_sampling({}, name, 1.3).values()) == values
    assert eval_sampling({"top_k": 5}, "Qwen/Qwen3-4B", 1.3) == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.8,
    }


def test_help_explains_every_setting_with_default_and_paper(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in [*DEFAULTS, "steps", "model", "lr", "out", "resume"]:
        assert "--" + key.replace("_", "-") in text
    assert "the paper: 5e-7" in text
    assert f"default: {TASKS['sums'].settings['lr']} for sums" in text
    settings = {*DEFAULTS, *TASKS["sums"].settings, "eval_sampling", "out", "resume"}
    assert text.count("default: ") == len(settings)


# ------------------------------------------------------------------------------------------------- where it runs


def test_it_runs_from_elsewhere_with_a_read_only_checkout_and_spaces_in_paths(tmp_path):
    checkout, elsewhere = tmp_path / "a check out", tmp_path / "some where"
    checkout.mkdir()
    elsewhere.mkdir()
    for name in [*(p.name for p in ROOT.glob("*.py")), "models"]:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, checkout / name)
    before = sorted(p for p in checkout.rglob("*"))
    for path in [*before, checkout]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        done = subprocess.run(
            [sys.executable, checkout / "train.py", *SMALL, "--steps", "1"],
            cwd=elsewhere,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path in [*before, checkout]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert (
        sorted(p for p in checkout.rglob("*")) == before
    )  # also as root, whom permissions do not stop
    (out,) = (elsewhere / "runs").iterdir()
    assert out.name.startswith("sums-tiny-")
    assert "trained: CaT" in done.stdout
    assert json.loads((out / "config.json").read_text())["commit"] is None


def test_questions_without_answers_run_and_say_so(tmp_path, capsys):
    data = tmp_path / "my questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(5)))
    arguments = [*SMALL, "--task", "jsonl", "--model", "tiny", "--data", str(data), "--steps", "1"]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "no labels" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists()


def test_each_pass_over_the_questions_takes_every_one_once_in_a_new_order():
    questions = list(range(10))
    drawn = [q for step in range(5) for q in train.batch_of(questions, 4, step, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == questions
    assert drawn[:10] != drawn[10:]
    assert (
        train.batch_of(questions, 4, 2, seed=0) == drawn[8:12]
    )  # a function of (seed, step) alone
    assert [train.batch_of(questions, 4, 0, seed=s) for s in range(4)].count(drawn[:4]) == 1


def test_an_early_stop_stays_stopped_when_the_run_is_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = "--method sft --lr 1 --validate-every 1 --patience 1 --steps 9".split()
    assert train.main([*SMALL, *arguments, "--out", str(out)]) == 0
    steps, best = len(metrics(out)), adapter(out)
    assert steps < 9
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert len(metrics(out)) == steps
    assert same(adapter(out), best)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--split test-time --validate-every 1", "labels would be those of the final table"),
        ("--method sft --beta 0.1", "--beta does nothing with --method sft"),
    ],
)
def test_what_would_leak_labels_or_do_nothing_is_refused(arguments, sentence, capsys):
    assert sentence in refused(arguments.split(), capsys)


def test_an_evaluation_is_not_a_run_to_be_resumed(tmp_path, capsys):
    import evaluate

    arguments = (
        "--eval-questions 2 --group-size 2 --max-new-tokens 24 --aggregators majority".split()
    )
    assert evaluate.main([*arguments, "--out", str(tmp_path / "evaluation")]) == 0
    before = (tmp_path / "evaluation" / "table.md").read_bytes()
    assert "cannot be continued" in refused(
        ["--resume", "--out", str(tmp_path / "evaluation")], capsys
    )
    assert (tmp_path / "evaluation" / "table.md").read_bytes() == before


def test_a_run_of_a_version_with_fewer_settings_can_be_resumed(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["settings"]["split"], config["settings"]["method"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", "--out", str(tmp_path / "old")]) == 0
