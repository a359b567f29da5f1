"""Errors that a person can act on, and how each of them ends a program."""

import sys
from collections.abc import Callable

import torch

NOT_FINITE = "the model's logits are not finite: lower --lr, or raise --beta"


class InputError(Exception):
    """Something a person can put right: one sentence, with the way out. Exit status 2."""


class EngineError(RuntimeError):
    """An engine failed in the middle of a run; the last checkpoint is whole. Exit status 1."""


class JudgeError(RuntimeError):
    """A judge that refuses, or that answers nothing at all. Exit status 1."""


class RankError(RuntimeError):
    """Another rank has died, and this one cannot go on without it. Exit status 1."""


def one_line(error: Exception) -> str:
    """An error of a library, short enough to end a sentence with."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def exit_status(program: str, work: Callable, resume: Callable, memory: str = "") -> int:
    """Run `work` and return the program's exit status, with one sentence on stderr if it fails.

    `resume` is called after a failure and says how to go on; it may return "". `memory` says what
    needs less GPU memory.
    """
    try:
        work()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # to go on would end in the same place
        print(f"{program}: stopped: {error}", file=sys.stderr)
        return 1
    except (EngineError, JudgeError, RankError) as error:
        print(f"{program}: stopped: {error}{resume()}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"{program}: stopped: out of GPU memory{memory}{resume()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: stopped: interrupted{resume()}", file=sys.stderr)
        return 130
    return 0
