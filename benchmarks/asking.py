"""Texts of a model behind a server, asked for once and saved."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.errors import InputError

Call = tuple[tuple, list[dict]]  # (key, chat)


class Saved:
    """Texts by key, one a line of a JSONL file. Each is added as soon as it is there."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.texts = path.open("a+", encoding="utf-8"), {}
        self.file.seek(0)
        for row in map(json.loads, self.file):
            self.texts[tuple(row["key"])] = row["text"]

    def add(self, key: tuple, text: str) -> None:
        self.texts[key] = text
        self.file.write(json.dumps({"key": key, "text": text}) + "\n")
        self.file.flush()


def fill(args, saved: Saved, chains: Sequence[Sequence[Call]], what: str, **options) -> None:
    """Asks the server for what is missing. Raises InputError.

    A chain's calls go one after the other, so that a server can keep what their prompts share.
    --concurrency chains run at a time. `options` replace the sampling.
    """
    missing = [[call for call in chain if call[0] not in saved.texts] for chain in chains]
    options = {"temperature": args.temperature, "max_tokens": args.max_new_tokens} | options
    # Servers truncate by default. These two names are those of vLLM and llama.cpp.
    options |= {"top_p": 1.0, "extra_body": {"top_k": 0, "min_p": 0.0}}

    async def work() -> None:
        gate = asyncio.Semaphore(args.concurrency)
        async with openai.AsyncOpenAI(
            base_url=args.url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=3600,
            max_retries=1,
        ) as client:

            async def ask_chain(chain: Sequence[Call]) -> None:
                async with gate:
                    for key, chat in chain:
                        answer = await client.chat.completions.create(
                            model=args.model, messages=chat, **options
                        )
                        saved.add(key, answer.choices[0].message.content or "")
                        bar.update()

            async with asyncio.TaskGroup() as group:  # a failure ends all the others in order
                for chain in missing:
                    group.create_task(ask_chain(chain))

    if total := sum(map(len, missing)):
        with tqdm(total=total, desc=what, unit="text", smoothing=0.05) as bar:
            try:
                asyncio.run(work())
            except* openai.APIError as errors:
                way_out = "start it, or give --url and --model; what is written stays"
                failed = f"the server {args.url} failed ({errors.exceptions[0]})"
                raise InputError(f"{failed}: {way_out}") from None
