"""HealthBench: one split once and for all, the physicians' rubrics, rows that are broken."""

import argparse
import json
from pathlib import Path

import pytest

from plumbing.errors import InputError
from tasks import load_healthbench, load_questions

HEALTHBENCH = Path(__file__).resolve().parents[2] / "shared" / "data" / "healthbench_sample.jsonl"


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(n):
    turns = [
        {"role": "user", "content": f"Question {n}"},
        {"role": "assistant", "content": "Which?"},
        {"role": "user", "content": "That."},
    ]
    rubric = [
        {"criterion": "Says so", "points": 5, "tags": []},
        {"criterion": "Harms", "points": -8, "tags": []},
    ]
    return json.dumps({"prompt_id": f"id{n}", "prompt": turns, "rubrics": rubric})


def test_healthbench_is_split_once_and_for_all(tmp_path):
    data = write(tmp_path / "h.jsonl", *(row(n) for n in range(50)))
    train, test = load_healthbench(data)
    assert (len(train), len(test)) == (45, 5)
    assert {q.id for q in train} | {q.id for q in test} == {f"id{n}" for n in range(50)}
    assert [q.id for q in test] == [q.id for q in load_healthbench(data)[1]]
    assert [q.id for q in train + test] != [f"id{n}" for n in range(50)]  # not the file's order
    assert train[0].rubric == (("Says so", 5.0), ("Harms", -8.0))
    assert [m["role"] for m in train[0].messages] == ["user", "assistant", "user"]
    assert "boxed" not in str(train[0].messages)


def test_healthbench_is_not_asked_for_a_box(tmp_path):
    data = write(tmp_path / "h.jsonl", *(row(n) for n in range(20)))
    settings = {"task": "healthbench", "split": "held-out", "data": str(data), "reward": "rubric"}
    settings |= {"validate_every": 1, "eval_questions": 500}
    parts = load_questions(argparse.Namespace(**settings))
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 17,
        "validation": 1,
        "test": 2,
    }
    assert not any(q.boxed for part in parts.values() for q in part)


@pytest.mark.parametrize(
    "broken", ['{"prompt_id": "x"}', '{"prompt_id": "x", "prompt": [], "rubrics": [{"points": 3}]}']
)
def test_a_broken_healthbench_row_is_named(broken, tmp_path):
    with pytest.raises(InputError, match="row 2"):
        load_healthbench(write(tmp_path / "h.jsonl", row(1), broken))


@pytest.mark.skipif(not HEALTHBENCH.exists(), reason="no HealthBench sample here")
def test_the_real_healthbench_rows_load():
    train, test = load_healthbench(HEALTHBENCH)
    assert (len(train), len(test)) == (18, 2)
    written = HEALTHBENCH.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in written if line]
    expected = {r["prompt_id"]: sum(c["points"] for c in r["rubrics"]) for r in rows}
    assert {q.id: sum(p for _, p in q.rubric) for q in train + test} == expected
    assert all(q.messages[-1]["role"] == "user" and q.answer is None for q in train + test)
