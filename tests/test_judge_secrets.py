"""The judge's key, and a password in --judge-url: both are sent, and show nowhere else."""

import base64
import html
import json
import traceback
from urllib.parse import unquote, urlsplit

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train
from abusive_server import SOON, calls_of, good, servers, truth
from judged_runs_helpers import SMALL, health_rows, judges
from plumbing import server
from plumbing.errors import InputError, JudgeError
from plumbing.judges import probe, server_judge
from plumbing.server import Server, shown_url
from run_helpers import lines, refused, settings_in

# Every library writes this one in another way.
KEY = "sk-\"recog'nis\\able<&>+/=%25"


@pytest.fixture
def serve(monkeypatch):
    yield from servers(monkeypatch)


@pytest.fixture
def judge():
    yield from judges()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "judge.jsonl"


def whole(url):
    """`url` with a user, a password and a code in its query: what it is made of, and how sent."""
    address = url.replace("://", "://some-user:pass%20word-77@") + "?code=query-88&api-version=2"
    basic = base64.b64encode(b"some-user:pass word-77").decode()
    return address, ["some-user", "pass%20word-77", "pass word-77", "query-88", basic], basic


# ------------------------------------------------------------------------------------------ the key


@pytest.mark.parametrize(
    "key", ["sk-ключ-secret", "sk-\u2028secret", "sk-\udcffsecret", "sk-a\nb-secret", "sk a-secret"]
)
def test_a_key_that_cannot_be_sent_is_refused_before_any_call_and_not_repeated(
    serve, cache, monkeypatch, key
):
    served = serve()
    monkeypatch.setattr("plumbing.server.os.environ", {"OPENAI_API_KEY": key})
    for asked in (
        lambda: probe(served.url, "m", 8),
        lambda: server_judge(served.url, "m", cache)(calls_of("a")),
    ):
        with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
            asked()
        shown = "".join(traceback.format_exception(caught.value))
        assert "copy the key again" in shown
        forms = [key, repr(key)[1:-1], json.dumps(key)[1:-1], ascii(key)[1:-1]]
        assert not [form for form in forms if form in shown]
    assert served.seen == []


