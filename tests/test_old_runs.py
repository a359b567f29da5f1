"""Runs of the version before this one: they are shown, compared, evaluated and resumed.

A run of that version differs from ours in its config.json alone. It had nine settings more.
"""

import json
import shutil

import pytest

import evaluate
import train
from plumbing import folder
from recipes import cat_sft
from run_helpers import SMALL, adapter, lines, metrics, refused, same, settings_in

# As that version wrote its defaults.
FORMER = {
    "method": "grpo", "clip": 0.2, "importance_cap": 2.0, "mask_truncated": False,
    "judge": "anchor", "judge_model": None, "judge_concurrency": 32, "sleep": False,
    "validation_questions": 100, "patience": 5,
}  # fmt: skip


def aged(run, out, **changes):
    """A copy of a run of ours, as the former version would have left it."""
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    config["settings"] |= FORMER | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def run_of(out, *arguments, method=None):
    assert train.main([*SMALL, *arguments, "--out", str(out)], method) == 0
    return out


def evaluated(*arguments):
    return evaluate.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    return run_of(tmp_path_factory.mktemp("straight") / "run", "--steps", "6")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Three steps of the same."""
    return run_of(tmp_path_factory.mktemp("half") / "run", "--steps", "3")


@pytest.fixture(scope="module")
def imitated(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    return run_of(out, "--steps", "2", method=cat_sft.METHOD)


def test_an_old_run_resumes_bit_for_bit(half, straight, tmp_path):
    out = aged(half, tmp_path / "old")
    assert train.main(["--resume", "--steps", "6", "--out", str(out)]) == 0
    assert same(adapter(out), adapter(straight))
    assert metrics(out) == metrics(straight)
    assert len(lines(out / "rollouts.jsonl")) == 24
    assert settings_in(out) == settings_in(straight)  # from now on it is a run of this version


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 0.1),
        ("importance_cap", None),
        ("mask_truncated", True),
        ("validation_questions", 50),
        ("patience", 3),
    ],
)
def test_a_value_that_this_version_does_not_have_is_not_resumed(
    name, value, half, tmp_path, capsys
):
    """To go on with ours would be another run in the same folder."""
    out = aged(half, tmp_path / "old", **{name: value})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train.main(["--resume", "--steps", "6", "--out", str(out)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    ours = FORMER[name]
    assert f"was started with {name} {value}, which is always {ours} in this version" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_old_sft_run_is_resumed_by_the_recipe(imitated, tmp_path, capsys):
    out = aged(imitated, tmp_path / "old", method="sft")
    arguments = ["--resume", "--steps", "3", "--out", str(out)]
    error = refused(train.main, arguments, capsys)
    assert "was started by recipes/cat_sft.py: resume it with that program" in error
    assert len(metrics(out)) == 2
    assert train.main(arguments, cat_sft.METHOD) == 0
    whole = run_of(tmp_path / "whole", "--steps", "3", method=cat_sft.METHOD)
    assert metrics(out) == metrics(whole)
    assert same(adapter(out), adapter(whole))


def test_a_run_of_a_version_with_fewer_settings_can_be_resumed(half, tmp_path):
    shutil.copytree(half, tmp_path / "older")
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    del config["settings"]["split"], config["settings"]["method"]
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", "--out", str(tmp_path / "older")]) == 0


def test_an_old_run_is_shown_and_evaluated_like_its_twin(half, tmp_path, capsys):
    old, outs, shown = aged(half, tmp_path / "old"), [], []
    for run in (half, old):
        capsys.readouterr()
        assert evaluated("show", run, 1) == 0
        shown.append(capsys.readouterr().out)
        outs.append(tmp_path / f"evaluation of {run.name}")
        arguments = ["--aggregators", "majority", "--sizes", "2", "--out", outs[-1]]
        assert evaluated("--adapter", run, *arguments) == 0
    assert shown[0] == shown[1]
    ours, theirs = (json.loads((out / "results.json").read_text()) for out in outs)
    assert ours["rows"] == theirs["rows"]
    assert ours["trained"] == theirs["trained"] == settings_in(half)
    assert settings_in(outs[0]) == settings_in(outs[1])


def rows_of(capsys, *runs):
    """{name of a row: its number of runs} of the table of runs."""
    capsys.readouterr()
    assert evaluated("table", *runs) == 0
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    return {cell[0].strip("| "): cell[1].strip() for cell in cells[2:]}


def test_old_and_new_runs_of_one_method_are_one_row(half, imitated, tmp_path, capsys):
    other = run_of(tmp_path / "seed 1", "--steps", "3", "--seed", "1")
    old = aged(other, tmp_path / "old")
    both = {"initial policy": "2", "majority of 4, at inference": "2"}
    both |= {"synthesis of 4, at inference": "2", "trained: CaT": "2"}
    both |= {"synthesis of 4 on trained: CaT": "2"}
    assert rows_of(capsys, half, old) == rows_of(capsys, half, other) == both
    old_sft = aged(imitated, tmp_path / "old sft", method="sft")
    assert rows_of(capsys, half, old_sft)["trained: CaT-SFT"] == "1"
    assert rows_of(capsys, imitated, old_sft)["trained: CaT-SFT"] == "1"  # the same seed

    # also where the new run is an evaluation of the old one's adapter
    out = tmp_path / "evaluation"
    arguments = ["--aggregators", "majority", "--sizes", "4", "--out", out]
    assert evaluated("--adapter", old, *arguments) == 0
    assert rows_of(capsys, half, out)["trained: CaT"] == "2"


def test_an_old_run_with_another_value_has_a_row_of_its_own(half, tmp_path, capsys):
    old = aged(half, tmp_path / "old", clip=0.1)
    found = rows_of(capsys, half, old)
    trained = {name: n for name, n in found.items() if name.startswith("trained")}
    assert trained == {"trained: CaT": "1", "trained: CaT, clip 0.1": "1"}
    assert found["initial policy"] == "1"  # no update reaches it


def upgraded(**changes):
    given = {"engine_args": {"max_num_seqs": 4}, "model": "tiny"}
    return folder.upgraded(given | FORMER | changes)


def test_who_judged_and_what_slept_is_kept():
    kept = {"method": "grpo", "engine_args": {"max_num_seqs": 4}, "model": "tiny"}
    assert upgraded() == kept | {"judge_model": None}
    server = upgraded(judge="server", judge_model="strict", judge_concurrency=7)
    assert server == kept | {"judge_model": "strict"}
    # the name of a judge that was not asked would let it judge now
    assert upgraded(judge_model="strict") == kept | {"judge_model": None}
    asleep = {"engine_args": {"max_num_seqs": 4, "enable_sleep_mode": True}}
    assert upgraded(sleep=True) == kept | {"judge_model": None} | asleep
    settings = upgraded(judge="server", judge_model="strict", sleep=True, clip=0.1)
    assert folder.upgraded(settings) == settings  # once is enough
