"""Questions from files and from the hub, with errors that a person can act on."""

import json
from pathlib import Path

import huggingface_hub

from plumbing.errors import InputError

huggingface_hub.logging.set_verbosity_error()  # without a network: our sentence, not its retries


def read_jsonl(path: Path, needed: str) -> list[dict]:
    """The objects of a JSONL file, each with a non-empty text under `needed`.

    Raises InputError with the number of the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: texts hold U+2028
    except OSError as error:
        way_out = "give --data an existing JSONL file"
        raise InputError(f"cannot read {path}: {error.strerror}; {way_out}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give --data a JSONL file") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error}); mend or remove that line") from None
        text = row.get(needed) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            wanted = f'wants an object with a text "{needed}"'
            raise InputError(f"{where}: {wanted}; mend or remove that line")
        rows.append(row)
    if not rows:
        raise InputError(
            f"{path} holds no questions; each line wants an object with a text {needed!r}"
        )
    return rows


def hub_file(repository: str, name: str) -> Path:
    """A data file from the Hugging Face hub. Raises InputError."""
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # noqa: BLE001 -- offline, a proxy, a time-out: each raises its own
        raise InputError(
            f"cannot fetch {repository} from the Hugging Face hub ({type(error).__name__}): "
            f"connect to the network, or give the file with --data {name}"
        ) from None
