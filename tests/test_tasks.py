"""Questions: the sums' three separate worlds, and files of every kind of brokenness."""

import argparse
import json
import re
import zlib
from pathlib import Path

import pytest
import torch

import tasks
from tasks import (
    InputError,
    load_healthbench,
    load_jsonl,
    load_math500,
    load_questions,
    load_sums,
    sums_part,
)

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
    assert [q.messages for q in train] == [
        q.messages for q in load_sums(None)[0]
    ]  # the same in every run


def test_parts_of_the_world_follow_the_checksum():
    parts = [sums_part(a, 1234) for a in range(1000, 3000)]
    assert {p: round(parts.count(p) / 2000, 1) for p in set(parts)} == {
        "train": 0.2,
        "test": 0.2,
        "taught": 0.5,
    } or all(
        abs(parts.count(p) / 2000 - share) < 0.05
        for p, share in (("train", 0.25), ("test", 0.25), ("taught", 0.5))
    )
    assert (
        sums_part(1000, 1234) == ("train", "test", "taught", "taught")[zlib.crc32(b"1000+1234") % 4]
    )


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
    from rewards import boxed_answer, equal

    questions, _ = load_math500(MATH500)
    assert len(questions) == 500
    solutions = [
        json.loads(line)["solution"] for line in MATH500.read_text(encoding="utf-8").splitlines()
    ]
    # The published solution's own box against the published answer: an independent check of the whole reader.
    wrong = [
        q.answer
        for q, s in zip(questions, solutions, strict=True)
        if not equal(boxed_answer(s), q.answer)
    ]
    assert len(wrong) <= 2, wrong


def test_a_loaded_model_does_not_use_cudnns_attention():
    """On an H100 its gradients can be NaN; vLLM turns it off as well."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    tasks.load_base("tiny")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_model_default_depends_on_the_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tasks.hub_model()[0] == "Qwen/Qwen3-4B"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tasks.hub_model()[0] == "Qwen/Qwen2.5-0.5B-Instruct"


# ------------------------------------------------------------------------------------------------- HealthBench

HEALTHBENCH = MATH500.parent / "healthbench_sample.jsonl"


def health_row(n):
    turns = [
        {"role": "user", "content": f"Question {n}"},
        {"role": "assistant", "content": "Which?"},
    ]
    prompt = [*turns, {"role": "user", "content": "That."}]
    rubric = [
        {"criterion": "Says so", "points": 5, "tags": []},
        {"criterion": "Harms", "points": -8, "tags": []},
    ]
    return json.dumps({"prompt_id": f"id{n}", "prompt": prompt, "rubrics": rubric})


def test_healthbench_is_split_once_and_for_all(tmp_path):
    data = write(tmp_path / "h.jsonl", *(health_row(n) for n in range(50)))
    train, test = load_healthbench(data)
    assert (len(train), len(test)) == (45, 5)
    assert {q.id for q in train} | {q.id for q in test} == {f"id{n}" for n in range(50)}
    assert [q.id for q in test] == [q.id for q in load_healthbench(data)[1]]
    assert [q.id for q in train + test] != [f"id{n}" for n in range(50)]  # not the file's order
    assert train[0].rubric == (("Says so", 5.0), ("Harms", -8.0))
    assert [m["role"] for m in train[0].messages] == ["user", "assistant", "user"]
    assert "boxed" not in str(train[0].messages)


@pytest.mark.parametrize(
    "broken", ['{"prompt_id": "x"}', '{"prompt_id": "x", "prompt": [], "rubrics": [{"points": 3}]}']
)
def test_a_broken_healthbench_row_is_named(broken, tmp_path):
    with pytest.raises(InputError, match="row 2"):
        load_healthbench(write(tmp_path / "h.jsonl", health_row(1), broken))


@pytest.mark.skipif(not HEALTHBENCH.exists(), reason="no HealthBench sample here")
def test_the_real_healthbench_rows_load():
    train, test = load_healthbench(HEALTHBENCH)
    assert (len(train), len(test)) == (18, 2)
    rows = [
        json.loads(line) for line in HEALTHBENCH.read_text(encoding="utf-8").split("\n") if line
    ]
    expected = {row["prompt_id"]: sum(r["points"] for r in row["rubrics"]) for row in rows}
    assert {q.id: sum(p for _, p in q.rubric) for q in train + test} == expected
    assert all(q.messages[-1]["role"] == "user" and q.answer is None for q in train + test)


def test_open_ended_questions_are_asked_as_they_stand(tmp_path):
    train, _ = load_jsonl(write(tmp_path / "q.jsonl", '{"prompt": "Write a poem."}'), boxed=False)
    assert train[0].messages == [{"role": "user", "content": "Write a poem."}]


def test_the_split_decides_what_is_trained_on(tmp_path):
    data = write(
        tmp_path / "q.jsonl", *(json.dumps({"prompt": f"q{n}", "answer": "1"}) for n in range(11))
    )
    asked = lambda part: [q.messages[0]["content"] for q in part]  # noqa: E731

    def load(task, split, data=None, eval_questions=500):
        s = argparse.Namespace(
            task=task, split=split, data=data, reward="match", eval_questions=eval_questions
        )
        train, test = load_questions(s)
        return asked(train), asked(test)

    train, test = load("jsonl", "test-time", str(data), 4)
    assert (len(train), len(test)) == (11, 4)
    assert set(test) < set(train)
    train, test = load("jsonl", "held-out", str(data))
    assert (len(train), len(test)) == (5, 6)
    assert len(set(train) | set(test)) == 11
    assert load("jsonl", "held-out", str(data)) == (train, test)  # the same halves every time
    train, test = load("sums", "held-out")
    assert (len(train), len(test), set(train) & set(test)) == (4096, 500, set())
    train, test = load("sums", "test-time", eval_questions=100)
    assert test == train[:100]
    assert len(train) == 500
