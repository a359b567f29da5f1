"""The real vLLM on a CPU against transformers: one tiny model, one adapter, in float32."""

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed (docs/development.md says how to test it without a GPU)"
)

from conftest import shift, truncated
from plumbing.decoding import TransformersEngine
from plumbing.engines import installed_engine
from plumbing.errors import InputError
from plumbing.logprobs import token_logprobs
from plumbing.models import TINY_MODEL, add_lora, load_base
from rollout import Rollout, Sampling, VLLMEngine
from run_helpers import ROOT
from synthesize import synthesis_messages
from tasks import load_sums
from vllm_helpers import MEMORY, TOLERANCE, worst_difference

PROMPTS = [q.messages for q in load_sums(None)[1][:8]]
# Longer than two blocks of the prefix cache, so that stale or foreign blocks would be used.
LONG = synthesis_messages(
    ["ones: 1+2=3\ntens: 4+5=9\nhundreds: 0+0=0\nthousands: 1+1=2\n\\boxed{2093}"] * 8
)
GREEDY = Sampling(0, 48)


@pytest.fixture(scope="module")
def engines():
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=16, seed=0)
    shift(model, 1)
    return VLLMEngine(model, tokenizer, MEMORY), TransformersEngine(model, tokenizer)


@pytest.fixture(autouse=True)
def same_adapter(engines):
    """Every test starts with the same weights in both engines, whatever the one before left."""
    shift(engines[0].model, 1)
    engines[0].sync()


def texts(groups):
    return [[o.text for o in group] for group in groups]


def trainers(model, o, temperature=1.0):
    """[[log-probability of each token]] of a rollout, by the trainer."""
    with torch.no_grad():
        return token_logprobs(model, [o], temperature)[0].tolist()


@pytest.mark.parametrize("policy", [True, False])
def test_greedy_text_equals_transformers(engines, policy):
    vllm, reference = (texts(e.sample(PROMPTS, 2, GREEDY, policy=policy)) for e in engines)
    assert vllm == reference
    assert vllm[0][0] == vllm[0][1]


def test_the_adapter_changes_what_the_policy_says_and_not_what_the_anchor_says(engines):
    """Both are asked in turns, so that one's cached prefixes could leak into the other's."""
    shift(engines[0].model, 7, scale=0.2)
    engines[0].sync()
    long, greedy = [LONG] * 2, Sampling(0, 20)
    for _ in range(2):
        for policy in (True, False):
            o = engines[0].sample(long, 1, greedy, policy=policy)
            expected = engines[1].score(long, [group[0].ids for group in o], policy=policy)
            assert worst_difference([group[0].logprobs for group in o], expected) < TOLERANCE / 100
    a, b = (engines[0].sample(PROMPTS, 1, greedy, policy=policy) for policy in (True, False))
    assert texts(a) != texts(b)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollouts_carry_ids_and_the_logprobs_that_the_trainer_computes(engines, temperature):
    groups = engines[0].sample(PROMPTS, 3, Sampling(temperature, 60), seed=2)
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    reasons = set()
    for group, messages in zip(groups, PROMPTS, strict=True):
        for o in group:
            assert o.prompt_ids == engines[1].encode(messages)
            assert all(type(i) is int for i in o.ids)
            assert o.finish_reason == ("stop" if o.ids[-1] in engines[0].stop_ids else "length")
            assert not any(i in engines[0].stop_ids for i in o.ids[:-1])
            assert o.text == engines[0].tokenizer.decode(o.ids, skip_special_tokens=True)
            reasons.add(o.finish_reason)
            expected = trainers(engines[0].model, o, temperature)
            assert worst_difference([o.logprobs], expected) < TOLERANCE / 100
    assert len({tuple(o.ids) for group in groups for o in group}) > len(PROMPTS)
    cut = engines[0].sample(PROMPTS[:1], 1, Sampling(max_new_tokens=3))[0][0]
    assert (cut.finish_reason, len(cut.ids)) == ("length", 3)
    assert "stop" in reasons


def test_first_tokens_follow_the_models_distribution(engines):
    n = 1000
    (group,) = engines[0].sample(PROMPTS[:1], n, Sampling(max_new_tokens=1), seed=1)
    with torch.no_grad():
        logits = engines[0].model(input_ids=torch.tensor([group[0].prompt_ids])).logits[0, -1]
    p = torch.softmax(logits.double(), -1)
    drawn = torch.tensor([o.ids[0] for o in group])
    counts = torch.bincount(drawn, minlength=len(p)).double()
    z = (counts - n * p) / (n * p * (1 - p)).sqrt().clamp(min=1)
    assert z.abs().max() < 5


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (4, 0.9)])
def test_evaluation_samples_come_from_the_truncated_distribution(engines, top_k, top_p):
    """Temperature, then top-k, then top-p, as the transformers engine does.

    Log-probabilities are of what is left.
    """
    sizes, sampling = [], Sampling(2.0, 12, top_k, top_p)
    for o in engines[0].sample(PROMPTS[:1], 20, sampling, seed=3)[0]:
        with torch.no_grad():
            whole = torch.tensor([o.prompt_ids + o.ids])
            logits = engines[0].model(input_ids=whole).logits[0].double()
        rows = logits[len(o.prompt_ids) - 1 : -1]
        for token, logprob, row in zip(o.ids, o.logprobs, rows, strict=True):
            left = truncated(row, 2.0, top_k, top_p)
            assert math.exp(logprob) == pytest.approx(left[token], rel=1e-3)
            sizes.append(len(left))
    assert 1 < max(sizes) < 100


