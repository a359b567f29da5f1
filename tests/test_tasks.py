"""Questions: the sums' three separate worlds, files of every kind of brokenness, and the split.

HealthBench is in test_healthbench.py.
"""

import argparse
import json
import re
import zlib
from pathlib import Path

import pytest
import torch

import tasks
from plumbing.answers import boxed_answer, equal
from plumbing.errors import InputError
from plumbing.models import load_base
from tasks import load_jsonl, load_math500, load_questions, load_sums, sums_part

MATH500 = Path(__file__).resolve().parents[2] / "shared" / "data" / "math500.jsonl"


def operands(question):
    return tuple(map(int, re.findall(r"\d+", question.messages[0]["content"])))


def test_sums_are_right_distinct_and_held_out():
    train, test = load_sums(None)
    assert (len(train), len(test)) == (4096, 500)
    seen = {"train": {operands(q) for q in train}, "test": {operands(q) for q in test}}
    for name, questions in (("train", train), ("test", test)):
        assert len(seen[name]) == len(questions)
        for q in questions:
            a, b = operands(q)
            assert q.answer == str(a + b)
            assert sums_part(a, b) == name
    assert not seen["train"] & seen["test"]
    again, _ = load_sums(None)  # the same in every run
    assert [q.messages for q in train] == [q.messages for q in again]


def test_parts_of_the_world_follow_the_checksum():
    parts = [sums_part(a, 1234) for a in range(1000, 3000)]
    for part, share in (("train", 0.25), ("test", 0.25), ("taught", 0.5)):
        assert abs(parts.count(part) / 2000 - share) < 0.05
    first = ("train", "test", "taught", "taught")[zlib.crc32(b"1000+1234") % 4]
    assert sums_part(1000, 1234) == first


# -------------------------------------------------------------------------------------------- files


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_jsonl_takes_questions_with_and_without_answers(tmp_path):
    data = write(tmp_path / "q.jsonl", '{"prompt": "One?", "answer": 5}', "", '{"prompt": "Two?"}')
    train, test = load_jsonl(data)
    assert [q.answer for q in train] == ["5", None]
    assert "One?" in train[0].messages[0]["content"]
    assert "\\boxed{}" in train[0].messages[0]["content"]
    assert train == test


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"prompt": "a"}', '{"prompt": '], "line 2: not JSON"),
        (['{"prompt": "a"}', '{"question": "b"}'], "line 2: wants"),
        (['{"prompt": ""}'], "line 1: wants"),
        (['{"prompt": 5}'], "line 1: wants"),
        (["[1]"], "line 1: wants"),
        ([""], "holds no questions"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, lines, sentence):
    with pytest.raises(InputError, match=sentence):
        load_jsonl(write(tmp_path / "q.jsonl", *lines))


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        load_jsonl(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="not UTF-8"):
        load_jsonl(tmp_path / "binary")
    with pytest.raises(InputError, match="wants --data"):
        load_jsonl(None)
    with pytest.raises(InputError, match="makes its own"):
        load_sums(tmp_path)


def test_math500_without_network_or_file_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="--data"):
        load_math500(None)


def test_math500_from_a_file(tmp_path):
    rows = [{"problem": "What is $1+1$?", "answer": "2", "solution": "..."}]
    train, test = load_math500(write(tmp_path / "test.jsonl", *map(json.dumps, rows)))
    assert train == test
    assert train[0].answer == "2"


@pytest.mark.skipif(not MATH500.exists(), reason="the real MATH-500 file is not here")
def test_the_real_math500():
    questions, _ = load_math500(MATH500)
    assert len(questions) == 500
    rows = map(json.loads, MATH500.read_text(encoding="utf-8").splitlines())
    # The published solution's own box against the published answer: an independent check of the
    # whole reader.
    pairs = zip(questions, (row["solution"] for row in rows), strict=True)
    wrong = [q.answer for q, s in pairs if not equal(boxed_answer(s), q.answer)]
    assert len(wrong) <= 2, wrong


def test_open_ended_questions_are_asked_as_they_stand(tmp_path):
    train, _ = load_jsonl(write(tmp_path / "q.jsonl", '{"prompt": "Write a poem."}'), boxed=False)
    assert train[0].messages == [{"role": "user", "content": "Write a poem."}]


# ---------------------------------------------------------------------------------------- the model


def test_a_loaded_model_does_not_use_cudnns_attention():
    """On an H100 its gradients can be NaN; vLLM turns it off as well."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_base("tiny")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_model_default_depends_on_the_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tasks.hub_model()[0] == "Qwen/Qwen3-4B"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tasks.hub_model()[0] == "Qwen/Qwen2.5-0.5B-Instruct"


# ---------------------------------------------------------------------------------------- the split


def load(task, split, data=None, eval_questions=500, validate_every=0, reward="match"):
    """The questions of each part, as they are asked; all are boxed if a reward compares boxes."""
    settings = {"task": task, "split": split, "data": data, "eval_questions": eval_questions}
    settings |= {"validate_every": validate_every, "reward": reward}
    parts = load_questions(argparse.Namespace(**settings))
    assert list(parts) == ["train", "validation", "test"]
    assert {q.boxed for part in parts.values() for q in part} == {reward == "match"}
    return {name: [q.messages[0]["content"] for q in part] for name, part in parts.items()}


def eleven(tmp_path):
    rows = [json.dumps({"prompt": f"q{n}", "answer": "1"}) for n in range(11)]
    return str(write(tmp_path / "q.jsonl", *rows))


def test_the_split_decides_what_is_trained_on(tmp_path):
    data = eleven(tmp_path)
    parts = load("jsonl", "test-time", data, 4)
    assert (len(parts["train"]), len(parts["test"])) == (11, 4)
    assert set(parts["test"]) < set(parts["train"])
    parts = load("jsonl", "held-out", data)
    assert (len(parts["train"]), len(parts["test"])) == (5, 6)
    assert len({*parts["train"], *parts["test"]}) == 11
    assert load("jsonl", "held-out", data) == parts  # the same halves every time
    parts = load("sums", "held-out")
    assert (len(parts["train"]), len(parts["test"])) == (4096, 500)
    assert not {*parts["train"]} & {*parts["test"]}
    parts = load("sums", "test-time", eval_questions=100)
    assert parts["test"] == parts["train"][:100]
    assert len(parts["train"]) == 500
    assert parts["validation"] == []


def test_what_is_kept_back_for_validation_is_neither_trained_on_nor_tested_on(monkeypatch):
    whole = load("sums", "held-out")
    parts = load("sums", "held-out", validate_every=5)
    assert len(parts["validation"]) == tasks.VALIDATION_QUESTIONS == 100
    assert parts["validation"] + parts["train"] == whole["train"]
    assert parts["test"] == whole["test"]
    monkeypatch.setattr(tasks, "VALIDATION_QUESTIONS", 1000)
    parts = load("sums", "held-out", validate_every=5)
    assert len(parts["validation"]) == 409  # at most one in ten


def test_a_box_is_asked_for_where_answers_are_compared(tmp_path):
    data = eleven(tmp_path)
    for reward, boxed in (("match", True), ("rubric", False), ("judge", False)):
        asked = load("jsonl", "test-time", data, reward=reward)["train"]
        assert all(("boxed" in text) == boxed for text in asked)
