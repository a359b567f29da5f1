"""Whole runs rewarded by a judge: a real HTTP server here, the real client, the tiny model."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import plumbing.progress
import train
from judged_runs_helpers import SMALL, health_rows, judges, points
from run_helpers import lines


@pytest.fixture
def judge():
    yield from judges()


@pytest.fixture
def data(tmp_path):
    return health_rows(tmp_path / "health.jsonl")


def flags(data, server, reward, more):
    """Of a run of SMALL on `data`, judged by `server`."""
    where = ["--data", str(data), "--judge-url", server.url, "--reward", reward]
    return [*SMALL, *where, *more.split()]


def test_a_run_judged_by_a_server_logs_every_verdict_and_pays_once(
    judge, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server, out = judge(), tmp_path / "run"
    arguments = flags(data, server, "physician", "--steps 2 --validate-every 1")
    assert train.main([*arguments, "--out", str(out)]) == 0
    rows = lines(out / "rollouts.jsonl")
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["rubric"] == ["Is kind", "Is right", "Is rude"]
        judged = zip(row["verdicts"], row["judge"], row["rewards"], strict=True)
        for verdicts, raw, reward in judged:
            assert verdicts == [text == "yes" for text in raw]
            assert reward == pytest.approx(points(verdicts))
    numbers = lines(out / "metrics.jsonl")
    assert all(row["judge/unknown_rate"] == 0 for row in numbers)
    assert all(row["validation/score"] is not None for row in numbers)
    assert any(row["loss"] != 0 for row in numbers)
    assert len(server.calls) == len(set(server.calls)) == len(lines(out / "judge.jsonl"))
    split = json.loads((out / "split.json").read_text())
    assert [len(split[part]) for part in ("train", "validation", "test")] == [25, 2, 2]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert all(b"sk-very-secret" not in path.read_bytes() for path in files)
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
    # 0.9 would be the fifth validation, and is what the final table gets.
    scores = itertools.chain([0.2, 0.6, 0.1, 0.3], itertools.repeat(0.9))

    def score(questions, answers, judge):
        return torch.full((len(questions), 1), next(scores)).double()

    monkeypatch.setattr(evaluate, "physician_scores", score)
    monkeypatch.setattr(plumbing.progress, "PATIENCE", 2)
    out = tmp_path / "run"
    more = "--lr 0.01 --steps 9 --validate-every 1"
    assert train.main([*flags(data, judge(), "physician", more), "--out", str(out)]) == 0
    found = [row["validation/score"] for row in lines(out / "metrics.jsonl")]
    assert found == pytest.approx([0.2, 0.6, 0.1, 0.3])
    assert "stopping early" in capsys.readouterr().out
    best = torch.load(out / "checkpoint" / "best.pt", weights_only=True)
    last = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert (best["step"], last["step"]) == (2, 4)
    assert best["best_score"] == pytest.approx(0.6)
    assert (last["best_score"], last["since_best"]) == (best["best_score"], 2)
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, weight in best["weights"].items():
        assert torch.equal(kept[name.replace(".default", "")], weight)
        if "lora_B" in name and weight.any():
            assert not torch.equal(weight, last["weights"][name])


def test_too_many_unknown_verdicts_make_no_update(judge, data, tmp_path, capsys):
    server, out = judge("Well, it depends."), tmp_path / "run"
    arguments = flags(data, server, "judge", "--validate-every 0 --steps 1")
    assert train.main([*arguments, "--out", str(out)]) == 0
    (numbers,) = lines(out / "metrics.jsonl")
    assert numbers["judge/unknown_rate"] == 1
    assert numbers["reward"] is None
    # Not even the KL acts: no rollout went through the trainer.
    assert numbers["nll"] is numbers["kl"] is None
    assert numbers["grad_norm"] == 0
    assert "100% of the verdicts are unknown" in capsys.readouterr().err
    weights = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["weights"]
    changed = [name for name, value in weights.items() if "lora_B" in name and value.any()]
    assert not changed  # B is still 0
    row = lines(out / "rollouts.jsonl")[0]
    assert row["rewards"] == [None] * 3
    assert row["judge"][0] == ["Well, it depends."]


@pytest.mark.parametrize(("unknown", "updated"), [(1, True), (2, False)])
def test_a_step_learns_from_what_is_known_if_that_is_enough(
    judge, data, tmp_path, monkeypatch, unknown, updated
):
    """9 verdicts of a step, one for each rollout: 1 of them unknown is 11%, 2 are 22%.

    A question with a rollout of unknown reward teaches nothing; the others do, or none does.
    """

    class Forgetful(Judged):
        def answers(self):
            return itertools.chain(["?"] * unknown, itertools.cycle(["yes", "no"]))

    monkeypatch.setattr("plumbing.engines.server_judge", Forgetful())
    out = tmp_path / "run"
    arguments = flags(data, judge(), "judge", "--validate-every 0 --steps 1 --beta 0")
    assert train.main([*arguments, "--out", str(out)]) == 0
    (numbers,) = lines(out / "metrics.jsonl")
    assert numbers["judge/unknown_rate"] == pytest.approx(unknown / 9)
    rows = [row["rewards"] for row in lines(out / "rollouts.jsonl")]
    assert rows[1] == ([1.0, 0.0, 1.0] if updated else [None] * 3)
    weights = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["weights"]
    assert updated == any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert (numbers["reward"] is not None) == updated


class Judged:
    """In the place of server_judge: what it makes says `answers()` in turn, whatever is asked."""

    def __call__(self, url, model, cache, max_tokens):
        answers = self.answers()
        return lambda calls: [next(answers) for _ in calls]


def test_a_judge_that_talks_nonsense_ends_the_run(judge, data, tmp_path, capsys):
    out = tmp_path / "run"
    more = "--validate-every 0 --steps 9"
    arguments = flags(data, judge("<think> Okay"), "physician", more)
    assert train.main([*arguments, "--out", str(out)]) == 1
    assert "could be read in 3 steps in a row" in capsys.readouterr().err
    assert len(lines(out / "metrics.jsonl")) == 3
    assert not (out / "judge.jsonl").exists()  # what could not be read is not kept for later


def test_a_judge_that_refuses_ends_the_run_with_a_sentence_and_another_goes_on(
    judge, data, tmp_path, capsys
):
    out = tmp_path / "run"  # the server answers the first question, and no other
    arguments = flags(data, judge("refuse"), "physician", "--validate-every 0 --steps 1")
    assert train.main([*arguments, "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no such model" in error
    assert f"--resume --out {out}" in error
    assert train.main(["--resume", "--out", str(out), "--judge-url", judge().url]) == 0
    assert len(lines(out / "metrics.jsonl")) == 1


def test_the_anchor_can_be_the_judge_and_a_rubric_that_it_cannot_write_rewards_nobody(tmp_path):
    """The tiny model writes no XML, so every rubric is unparsable.

    No call is made, nothing is learnt, and it is logged.
    """
    data, out = tmp_path / "open.jsonl", tmp_path / "run"
    prompts = [{"prompt": f"What is {n} + 1?"} for n in range(1234, 1239)]
    data.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = "--task jsonl --model tiny --reward rubric --steps 1 --prompts-per-step 2".split()
    arguments += "--group-size 2 --max-new-tokens 24 --beta 0".split()
    assert train.main([*arguments, "--data", str(data), "--out", str(out)]) == 0
    (numbers,) = lines(out / "metrics.jsonl")
    assert (numbers["rubric/unparsable"], numbers["rubric/criteria"]) == (1, 0)
    assert numbers["frac_reward_zero_std"] == 1
    assert numbers["grad_norm"] == 0
    assert "boxed" not in lines(out / "rollouts.jsonl")[0]["question"][0]["content"]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--judge server", "--judge-model"),  # gone: the model's name says it
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
    arguments = "--task jsonl --model tiny --reward judge --split held-out --validate-every 1"
    where = ["--data", str(open_ended), "--out", str(tmp_path / "run")]
    assert train.main([*arguments.split(), *where]) == 2
    assert "reads labels" in capsys.readouterr().err


def test_too_few_questions_to_validate_on_are_refused(judge, tmp_path, capsys):
    few = health_rows(tmp_path / "few.jsonl", 6)
    where = ["--data", str(few), "--out", str(tmp_path / "run"), "--judge-url", judge().url]
    assert train.main([*SMALL, "--validate-every", "1", *where]) == 2
    assert "--validate-every 0" in capsys.readouterr().err
