"""The real vLLM on a CPU against transformers: the same tiny model, the same adapter, in float32."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed (the README says how to test it without a GPU)"
)

import vllm

import train
from conftest import truncated
from grpo import token_logprobs
from rollout import TransformersEngine, VLLMEngine
from settings import installed_engine, vllm_options
from synthesize import synthesis_messages
from tasks import TINY_MODEL, InputError, add_lora, load_base, load_sums
from test_ranks import ROOT, run

QUESTIONS = load_sums(None)[1]
PROMPTS = [q.messages for q in QUESTIONS[:8]]
# Longer than two blocks of the prefix cache, so that stale or foreign blocks would be used.
LONG = synthesis_messages(
    ["ones: 1+2=3\ntens: 4+5=9\nhundreds: 0+0=0\nthousands: 1+1=2\n\\boxed{2093}"] * 8
)
MEMORY = {"kv_cache_memory_bytes": 1 << 28}
SMALL = ["--engine", "vllm", "--engine-args", json.dumps(MEMORY)]
SMALL += "--prompts-per-step 4 --group-size 4 --eval-questions 6 --max-new-tokens 48".split()
TOLERANCE = 0.05  # nats a token is the bound for bf16; float32 is held to a hundredth of it


def shift(model, seed, scale=0.02):
    """Give the adapter new weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module")
def engines():
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=16, seed=0)
    shift(model, 1)
    return VLLMEngine(model, tokenizer, vllm_options(model, MEMORY)), TransformersEngine(
        model, tokenizer
    )


@pytest.fixture(autouse=True)
def same_adapter(engines, request):
    """Every test starts with the same weights in both engines, whatever the one before left."""
    shift(engines[0].model, 1)
    engines[0].sync()


def texts(groups):
    return [[o.text for o in group] for group in groups]


