"""What is refused: one sentence with the way out, status 2, and nothing written."""

import importlib.util

import pytest

import train
from plumbing import checks
from plumbing.engines import installed_engine
from plumbing.errors import InputError
from plumbing.settings import eval_sampling, settle
from recipes import cat_sft
from run_helpers import SMALL, refused


def sft(arguments):
    return train.main(arguments, cat_sft.METHOD)


def test_an_existing_run_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "1", "--out", str(out)]) == 0
    before = (out / "metrics.jsonl").read_bytes()
    assert "--resume" in refused(train.main, ["--out", str(out)], capsys)
    assert (out / "metrics.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    assert "exists" in refused(train.main, ["--out", str(tmp_path / "file")], capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--group-size 1", "2 up"),
        ("--steps 0", "1 up"),
        ("--steps x", "1 up"),
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0"),
        ("--lr inf", "above 0"),
        ("--beta -1", "0 up"),
        ("--seed 99999999999999999999", "0 up"),
        ("--temperature 0", "above 0"),
        ("--lora-rank 7", "invalid choice"),
        ("--lora-rank 0", "invalid choice"),
        ("--task nothing", "invalid choice"),
        ("--aggregator nothing", "invalid choice"),
        ("--prompts-per-step 5000", "more than there are questions"),
        ("--task jsonl --model tiny", "--data"),
        ("--task jsonl --model tiny --data nowhere.jsonl", "cannot read"),
        ("--model nobody/nothing", "cannot load the model"),
        ("--max-new-tokens 4000", "context"),
        ("--group-size 400 --max-new-tokens 100", "context"),
        ("--resume", "--out"),
        ("--resume --out nowhere", "holds no run"),
        ("--out /proc/nowhere/run", "cannot write"),
        ("--temperature 2.1", "at most 2"),
        ("--engine nothing", "invalid choice"),
        ("--engine-args [1]", "not a JSON object"),
        ("--engine-args {", "not a JSON object"),
        ('--engine transformers --engine-args {"max_num_seqs":1}', "are for vLLM"),
        ('--engine transformers --engine-args {"enable_sleep_mode":true}', "are for vLLM"),
        ('--eval-sampling {"top_q":1}', "takes numbers for"),
        ('--eval-sampling {"top_k":"many"}', "takes numbers for"),
        ('--eval-sampling {"top_p":0}', "above 0"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(
    arguments, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(train.main, arguments.split(), capsys)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "a refused command leaves nothing behind"


def test_labels_of_the_final_table_cannot_leak(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--split test-time --validate-every 1".split()
    assert "labels would be those of the final table" in refused(train.main, arguments, capsys)


@pytest.mark.parametrize("flag", ["--beta", "--kl", "--updates-per-step", "--length-limit"])
def test_the_recipe_does_not_take_what_it_does_not_read(flag, capsys, tmp_path, monkeypatch):
    """They do nothing in CaT-SFT."""
    monkeypatch.chdir(tmp_path)
    value = "loss" if flag == "--kl" else "1"
    error = refused(sft, [flag, value], capsys)
    assert f"unrecognized arguments: {flag} {value}" in error
    with pytest.raises(SystemExit) as stop:
        sft(["--help"])
    assert stop.value.code == 0
    assert f"{flag} " not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_auto_says_so_and_asking_for_it_is_refused(capsys, tmp_path):
    assert installed_engine()[0] == "transformers"
    assert "not installed" in installed_engine()[1]
    arguments = ["--engine", "vllm", "--out", str(tmp_path / "run")]
    assert "requirements-gpu.txt" in refused(train.main, arguments, capsys)


def test_sleeping_without_a_gpu_is_refused_with_the_way_out(monkeypatch):
    """Where vLLM is installed, which it need not be here."""
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())
    given = {"engine": "vllm", "engine_args": {"enable_sleep_mode": True}}
    with pytest.raises(InputError, match=r"no GPU here: leave it out of --engine-args"):
        settle(given)


def test_the_final_table_samples_as_the_paper_does_for_its_models():
    """The paper's table of hyper-parameters; a part that is given goes before it."""
    table = {
        "google/gemma-3-4b-it": (1.0, 64, 0.95),
        "Qwen/Qwen3-4B": (0.7, 20, 0.8),
        "meta-llama/Llama-3.1-8B-Instruct": (0.7, 50, 0.9),
        "tiny": (1.3, 0, 1.0),
        "/home/llama/mine": (1.3, 0, 1.0),
    }
    for name, values in table.items():
        assert tuple(eval_sampling({}, name, 1.3).values()) == values
    changed = {"temperature": 0.7, "top_k": 5, "top_p": 0.8}
    assert eval_sampling({"top_k": 5}, "Qwen/Qwen3-4B", 1.3) == changed
