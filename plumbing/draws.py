"""Everything random in a run is a function of (seed, step), so a resumed run needs no random
state.
"""

import random
from collections.abc import Sequence


def seed_of(seed: int, *where) -> int:
    """A seed for one place in the run, like seed_of(0, step, "rollouts").

    Nothing random carries over from step to step: a resumed run draws what the unbroken one would.
    """
    return random.Random(f"{seed}/{where}").getrandbits(62)


def batch_of(questions: Sequence, size: int, step: int, seed: int) -> list:
    """The `size` questions of a step: consecutive ones of an endless list.

    Each pass over the data is in a new order, and takes every question once.
    """
    batch, orders = [], {}
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(questions))
        if epoch not in orders:
            order = random.Random(f"{seed}/epoch {epoch}")
            orders[epoch] = order.sample(range(len(questions)), len(questions))
        batch.append(questions[orders[epoch][i]])
    return batch
