"""The judge's client on a real HTTP server: the protocol, the order, the cache, the key.

What it does about a server that fails is in test_judge_failures.py.
"""

import json
import logging
import threading
import traceback

import pytest

from abusive_server import SOON, calls_of, good, numbered, servers, truth
from plumbing.errors import JudgeError
from plumbing.judges import CONCURRENCY, anchor_judge, server_judge


@pytest.fixture
def serve(monkeypatch):
    yield from servers(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "judge.jsonl"


def test_a_server_is_asked_in_its_protocol_and_its_answers_come_in_the_order_of_the_calls(
    serve, cache
):
    server, prompts = serve(), numbered(60)
    judge = server_judge(server.url, "some-judge", cache, concurrency=7)
    assert judge(calls_of(*prompts)) == [truth(prompt) for prompt in prompts]
    assert 1 < server.most <= 7  # at once, and never more than that
    assert {path for _, path, _, _ in server.seen} == {"/v1/chat/completions"}
    for _, _, _, body in server.seen:
        assert body.pop("messages") in calls_of(*prompts)
        assert body == {"model": "some-judge", "temperature": 0.0, "max_completion_tokens": 8}
    assert judge([]) == []


def test_a_run_asks_as_many_at_once_as_the_constant_says(serve, cache):
    all_here = threading.Barrier(CONCURRENCY, timeout=30)  # fewer would wait here until it breaks

    def together(prompt, attempt):
        all_here.wait()
        return good(prompt)

    server, prompts = serve(together), numbered(2 * CONCURRENCY)
    assert server_judge(server.url, "m", cache)(calls_of(*prompts)) == [*map(truth, prompts)]
    assert server.most == CONCURRENCY


def test_equal_prompts_are_asked_once_and_all_get_the_answer(serve, cache):
    server, prompts = serve(), ["a", "b", "a", "a", "b"]
    answers = server_judge(server.url, "m", cache)(calls_of(*prompts))
    assert answers == [truth(prompt) for prompt in prompts]
    assert server.attempts == {"a": 1, "b": 1}


def test_the_cache_answers_for_the_same_judge_alone(serve, cache):
    server, other, prompts = serve(), serve(), numbered(5)
    expected = server_judge(server.url, "m", cache)(calls_of(*prompts))
    assert server_judge(server.url, "m", cache)(calls_of(*reversed(prompts))) == expected[::-1]
    assert len(server.seen) == 5
    server_judge(server.url, "another", cache)(calls_of(*prompts))
    assert len(server.seen) == 10
    server_judge(other.url, "m", cache)(calls_of(*prompts))
    assert (len(server.seen), len(other.seen)) == (10, 5)
    # A chat is not its last message: another role is another question.
    server_judge(server.url, "m", cache)([[{"role": "system", "content": prompts[0]}]])
    assert len(server.seen) == 11


@pytest.mark.parametrize("lost", [1, 2, 3, 40, 90])  # 1: the line break; 3: what is left ends in }
def test_a_cache_cut_short_by_a_crash_loses_its_last_answer_at_most(serve, cache, lost):
    def brace(prompt, attempt):
        return good(prompt, f"yes\n{{{prompt}}}")

    server, calls = serve(brace), calls_of("a", "b", "c")
    answers = server_judge(server.url, "m", cache, concurrency=1)(calls)
    assert answers == ["yes\n{a}", "yes\n{b}", "yes\n{c}"]
    cache.write_bytes(cache.read_bytes()[:-lost])
    assert server_judge(server.url, "m", cache, concurrency=1)(calls) == answers
    assert (server.attempts["a"], server.attempts["b"]) == (1, 1)
    assert server.attempts["c"] <= 2
    # What is written after the cut line must not be lost with it.
    more = [*calls, *calls_of("d")]
    wanted = server_judge(server.url, "m", cache)(more)
    asked = len(server.seen)
    assert server_judge(server.url, "m", cache)(more) == wanted
    assert wanted[:3] == answers
    assert len(server.seen) == asked


# ------------------------------------------------------------------------------------------ the key

KEY = "sk-recognisable-0123456789"


@pytest.mark.parametrize("status", [200, 401, 429])
def test_the_key_is_sent_and_shows_nowhere(
    serve, tmp_path, cache, monkeypatch, caplog, capfd, status
):
    # Some servers repeat it.
    refusal = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()

    def behave(prompt, attempt):
        return good(prompt) if status == 200 else (status, SOON, refusal)

    server = serve(behave)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    shown = ""
    try:
        server_judge(server.url, "m", cache, retries=1)(calls_of("a", "b"))
    except JudgeError as error:
        shown = "".join(traceback.format_exception(error))
    assert (shown == "") is (status == 200)
    assert {authorization for _, _, authorization, _ in server.seen} == {f"Bearer {KEY}"}
    assert any(record.name.startswith("openai") for record in caplog.records)  # it was listened to
    assert KEY not in caplog.text
    assert KEY not in repr([(record.msg, record.args) for record in caplog.records])
    assert KEY not in "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert cache.exists() is (status == 200)
    assert KEY not in shown


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_of_ones_own_wants_no_key(serve, cache, monkeypatch, key):
    server = serve()
    if key is not None:  # set and empty is what `export OPENAI_API_KEY=` leaves
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert server_judge(server.url, "m", cache)(calls_of("a")) == [truth("a")]


# --------------------------------------------------------------------------------------- the anchor


def test_the_anchor_as_judge_is_the_frozen_one_and_held_to_yes_or_no(engine):
    """One greedy answer a call, in their order, whatever the policy has become."""
    calls = calls_of("What is 1 + 1?", *numbered(3), "yes", "no")
    answers = anchor_judge(engine)(calls)
    assert len(answers) == len(calls)
    assert set(answers) <= {"yes", "no"}
    for name, parameter in engine.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(40)
    assert anchor_judge(engine)(calls) == answers
    assert [anchor_judge(engine)([call])[0] for call in calls] == answers


def test_what_is_kept_for_a_resumed_run_can_be_read(serve, cache):
    """Verdicts are in the cache under a hash; what was no verdict is not."""
    server = serve(lambda prompt, attempt: good(prompt, "Hm." if prompt == "hm" else "Yes."))
    assert server_judge(server.url, "m", cache)(calls_of("a", "hm")) == ["Yes.", "Hm."]
    (row,) = map(json.loads, cache.read_text().splitlines())
    assert row["text"] == "Yes."
