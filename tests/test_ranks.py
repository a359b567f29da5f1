"""Several ranks take the step that one would. They are real processes under the real torchrun."""

from pathlib import Path

import pytest
import torch

from grpo import micro_batches
from grpo_helpers import batch
from plumbing import checks, ranks
from plumbing.errors import InputError
from rank_helpers import GROUPS, STEPS, STEPS_TAKEN, UPDATES, finished, measure, torchrun
from run_helpers import ROOT

MEASURE = Path(__file__).with_name("rank_helpers.py")


@pytest.fixture(scope="module", params=[2, 3])
def parts(request, tmp_path_factory):
    """What each of several ranks has measured."""
    out = tmp_path_factory.mktemp("ranks")
    status, _, err = finished(torchrun(request.param, MEASURE, out))
    assert status == 0, err
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return measure()


# -------------------------------------------------------------------------------------- one step


def test_the_cases_are_what_their_names_say():
    def cuts(count, budget):
        shares = [batch()[rank::count] for rank in range(count)]
        return [len(list(micro_batches(share, budget))) for share in shares]

    assert cuts(2, 20) == [1, 2]
    assert cuts(2, 1) == [2, 2]
    assert cuts(3, 1) == [2, 1, 1]
    assert cuts(2, 1000) == [1, 1]
    (unknown,) = UPDATES["a question not known, so a rank without"][0].isnan().any(dim=1).nonzero()
    assert unknown.tolist() == [1]  # all that rank 1 gets, of two ranks and of three
    assert len(GROUPS[1::2]) == len(GROUPS[1::3]) == 1


@pytest.mark.parametrize("name", [*STEPS, *UPDATES])
def test_ranks_take_the_step_that_one_would(parts, alone, name):
    """Through policy_step with advantages, and through grpo.update with groups and rewards.

    Rank 0's rollouts and rewards are used by all: the others were given different ones.
    """
    expected = alone[name]
    assert len(expected["gradients"]) == STEPS_TAKEN[name]
    for part in parts:  # every rank, not rank 0 alone
        assert len(part[name]["gradients"]) == len(expected["gradients"])
        for ours, theirs in zip(part[name]["gradients"], expected["gradients"], strict=True):
            assert theirs.norm() > 0
            assert (ours - theirs).norm() / theirs.norm() < 1e-6
        assert part[name]["numbers"].keys() == expected["numbers"].keys()
        for number, value in expected["numbers"].items():
            near = None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)
            assert part[name]["numbers"][number] == near, number
        torch.testing.assert_close(part[name]["weights"], expected["weights"], rtol=1e-6, atol=1e-9)
        assert torch.equal(part[name]["weights"], parts[0][name]["weights"])  # to the last bit


def test_ranks_share_out_prompts_and_scores(parts, alone):
    for part in parts:
        assert part["greedy"] == alone["greedy"]
        torch.testing.assert_close(part["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
        assert part["few"] == 1


def test_ranks_draw_with_seeds_of_their_own_and_know_all_draws(parts, alone):
    first, second = parts[0]["twice"]
    assert first != second  # one prompt, asked on two ranks
    assert all(part["twice"] == parts[0]["twice"] for part in parts)
    assert alone["twice"][0] != alone["twice"][1]


# ------------------------------------------------------------------------------ what they refuse

LEFT_ALONE = """
import os, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import torch
from plumbing.errors import RankError
from plumbing.ranks import RANK, add_up, gather
torch.distributed.init_process_group("gloo")
assert gather(RANK * "x") == ["", "x"]
if RANK:
    os._exit(7)
for call in (lambda: gather(1), lambda: add_up([torch.ones(3)])):
    try:
        call()
    except RankError as error:
        print("SAID", error, flush=True)
"""


def test_a_rank_that_is_left_alone_says_so(tmp_path):
    script = tmp_path / "one_dies.py"
    script.write_text(LEFT_ALONE.format(root=str(ROOT)))
    _, out, _ = finished(torchrun(2, script), timeout=60)
    assert out.count("SAID another rank has died") == 2


def test_more_ranks_than_gpus_and_split_engines_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="at most 2"):
        ranks.join()
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: True)
    for given in (
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"distributed_executor_backend": "uni"},
    ):
        with pytest.raises(InputError, match="start without torchrun"):
            checks.check_settings({"engine": "vllm", "engine_args": given})
