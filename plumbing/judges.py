"""The judge pi_J: the frozen anchor, or any server that speaks the OpenAI protocol.

A judge is a function from chats to texts, in their order; None where no answer came.
"""

import asyncio
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from plumbing.errors import InputError, JudgeError
from plumbing.server import FAILURES, RETRIES, TIMEOUT, Server, may_pass, shown_url
from rollout import Messages, Sampling
from rubrics import JUDGE_PROMPT, between_tags, verdict

CONCURRENCY = 32  # calls to a server at a time
REFUSALS = (401, 403, 404)  # no key, no right, no such model: no call will fare better
PROBE_TIMEOUT = 20.0  # seconds in which a server has to show that it is there
FIRST = between_tags(JUDGE_PROMPT, criterion="The response greets.", response="Hello!")


def anchor_judge(engine) -> Callable:
    """The frozen anchor as judge: greedy, and held to yes or no."""

    def judge(calls: Sequence[Messages]) -> list[str]:
        greedy = Sampling(temperature=0, max_new_tokens=8)
        answers = engine.sample(calls, 1, greedy, policy=False, choices=("yes", "no"))
        return [group[0].text for group in answers]

    return judge


def warn(sentence: str) -> None:
    print(f"WARNING: {sentence}", file=sys.stderr, flush=True)


def no_verdict(text: str, cut: bool) -> bool:
    """Has a model's thinking used up the budget before a verdict?"""
    return verdict(text) is None and (cut or not text.strip())


def larger_budget(server: Server) -> str:
    """What to do if so."""
    return (
        f"a model that thinks first has used up its {server.max_tokens} tokens: raise "
        "--judge-max-tokens (4096, say), or turn its thinking off on the server"
    )


def probe(url: str, model: str, max_tokens: int) -> None:
    """One question to the judge before anything is loaded. Raises InputError if it cannot judge.

    It is a question as those of a run, so that what the server does not take shows too. A server
    that is busy (429) is there.
    """
    server = Server(shown_url(url), model, max_tokens, PROBE_TIMEOUT, retries=4)

    async def ask():
        async with server.client() as client, asyncio.timeout(server.limit):
            return await server.ask(client, FIRST)

    where = f"the judge {model} at {server.url}"
    try:
        answer = asyncio.run(ask())
    except FAILURES as error:
        if getattr(error, "status_code", None) != 429:
            way_out = "start it, or correct --judge-url, --judge-model or OPENAI_API_KEY"
            what = f"{where} did not answer a first question ({server.told(error)})"
            raise InputError(f"{what}: {way_out}") from None
        warn(f"{where} is busy: {server.told(error)}")
    else:
        if no_verdict(*answer):
            warn(f"{where} answered a first question with nothing: {larger_budget(server)}")


def saved_answers(cache: Path) -> dict[str, str]:
    """{key: text} of the verdicts in the JSONL file `cache`.

    A line that a crash cut short is cut off, so that the next is not glued to it. Lines that are
    damaged in another way are skipped, and a warning counts them: their calls are made again.
    """
    content = cache.read_bytes() if cache.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(cache, len(whole))
    answers, damaged = {}, 0
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            key, text = row["key"], row["text"]
            if not isinstance(key, str) or verdict(text) is None:  # only verdicts are kept
                raise ValueError
            answers[key] = text
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            damaged += 1
    if damaged:
        warn(f"{cache}: {damaged} damaged lines skipped; what they held is asked again")
    return answers


def server_judge(
    url: str, model: str, cache: Path, *, max_tokens: int = 8, concurrency: int = CONCURRENCY,
    timeout: float = TIMEOUT, retries: int = RETRIES,
) -> Callable:  # fmt: skip
    """A judge behind any server that speaks the OpenAI protocol (see plumbing/server.py).

    Each verdict is added to the JSONL file `cache` at once, under a hash of judge and prompt, so
    that an interrupted run pays for none twice. Raises InputError for a URL or a key that cannot be
    used. The judge raises JudgeError if the server refuses us, or answers no call at all.
    """
    server = Server(shown_url(url), model, max_tokens, timeout, retries)
    where, warned = f"the judge {model} at {server.url}", False

    @functools.cache
    def kept() -> dict[str, str]:
        return saved_answers(cache)

    def key(messages: Messages) -> str:  # with the URL as shown: passwords change
        return hashlib.sha256(json.dumps([server.url, model, messages]).encode()).hexdigest()

    async def ask_all(wanted: dict[str, Messages]) -> tuple[dict, Exception | None]:
        """({key: (text, cut)}, the last failure)."""
        gate, answers, last, in_a_row = asyncio.Semaphore(concurrency), {}, None, 0

        async def ask(name: str, messages: Messages) -> None:
            nonlocal last, in_a_row
            async with gate:
                if in_a_row >= 2 * concurrency:
                    return  # it is down: to wait for every call's time-out would take hours
                try:
                    answers[name] = await server.ask(client, messages)
                except FAILURES as error:
                    last, status = error, getattr(error, "status_code", None)
                    if status in REFUSALS:
                        raise JudgeError(f"{where} refuses: {server.told(error)}") from None
                    # A prompt that is refused, or whose answer is no text, says nothing of others.
                    in_a_row += may_pass(error)
                    return
                in_a_row = 0
                keep(name, answers[name][0])

        async with server.client() as client:
            await asyncio.gather(*(ask(name, messages) for name, messages in wanted.items()))
        return answers, last

    def keep(name: str, text: str) -> None:
        if verdict(text) is not None:  # what cannot be read is asked again by a resumed run
            kept()[name] = text
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": name, "text": text}) + "\n")

    def judge(calls: Sequence[Messages]) -> list[str | None]:
        nonlocal warned
        names = [key(messages) for messages in calls]
        pairs = zip(names, calls, strict=True)
        wanted = {name: m for name, m in pairs if name not in kept()}  # equal ones are asked once
        fresh, last = asyncio.run(ask_all(wanted)) if wanted else ({}, None)
        found = {name: text for name, (text, _) in fresh.items()} | kept()
        if calls and not any(name in found for name in names):
            reason = server.told(last)
            raise JudgeError(f"{where} answered none of {len(wanted)} calls: {reason}")
        empty = sum(no_verdict(*answer) for answer in fresh.values())
        if empty > len(fresh) / 2 and not warned:
            warned = True
            what = f"{empty} of {len(fresh)} answers of {where} end before a verdict"
            warn(f"{what}: {larger_budget(server)}")
        return [found.get(name) for name in names]

    return judge
