"""Whole runs whose rewards come from a judge: a real HTTP server on this machine, the real client, the tiny model."""

import json
import math
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import rubric_validity

import evaluate
import train
from rewards import Rewards, penalise_length
from rollout import Rollout

SMALL = "--model tiny --task healthbench --prompts-per-step 3 --group-size 3 --max-new-tokens 24 --eval-questions 2".split()
SMALL += ["--judge", "server", "--judge-model", "strict"]


class Judge(ThreadingHTTPServer):
    """Its verdict is a function of the prompt, so that mistaken identities would show; or it always says `answer`."""

    def __init__(self, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.calls, self.lock = answer, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.calls.append(prompt)
        text = self.server.answer or ("yes" if zlib.crc32(prompt.encode()) % 2 else "no")
        status = 200 if text != "refuse" else 404
        message = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "strict",
            "choices": [message],
        }
        data = json.dumps(
            reply if status == 200 else {"error": {"message": "no such model"}}
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    servers = []

    def make(answer=None):
        servers.append(Judge(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def data(tmp_path):
    rubric = [
        {"criterion": c, "points": p}
        for c, p in (("Is kind", 5), ("Is right", 10), ("Is rude", -4))
    ]
    rows = [
        {
            "prompt_id": f"q{n}",
            "prompt": [{"role": "user", "content": f"{n} + 1?"}],
            "rubrics": rubric,
        }
        for n in range(30)
    ]
    path = tmp_path / "health.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_judged_by_a_server_logs_every_verdict_and_pays_once(
    judge, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server, out = judge(), tmp_path / "run"
    arguments = [*SMALL, "--data", str(data), "--judge-url", server.url, "--reward", "physician"]
    assert train.main([*arguments, "--steps", "2", "--validate-every", "1", "--out", str(out)]) == 0
    rows = lines(out / "rollouts.jsonl")
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["rubric"] == ["Is kind", "Is right", "Is rude"]
        for verdicts, raw, reward in zip(
            row["verdicts"], row["judge"], row["rewards"], strict=True
        ):
            assert verdicts == [text == "yes" for text in raw]
            assert reward == pytest.approx(
                (5 * verdicts[0] + 10 * verdicts[1] - 4 * verdicts[2]) / 15
            )
    numbers = lines(out / "metrics.jsonl")
    assert all(row["judge/unknown_rate"] == 0 for row in numbers)
    assert all(row["validation/score"] is not None for row in numbers)
    assert any(row["loss"] != 0 for row in numbers)
    assert len(server.calls) == len(set(server.calls)) == len(lines(out / "judge.jsonl"))
    split = json.loads((out / "split.json").read_text())
    assert [len(split[part]) for part in ("train", "validation", "test")] == [25, 2, 2]
    assert all(
        b"sk-very-secret" not in path.read_bytes() for path in out.rglob("*") if path.is_file()
    )
    table = capsys.readouterr().out
    assert "| score |" in table
    assert "bootstrap over runs and questions" in table
    assert "no labels" not in table

    assert evaluate.main(["show", str(out), "1"]) == 0
    shown = capsys.readouterr().out
    assert "| Is right |" in shown
    assert f"{rows[-1]['rewards'][0]:.2f}" in shown
    assert evaluate.main(["show", str(out), "7"]) == 2
    assert evaluate.main(["show", str(tmp_path), "0"]) == 2


def test_the_best_adapter_is_kept_and_patience_ends_the_run(
    judge, data, tmp_path, capsys, monkeypatch
):
    scores = iter([0.2, 0.6, 0.1, 0.3, 0.9])
    monkeypatch.setattr(
        train,
        "physician_scores",
        lambda questions, *_: torch.full((len(questions), 1), next(scores)).double(),
    )
    out = tmp_path / "run"
    arguments = [
        *SMALL,
        "--data",
        str(data),
        "--judge-url",
        judge().url,
        "--reward",
        "physician",
        "--lr",
        "0.01",
    ]
    assert (
        train.main(
            [*arguments, *"--steps 9 --validate-every 1 --patience 2".split(), "--out", str(out)]
        )
        == 0
    )
    assert [row["validation/score"] for row in lines(out / "metrics.jsonl")] == pytest.approx(
        [0.2, 0.6, 0.1, 0.3]
    )
    assert "stopping early" in capsys.readouterr().out
    best = torch.load(out / "checkpoint" / "best.pt", weights_only=True)
    last = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert (best["step"], last["step"]) == (2, 4)
    assert (best["best_score"], last["best_score"], last["since_best"]) == (
        pytest.approx(0.6),
        best["best_score"],
        2,
    )
    from safetensors.torch import load_file

    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, weight in best["weights"].items():
        key = name.replace(".default", "")
        assert torch.equal(kept[key], weight)
        if "lora_B" in name and weight.any():
            assert not torch.equal(weight, last["weights"][name])


def test_too_many_unknown_verdicts_make_no_update(judge, data, tmp_path, capsys):
    server, out = judge("Well, it depends."), tmp_path / "run"
    arguments = [
        *SMALL,
        "--data",
        str(data),
        "--judge-url",
        server.url,
        "--reward",
        "judge",
        "--validate-every",
        "0",
    ]
    assert train.main([*arguments, "--steps", "1", "--out", str(out)]) == 0
    (numbers,) = lines(out / "metrics.jsonl")
    assert numbers["judge/unknown_rate"] == 1
    assert numbers["reward"] is None
    assert "100% of the verdicts are unknown" in capsys.readouterr().err
    weights = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["weights"]
    assert not any(
        value.any() for name, value in weights.items() if "lora_B" in name
    )  # B is still 0
    row = lines(out / "rollouts.jsonl")[0]
    assert row["rewards"] == [None] * 3
    assert row["judge"][0] == ["Well, it depends."]


def test_a_judge_that_talks_nonsense_ends_the_run(judge, data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        *SMALL,
        "--data",
        str(data),
        "--judge-url",
        judge("<think> Okay").url,
        "--reward",
        "physician",
    ]
    assert train.main([*arguments, "--validate-every", "0", "--steps", "9", "--out", str(out)]) == 1
    assert "could be read in 3 steps in a row" in capsys.readouterr().err
    assert len(lines(out / "metrics.jsonl")) == 3
    assert not (out / "judge.jsonl").exists()  # what could not be read is not kept for later


def test_a_judge_that_refuses_ends_the_run_with_a_sentence_and_another_goes_on(
    judge, data, tmp_path, capsys
):
    out = tmp_path / "run"
    arguments = [
        *SMALL,
        "--data",
        str(data),
        "--reward",
        "physician",
        "--validate-every",
        "0",
        "--steps",
        "1",
    ]
    assert train.main([*arguments, "--judge-url", judge("refuse").url, "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no such model" in error
    assert f"--resume --out {out}" in error
    assert train.main(["--resume", "--out", str(out), "--judge-url", judge().url]) == 0
    assert len(lines(out / "metrics.jsonl")) == 1


def test_the_anchor_can_be_the_judge_and_a_rubric_that_it_cannot_write_rewards_nobody(
    tmp_path, capsys
):
    """The tiny model writes no XML: every rubric is unparsable, no call is made, nothing is learnt, and it is logged."""
    data = tmp_path / "open.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(1234, 1239))
    )
    arguments = "--task jsonl --model tiny --reward rubric --judge anchor --steps 1 --prompts-per-step 2 --group-size 2"
    arguments = [*arguments.split(), "--max-new-tokens", "24", "--beta", "0", "--data", str(data)]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    (numbers,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert (numbers["rubric/unparsable"], numbers["rubric/criteria"]) == (1, 0)
    assert numbers["frac_reward_zero_std"] == 1
    assert numbers["grad_norm"] == 0
    assert "boxed" not in lines(tmp_path / "run" / "rollouts.jsonl")[0]["question"][0]["content"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--judge server", "--judge-model"),
        ("--reward physician", "only --task healthbench has"),
        ("--task healthbench --reward match", "HealthBench has none"),
        ("--reward rubric --aggregator majority", "counts boxed answers"),
        ("--length-limit 0", "1 up"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, sentence, capsys):
    try:
        status = train.main(["--model", "tiny", *arguments.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_questions_without_labels_cannot_validate(tmp_path, capsys):
    open_ended = tmp_path / "open.jsonl"
    open_ended.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(30)))
    arguments = [
        "--task",
        "jsonl",
        "--model",
        "tiny",
        "--data",
        str(open_ended),
        "--reward",
        "judge",
        "--split",
        "held-out",
    ]
    assert train.main([*arguments, "--validate-every", "1", "--out", str(tmp_path / "run")]) == 2
    assert "reads labels" in capsys.readouterr().err


def test_too_few_questions_to_validate_on_are_refused(data, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(data.read_text().split("\n")[:6]))
    arguments = [
        *SMALL,
        "--data",
        str(few),
        "--validate-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(arguments) == 2
    assert "--validate-every 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- numbers


def test_long_rollouts_lose_one_and_a_missing_reward_stays_missing():
    group = [Rollout("", [1] * n, [0.0] * n, "stop", [1]) for n in (750, 751, 900)]
    rewards = Rewards(torch.tensor([[0.5, 0.5, math.nan]]))
    penalise_length(rewards, [group], None)
    assert rewards.values[0, :2].tolist() == [0.5, 0.5]
    penalise_length(rewards, [group], 750)
    assert rewards.values[0, :2].tolist() == [0.5, -0.5]
    assert rewards.values[0, 2].isnan()


def test_the_correlations_are_scipys_and_within_questions_is_not_overall():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(40, 1))  # a reward that only knows which questions are hard
    truth, blind = hard + 0.3 * rng.normal(size=(40, 6)), hard + 0.3 * rng.normal(size=(40, 6))
    found = rubric_validity.agreement(blind, truth, draws=200)
    for name, coefficient in (
        ("Pearson", scipy.stats.pearsonr),
        ("Spearman", scipy.stats.spearmanr),
    ):
        estimate, low, high, used = found["overall", name]
        assert estimate == pytest.approx(coefficient(blind.ravel(), truth.ravel()).statistic)
        assert 0.7 < low < estimate < high <= 1
        estimate, low, high, used = found["within", name]
        assert estimate == pytest.approx(
            np.mean([coefficient(a, b).statistic for a, b in zip(blind, truth, strict=True)])
        )
        assert low < estimate < high < 0.5
        assert used == 40
    same = rubric_validity.agreement(truth, truth, draws=50)
    assert all(estimate == pytest.approx(1) for estimate, *_ in same.values())
    # A reward that is constant in a question teaches nothing there: 0. A constant truth says nothing. NaN is no score.
    blind[0], truth[1], truth[2, 2:] = 0.5, 0.5, np.nan
    found = rubric_validity.agreement(blind, truth, draws=50)
    pairs = [*zip(blind[3:], truth[3:], strict=True), (blind[2, :2], truth[2, :2])]
    expected = sum(scipy.stats.kendalltau(a, b).statistic for a, b in pairs) / 39
    assert found["within", "Kendall"][0] == pytest.approx(expected)
    assert found["within", "Kendall"][3] == 39
    assert math.isnan(
        rubric_validity.agreement(np.ones((3, 4)), truth[:3, :4], draws=20)["overall", "Kendall"][0]
    )


def test_rubric_validity_scores_the_same_responses_in_every_way(judge, data, tmp_path, capsys):
    out = tmp_path / "validity"
    arguments = [*SMALL, "--data", str(data), "--judge-url", judge().url, "--out", str(out)]
    arguments = [
        a
        for n, a in enumerate(arguments)
        if "--prompts-per-step" not in arguments[max(0, n - 1) : n + 1]
    ]
    assert rubric_validity.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| rubric | overall |" in table
    assert "| judge | within |" in table
    rewards = json.loads((out / "validity.json").read_text())["rewards"]
    assert set(rewards) == {"physician", "rubric", "rubric-question", "judge"}
    for values, detail in zip(
        rewards["physician"]["values"], rewards["physician"]["details"], strict=True
    ):
        for value, verdicts in zip(values, detail["verdicts"], strict=True):
            assert value == pytest.approx(
                (5 * verdicts[0] + 10 * verdicts[1] - 4 * verdicts[2]) / 15
            )
    assert [len(row) for row in rewards["judge"]["values"]] == [3, 3]
    assert (
        rubric_validity.main(
            ["--model", "tiny", "--eval-questions", "2", "--out", str(tmp_path / "x")]
        )
        == 2
    )
    assert "--task healthbench" in capsys.readouterr().err
