"""How long the judge's client waits: far Retry-After, drips, silence, and a model that thinks."""

import email.utils
import json
import time

import pytest

from abusive_server import SOON, UNREADABLE, calls_of, good, numbered, servers, truth
from plumbing import judges, server
from plumbing.errors import InputError, JudgeError
from plumbing.judges import probe, server_judge


@pytest.fixture
def serve(monkeypatch):
    yield from servers(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "judge.jsonl"


def gap(served):
    first, second = (arrived for arrived, *_ in served.seen)
    return second - first


def in_seconds(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


# -------------------------------------------------------------------------------------- Retry-After

FAR = {
    "seconds": lambda: "3600",
    "a date": lambda: in_seconds(86400),
    "overflow": lambda: "1e999",
    "milliseconds": lambda: None,
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("name", FAR)
def test_a_retry_after_far_ahead_is_waited_for_up_to_the_limit_and_loses_nothing(
    serve, cache, monkeypatch, name, status
):
    monkeypatch.setattr(server, "LONGEST_PAUSE", 1.5)  # the first pause of its own is 0.5 s at most
    said = FAR[name]()
    headers = {"Retry-After": said} if said else {"retry-after-ms": "9999999"}
    busy = (status, headers, b"")
    served = serve(lambda prompt, attempt: good(prompt) if attempt else busy)
    assert server_judge(served.url, "m", cache)(calls_of("a")) == [truth("a")]
    assert 1.4 < gap(served) < 4


def test_a_date_is_waited_for(serve, cache):
    busy = (429, {"Retry-After": in_seconds(3)}, b"")  # dates have whole seconds
    served = serve(lambda prompt, attempt: good(prompt) if attempt else busy)
    assert server_judge(served.url, "m", cache)(calls_of("a")) == [truth("a")]
    assert 1.5 < gap(served) < 5


@pytest.mark.parametrize("said", ["-5", "0", "nan", "soon", "", "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_a_retry_after_that_says_nothing_gets_the_clients_own_pause(serve, cache, said):
    busy = (429, {"Retry-After": said}, b"")
    served = serve(lambda prompt, attempt: good(prompt) if attempt else busy)
    assert server_judge(served.url, "m", cache)(calls_of("a")) == [truth("a")]
    assert 0.3 < gap(served) < 2


# ----------------------------------------------------------------------- a call as a whole, silence


def test_a_server_that_drips_holds_no_call(serve, cache):
    """Its bytes come faster than any time-out between two of them."""
    served = serve(lambda prompt, attempt: "drip" if prompt == "bad" else good(prompt))
    started = time.monotonic()
    judge = server_judge(served.url, "m", cache, timeout=1.0, retries=1)
    assert judge(calls_of("a", "bad", "b")) == [truth("a"), None, truth("b")]
    assert served.attempts["bad"] == 2
    assert 2 < time.monotonic() - started < 10
    served.behave = lambda prompt, attempt: good(prompt) if attempt > 2 else "drip"
    assert judge(calls_of("bad")) == [truth("bad")]


def test_a_judge_that_goes_down_in_the_middle_is_not_waited_for_by_every_call(serve, cache):
    served, prompts = serve(), numbered(200)
    served.behave = lambda prompt, attempt: good(prompt) if prompt in prompts[:6] else "dropped"
    judge = server_judge(served.url, "m", cache, concurrency=4, retries=0)
    assert judge(calls_of(*prompts)) == [*map(truth, prompts[:6]), *[None] * 194]
    assert 6 + 8 <= len(served.seen) <= 6 + 12


def test_many_refused_prompts_in_a_row_do_not_make_a_server_look_dead(serve, cache):
    refusal, prompts = (400, {}, b'{"error": {"message": "filtered"}}'), numbered(40)
    served = serve(lambda p, attempt: good(p) if p == prompts[-1] else refusal)
    judge = server_judge(served.url, "m", cache, concurrency=1)
    assert judge(calls_of(*prompts)) == [None] * 39 + [truth(prompts[-1])]
    # Nor does the one that is left when a run goes on end it: the others' verdicts are known.
    assert server_judge(served.url, "m", cache)(calls_of(*prompts[-2:]))[0] is None


# ---------------------------------------------------------------------------------------- the probe


def test_one_question_shows_that_a_judge_is_there(serve, capfd):
    served = serve(lambda prompt, attempt: good(prompt, "Yes."))
    probe(served.url, "some-judge", 8)
    ((_, path, _, body),) = served.seen
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == (
        "some-judge", 0.0, 8,
    )  # fmt: skip
    assert "".join(capfd.readouterr()) == ""


ABSENT = {
    "silent": "slow",
    "dripping": "drip",
    "dropping": "dropped",
    "broken": (500, SOON, b""),
    "unauthorized": (401, {}, b'{"error": {"message": "bad key"}}'),
    "no such model": (404, {}, b'{"error": {"message": "no such model"}}'),
    "no temperature": (400, {}, b'{"error": {"message": "temperature must be 1"}}'),
    "a web page": UNREADABLE["page"],
    "another shape": UNREADABLE["{}"],
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_judge_that_cannot_judge_is_refused_in_seconds(serve, monkeypatch, name):
    monkeypatch.setattr(judges, "PROBE_TIMEOUT", 3.0)
    served, started = serve(lambda prompt, attempt: ABSENT[name]), time.monotonic()
    with pytest.raises(InputError) as caught:
        probe(served.url, "some-judge", 8)
    assert time.monotonic() - started < 8
    for word in ("some-judge", served.url, "--judge-url", "--judge-model", "OPENAI_API_KEY"):
        assert word in str(caught.value)
    if isinstance(ABSENT[name], tuple) and ABSENT[name][0] < 500 and b"message" in ABSENT[name][2]:
        assert json.loads(ABSENT[name][2])["error"]["message"] in str(caught.value)


def test_nobody_at_the_address_is_noticed_in_seconds(serve):
    served = serve()
    served.stop()
    served.stop = lambda: None
    started = time.monotonic()
    with pytest.raises(InputError, match="did not answer a first question"):
        probe(served.url, "m", 8)
    assert time.monotonic() - started < judges.PROBE_TIMEOUT


def test_a_busy_or_flaky_judge_is_there(serve, monkeypatch, capfd):
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.1)
    served = serve(lambda prompt, attempt: (429, {"Retry-After": "999"}, b'{"error": "busy"}'))
    probe(served.url, "m", 8)
    assert "is busy" in capfd.readouterr().err
    served.behave = lambda prompt, attempt: good(prompt, "no") if attempt > 7 else "dropped"
    probe(served.url, "m", 8)


# ------------------------------------------------------------------------------ a model that thinks


def thinking(content, finish="length", thought="yes"):
    message = {"role": "assistant", "content": content, "reasoning_content": thought}
    reply = {"choices": [{"message": message, "finish_reason": finish}]}
    return 200, {}, json.dumps(reply).encode()


@pytest.mark.parametrize("content", [None, "", "\n", "<think>\nyes, because"])
def test_what_a_model_thinks_is_no_verdict_and_one_sentence_says_what_to_do(
    serve, cache, capfd, content
):
    served = serve(lambda p, attempt: thinking(content) if p != "short" else thinking("no", "stop"))
    judge = server_judge(served.url, "m", cache)
    assert judge(calls_of("a", "b", "short")) == [content or "", content or "", "no"]
    assert set(served.attempts.values()) == {1}  # the same again would be paid for again
    assert len(cache.read_text().splitlines()) == 1
    error = capfd.readouterr().err
    assert "2 of 3 answers" in error
    assert "its 8 tokens: raise --judge-max-tokens" in error
    judge(calls_of("c", "d"))
    assert capfd.readouterr().err == ""  # once
    probe(served.url, "m", 8)
    assert "answered a first question with nothing" in capfd.readouterr().err


def test_a_larger_budget_is_asked_for_and_changes_no_rule(serve, cache, capfd):
    replies = {"a": thinking("Yes.", "stop"), "b": thinking("<think>ok</think>\n\nyes", "stop")}
    replies["c"] = thinking("I would say yes", "stop")
    served = serve(lambda prompt, attempt: replies[prompt])
    judge = server_judge(served.url, "m", cache, max_tokens=4096)
    assert judge(calls_of("a", "b", "c"))[0] == "Yes."
    assert {body["max_completion_tokens"] for *_, body in served.seen} == {4096}
    assert len(cache.read_text().splitlines()) == 1  # a's alone is a verdict
    assert capfd.readouterr().err == ""  # these did say something


def test_few_empty_answers_are_no_reason_to_say_so(serve, cache, capfd):
    served = serve(lambda prompt, attempt: thinking("") if prompt == "a" else good(prompt))
    server_judge(served.url, "m", cache)(calls_of("a", "b", "c"))
    assert capfd.readouterr().err == ""


def test_a_judge_of_the_wrong_shape_is_an_error_and_no_verdict(serve, cache):
    served = serve(lambda prompt, attempt: thinking(None, "stop"))
    with pytest.raises(JudgeError, match="answered none of 1 calls: an answer without text"):
        server_judge(served.url, "m", cache)(calls_of("a"))