def worst_difference(ours, theirs):
    return max(
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("policy", [True, False])
def test_greedy_text_equals_transformers(engines, policy):
    vllm, reference = (
        texts(e.sample(PROMPTS, 2, policy=policy, temperature=0, max_new_tokens=48))
        for e in engines
    )
    assert vllm == reference
    assert vllm[0][0] == vllm[0][1]


def test_the_adapter_changes_what_the_policy_says_and_not_what_the_anchor_says(engines):
    """Policy and anchor are asked in turns, so that one's cached prefixes could leak into the other's."""
    shift(engines[0].model, 7, scale=0.2)
    engines[0].sync()
    long = [LONG] * 2
    for _ in range(2):
        for policy in (True, False):
            o = engines[0].sample(long, 1, policy=policy, temperature=0, max_new_tokens=20)
            expected = engines[1].score(long, [group[0].ids for group in o], policy=policy)
            assert worst_difference([group[0].logprobs for group in o], expected) < TOLERANCE / 100
    a, b = (
        engines[0].sample(PROMPTS, 1, policy=p, temperature=0, max_new_tokens=20)
        for p in (True, False)
    )
    assert texts(a) != texts(b)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollouts_carry_ids_and_the_logprobs_that_the_trainer_computes(engines, temperature):
    groups = engines[0].sample(PROMPTS, 3, temperature=temperature, max_new_tokens=60, seed=2)
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    reasons = set()
    for group, messages in zip(groups, PROMPTS, strict=True):
        for o in group:
            assert o.prompt_ids == engines[1].encode(messages)
            assert all(type(i) is int for i in o.ids)
            assert o.finish_reason == ("stop" if o.ids[-1] in engines[0].stop_ids else "length")
            assert not any(i in engines[0].stop_ids for i in o.ids[:-1])
            assert o.text == engines[0].tokenizer.decode(o.ids, skip_special_tokens=True)
            reasons.add(o.finish_reason)
            with torch.no_grad():
                expected, _, _ = token_logprobs(
                    engines[0].model, [o.prompt_ids], [o.ids], temperature=temperature
                )
            assert worst_difference([o.logprobs], expected.tolist()) < TOLERANCE / 100
    assert len({tuple(o.ids) for group in groups for o in group}) > len(PROMPTS)
    cut = engines[0].sample(PROMPTS[:1], 1, max_new_tokens=3)[0][0]
    assert (cut.finish_reason, len(cut.ids)) == ("length", 3)
    assert "stop" in reasons


def test_first_tokens_follow_the_models_distribution(engines):
    n, group = 1000, engines[0].sample(PROMPTS[:1], 1000, max_new_tokens=1, seed=1)[0]
    with torch.no_grad():
        logits = engines[0].model(input_ids=torch.tensor([group[0].prompt_ids])).logits[0, -1]
    probabilities = torch.softmax(logits.double(), -1)
    counts = torch.bincount(
        torch.tensor([o.ids[0] for o in group]), minlength=len(probabilities)
    ).double()
    z = (counts - n * probabilities) / (n * probabilities * (1 - probabilities)).sqrt().clamp(min=1)
    assert z.abs().max() < 5


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (4, 0.9)])
def test_evaluation_samples_come_from_the_truncated_distribution(engines, top_k, top_p):
    """Temperature, then top-k, then top-p; the log-probabilities are of what is left, as the transformers engine's."""
    sizes = []
    for o in engines[0].sample(
        PROMPTS[:1], 20, temperature=2.0, top_k=top_k, top_p=top_p, max_new_tokens=12, seed=3
    )[0]:
        with torch.no_grad():
            logits = (
                engines[0].model(input_ids=torch.tensor([o.prompt_ids + o.ids])).logits[0].double()
            )
        for token, logprob, row in zip(
            o.ids, o.logprobs, logits[len(o.prompt_ids) - 1 : -1], strict=True
        ):
            left = truncated(row, 2.0, top_k, top_p)
            assert math.exp(logprob) == pytest.approx(left[token], rel=1e-3)
            sizes.append(len(left))
    assert 1 < max(sizes) < 100


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(engines):
    first, again, other = (
        texts(engines[0].sample(PROMPTS, 2, max_new_tokens=20, seed=s)) for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("policy", [True, False])
def test_score_equals_transformers(engines, policy):
    completions = [
        o.ids for group in engines[0].sample(PROMPTS, 1, max_new_tokens=30, seed=4) for o in group
    ]
    completions[0] = engines[0].tokenizer.encode(
        "ones: 9+9=3", add_special_tokens=False
    )  # unlikely tokens too
    vllm, reference = (e.score(PROMPTS, completions, policy=policy) for e in engines)
    assert [len(s) for s in vllm] == [len(c) for c in completions]
    assert worst_difference(vllm, reference) < TOLERANCE / 100


def test_fifty_swaps_leave_one_adapter_and_always_the_newest(engines):
    vllm, reference = engines
    assert len(vllm.encode(LONG)) > 2 * 128
    completion = vllm.tokenizer.encode("tens: 9+9=3", add_special_tokens=False)
    seen = set()
    for swap in range(50):
        shift(vllm.model, 100 + swap, scale=0.05)
        vllm.sync()
        assert len(vllm.llm.llm_engine.list_loras()) == 1
        # Sampling goes through the prefix cache; hot, so that no token is certain, whatever the weights.
        o = vllm.sample([LONG], 1, temperature=2.0, max_new_tokens=6, seed=swap)[0][0]
        with torch.no_grad():
            expected, _, _ = token_logprobs(vllm.model, [o.prompt_ids], [o.ids], temperature=2.0)
        assert worst_difference([o.logprobs], expected.tolist()) < TOLERANCE / 100, swap
        assert (
            worst_difference(
                vllm.score([LONG], [completion]), reference.score([LONG], [completion])
            )
            < TOLERANCE / 100
        )
        seen.add(round(float(expected.sum()), 3))
    assert len(seen) > 30  # the weights did change


def test_choices_are_the_only_answers(engines):
    group = engines[0].sample(PROMPTS[:1], 20, max_new_tokens=8, seed=1, choices=("yes", "no"))[0]
    assert {o.text for o in group} == {"yes", "no"}


def test_a_prompt_that_does_not_fit_is_refused(engines):
    with pytest.raises(InputError, match="do not fit"):
        engines[0].sample(PROMPTS[:1], 1, max_new_tokens=engines[0].context)


# ------------------------------------------------------------------------------------------------- whole runs


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_auto_takes_the_engine_that_is_installed_for_this_device():
    assert installed_engine()[0] == "vllm"


def test_a_run_with_vllm_trains_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    assert train.main(["--resume", "--steps", "3", "--out", str(out)]) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # Of the resumed step too: its engine has to start from the checkpoint's adapter, not from a new one.
    assert all(row["sampling/logp_difference_max"] < 1e-3 for row in rows)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["engine"] == "vllm"
    assert config["versions"]["vllm"] == vllm.__version__
    captured = capsys.readouterr()
    assert "rollouts by vllm" in captured.out
    assert "| trained: CaT |" in captured.out
    assert "WARNING: step" not in captured.err


def test_two_ranks_have_an_engine_each_and_train_one_policy(tmp_path, monkeypatch):
    """Under torchrun the trainers' process group is there before vLLM makes its own."""
    out = tmp_path / "run"
    printed, err = run(
        2, *SMALL, "--steps", "3", "--eval-questions", "1", "--out", out
    )  # one question: a rank asks nothing
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # The largest over both ranks' shares of the tokens: each engine has the adapter that both trainers have made.
    assert all(row["sampling/logp_difference_max"] < 1e-3 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert [len(row["rollouts"]) for row in rollouts(out)] == [4] * 12
    assert printed.count("| trained: CaT |") == 1
    assert "WARNING: step" not in err
    assert "Traceback" not in err  # at exit, when both take down their process groups


SPLIT = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
if __name__ == "__main__":  # its workers import this file
    from test_vllm import MEMORY, PROMPTS, TINY_MODEL, VLLMEngine, add_lora, load_base, shift, vllm_options
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=16, seed=0)
    shift(model, 1)
    engine = VLLMEngine(model, tokenizer, vllm_options(model, MEMORY | {{"tensor_parallel_size": 2}}))
    drawn = [engine.sample(PROMPTS, 2, max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    drawn = [[[(o.ids, o.logprobs) for o in group] for group in groups] for groups in drawn]
    greedy = [[o.ids for o in g] for g in engine.sample(PROMPTS, 1, temperature=0, max_new_tokens=48)]
    open(sys.argv[1], "w").write(json.dumps([drawn, greedy, engine.llm.llm_engine.vllm_config.parallel_config.world_size]))
"""


def test_an_engine_split_over_two_devices_gives_the_same_and_obeys_seeds(engines, tmp_path):
    """--engine-args reaches vLLM as it is. The workers are processes of their own, which a seed has to reach."""
    script = tmp_path / "split.py"
    script.write_text(SPLIT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    subprocess.run([sys.executable, script, tmp_path / "out.json"], check=True, timeout=400)
    (first, again, other), greedy, devices = json.loads((tmp_path / "out.json").read_text())
    assert devices == 2
    assert first == again != other
    assert greedy == [
        [o.ids for o in g] for g in engines[1].sample(PROMPTS, 1, temperature=0, max_new_tokens=48)
    ]
    for group, messages in zip(first, PROMPTS, strict=True):
        for ids, logprobs in group:
            with torch.no_grad():
                expected, _, _ = token_logprobs(
                    engines[1].model, [engines[1].encode(messages)], [ids], temperature=1.0
                )
            assert worst_difference([logprobs], expected.tolist()) < TOLERANCE / 100


def test_a_sync_that_does_nothing_is_warned_of(tmp_path, capsys, monkeypatch):
    """The engine goes on with the first adapter while the trainer's moves: the difference is logged and the run says so."""
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
    ("arguments", "sentence"),
    [
        ('--engine-args {"nonsense":1}', "nonsense"),
        ('--engine-args {"max_lora_rank":8}', "rank"),
        ('--engine-args {"kv_cache_memory_bytes":1000000000000000}', "memory"),
        ("--sleep", "no GPU"),
    ],
)
def test_an_engine_that_cannot_start_says_what_to_change(arguments, sentence, tmp_path, capsys):
    assert train.main([*SMALL, *arguments.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ")
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_model_that_vllm_does_not_know_is_refused(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer = load_base(str(TINY_MODEL))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        *SMALL,
        "--group-size",
        "2",
        "--max-new-tokens",
        "20",
        "--model",
        str(tmp_path / "model"),
    ]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "--engine transformers" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- judges


@pytest.fixture
def healthbench(tmp_path):
    rubric = [
        {"criterion": c, "points": p}
        for c, p in (("Is kind", 5), ("Is right", 10), ("Is rude", -4))
    ]
    asked = [[{"role": "user", "content": f"What is {n} + 1?"}] for n in range(1000, 1006)]
    rows = [
        {"prompt_id": f"q{n}", "prompt": prompt, "rubrics": rubric}
        for n, prompt in enumerate(asked)
    ]
    path = tmp_path / "health.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return [
        "--task",
        "healthbench",
        "--model",
        "tiny",
        "--data",
        str(path),
        "--validate-every",
        "0",
        "--steps",
        "1",
    ]


def rollouts(out):
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def test_the_anchor_judges_in_the_same_engine_and_is_held_to_yes_and_no(healthbench, tmp_path):
    out = tmp_path / "run"
    assert (
        train.main(
            [*SMALL, *healthbench, "--reward", "physician", "--judge", "anchor", "--out", str(out)]
        )
        == 0
    )
    assert {text for row in rollouts(out) for texts in row["judge"] for text in texts} <= {
        "yes",
        "no",
    }
    assert metrics(out)[0]["judge/unknown_rate"] == 0


def test_a_step_judged_by_vllm_serve(healthbench, tmp_path):
    """The real server and the real client. The tiny model's verdicts are nonsense, and the run must say so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; the command itself does not find its own version in the build for CPUs.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(TINY_MODEL),
    ]
    command += ["--served-model-name", "judge"]
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
        arguments = "--engine transformers --prompts-per-step 2 --group-size 2 --eval-questions 1 --max-new-tokens 24".split()
        arguments += [
            "--judge",
            "server",
            "--judge-url",
            f"http://127.0.0.1:{port}/v1",
            "--judge-model",
            "judge",
        ]
        assert (
            train.main([*arguments, *healthbench, "--reward", "physician", "--out", str(out)]) == 0
        )
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    rows = rollouts(out)
    assert [len(row["judge"]) for row in rows] == [2, 2]
    for row in rows:
        assert all(
            isinstance(text, str) for texts in row["judge"] for text in texts
        )  # every call was answered ...
        assert all(len(texts) == 3 for texts in row["judge"])
    unknown = [v is None for row in rows for verdicts in row["verdicts"] for v in verdicts]
    assert metrics(out)[0]["judge/unknown_rate"] == sum(unknown) / len(
        unknown
    )  # ... and what it means is not made up
