"""benchmarks/cost.py: what a step costs, against a table made by hand."""

import json
import sys

import pytest

from run_helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cost

NAMES = ("time/rollouts", "time/references", "time/rewards", "time/update")
NAMES += ("step_time", "num_tokens")
STEPS = [
    (9, 8, 0, 0, 9, 1000),  # the first compiles
    (2, 1, 0, 1, 4, 1300),
    (2, 2, 1, 3, 8, 1700),
    (5, 1, 0, 4, 10, 2900),
]
BY_HAND = {
    "device": "NVIDIA H100",
    "steps measured": "3",
    "seconds a step": "8.0 (4.0 to 10.0)",
    "... of it rollouts": "50% (25% to 50%)",
    "... of it references": "25% (10% to 25%)",
    "... of it rewards": "0% (0% to 12%)",
    "... of it update": "38% (25% to 40%)",
    "generated tokens a step": "400 (300 to 1200)",
    "... a second of sampling": "100 (100 to 200)",
    "... a second of the step": "75 (50 to 120)",
    "peak memory, GiB": "not measured",
    "minutes in all": "not measured",
}


def test_what_a_step_costs_against_a_table_made_by_hand(tmp_path, capsys, monkeypatch):
    rows = [json.dumps(dict(zip(NAMES, step, strict=True))) + "\n" for step in STEPS]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    (tmp_path / "config.json").write_text('{"device": "NVIDIA H100"}')
    assert cost.cost(tmp_path) == BY_HAND
    (tmp_path / "results.json").write_text('{"peak_gib": 61.24, "minutes": 9.96}')
    ended = {"peak memory, GiB": "61.2", "minutes in all": "10.0"}
    assert cost.cost(tmp_path) == BY_HAND | ended
    (tmp_path / "metrics.jsonl").write_text(rows[0])  # one step alone is better than none
    assert cost.cost(tmp_path)["seconds a step"] == "9.0 (9.0 to 9.0)"
    monkeypatch.setattr(sys, "argv", ["cost.py", str(tmp_path), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        cost.main()
    assert stopped.value.code == 2
    assert "nowhere holds no timed steps" in capsys.readouterr().err


def test_a_run_of_ours_has_the_names_that_it_reads(tmp_path):
    import train

    out = tmp_path / "run"
    small = "--steps 2 --prompts-per-step 2 --group-size 2 --eval-questions 2 --max-new-tokens 24"
    assert train.main([*small.split(), "--out", str(out)]) == 0
    found = cost.cost(out)
    assert found.keys() == BY_HAND.keys()
    assert "not measured" not in found.values()
