"""`evaluate.py`: what the command writes and prints, and what it refuses."""

import json

import pytest

import evaluate
import train
from comparison_helpers import tables
from run_helpers import settings_in

SMALL = "--group-size 2 --eval-questions 6 --max-new-tokens 48".split()
ONE_STEP = "--prompts-per-step 4 --steps 1 --lr 0.05 --seed 5".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, large enough to be seen."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*SMALL, *ONE_STEP, "--out", str(out)]) == 0
    return out


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_in(out):
    return json.loads((out / "results.json").read_text())


def test_the_command_writes_and_prints_what_it_found(tmp_path, capsys):
    out = tmp_path / "out"
    names = ["--aggregators", "majority", "synthesis"]
    assert evaluate.main([*SMALL, *names, "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, (out / "table.md").read_text()
    assert text.strip() in printed
    rows, *explained = tables(text)
    expected = ["initial policy", "majority of 2, at inference"]
    expected += ["synthesis of 1, at inference", "synthesis of 2, at inference"]
    assert list(rows) == expected
    results = results_in(out)
    right = sum(2 * v for v in results["rows"][0]["values"])
    assert rows["initial policy"]["right"] == f"{right:.0f} of 12"
    assert results["questions"] == 6
    assert [*explained[0]] == ["majority"]
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "comparison.png").stat().st_size > 10_000
    settings = settings_in(out)
    assert (settings["group_size"], settings["model"], settings["seed"]) == (2, "tiny", 0)


def test_a_runs_policy_is_evaluated_with_the_runs_settings_and_put_into_one_table(
    run, tmp_path, capsys
):
    out = tmp_path / "out"
    names = ["--aggregators", "majority", "synthesis"]
    assert evaluate.main(["--adapter", str(run), *names, "--out", str(out)]) == 0
    then, now = results_in(run), results_in(out)
    assert (now["adapter"], settings_in(out)["seed"]) == (str(run), 5)
    rows = [{r["kind"]: r for r in results["rows"]} for results in (then, now)]
    for kind in ("initial", "trained"):  # the same seed and the same weights
        assert rows[0][kind] == rows[1][kind]
    assert rows[1]["trained"]["tokens"] != rows[1]["initial"]["tokens"]
    (unsolved,) = now["coverage"]
    assert f"| {unsolved} |" in capsys.readouterr().out
    assert now["trained"] == settings_in(run)

    plot = tmp_path / "plot.png"
    more = ["--against", "trained: CaT", "--plot", str(plot)]
    assert evaluate.main(["table", str(run), str(out), *more]) == 0
    (table,) = tables(capsys.readouterr().out)
    assert {row["runs"] for row in table.values()} == {"1"}
    assert "minus trained: CaT" in table["initial policy"]
    assert {"initial policy", "trained: CaT", "synthesis of 1, at inference"} <= table.keys()
    assert plot.stat().st_size > 10_000


def test_show_prints_a_step(run, capsys):
    assert evaluate.main(["show", str(run), "0"]) == 0
    shown = capsys.readouterr().out
    for row in map(json.loads, (run / "rollouts.jsonl").read_text().splitlines()):
        said = [row["question"][0]["content"], row["reference"], *row["rollouts"]]
        assert all(text in shown for text in said)
        assert "| reward | " + " | ".join(f"{r:.2f}" for r in row["rewards"]) + " |" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("table {tmp}/nowhere", "no results.json"),
        ("table {run} {tmp}", "no results.json"),
        ("table {run} --against nothing", "no method 'nothing'"),
        ("show {tmp}/nowhere 0", "no rollouts.jsonl"),
        ("show {run} 1", "no step 1"),
        ("--adapter {tmp}/nowhere --out {tmp}/new", "no run"),
        ("--adapter {tmp} --out {tmp}/new", "no run"),
        ("--adapter {tmp}/bare --out {tmp}/new", "cannot load"),
        ("--adapter {run} --seed 1 --out {tmp}/new", "leave --seed out"),
        ("--adapter {run} --out {run}", "exists and is not empty"),
        ("--out {run}", "exists and is not empty"),
        ("--task jsonl --model tiny --out {tmp}/new", "--data"),
        ("--group-size 4 --sizes 8 --out {tmp}/new", "--sizes"),
        ("--reward judge --aggregators majority --out {tmp}/new", "counts boxed answers"),
        ("table {tmp}/old", "of this version"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2_and_nothing_is_written(
    arguments, sentence, run, tmp_path, capsys
):
    (tmp_path / "bare").mkdir()
    # of a run that has no adapter yet
    (tmp_path / "bare" / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"rows": []}')
    before = files(run), files(tmp_path)
    assert evaluate.main(arguments.format(run=run, tmp=tmp_path).split()) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("evaluate.py: error: ")
    assert sentence in error
    assert (files(run), files(tmp_path)) == before
    assert not (tmp_path / "new").exists()
