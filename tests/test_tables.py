"""Results in tables: which runs are one method, what rows are called, what each cell says."""

import numpy as np
import pytest

from analysis import figures
from analysis.statistics import methods
from analysis.tables import table
from comparison_helpers import settings_of, tables
from plumbing.errors import InputError

SETTINGS = settings_of(model="tiny")


def measured(seed=0, digest="d", judged=False, initial=(0.5, 0.0, 1.0, 0.5), more=(), **settings):
    common = {"kind": "initial", "generations": 1, "tokens": 30.4, "answers": 2}
    rows = [{**common, "values": list(initial)}, *more]
    results = {"questions": 4, "digest": digest, "judged": judged, "rows": rows}
    return results | {"settings": SETTINGS | {"seed": seed} | settings}


def trained(*values):
    return {"kind": "trained", "generations": 1, "tokens": 31, "answers": 2, "values": list(values)}


def synthesised(*values):
    common = {"kind": "inference", "aggregator": "synthesis", "size": 4, "cut": 0}
    common |= {"generations": 5, "tokens": 160, "answers": 1}
    return {**common, "values": list(values)}


def test_seeds_of_a_method_are_put_together_and_the_same_one_counts_once():
    one = measured(0, more=[trained(1, 1, 0.5, 1)])
    two = measured(1, initial=(0, 0, 0, 1), more=[trained(1, 0, 0, 1)])
    found = methods([one, two, one])
    seeds = {name: m["runs"].keys() for name, m in found.items()}
    assert seeds == {"initial policy": {0, 1}, "trained: CaT": {0, 1}}
    assert found["initial policy"]["scores"].tolist() == [[0.5, 0, 1, 0.5], [0, 0, 0, 1]]
    (rows,) = tables(table([one, two, one]))
    first, then = rows["initial policy"], rows["trained: CaT"]
    assert (first["runs"], first["right"], first["accuracy"][:5]) == ("2", "6 of 16", "0.375")
    assert (then["runs"], then["right"], then["accuracy"][:5]) == ("2", "11 of 16", "0.688")
    assert then["minus initial policy"].startswith("+0.312 (")
    assert (first["minus initial policy"], first["generations"], first["tokens"]) == ("", "1", "30")


def test_runs_that_differ_in_a_setting_are_kept_apart_and_named_by_it():
    base = measured(0, more=[trained(1, 1, 1, 1)])
    for key, value in (("lr", 0.1), ("steps", 99)):
        found = methods([base, measured(1, more=[trained(0, 0, 0, 0)], **{key: value})])
        both = {f"trained: CaT, {key} {SETTINGS[key]}", f"trained: CaT, {key} {value}"}
        assert set(found) == {"initial policy", *both}
        assert len(found["initial policy"]["runs"]) == 2  # the setting does not reach pi_0
    no_matter = {"micro_batch_tokens": 7, "engine": "vllm"}
    found = methods([base, measured(1, more=[trained(0, 0, 0, 0)], **no_matter)])
    assert len(found["trained: CaT"]["runs"]) == 2  # nor do these reach a result
    assert len(methods([base, measured(1, max_new_tokens=7)])) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"aggregator": "majority"}, "trained: TTRL"),
        ({"method": "sft"}, "trained: CaT-SFT"),
        ({"method": "sft", "aggregator": "single"}, "trained: sft on single"),
        ({"reward": "judge"}, "trained: CaT, reward judge"),
    ],
)
def test_what_was_trained_has_the_papers_name(settings, name):
    assert list(methods([measured(0, more=[trained(1, 1, 1, 1)], **settings)]))[1] == name


@pytest.mark.parametrize(
    "other", [{"judge_model": "strict"}, {"reward": "judge"}, {"group_size": 16}]
)
def test_answers_of_the_initial_policy_are_kept_apart_by_judge_prompt_and_group_size(other):
    found = methods([measured(0), measured(0, **other)])
    assert len(found) == 2
    assert all(name.startswith("initial policy, ") for name in found)


def test_rewards_that_do_not_change_the_prompt_leave_the_initial_policy_one_row():
    found = methods([measured(0, reward="rubric"), measured(1, reward="physician")])
    assert list(found) == ["initial policy"]
    two = [measured(0), measured(0, judge_model="strict")]
    # the first row, whatever it is called
    assert "minus initial policy, judge_model None" in table(two)


def test_an_evaluation_names_what_was_trained_by_the_runs_own_settings():
    run = measured(0, more=[trained(1, 1, 1, 1)])
    again = measured(0, more=[trained(1, 1, 1, 1)], group_size=8, reward="judge")
    again |= {"trained": run["settings"]}
    names = [name for name in methods([run, again]) if name.startswith("trained")]
    assert names[0] == "trained: CaT"
    assert names[1].startswith("trained: CaT, evaluated with group_size 8")


def test_scores_that_are_all_the_same_can_be_drawn(tmp_path):
    vote = {**synthesised(0.2, 0.2, 0.2, 0.2), "aggregator": "majority", "generations": 4}
    more = [synthesised(0.6, 0.6, 0.6, 0.6), vote]
    figures.comparison(tmp_path / "plot.png", [measured(initial=[0.1] * 4, more=more)])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_each_set_of_questions_has_its_table_and_differences_are_to_the_row_asked_for():
    one = measured(0, more=[synthesised(1, 1, 1, 0), trained(1, 1, 1, 1)])
    other = measured(0, "e", more=[synthesised(1, 0, 0, 0)])
    name = "synthesis of 4, at inference"
    rows, others = tables(table([one, other], name))
    minus = f"minus {name}"
    assert rows["trained: CaT"][minus][:6] == "+0.250"
    assert rows["initial policy"][minus][:6] == "-0.250"
    assert rows[name][minus] == rows[name]["p"] == ""
    assert others[name]["right"] == "1 of 4"
    there = r"no method 'nothing'.*initial policy, synthesis of 4, at inference, trained: CaT"
    with pytest.raises(InputError, match=there):
        table([one], "nothing")


def test_questions_without_labels_have_a_row_that_says_so():
    unlabelled = measured(initial=[None] * 4, more=[synthesised(*[None] * 4)])
    (rows,) = tables(table([unlabelled]))
    assert len(rows) == 2
    for row in rows.values():
        assert row["accuracy"] == "no labels"
        assert row["95% interval"] == row["right"] == row["minus initial policy"] == row["p"] == ""
    (rows,) = tables(table([measured(initial=[0.5, None, None, 1])]))
    assert rows["initial policy"]["accuracy"].startswith("0.750")
    assert rows["initial policy"]["right"] == "3 of 4"


def test_judged_scores_are_clipped_not_counted_and_say_what_was_left_open():
    more = [synthesised(0.2, 0.4, 0.6, 0.8)]
    results = measured(judged=True, initial=[-0.5, -0.25, None, 0.1], more=more)
    (rows,) = tables(table([results]))
    first, then = rows["initial policy"], rows["synthesis of 4, at inference"]
    assert first["score"].startswith("0.000 ±")
    assert first["score"].endswith("(of 3 questions)")
    assert first["95% interval"].startswith("0.000 to")
    assert then["score"].startswith("0.500 ±")
    assert "of" not in then["score"]
    assert first["right"] == then["right"] == ""
    # not clipped: (0.7 + 0.65 + 0.7) / 3
    assert then["minus initial policy"].startswith("+0.683")


def test_a_missing_score_is_no_number():
    found = methods([measured(initial=[0.5, None, None, 1])])["initial policy"]["scores"]
    assert np.isnan(found).tolist() == [[False, True, True, False]]
