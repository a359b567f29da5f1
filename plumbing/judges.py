"""The judge pi_J: the frozen anchor, or any server that speaks the OpenAI protocol.

A judge is a function from chats to texts, in their order; None where no answer came.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import openai

from plumbing.errors import JudgeError
from rollout import Messages, Sampling
from rubrics import verdict

CONCURRENCY = 32  # calls to a server at a time
ATTEMPTS = 3  # at an answer that cannot be read; the client itself repeats what may pass
REFUSALS = (401, 403, 404)  # no key, no right, no such model: no call will fare better
# What the client or we raise over broken JSON, or over JSON of another shape.
UNREADABLE = (openai.APIError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def anchor_judge(engine) -> Callable:
    """The frozen anchor as judge: greedy, and held to yes or no."""

    def judge(calls: Sequence[Messages]) -> list[str]:
        greedy = Sampling(temperature=0, max_new_tokens=8)
        answers = engine.sample(calls, 1, greedy, policy=False, choices=("yes", "no"))
        return [group[0].text for group in answers]

    return judge


def server_judge(
    url: str, model: str, cache: Path, *, concurrency=CONCURRENCY, timeout=60.0, retries=6
) -> Callable:
    """A judge behind any server that speaks the OpenAI protocol.

    The client retries what may pass (429, 5xx, time-outs, dropped connections) with growing pauses,
    or as Retry-After says, up to 2 minutes. Each verdict is added to the JSONL file `cache` at
    once, under a hash of judge and prompt, so that an interrupted run pays for none twice. The key,
    in OPENAI_API_KEY, is written nowhere. Raises JudgeError if the server refuses us, or answers no
    call at all.
    """
    where = f"the judge {model} at {url}"

    def key(messages: Messages) -> str:
        return hashlib.sha256(json.dumps([url, model, messages]).encode()).hexdigest()

    async def ask_all(calls: list[Messages], answers: dict[str, str]) -> None:
        gate, problems, before = asyncio.Semaphore(concurrency), [], len(answers)
        api_key = os.environ.get("OPENAI_API_KEY") or "no-key"  # a server of one's own wants none

        def told(error) -> str:  # some servers repeat the key
            return str(error).replace(api_key, "***")[:300]

        async def ask(messages: Messages) -> None:
            async with gate:
                if len(problems) >= 2 * concurrency and len(answers) == before:
                    return  # it is down: to wait for every call's time-out would take hours
                for _ in range(ATTEMPTS):
                    try:
                        text = await complete(messages)
                    except (openai.APIStatusError, openai.APIConnectionError) as error:
                        problems.append(error)
                        if getattr(error, "status_code", 500) in REFUSALS:
                            raise JudgeError(f"{where} refuses: {told(error.message)}") from None
                        return
                    except UNREADABLE as error:
                        problems.append(error)
                        continue
                    if isinstance(text, str):
                        keep(key(messages), text, answers)
                        return

        async def complete(messages: Messages):
            settings = {"model": model, "temperature": 0.0, "max_completion_tokens": 8}
            reply = await client.chat.completions.create(messages=messages, **settings)
            return reply.choices[0].message.content

        options = {"api_key": api_key, "timeout": timeout, "max_retries": retries}
        async with openai.AsyncOpenAI(base_url=url, **options) as client:
            await asyncio.gather(*map(ask, calls))
        if calls and not any(key(messages) in answers for messages in calls):
            reason = told(problems[-1:])
            raise JudgeError(f"{where} answered none of {len(calls)} calls: {reason}")

    def keep(name: str, text: str, answers: dict[str, str]) -> None:
        answers[name] = text
        if verdict(text) is not None:  # what cannot be read is asked again by a resumed run
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": name, "text": text}) + "\n")

    def judge(calls: Sequence[Messages]) -> list[str | None]:
        text = cache.read_text(encoding="utf-8") if cache.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a crash cut the last line short; the next must not be glued to it
            os.truncate(cache, len(whole))  # ASCII, so characters are bytes
        answers = {row["key"]: row["text"] for row in map(json.loads, whole.splitlines())}
        wanted = {key(m): m for m in calls if key(m) not in answers}  # equal prompts are asked once
        asyncio.run(ask_all(list(wanted.values()), answers))
        return [answers.get(key(messages)) for messages in calls]

    return judge