ECHOES = {
    "as it is": str,
    "as Python writes it": repr,
    "as JSON writes it": json.dumps,
    "as HTML": html.escape,
    "in a header": lambda key: f"Authorization: Bearer {key}",
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_server_that_repeats_the_key_gets_it_written_nowhere(
    serve, cache, monkeypatch, capfd, name
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    text = f"yes\n{ECHOES[name](KEY)}"
    served = serve(lambda prompt, attempt: good(prompt, text))
    (answer,) = server_judge(served.url, "m", cache)(calls_of("a"))
    assert {authorization for _, _, authorization, _ in served.seen} == {f"Bearer {KEY}"}
    assert answer.startswith("yes\n")
    assert "***" in answer
    assert "able" not in answer
    assert "able" not in cache.read_text()  # no piece, whatever its form
    for status in (400, 401, 500):
        refusal = json.dumps({"error": {"message": text}}).encode()
        served.behave = lambda prompt, attempt, reply=(status, SOON, refusal): reply
        with pytest.raises((JudgeError, InputError)) as caught:
            server_judge(served.url, "m", cache, retries=0)(calls_of("b"))
        with pytest.raises(InputError) as also:
            probe(served.url, "m", 8)
        for error in (caught.value, also.value):
            assert "***" in str(error)
            assert "able" not in "".join(traceback.format_exception(error))
    assert "able" not in "".join(capfd.readouterr())


def test_a_verdict_is_not_taken_for_a_secret(serve, cache, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "no")  # what one types where none is wanted
    served = serve(lambda prompt, attempt: good(prompt, "no"))
    assert server_judge(served.url, "m", cache)(calls_of("a")) == ["no"]


# ------------------------------------------------------------------------------------------ the URL


def test_a_password_and_a_query_are_sent_and_not_shown(serve, cache, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    served = serve()
    address, secrets, basic = whole(served.url)
    assert server_judge(address, "m", cache)(calls_of("a")) == [truth("a")]
    ((_, path, authorization, _),) = served.seen
    assert path == "/v1/chat/completions?code=query-88&api-version=2"
    assert authorization == f"Basic {basic}"
    # With another password it is the same judge, and what it said is known.
    assert server_judge(address.replace("77", "99"), "m", cache)(calls_of("a")) == [truth("a")]
    assert len(served.seen) == 1
    refusal = json.dumps({"error": {"message": " ".join(secrets)}}).encode()
    served.behave = lambda prompt, attempt: (401, {}, refusal)
    with pytest.raises(JudgeError, match="refuses") as caught:
        server_judge(address, "m", cache)(calls_of("b"))
    assert [secret for secret in secrets if secret in str(caught.value)] == []
    host = f"127.0.0.1:{served.server_port}"
    assert f"http://***@{host}/v1?code=***&api-version=***" in str(caught.value)


MALFORMED = [
    "", "judge", "localhost:8000/v1", "ftp://host/v1", "http://", "http:///v1", "https:host/v1",
    "http://host:abc/v1", "http://host:99999/v1", "http://host:0/v1", "http://[::1/v1",
    "http://ho st/v1", "http://host/v1\n", "http://h\u00f6st/v1", "http://<host>/v1", "//host/v1",
    "http://user:secret-word@/v1", "http://user:secret-word@host:port/v1",
    "http://host/" + 2000 * "a", None, 7, [], {},
]  # fmt: skip


@pytest.mark.parametrize("url", MALFORMED)
def test_what_is_no_url_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match=r"--judge-url .*like http://localhost:8000/v1") as caught:
        shown_url(url)
    assert "secret-word" not in "".join(traceback.format_exception(caught.value))


@example("http://[::1]:8000/v1")
@example("http://a%zz:b%zz@host/p%zz?q=%zz#f")
@example("http://host/\u20ac?\u20ac=1")
@settings(deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"https?://([^@/]{0,9}@)?[\w.\[\]:-]{1,9}/?.{0,20}")))
def test_what_is_taken_for_a_url_the_client_takes_too(url):
    try:
        shown = shown_url(url)
    except InputError:
        return
    client = Server(shown, "m").client()
    assert isinstance(client, openai.AsyncOpenAI)
    assert client.base_url.host.strip("[]") == urlsplit(url).hostname
    assert shown_url(shown) == shown


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run(judge, tmp_path):
    """(arguments of a run whose judge's URL has secrets, its folder, the server, the secrets)."""
    served, out = judge(), tmp_path / "run"
    address, secrets, _ = whole(served.url)
    arguments = [*SMALL, "--data", str(health_rows(tmp_path / "health.jsonl")), "--out", str(out)]
    arguments += ["--judge-url", address, *"--reward physician --validate-every 0".split()]
    return [*arguments, "--steps", "1", "--judge-max-tokens", "9"], out, served, secrets


def test_a_run_writes_no_secret_of_the_url_and_asks_for_it_again_when_resumed(
    run, capfd, monkeypatch
):
    arguments, out, served, secrets = run
    assert train.main(arguments) == 0
    saved = settings_in(out)
    assert saved["judge_url"].endswith("/v1?code=***&api-version=***")
    assert {body["max_completion_tokens"] for *_, body in served.seen} == {9}
    assert len(served.calls) == len(lines(out / "judge.jsonl"))
    files = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    said = "".join(capfd.readouterr())
    assert [secret for secret in secrets if secret.encode() in files or secret in said] == []

    monkeypatch.setattr(server, "_whole", {})  # as in another process
    resume, asked = ["--resume", "--steps", "2", "--out", str(out)], len(served.seen)
    error = refused(train.main, resume, capfd)
    assert "was written nowhere: give the whole --judge-url again" in error
    assert len(served.seen) == asked
    address = arguments[arguments.index("--judge-url") + 1]
    assert train.main([*resume, "--judge-url", address, "--judge-max-tokens", "64"]) == 0
    assert settings_in(out) == saved | {"steps": 2, "judge_max_tokens": 64}
    assert len(served.calls) == len(set(served.calls)) == len(lines(out / "judge.jsonl"))


@pytest.mark.parametrize(
    ("changes", "key", "sentence"),
    [
        (["--judge-url", "localhost:8000/v1"], "", "does not start with http"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "", "did not answer a first question"),
        ([], "sk-ключ", "copy the key again"),
        (["--judge-max-tokens", "0"], "", "1 up"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_a_model_is_loaded(
    run, capfd, monkeypatch, changes, key, sentence
):
    arguments, out, served, _ = run
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(train, "load_base", None)  # calling it would raise TypeError
    assert sentence in refused(train.main, [*arguments, *changes], capfd)
    assert not out.exists()
    assert served.seen == []
    assert unquote("pass%20word-77") not in "".join(capfd.readouterr())
