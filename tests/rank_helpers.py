"""Real processes under the real torchrun, joined by gloo, and what each of them measures.

torchrun --nproc-per-node 2 tests/rank_helpers.py OUT    one rank of the comparison with one process
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from conftest import tiny_policy
from grpo_helpers import (
    ANSWERS,
    COMPLETIONS,
    FAST,
    PROMPTS,
    A,
    batch,
    in_float32,
    plain_logprobs,
    recorded,
    rollouts_of,
)
from plumbing import ranks
from plumbing.decoding import TransformersEngine
from rollout import Rollout, Sampling
from run_helpers import ROOT
from tasks import load_sums

NOT_KNOWN = float("nan")
# Three questions of two rollouts, and their rewards.
GROUPS = [
    rollouts_of([PROMPTS[0]] * 2, COMPLETIONS[:2]),
    rollouts_of([PROMPTS[2]] * 2, ANSWERS[2:4]),
    rollouts_of([PROMPTS[3]] * 2, ANSWERS[4:]),
]
R = torch.tensor([[1.0, 0.0], [0.25, 0.75], [1.0, 0.5]])
FIRST = torch.tensor([0.7])

# name: (advantages of batch()'s first rollouts, each a question of its own; fields of GRPOConfig)
STEPS = {
    "one and two micro-batches on two ranks": (A, {"beta": 0.05, "token_budget": 20}),
    "two micro-batches on a rank, by sequence": (
        A,
        {"beta": 0.05, "token_budget": 1, "loss": "sequence", "temperature": 0.7},
    ),
    "one micro-batch a rank": (A, {"beta": 0.05, "token_budget": 1000}),
    "one question, so a rank without": (FIRST, {"beta": 0.05, "token_budget": 1000}),
    "all but one advantage zero, so a rank without": (
        torch.tensor([0, 0, 0.4, 0]),
        {"beta": 0.0, "token_budget": 1},
    ),
    "all advantages zero": (torch.zeros(4), {"beta": 0.0, "token_budget": 1}),
    "cut-off rollouts masked": (A, {"beta": 0.05, "token_budget": 1, "mask_truncated": True}),
    "two optimizer steps": (
        A,
        {"beta": 0.05, "token_budget": 20, "updates_per_step": 2, "importance_cap": 2.0},
    ),
    "not finite on one rank": (
        torch.tensor([1.2, float("nan"), 0.4, -0.9]),
        {"beta": 0.0, "token_budget": 1},
    ),
}
# name: (rewards of GROUPS, fields of GRPOConfig)
UPDATES = {
    "rewards, KL in the loss": (R, {"beta": 0.05, "token_budget": 20}),
    "rewards, KL in the reward": (R, {"beta": 0.3, "kl": "reward", "loss": "sequence"}),
    "a question not known, so a rank without": (
        torch.tensor([[1.0, 0.0], [0.25, NOT_KNOWN], [1.0, 0.5]]),
        {"beta": 0.3, "kl": "reward", "updates_per_step": 2},
    ),
    "nothing known": (torch.full((3, 2), NOT_KNOWN), {"beta": 0.05}),
}
STEPS_TAKEN = dict.fromkeys([*STEPS, *UPDATES], 1) | {
    "all advantages zero": 0,
    "not finite on one rank": 0,
    "two optimizer steps": 2,
    "a question not known, so a rank without": 2,
    "nothing known": 0,
}


def policy_step(model, optimizer, groups, A, cfg, token_logprobs, add_up=lambda tensors: None):
    """grpo.policy_step in the form of grpo.update: A (Q, G) in the place of rewards."""
    rollouts = [o for group in groups for o in group]
    return grpo.policy_step(model, optimizer, rollouts, A.flatten(), cfg, token_logprobs, add_up)


def shared_step(model, update, groups, values, options):
    """(numbers, gradients) of one step that all ranks take. Only rank 0 has the right rollouts."""
    cfg = grpo.GRPOConfig(**{"importance_cap": None} | options)
    if ranks.RANK:
        groups, values = [[Rollout("", [5], [0.0], "stop", [4])]] * 2, torch.rand(2, 1)

    def step(optimizer):
        logprobs = in_float32(FAST) if cfg.kl == "reward" else FAST

        def of_share(groups, values, **sums):
            return update(model, optimizer, groups, values, cfg, logprobs, **sums)

        return ranks.shared(of_share)(groups, values)

    return recorded(model, step, lr=0.1)


def measure() -> dict:
    """What this rank, or the only process, computes: it is to be the same on any number of them."""
    model, tokenizer = tiny_policy()
    model.double()
    start = {name: p.detach().clone() for name, p in model.state_dict().items()}
    found = {}
    with torch.no_grad():
        rows = [(o, plain_logprobs(model, o).tolist()) for o in batch()]
    singles = [[Rollout("", o.ids, x, o.finish_reason, o.prompt_ids)] for o, x in rows]
    cases = [
        (name, policy_step, singles[: len(a)], a[:, None], o) for name, (a, o) in STEPS.items()
    ]
    cases += [(name, grpo.update, GROUPS, r, o) for name, (r, o) in UPDATES.items()]
    for name, update, groups, values, options in cases:
        model.load_state_dict(start)
        numbers, gradients = shared_step(model, update, groups, values, options)
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        found[name] = {"numbers": numbers, "gradients": gradients, "weights": weights}
    model.load_state_dict(start)
    engine = TransformersEngine(model.float(), tokenizer)
    engine = engine if ranks.WORLD == 1 else ranks.SharedEngine(engine)
    prompts = [q.messages for q in load_sums(None)[1][:5]]
    greedy = engine.sample(prompts, 2, Sampling(0, 20))
    found["greedy"] = [[o.ids for o in group] for group in greedy]
    found["scores"] = engine.score(prompts, [group[0].ids for group in greedy])
    # On two ranks, one prompt each.
    twice = engine.sample([prompts[0]] * 2, 2, Sampling(max_new_tokens=30), seed=3)
    found["twice"] = [[o.ids for o in group] for group in twice]
    # Fewer prompts than ranks.
    found["few"] = len(engine.sample(prompts[:1], 3, Sampling(max_new_tokens=4)))
    return found


def torchrun(count, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, **options)


def finished(process, timeout=300):
    """(exit status, stdout, stderr) of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run(count, *arguments, program=ROOT / "train.py"):
    """(stdout, stderr) of a whole run on several ranks, which is to succeed."""
    status, out, err = finished(torchrun(count, program, *arguments))
    assert status == 0, err
    return out, err


if __name__ == "__main__":
    ranks.join()
    torch.save(measure(), Path(sys.argv[1]) / f"{ranks.RANK}.pt")
