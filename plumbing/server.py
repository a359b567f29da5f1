"""A server that speaks the OpenAI protocol: its address, its secrets, and one call to it.

Secrets are the key in OPENAI_API_KEY, and what --judge-url may hold: a user and a password, or the
values of a query. They leave this process with a call, and in no other way.
"""

import asyncio
import base64
import email.utils
import html
import json
import math
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

import openai

from plumbing.errors import InputError, one_line
from rollout import Messages

TIMEOUT = 60.0  # seconds for one try, as a whole, and more for a longer answer:
PER_TOKEN = 0.05  # seconds; a server that writes fewer than 20 tokens a second is too slow
RETRIES = 6  # of a try that failed in a way that may pass
ATTEMPTS = 3  # at an answer that cannot be read
LONGEST_PAUSE = 60.0  # seconds; a server may ask for hours, and be ready long before
# All that `Server.ask` raises: time-outs, what the client says, and what it or we raise over broken
# JSON or over JSON of another shape.
FAILURES = (
    TimeoutError, openai.APIError, ValueError, LookupError, TypeError, AttributeError,
    RecursionError,
)  # fmt: skip

HIDDEN = "***"
_whole: dict[str, str] = {}  # shown URL: the same with its secrets; never leaves the memory


def api_key() -> str:
    """What OPENAI_API_KEY holds; "" if nothing. Raises InputError, which does not repeat it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(
            "OPENAI_API_KEY holds a blank or a character that is not ASCII, so it cannot be sent: "
            "copy the key again"
        )
    return key


def shown_url(url: str) -> str:
    """`url` as it may be written down: user, password and the values of its query are ***.

    The whole one is kept in memory for the calls. Raises InputError, which does not repeat `url`,
    if it is none.

    >>> shown_url("https://me:secret@host:8000/v1?code=secret")
    'https://***@host:8000/v1?code=***'
    """
    try:
        parts, problem = urlsplit(url), None
        if not (url.isprintable() and " " not in url and len(url) < 2000):
            problem = "holds what no URL can"
        elif parts.scheme not in ("http", "https"):
            problem = "does not start with http:// or https://"
        elif not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", parts.hostname or "", re.ASCII):
            problem = "names no host"
        elif parts.port == 0:
            problem = "has no usable port"
    except (ValueError, TypeError, AttributeError):  # of a port, of brackets; not even a text
        problem = "cannot be read"
    if problem:
        raise InputError(f"--judge-url {problem}: it is like http://localhost:8000/v1")
    _, user, host = parts.netloc.rpartition("@")
    query = "&".join(f"{name}={HIDDEN}" for name, _ in parse_qsl(parts.query, True))
    netloc = f"{HIDDEN}@{host}" if user else host
    shown = urlunsplit((parts.scheme, netloc, parts.path, query, ""))
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) > 3:
        shown = shown.replace(key, HIDDEN)
    if shown != url:
        _whole[shown] = url
    return shown


def may_pass(error: Exception) -> bool:
    """Is it worth a wait: is the server busy, broken, silent or away?"""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def pause(error: Exception, failed: int) -> float:
    """Seconds to wait after the `failed`-th failure: what Retry-After says, else twice the last.

    It is a number of seconds or a date (RFC 9110, 10.2.3); some servers send milliseconds.
    """
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif date := email.utils.parsedate_tz(said):
            seconds = email.utils.mktime_tz(date) - time.time()
        else:
            seconds = float(said)
    except (ValueError, OverflowError):
        seconds = math.nan
    if not seconds > 0:  # nothing said, nonsense, or a date that has passed
        seconds = min(0.5 * 2 ** (failed - 1), 8.0) * random.uniform(0.75, 1.0)
    return min(seconds, LONGEST_PAUSE)


@dataclass(frozen=True)
class Server:
    """A model on a server, and how patiently it is asked."""

    url: str  # as shown_url gives it
    model: str
    max_tokens: int = 8
    timeout: float = TIMEOUT
    retries: int = RETRIES

    @cached_property
    def key(self) -> str:
        return api_key()

    @cached_property
    def parts(self):
        """The whole URL, taken apart. Raises InputError if it is not known any more."""
        if HIDDEN in self.url and self.url not in _whole:
            what = f"--judge-url {self.url}: what is {HIDDEN} was written nowhere"
            raise InputError(f"{what}: give the whole --judge-url again")
        return urlsplit(_whole.get(self.url, self.url))

    @cached_property
    def basic(self) -> str:
        """User and password as HTTP's basic authentication sends them; "" without."""
        user = unquote(self.parts.netloc.rpartition("@")[0])
        return base64.b64encode(user.encode()).decode()

    @cached_property
    def secrets(self) -> list[str]:
        """Every form in which a server or a library may repeat a secret, the longest first."""
        user, _, password = self.parts.netloc.rpartition("@")[0].partition(":")
        found = {self.key, self.basic, unquote(user), unquote(password), user, password}
        found |= {value for _, value in parse_qsl(self.parts.query)}
        found = {secret for secret in found if len(secret) > 3}  # less hides nothing but words
        forms = (str, quote, html.escape, lambda s: repr(s)[1:-1], lambda s: json.dumps(s)[1:-1])
        return sorted({form(s) for s in found for form in forms}, key=len, reverse=True)

    def clean(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def told(self, error: Exception | None) -> str:
        """An error in a few words, without secrets."""
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"no whole answer within {self.limit:.0f} s"
        words = getattr(error, "message", None) or str(error) or type(error).__name__
        cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) else ""
        return one_line(ValueError(self.clean(f"{words}{cause}")))

    @property
    def limit(self) -> float:
        """Seconds for one try."""
        return self.timeout + PER_TOKEN * self.max_tokens

    def client(self) -> openai.AsyncOpenAI:
        """The connection, to be used in `async with`. Raises InputError."""
        path, host = self.parts.path, self.parts.netloc.rpartition("@")[2]
        try:
            return openai.AsyncOpenAI(
                base_url=urlunsplit((self.parts.scheme, host, path, "", "")),
                api_key=self.key or "no-key",  # a server of one's own wants none
                default_headers={"Authorization": f"Basic {self.basic}"} if self.basic else None,
                default_query=dict(parse_qsl(self.parts.query, True)),
                timeout=self.limit,
                max_retries=0,  # `ask` does; the client itself gives up at a long Retry-After
            )
        except (openai.OpenAIError, ValueError, ImportError, OSError) as error:
            # Of the environment: a proxy that cannot be used, certificates that are not there.
            raise InputError(f"no connection can be made: {self.told(error)}") from None

    async def ask(self, client: openai.AsyncOpenAI, messages: Messages) -> tuple[str, bool]:
        """(text, whether the budget cut it off). Raises one of FAILURES when no try is left.

        What may pass (429, 5xx, silence, dropped connections) is tried again after growing pauses,
        or when Retry-After says. Each try has `limit` seconds as a whole: a server may send a byte
        at a time, and the client's own time-out is for the next byte.
        """
        failed = unreadable = 0
        while True:
            try:
                async with asyncio.timeout(self.limit):
                    reply = await client.chat.completions.create(
                        messages=messages,
                        model=self.model,
                        temperature=0.0,
                        max_completion_tokens=self.max_tokens,
                    )
                return self.read(reply.choices)
            except FAILURES as error:
                waits = may_pass(error)
                failed, unreadable = failed + waits, unreadable + (not waits)
                refused = isinstance(error, openai.APIStatusError) and not waits
                if refused or failed > self.retries or unreadable == ATTEMPTS:
                    raise
                await asyncio.sleep(pause(error, failed) if waits else 0)

    def read(self, choices: Sequence) -> tuple[str, bool]:
        """A model that thinks until its budget is used up has said nothing: "".

        What it thought (reasoning_content) is no answer, whatever it says.
        """
        text, cut = choices[0].message.content, choices[0].finish_reason == "length"
        text = "" if text is None and cut else text
        if not isinstance(text, str):
            raise TypeError("an answer without text")
        return self.clean(text), cut
