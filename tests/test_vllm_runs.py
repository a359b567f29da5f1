"""Whole runs with the real vLLM: resumed, on two ranks, broken in the middle, and judged."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed (docs/development.md says how to test it without a GPU)"
)

import vllm
from transformers import GPT2Config, GPT2LMHeadModel

import train
from plumbing.models import TINY_MODEL, load_base
from rank_helpers import run
from rollout import VLLMEngine
from run_helpers import lines, metrics
from vllm_helpers import SMALL


def rollouts(out):
    return lines(out / "rollouts.jsonl")


def test_a_run_with_vllm_trains_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    assert train.main(["--resume", "--steps", "3", "--out", str(out)]) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # Of the resumed step too: its engine starts from the checkpoint's adapter, not from a new one.
    assert all(row["sampling/logp_difference_max"] < 1e-3 for row in rows)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["engine"] == "vllm"
    assert config["versions"]["vllm"] == vllm.__version__
    captured = capsys.readouterr()
    assert "rollouts by vllm" in captured.out
    assert "| trained: CaT |" in captured.out
    assert "WARNING: step" not in captured.err


def test_two_ranks_have_an_engine_each_and_train_one_policy(tmp_path):
    """Under torchrun the trainers' process group is there before vLLM makes its own."""
    out = tmp_path / "run"
    # One question in the end: a rank asks nothing.
    printed, err = run(2, *SMALL, "--steps", "3", "--eval-questions", "1", "--out", out)
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # The largest over both ranks' shares: each engine has the adapter that both have trained.
    assert all(row["sampling/logp_difference_max"] < 1e-3 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert [len(row["rollouts"]) for row in rollouts(out)] == [4] * 12
    assert printed.count("| trained: CaT |") == 1
    assert "WARNING: step" not in err
    assert "Traceback" not in err  # at exit, when both take down their process groups


def test_a_sync_that_does_nothing_is_warned_of(tmp_path, capsys, monkeypatch):
    """The engine stays with the first adapter while the trainer's moves.

    The difference is logged, and the run says so.
    """
    real = VLLMEngine.sync
    monkeypatch.setattr(VLLMEngine, "sync", lambda self: None if self.version else real(self))
    assert train.main([*SMALL, "--steps", "4", "--lr", "0.01", "--out", str(tmp_path / "run")]) == 0
    differences = [row["sampling/logp_difference_mean"] for row in metrics(tmp_path / "run")]
    assert differences[0] < 1e-4 < 0.05 < max(differences)
    assert "WARNING: step" in capsys.readouterr().err


def test_an_engine_that_dies_leaves_a_checkpoint_that_another_engine_continues(
    tmp_path, capsys, monkeypatch
):
    out, real, calls = tmp_path / "run", VLLMEngine._generate, []

    def dies(self, *given, **params):
        calls.append(1)
        if len(calls) == 4:  # the references of the second step
            self.llm.llm_engine.engine_core.shutdown()  # what a crash of the engine leaves behind
        return real(self, *given, **params)

    monkeypatch.setattr(VLLMEngine, "_generate", dies)
    assert train.main([*SMALL, "--steps", "3", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "vLLM failed" in error
    assert f"--resume --out {out}" in error
    assert [row["step"] for row in metrics(out)] == [0]
    assert train.main(["--resume", "--engine", "transformers", "--out", str(out)]) == 0
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"max_lora_rank": 8}, "rank"),
        ({"kv_cache_memory_bytes": 10**15}, "memory"),
        ({"enable_sleep_mode": True}, "no GPU"),
    ],
)
def test_an_engine_that_cannot_start_says_what_to_change(options, sentence, tmp_path, capsys):
    arguments = [*SMALL, "--engine-args", json.dumps(options), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ")
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_model_that_vllm_does_not_know_is_refused(tmp_path, capsys):
    _, tokenizer = load_base(str(TINY_MODEL))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [*SMALL, *"--group-size 2 --max-new-tokens 20".split()]
    arguments += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 2
    assert "--engine transformers" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- judges


@pytest.fixture
def healthbench(tmp_path):
    points = {"Is kind": 5, "Is right": 10, "Is rude": -4}
    rubric = [{"criterion": text, "points": p} for text, p in points.items()]
    rows = [
        {
            "prompt_id": f"q{n}",
            "prompt": [{"role": "user", "content": f"What is {1000 + n} + 1?"}],
            "rubrics": rubric,
        }
        for n in range(6)
    ]
    path = tmp_path / "health.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = "--task healthbench --model tiny --reward physician --validate-every 0 --steps 1"
    return [*arguments.split(), "--data", str(path)]


def test_the_anchor_judges_in_the_same_engine_and_is_held_to_yes_and_no(healthbench, tmp_path):
    """Without --judge-model."""
    out = tmp_path / "run"
    assert train.main([*SMALL, *healthbench, "--out", str(out)]) == 0
    said = {text for row in rollouts(out) for texts in row["judge"] for text in texts}
    assert said <= {"yes", "no"}
    assert metrics(out)[0]["judge/unknown_rate"] == 0


def test_a_step_judged_by_vllm_serve(healthbench, tmp_path):
    """The real server and the real client.

    The tiny model's verdicts are nonsense, and the run must say so.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; the command itself does not find its own version in the build for
    # CPUs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(TINY_MODEL), "--served-model-name", "judge"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        out = tmp_path / "run"
        arguments = "--engine transformers --prompts-per-step 2 --group-size 2".split()
        arguments += "--eval-questions 1 --max-new-tokens 24 --judge-model judge".split()
        arguments += ["--judge-url", f"http://127.0.0.1:{port}/v1", "--out", str(out)]
        assert train.main([*arguments, *healthbench]) == 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    rows = rollouts(out)
    assert [len(row["judge"]) for row in rows] == [2, 2]
    for row in rows:  # every call was answered ...
        assert all(isinstance(text, str) for texts in row["judge"] for text in texts)
        assert all(len(texts) == 3 for texts in row["judge"])
    # ... and what it means is not made up.
    unknown = [v is None for row in rows for verdicts in row["verdicts"] for v in verdicts]
    assert metrics(out)[0]["judge/unknown_rate"] == sum(unknown) / len(unknown)
