"""benchmarks/prompts.py: its tables against ones made by hand, and a real server for its calls."""

import json
import sys
import zlib
from pathlib import Path

import pytest

from judge_server import Judge

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import prompts
from asking import Saved
from candidates import FREEFORM, JUDGE, REFERENCE, RUBRIC, SYNTHESIS, judge_chat

from rubrics import JUDGE_PROMPT, RUBRIC_PROMPT
from synthesize import FREEFORM_PROMPT, SYNTHESIS_PROMPT

ROOT = Path(__file__).resolve().parent.parent

KEY = [json.loads(line) for line in (ROOT / "benchmarks/judge_key.jsonl").open(encoding="utf-8")]
PAIRS = [(row["response"], c) for row in KEY for c in row["criteria"]]
NOBODY = "http://127.0.0.1:9/v1"


def box(answer):
    return f"so \\boxed{{{answer}}}"


@pytest.fixture
def saved(tmp_path):
    """Four problems whose answer is 1, three rollouts each, and two prompts' syntheses."""
    data, out = tmp_path / "ones.jsonl", tmp_path / "out"
    data.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "answer": "1"}) + "\n" for i in range(4))
    )
    rollouts, written = Saved(out / "rollouts.jsonl"), Saved(out / "syntheses.jsonl")
    for i, answers in enumerate(["112", "122", "222", "111"]):
        for n, answer in enumerate(answers):
            rollouts.add(("ones", i, n), "one two three " + box(answer))  # five words
    for i in range(4):
        written.add(("first", "ones", i), box("1") if i < 3 else "no box")  # two words
    for i, answer in enumerate("1121"):
        written.add(("last", "ones", i), box(answer))
    return ["synthesis", "--data", f"{data}", "--out", f"{out}", "--group-size", "3"]


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:5], row[1:5], strict=True)) | {"cells": row} for row in rows}


def test_the_table_of_syntheses_is_the_one_made_by_hand(saved, capsys):
    assert prompts.main([*saved, "--prompts", "first", "last", "--url", NOBODY]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["one answer"]["ones"] == "0.50"  # (2 + 1 + 0 + 3) / 12
    assert rows["majority"]["ones"] == "0.50"  # of 1, 2, 2, 1
    assert rows["some rollout"]["ones"] == "0.75"
    # first is right on 0, 1, 2; it differs from the majority on 1, 2 (right) and 3 (no answer)
    assert rows["first"]["cells"][5:] == ["3", "2, 1", "1", "1", "0.75", "0.40"]
    assert rows["first"]["minus majority"].startswith("+0.250 ")
    # last is right on 0, 1, 3, differs on 1 alone, and solves nothing that no rollout solves
    assert rows["last"]["cells"][5:] == ["1", "1, 0", "1", "0", "1.00", "0.40"]
    assert rows["last"]["minus first"].startswith("+0.000 ")


def test_what_is_missing_is_asked_for_and_saved(saved, tmp_path, capsys):
    server = Judge("\\boxed{1}")
    assert prompts.main([*saved, "--prompts", "last", "turns", "--url", server.url]) == 0
    assert len(server.calls) == 4  # only `turns`
    assert rows_of(capsys.readouterr().out)["turns"]["ones"] == "1.00"
    again = Saved(tmp_path / "out/syntheses.jsonl").texts
    assert [again["turns", "ones", i] for i in range(4)] == ["\\boxed{1}"] * 4
    server.calls.clear()
    assert prompts.main([*saved, "--prompts", "turns", "--url", server.url]) == 0
    assert server.calls == []


def test_without_a_server_it_says_what_to_do(saved, capsys):
    assert prompts.main([*saved, "--prompts", "turns", "--url", NOBODY]) == 2
    assert "start it, or give --url" in capsys.readouterr().err


def test_agreement_with_the_key_is_counted(tmp_path, capsys):
    server = Judge()  # its verdict is a checksum of the prompt
    assert prompts.main(["judge", "--out", f"{tmp_path}", "--url", server.url]) == 0
    rows = rows_of(capsys.readouterr().out)
    for name in JUDGE:
        agreed = 0
        for text, criterion in PAIRS:
            prompt = judge_chat(name, criterion["text"], text)[0]["content"]
            agreed += (zlib.crc32(prompt.encode()) % 2 == 1) == criterion["met"]
        assert rows[name]["agrees"].startswith(f"{agreed / 60:.2f} ")
        assert rows[name]["cells"][-1] == "0"


def test_the_answer_key_is_balanced():
    met = [c["met"] for _, c in PAIRS]
    assert (len(met), sum(met)) == (60, 30)
    for kind in ("plain", "negative", "injection"):
        assert {c["met"] for _, c in PAIRS if c["kind"] == kind} == {True, False}
    assert len({(text, c["text"]) for text, c in PAIRS}) == 60


def test_the_parts_of_a_prompt_are_where_its_place_says():
    for name, candidate in SYNTHESIS.items():
        chat = candidate.chat(["attempt one", "attempt two"], "the question")
        everything = "\n".join(m["content"] for m in chat)
        assert everything.index("attempt one") < everything.index("attempt two")
        assert ("the question" in everything) == (name == "question")
        place = everything.index(candidate.instruction)
        assert (place == 0) == (candidate.place in ("first", "system"))


def test_the_prompts_that_the_project_uses_are_among_those_compared():
    assert SYNTHESIS_PROMPT in {candidate.instruction for candidate in SYNTHESIS.values()}
    assert FREEFORM_PROMPT in {candidate.instruction for candidate in FREEFORM.values()}
    assert RUBRIC_PROMPT.format("reference", REFERENCE) in {text for text, _ in RUBRIC.values()}
    assert JUDGE_PROMPT in {text for text, _ in JUDGE.values()}
