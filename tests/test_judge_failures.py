"""A judge that fails: nothing is lost, mixed up or paid for twice, and a dead one is named."""

import json
import random
import time
from collections import Counter

import pytest

from abusive_server import NO_ANSWER, SOON, UNREADABLE, calls_of, good, numbered, servers, truth
from plumbing.errors import JudgeError
from plumbing.judges import server_judge
from plumbing.server import ATTEMPTS


@pytest.fixture
def serve(monkeypatch):
    yield from servers(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "judge.jsonl"


def test_a_thousand_calls_to_an_abusive_server_lose_none_and_mix_up_none(serve, cache):
    done = Counter()
    rare = {"slow": 1, "dropped": 1, "body cut": 1}
    weights = [rare.get(name, 4) for name in NO_ANSWER] + [0.8] * len(UNREADABLE) + [40]

    def abuse(prompt, attempt):
        """Up to four faults for a prompt, of which two are unreadable.

        That is as many as the judge has to bear, by its retries.
        """
        faults = [*NO_ANSWER, *UNREADABLE, "good"]
        names = random.Random(f"0 {prompt}").choices(faults, weights, k=4)
        name = "good" if attempt >= 4 else names[attempt]
        if name in UNREADABLE and sum(n in UNREADABLE for n in names[:attempt]) >= 2:
            name = "good"
        done[name] += 1
        return good(prompt) if name == "good" else (NO_ANSWER | UNREADABLE)[name]

    server, prompts = serve(abuse), numbered(1000)
    judge = server_judge(server.url, "m", cache, concurrency=24, timeout=4.0, retries=6)
    answers = judge(calls_of(*prompts))
    assert [prompt for prompt, text in zip(prompts, answers, strict=True) if text is None] == []
    assert answers == [truth(prompt) for prompt in prompts]
    assert done["good"] == 1000  # none was asked again after its answer
    assert set(done) == {"good", *NO_ANSWER, *UNREADABLE}  # each kind of abuse took place
    assert 8 < server.most <= 24
    # And what was paid for is kept: the same thousand again cost nothing.
    before = len(server.seen)
    assert server_judge(server.url, "m", cache)(calls_of(*prompts)) == answers
    assert len(server.seen) == before


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_unknown_and_does_not_harm_the_others(serve, cache, name):
    server = serve(lambda prompt, attempt: UNREADABLE[name] if prompt == "bad" else good(prompt))
    calls = calls_of("a", "bad", "b")
    assert server_judge(server.url, "m", cache)(calls) == [truth("a"), None, truth("b")]
    assert server.attempts == {"a": 1, "bad": ATTEMPTS, "b": 1}
    # It is not remembered either: a server that was mended is asked again.
    server.behave = lambda prompt, attempt: good(prompt)
    mended = [truth("a"), truth("bad"), truth("b")]
    assert server_judge(server.url, "m", cache)(calls) == mended


FAULTS = [(status, SOON, b"{}") for status in (408, 409, 429, 500, 503)] + ["slow", "dropped"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_for_good_is_unknown_and_does_not_harm_the_others(serve, cache, fault):
    server = serve(lambda prompt, attempt: fault if prompt == "bad" else good(prompt))
    judge = server_judge(server.url, "m", cache, timeout=1.0, retries=2)
    assert judge(calls_of("a", "bad", "b")) == [truth("a"), None, truth("b")]
    assert server.attempts["bad"] == 3  # the first and two retries


DEAD = ["slow", "dropped", (500, SOON, b""), UNREADABLE["broken JSON"], UNREADABLE["{}"]]


@pytest.mark.parametrize("fault", DEAD)
def test_a_judge_that_answers_nothing_is_an_error_that_names_it(serve, cache, fault):
    server = serve(lambda prompt, attempt: fault)
    with pytest.raises(JudgeError) as caught:
        server_judge(server.url, "some-judge", cache, timeout=0.3, retries=1)(calls_of("a", "b"))
    assert "some-judge" in str(caught.value)
    assert server.url in str(caught.value)


def test_a_judge_that_is_down_is_not_waited_for_by_every_call(serve, cache):
    server = serve(lambda prompt, attempt: "dropped")
    with pytest.raises(JudgeError):
        server_judge(server.url, "m", cache, concurrency=4, retries=0)(calls_of(*numbered(200)))
    assert 8 <= len(server.seen) <= 12  # two rounds of four, and those on their way


def test_a_judge_that_stops_in_the_middle_keeps_what_it_answered_and_a_dead_one_is_an_error(
    serve, cache
):
    server, prompts = serve(), numbered(10)
    server.behave = lambda prompt, attempt: good(prompt) if prompt in prompts[:4] else "dropped"
    judge = server_judge(server.url, "m", cache, timeout=1.0, retries=1)
    assert judge(calls_of(*prompts)) == [*map(truth, prompts[:4]), *[None] * 6]
    server.stop()
    assert judge(calls_of(*prompts[:4])) == [*map(truth, prompts[:4])]  # from the file alone
    # Nobody listens there now.
    with pytest.raises(JudgeError, match=r"m at http://127\.0\.0\.1:\d+/v1"):
        judge(calls_of(*prompts[4:]))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_is_unknown_and_the_others_are_answered(serve, cache, status):
    """A content filter, or a text too long for the judge: one prompt's trouble ends no run."""
    refusal = (status, {}, json.dumps({"error": {"message": "filtered"}}).encode())
    calls = calls_of(*numbered(6))
    bad = calls[2][0]["content"]
    server = serve(lambda prompt, attempt: refusal if prompt == bad else good(prompt, "yes"))
    answers = server_judge(server.url, "j", cache)(calls)
    assert answers == ["yes", "yes", None, "yes", "yes", "yes"]
    with pytest.raises(JudgeError, match=r"answered none of 1 calls.*filtered"):
        server_judge(server.url, "j", cache)([calls[2]])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_an_error_at_once_and_no_storm(serve, cache, status):
    # What a wrong path gets from many a server.
    page = b"<html>" + b"no such thing\n" * 10_000 + b"</html>"
    server = serve(lambda prompt, attempt: (status, {}, page))
    started = time.monotonic()
    with pytest.raises(JudgeError) as caught:
        server_judge(server.url, "some-judge", cache, concurrency=4)(calls_of(*numbered(500)))
    assert time.monotonic() - started < 10
    assert len(server.seen) <= 2 * 4  # those on their way; not 500, and none of them again
    assert set(server.attempts.values()) == {1}
    assert "some-judge" in str(caught.value)
    assert server.url in str(caught.value)
    assert len(str(caught.value)) < 1000  # a person is to read it


def test_retry_after_is_waited_for(serve, cache):
    busy = (429, {"Retry-After": "1"}, b"")
    server = serve(lambda prompt, attempt: good(prompt) if attempt else busy)
    assert server_judge(server.url, "m", cache)(calls_of("a")) == [truth("a")]
    first, second = (arrived for arrived, *_ in server.seen)
    assert second - first > 0.95  # the client's own first pause is 0.5 s at most
