"""Why it works, counted: where a reference leaves the majority, and what was unsolvable before.

Nothing here reads a label. evaluate.py says what is right.
"""

import math
from collections.abc import Sequence

import torch

from plumbing.answers import boxed_answer, equal
from synthesize import answer_classes


def added(groups, references, others, right_o, right, right_other) -> dict:
    """What a reference adds to its rollouts, in numbers of questions (paper, section 5).

    `others`: what another aggregator made of the same rollouts. `right_o` (Q, G), `right` (Q,) and
    `right_other` (Q,) say which answers are right: 1, 0, or NaN. Only boxed answers count.

        voted         `others` has an answer
        differs       ... and the reference's is not the same
        other_right   ... and the other is right
        new           the reference has an answer that no rollout has
        hopeless      no rollout is right
        ..._right     and the reference is right there
        entropy       of the rollouts' answers, nats, mean over questions: 0 where all agree
    """
    answers, rivals = ([boxed_answer(s.text) for s in made] for made in (references, others))
    classes = [answer_classes(group) for group in groups]
    known = [[boxed_answer(c[0].text) for c in found] for found in classes]
    both, fresh = zip(answers, rivals, strict=True), zip(answers, known, strict=True)
    sets = {
        "differs": [b is not None and not equal(a, b) for a, b in both],
        "new": [a is not None and not any(equal(a, b) for b in found) for a, found in fresh],
        "hopeless": (right_o == 0).all(dim=1).tolist(),
    }
    counts = {name: sum(members) for name, members in sets.items()}
    counts["voted"] = sum(b is not None for b in rivals)
    for name, members in sets.items():
        counts[f"{name}_right"] = int((right[torch.tensor(members)] == 1).sum())
    counts["other_right"] = int((right_other[torch.tensor(sets["differs"])] == 1).sum())
    if right.isnan().any():  # no labels, so nothing is known to be right
        unknown = [name for name in counts if name.endswith("right")]
        counts |= dict.fromkeys([*unknown, "hopeless"])
    return counts | {"entropy": entropy(classes)}


def entropy(classes: Sequence[Sequence[Sequence]]) -> float | None:
    """Of the answers of each question, mean over questions with an answer, nats."""
    shares = [[len(c) / sum(map(len, found)) for c in found] for found in classes if found]
    each = [-sum(p * math.log(p) for p in row) for row in shares]
    return sum(each) / len(each) if each else None


def pass_at_k(right: torch.Tensor, k: int) -> torch.Tensor:
    """The chance that one of k samples is right, (Q,), from `right` (Q, n) with n >= k.

    1 - C(n - c, k) / C(n, k), which has no bias (Chen et al. 2021, arXiv 2107.03374).
    """
    n = right.shape[1]
    chances = [1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(dim=1)]
    return torch.tensor(chances, dtype=torch.float64)


def coverage(right: dict[str, torch.Tensor]) -> dict:
    """pass@k of the "initial" and the "trained" policy, from their `right` (Q, G), and whether the
    trained one solves what the initial one did not.

    Half of pi_0's rollouts decide which questions it does not solve; the other half is the control.
    """
    g = right["initial"].shape[1]
    ks, half = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= g], g // 2 or 1
    passed = {n: {f"{k}": float(pass_at_k(v, k).mean()) for k in ks} for n, v in right.items()}
    unsolved = right["initial"][:, :half].sum(dim=1) == 0  # (Q,)
    counts = {
        f"solved by {g - half} of {n}": int(v[unsolved, half:].any(dim=1).sum())
        for n, v in right.items()
    }
    what = f"{int(unsolved.sum())} questions that {half} of initial did not solve"
    return {"pass": passed, "coverage": {what: counts}}
