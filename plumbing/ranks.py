"""Many GPUs: torchrun starts WORLD copies of a program, which take each step together.

The rest of the project does not know about it. It gets an engine that shares its prompts out
(`SharedEngine`) and an update that shares its questions out and adds the gradients up (`shared`).
All ranks know all rollouts and rewards of a step. Rank 0 alone writes the run's folder and speaks.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

from plumbing.errors import InputError, RankError

# torchrun tells each copy in the environment which rank it has. Alone: rank 0 of 1.
LAUNCHED = torch.distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1

SILENCE = 300.0  # seconds without a sign of life after which a rank counts as lost
BEAT = 1.0  # seconds between two signs


def join() -> None:
    """Meet the other ranks, if there are any. Each takes the GPU of its number on its machine.

    They meet by gloo, on GPUs too: what they exchange is little beside a step's minutes, and tests
    need no GPU. The time-out is long, for a rank that is slow, or that asks a judge; one that is
    gone is noticed by `watch`. gloo's threads must not outlive Python, so the groups end at exit,
    after vLLM's own. Raises InputError.
    """
    if WORLD == 1:
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise InputError(
            f"this machine has {gpus} GPUs, and every rank wants its own: "
            f"--nproc-per-node is at most {gpus}"
        )
    if gpus:
        torch.cuda.set_device(local)  # "cuda" means this one from now on
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=2))
    beats = torch.distributed.new_group(timeout=timedelta(seconds=SILENCE))
    leaving = threading.Event()
    watcher = threading.Thread(target=watch, args=(beats, leaving), daemon=True)
    watcher.start()
    weakref.finalize(join, leave, watcher, leaving)
    if RANK:  # rank 0 speaks for all, until the end
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def watch(beats, leaving: threading.Event) -> None:
    """A thread: meets the other ranks' every second, until the first of them leaves.

    A machine without power, and a process that is stopped, close no connection: nobody would notice
    before the two hours are over. A rank that samples, or waits for a judge, still gives its signs.
    After SILENCE this process ends, whatever it is doing; before, it may notice and end in order.
    """
    ends = torch.zeros(1)  # how many ranks are leaving
    while not ends.any():
        leaving.wait(BEAT)
        ends[0], began = leaving.is_set(), time.monotonic()
        try:
            torch.distributed.all_reduce(ends, group=beats)
        except RuntimeError:  # at once for one that died, after SILENCE for one that is silent
            if leaving.wait(max(0.0, SILENCE - (time.monotonic() - began))):
                return
            what = f"rank {RANK} has not heard of another one for {SILENCE:.0f} s"
            way_out = "every completed step is saved. To go on: the same command with --resume"
            print(f"stopped: {what}; {way_out} --out DIR", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait in a collective that nothing can end


def leave(watcher: threading.Thread, leaving: threading.Event) -> None:
    leaving.set()
    watcher.join()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exchange(collective: Callable, *given) -> None:
    """A collective of torch.distributed. A rank waits in it until all have come to it."""
    try:
        collective(*given)
    except RuntimeError as error:
        if RANK:  # rank 0 says it for all; the dead rank has said itself why it died, if it could
            raise SystemExit(1) from error
        raise RankError("another rank has died or does not answer") from error


def gather(value, alike: str = "") -> list:
    """`value` of every rank, in their order; gather(value)[0] is rank 0's. Raises RankError.

    With `alike`, a word for what it is, it has to be the same everywhere: else raises InputError.
    """
    values = [value] * WORLD
    if WORLD > 1:
        exchange(torch.distributed.all_gather_object, values, value)
    if alike and any(other != value for other in values):
        raise InputError(
            f"the ranks do not have the same {alike}: start all alike, with an --out that all "
            "machines share"
        )
    return values


def of_rank_0(function: Callable) -> Callable:
    """`function`, called on rank 0 alone; every rank gets its result."""

    def called(*given):
        return gather(function(*given) if RANK == 0 else None)[0]

    return function if WORLD == 1 else called


class SharedEngine:
    """An engine whose prompts are shared out: each rank's own engine takes every WORLD-th of them.

    All ranks call it alike, and all get all results. Rank r samples with the call's seed + r.
    """

    def __init__(self, engine):
        self.engine, self.context, self.tokenizer = engine, engine.context, engine.tokenizer
        self.encode, self.sleep, self.sync = engine.encode, engine.sleep, engine.sync

    def sample(self, prompts: Sequence, n: int, sampling, *, seed: int = 0, **options) -> list:
        room = self.context - sampling.max_new_tokens
        too_long = [p for p in prompts if len(self.encode(p)) > room]
        mine = too_long or prompts[RANK::WORLD]  # then every rank raises, and says the same
        return self._dealt(self.engine.sample(mine, n, sampling, seed=seed + RANK, **options))

    def score(self, prompts: Sequence, completions: Sequence, **options) -> list:
        mine = prompts[RANK::WORLD], completions[RANK::WORLD]
        return self._dealt(self.engine.score(*mine, **options))

    def _dealt(self, share: list) -> list:
        """One list again of what was dealt out: the first of each rank, then the second, ..."""
        shares = gather(share)
        return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place; by way of the CPU, where gloo is."""
    if WORLD > 1:
        flat = torch.nn.utils.parameters_to_vector(tensors).cpu()
        exchange(torch.distributed.all_reduce, flat)
        torch.nn.utils.vector_to_parameters(flat.to(tensors[0].device), tensors)


def shared(update: Callable) -> Callable:
    """`update(groups, rewards)` of a whole step, taken by all ranks together.

    Each rank gets every WORLD-th question with its rollouts. They are rank 0's for all: the answer
    checker gives up by the clock, and so not at the same pair everywhere.
    """

    def together(groups: Sequence, rewards: torch.Tensor) -> dict:
        groups, rewards = gather((groups, rewards) if RANK == 0 else None)[0]
        numbers = update(groups[RANK::WORLD], rewards[RANK::WORLD], add_up=add_up)
        name = "sampling/logp_difference_max"  # all others are sums or averages
        largest = [x for x in gather(numbers[name]) if x is not None]
        return numbers | {name: max(largest, default=None)}

    return update if WORLD == 1 else together
