"""CaT-SFT: only the anchor is asked, its references are imitated, and no label is read."""

import json
import statistics
from functools import partial

import pytest
import torch

import grpo
import train
from plumbing import progress
from plumbing.logprobs import token_logprobs
from plumbing.settings import config, settle
from recipes import cat_sft
from run_helpers import SMALL, adapter, metrics, results_of, same, settings_in
from synthesize import AGGREGATORS
from tasks import load_sums, without_labels


def sft(*arguments):
    return train.main([*map(str, arguments)], cat_sft.METHOD)


def test_sft_asks_only_the_anchor_and_imitates_its_references(engine, policy, monkeypatch):
    """Rollouts and references come from pi_0, and the gradient is that of cross-entropy on whole
    references.
    """
    model, who, targets = policy[0], [], []
    sample = engine.sample

    def asked(*given, policy=True, **options):
        who.append(policy)
        return sample(*given, policy=policy, **options)

    monkeypatch.setattr(engine, "sample", asked)
    # with plain SGD and a norm below the clip, the step of the weights IS the gradient
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", 1e9)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    given = {"engine": "transformers", "group_size": 4, "max_new_tokens": 48}
    cfg = config(settle(given, method="sft")[1])
    sgd = torch.optim.SGD(trainable.values(), lr=1.0)
    real = partial(cat_sft.METHOD.update, model, sgd, cfg=cfg.grpo, logprobs=token_logprobs)

    def update(groups, R):
        targets.extend(o for group in groups for o in group)
        return real(groups, R)

    questions = without_labels(load_sums(None)[0][:6])
    aggregate = AGGREGATORS["synthesis"]
    made = cat_sft.METHOD.take_step(cfg, 0, questions, engine, aggregate, None, update)
    assert who == [False, False]
    finished = [s for s in made.references if s.finish_reason == "stop" and "boxed" in s.text]
    assert len(finished) > 0
    assert [o.ids for o in targets] == [s.ids for s in finished]
    step = {name: before[name] - p.detach() for name, p in trainable.items()}

    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(before[name])
    loss, tokens = 0.0, sum(len(o.ids) for o in targets)
    for o in targets:
        logits = model(input_ids=torch.tensor([o.prompt_ids + o.ids])).logits
        logits = logits[0, len(o.prompt_ids) - 1 : -1].double()  # (|s|, V)
        entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(o.ids), reduction="sum")
        loss = loss + entropy / tokens
    loss.backward()
    assert made.numbers["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, p in trainable.items():
        torch.testing.assert_close(step[name], p.grad, rtol=1e-3, atol=1e-5)


def test_references_that_are_cut_off_or_unanswered_are_not_imitated(engine):
    """They are logged, and nobody learns from them: with 20 tokens none comes to its end."""
    given = {"engine": "transformers", "group_size": 2, "max_new_tokens": 20}
    cfg = config(settle(given, method="sft")[1])
    questions = load_sums(None)[0][:3]
    where = (cfg, 0, questions, engine, AGGREGATORS["synthesis"])
    groups, references, targets = cat_sft.references_of(*where)
    assert (len(groups), len(references)) == (3, 3)
    assert all(s.finish_reason == "length" for s in references)
    assert targets == []


def test_sft_validates_without_labels_and_stops_early(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 2)
    unlabelled, out = tmp_path / "sums.jsonl", tmp_path / "stops"
    asked = (json.dumps({"prompt": f"What is {n} + 4321?"}) for n in range(1000, 1040))
    unlabelled.write_text("\n".join(asked))
    arguments = "--task jsonl --model tiny --lr 1 --validate-every 1 --steps 9".split()
    assert sft(*SMALL, "--data", unlabelled, *arguments, "--out", out) == 0
    scores = [row["validation/score"] for row in metrics(out)]
    assert len(scores) < 9
    assert max(scores[-2:]) <= max(scores[:-2])
    assert all(score < 0 for score in scores)
    assert "stopping early" in capsys.readouterr().out


def test_sft_teaches(tmp_path):
    out = tmp_path / "teaches"
    arguments = "--steps 12 --lr 2e-3 --prompts-per-step 8 --max-new-tokens 64"
    more = "--eval-questions 100 --validate-every 0"
    assert sft(*arguments.split(), *more.split(), "--out", out) == 0
    before, after = results_of(out, "initial"), results_of(out, "trained")
    assert statistics.mean(after) > statistics.mean(before) + 0.1
    assert metrics(out)[-1]["reward"] is None
    assert settings_in(out)["method"] == "sft"


def test_an_early_stop_stays_stopped_when_the_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 1)
    out = tmp_path / "run"
    assert sft(*SMALL, *"--lr 1 --validate-every 1 --steps 9".split(), "--out", out) == 0
    steps, best = len(metrics(out)), adapter(out)
    assert steps < 9
    assert sft("--resume", "--out", out) == 0
    assert len(metrics(out)) == steps
    assert same(adapter(out), best)


def test_each_program_resumes_its_own_runs_alone(tmp_path, capsys):
    ours, theirs = tmp_path / "sft", tmp_path / "cat"
    assert sft(*SMALL, "--steps", 1, "--out", ours) == 0
    assert train.main([*SMALL, "--steps", "1", "--out", str(theirs)]) == 0
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(ours)]) == 2
    error = capsys.readouterr().err
    assert "was started by recipes/cat_sft.py: resume it with that program" in error
    assert sft("--resume", "--out", theirs) == 2
    assert "was started by train.py" in capsys.readouterr().err
