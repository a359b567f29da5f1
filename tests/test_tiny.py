"""The stand-in model: small, fair, and made by the script that is here."""

import random
import re

import pytest

import make_tiny
from evaluate import correct
from make_tiny import draw, worked_sum
from plumbing.answers import boxed_answer
from plumbing.decoding import TransformersEngine
from plumbing.models import TINY_MODEL
from rollout import Sampling
from synthesize import Anchor, majority, synthesis, texts
from tasks import load_sums, sums_part


def test_worked_sums_without_slips_are_right():
    rng = random.Random(1)
    for _ in range(300):
        a, b = draw(rng)
        text = worked_sum(a, b, 0.0, rng)
        assert boxed_answer(text) == str(a + b)
        for x, y, one, s in re.findall(r": (\d)\+(\d)(\+1)?=(\d+)", text):
            assert int(x) + int(y) + bool(one) == int(s)


def test_slips_are_as_frequent_as_stated_and_hit_different_columns():
    rng = random.Random(2)
    right = [
        boxed_answer(worked_sum(a, b, 0.2, rng)) == str(a + b)
        for a, b in (draw(rng) for _ in range(3000))
    ]
    assert sum(right) / 3000 == pytest.approx(0.8**4, abs=0.03)
    truth = worked_sum(4728, 3590, 0.0, rng).splitlines()
    columns = [0] * 4
    for _ in range(2000):
        text = worked_sum(4728, 3590, 0.2, rng).splitlines()
        first = next((i for i in range(4) if text[i] != truth[i]), None)
        if first is not None:
            columns[first] += 1
    assert min(columns) > 100


def test_what_is_taught_is_neither_trained_on_nor_tested_on():
    rng = random.Random(3)
    assert all(sums_part(*draw(rng)) == "taught" for _ in range(500))


def test_the_model_is_small_and_in_safetensors(policy):
    model, tokenizer = policy
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" not in n) <= 2_000_000
    assert (TINY_MODEL / "model.safetensors").stat().st_size <= 5_000_000
    assert model.config.model_type == "llama"
    text = "any text, even 北京 and \x00, comes back: 12+3"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap is set on purpose


def test_it_learnt_imperfectly_and_synthesis_beats_the_majority_beats_one_answer(policy):
    """On the 500 sums that no text and no step ever showed it.

    Single-sample accuracy is 40 to 70% at temperature 1.
    """
    engine = TransformersEngine(*policy)
    questions, sampling = load_sums(None)[1], Sampling(max_new_tokens=64)
    prompts = [q.messages for q in questions]
    groups = engine.sample(prompts, 8, sampling, policy=False, seed=1)
    written = synthesis(questions, groups, Anchor(engine, sampling, seed=(2,)))
    single = correct(questions, [texts(group) for group in groups]).mean()
    voted = correct(questions, [[s.text] for s in majority(questions, groups)]).mean()
    synthesised = correct(questions, [[s.text] for s in written]).mean()
    assert 0.4 <= single <= 0.7
    assert single < voted < synthesised


def test_building_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_tiny.build(tmp_path / name, steps=(2, 1, 1))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    committed = {p.name for p in TINY_MODEL.iterdir()}
    assert committed == set(files)
    for name in ("tokenizer.json", "chat_template.jinja"):  # whatever the number of steps
        assert (tmp_path / "a" / name).read_bytes() == (TINY_MODEL / name).read_bytes(), name
