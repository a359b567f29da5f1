"""What a run is: what it writes, that it can be computed again, and that it never reads labels."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import grpo
import train
from plumbing.answers import boxed_answer, equal
from plumbing.draws import batch_of
from plumbing.models import TINY_MODEL, load_base
from plumbing.settings import DEFAULTS
from run_helpers import ROOT, SMALL, adapter, lines, metrics, results_of, same, settings_in
from tasks import TASKS, load_sums


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*SMALL, "--steps", "6", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_everything_that_a_reader_needs(straight):
    config = json.loads((straight / "config.json").read_text())
    known = {*DEFAULTS, *TASKS["sums"].settings, "method", "eval_sampling"}
    assert set(config["settings"]) == known
    assert config["settings"]["steps"] == 6
    assert set(config["versions"]) == {"torch", "transformers", "peft", "math-verify"}
    on_a_cpu = config["device"].startswith("CPU, ")
    assert on_a_cpu == (not torch.cuda.is_available())  # else the GPU's name
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
    rows = lines(straight / "rollouts.jsonl")
    for row in rows:
        target = boxed_answer(row["reference"])
        agree = [float(equal(boxed_answer(text), target)) for text in row["rollouts"]]
        assert row["rewards"] == agree
    for step, logged in enumerate(metrics(straight)):
        rewards = [r for row in rows if row["step"] == step for r in row["rewards"]]
        assert logged["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_the_docs_define_every_metric(straight):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in lines(straight / "metrics.jsonl")[0]:
        assert f"\n| `{name}` | " in page, name


def test_the_times_of_the_four_phases_add_up_to_the_steps(straight):
    for row in lines(straight / "metrics.jsonl"):
        phases = {name: t for name, t in row.items() if name.startswith("time/")}
        names = {"time/rollouts", "time/references", "time/rewards", "time/update"}
        assert phases.keys() == names
        assert all(t > 0 for t in phases.values())
        assert sum(phases.values()) == pytest.approx(row["step_time"], rel=0.01)


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
    for name, seed in (("again", "0"), ("other", "1")):
        arguments = ["--steps", "2", "--seed", seed, "--out", str(tmp_path / name)]
        assert train.main([*SMALL, *arguments]) == 0
    assert metrics(tmp_path / "again") == metrics(straight)[:2]
    assert metrics(tmp_path / "other") != metrics(straight)[:2]


def test_training_never_reads_labels(straight, tmp_path, monkeypatch):
    """Take the answers away, or deal them out at random: the weights are the same, bit for bit."""
    questions, test = load_sums(None)
    answers = [q.answer for q in questions]
    random.Random(0).shuffle(answers)
    dealt = [replace(q, answer=a) for q, a in zip(questions, answers, strict=True)]
    unlabelled = [[replace(q, answer=None) for q in part] for part in (questions, test)]
    for name, world in {"removed": unlabelled, "shuffled": (dealt, test)}.items():
        task = replace(TASKS["sums"], load=lambda data, boxed, world=world: world)
        monkeypatch.setitem(TASKS, "sums", task)
        assert train.main([*SMALL, "--steps", "6", "--out", str(tmp_path / name)]) == 0
        assert same(adapter(tmp_path / name), adapter(straight)), name
    assert metrics(straight)[0]["accuracy/rollouts"] > 0.1
    assert metrics(tmp_path / "removed")[0]["accuracy/rollouts"] is None
    assert metrics(tmp_path / "shuffled")[0]["accuracy/rollouts"] == 0
    # there was something to learn from
    assert sum(row["reward_std"] for row in metrics(straight)) > 0


def test_the_questions_of_a_step_have_no_labels_to_read(tmp_path):
    seen = []

    def spy(cfg, step, questions, *others):
        seen.extend(questions)
        return train.cat_step(cfg, step, questions, *others)

    arguments = [*SMALL, "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main(arguments, train.Method(take_step=spy)) == 0
    assert len(seen) == 2 * 4
    assert all(q.answer is None and q.rubric is None for q in seen)
    labelled = batch_of(load_sums(None)[0], 4, 0, seed=0)
    assert [q.messages for q in seen[:4]] == [q.messages for q in labelled]


def masked(*given, cfg, **more):
    """The update of a run whose GRPOConfig leaves out rollouts that were cut off."""
    return grpo.update(*given, cfg=replace(cfg, mask_truncated=True), **more)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ("--aggregator majority --kl reward --beta 0.01", train.Method()),
        ("--aggregator single --loss sequence --beta 0", train.Method()),
        (
            "--updates-per-step 2 --temperature 0.8 --max-new-tokens 20 --micro-batch-tokens 100",
            train.Method(update=masked),
        ),
    ],
)
def test_every_option_trains(options, method, tmp_path):
    arguments = [*SMALL, "--steps", "2", *options.split(), "--out", str(tmp_path / "run")]
    assert train.main(arguments, method) == 0
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["update/skipped"] == 0 for row in rows)
    for row in rows:  # the trainer scores what was sampled, at the temperature it was sampled at
        largest = row["sampling/logp_difference_max"]
        assert largest is None or largest < 1e-3
    if "--kl reward" in options:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # pi_t starts as pi_0 ...
        assert rows[1]["kl"] != 0  # ... and has moved
    if "--aggregator single" in options:
        assert rows[0]["kl"] is None  # not measured, and not called 0


def test_it_teaches(tmp_path):
    """Thirty small steps raise the accuracy on sums that are new to every text and step."""
    arguments = "--steps 30 --prompts-per-step 12 --eval-questions 150 --seed 3".split()
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    before, after = (results_of(tmp_path / "run", kind) for kind in ("initial", "trained"))
    errors = [statistics.stdev(values) / math.sqrt(len(values)) for values in (before, after)]
    assert statistics.mean(after) > statistics.mean(before) + 3 * sum(errors)


def test_each_pass_over_the_questions_takes_every_one_once_in_a_new_order():
    questions = list(range(10))
    drawn = [q for step in range(5) for q in batch_of(questions, 4, step, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == questions
    assert drawn[:10] != drawn[10:]
    # a function of (seed, step) alone
    assert batch_of(questions, 4, 2, seed=0) == drawn[8:12]
    assert [batch_of(questions, 4, 0, seed=s) for s in range(4)].count(drawn[:4]) == 1


def test_questions_without_answers_run_and_say_so(tmp_path, capsys):
    data = tmp_path / "my questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(5)))
    arguments = [*SMALL, "--task", "jsonl", "--model", "tiny", "--data", str(data), "--steps", "1"]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "no labels" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists()
    assert settings_in(tmp_path / "run")["data"] == str(data)