def test_the_same_seed_gives_the_same_rollouts_and_another_gives_others(engines):
    sampling = Sampling(max_new_tokens=20)
    first, again, other = (
        texts(engines[0].sample(PROMPTS, 2, sampling, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("policy", [True, False])
def test_score_equals_transformers(engines, policy):
    groups = engines[0].sample(PROMPTS, 1, Sampling(max_new_tokens=30), seed=4)
    completions = [o.ids for group in groups for o in group]
    # Unlikely tokens too.
    completions[0] = engines[0].tokenizer.encode("ones: 9+9=3", add_special_tokens=False)
    vllm, reference = (e.score(PROMPTS, completions, policy=policy) for e in engines)
    assert [len(s) for s in vllm] == [len(c) for c in completions]
    assert worst_difference(vllm, reference) < TOLERANCE / 100


def test_fifty_swaps_leave_one_adapter_and_always_the_newest(engines):
    vllm, reference = engines
    assert len(vllm.encode(LONG)) > 2 * 128
    completion = vllm.tokenizer.encode("tens: 9+9=3", add_special_tokens=False)
    seen = set()
    for swap in range(50):
        shift(vllm.model, 100 + swap, scale=0.05)
        vllm.sync()
        assert len(vllm.llm.llm_engine.list_loras()) == 1
        # Sampling goes through the prefix cache. Hot, so that no token is certain, whatever the
        # weights.
        o = vllm.sample([LONG], 1, Sampling(2.0, 6), seed=swap)[0][0]
        expected = trainers(vllm.model, o, 2.0)
        assert worst_difference([o.logprobs], expected) < TOLERANCE / 100, swap
        scores = (e.score([LONG], [completion]) for e in (vllm, reference))
        assert worst_difference(*scores) < TOLERANCE / 100
        seen.add(round(sum(expected[0]), 3))
    assert len(seen) > 30  # the weights did change


def test_choices_are_the_only_answers(engines):
    sampling = Sampling(max_new_tokens=8)
    (group,) = engines[0].sample(PROMPTS[:1], 20, sampling, seed=1, choices=("yes", "no"))
    assert {o.text for o in group} == {"yes", "no"}


def test_a_prompt_that_does_not_fit_is_refused(engines):
    with pytest.raises(InputError, match="do not fit"):
        engines[0].sample(PROMPTS[:1], 1, Sampling(max_new_tokens=engines[0].context))


def test_auto_takes_the_engine_that_is_installed_for_this_device():
    assert installed_engine()[0] == "vllm"


SPLIT = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
if __name__ == "__main__":  # its workers import this file
    from test_vllm import GREEDY, MEMORY, PROMPTS, TINY_MODEL, Sampling, VLLMEngine
    from test_vllm import add_lora, load_base, shift
    base, tokenizer = load_base(str(TINY_MODEL))
    model = add_lora(base, rank=16, seed=0)
    shift(model, 1)
    engine = VLLMEngine(model, tokenizer, MEMORY | {{"tensor_parallel_size": 2}})
    sampling = Sampling(max_new_tokens=20)
    drawn = [engine.sample(PROMPTS, 2, sampling, seed=seed) for seed in (1, 1, 2)]
    drawn = [[[(o.ids, o.logprobs) for o in group] for group in groups] for groups in drawn]
    greedy = [[o.ids for o in group] for group in engine.sample(PROMPTS, 1, GREEDY)]
    devices = engine.llm.llm_engine.vllm_config.parallel_config.world_size
    open(sys.argv[1], "w").write(json.dumps([drawn, greedy, devices]))
"""


def test_an_engine_split_over_two_devices_gives_the_same_and_obeys_seeds(engines, tmp_path):
    """What is given reaches vLLM as it is.

    The workers are processes of their own, which a seed has to reach.
    """
    script = tmp_path / "split.py"
    script.write_text(SPLIT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    subprocess.run([sys.executable, script, tmp_path / "out.json"], check=True, timeout=400)
    (first, again, other), greedy, devices = json.loads((tmp_path / "out.json").read_text())
    assert devices == 2
    assert first == again != other
    assert greedy == [[o.ids for o in group] for group in engines[1].sample(PROMPTS, 1, GREEDY)]
    for group, messages in zip(first, PROMPTS, strict=True):
        for ids, logprobs in group:
            o = Rollout("", ids, logprobs, "stop", engines[1].encode(messages))
            assert worst_difference([logprobs], trainers(engines[1].model, o)) < TOLERANCE / 100
