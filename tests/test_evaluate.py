"""What is measured and how sure it is: statistics against simulation, counts by hand, the comparison on the tiny model."""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import cost

import evaluate
import runs
import train
from evaluate import compare, correct, mechanism, pass_at_k
from rollout import Rollout
from settings import settle
from synthesize import AGGREGATORS, Reference
from tasks import InputError, Question, load_questions, load_sums, seed_of

QUESTIONS = [
    Question([{"role": "user", "content": q}], a)
    for q, a in (("a", "1/2"), ("b", "3"), ("c", None))
]


def box(answer):
    return "none" if answer is None else f"\\boxed{{{answer}}}"


def rollouts(*answers):
    return [Rollout(box(a), [1] * 10, [0.0] * 10, "stop", [1]) for a in answers]


def test_correct_compares_with_the_label_by_meaning():
    texts = [["\\boxed{0.5}", "\\boxed{2}"], ["\\boxed{3}", "none"], ["\\boxed{1}", "x"]]
    values = correct(QUESTIONS, texts)
    assert values[:2].tolist() == [[1, 0], [1, 0]]
    assert values[2].isnan().all()


# ------------------------------------------------------------------------------------------------- statistics


def drawn(rng, n_runs, n_questions=100, run_sd=0.0, effect=0.0, answers=8):
    """Scores (runs, questions) of two methods on the same questions, whose true means are 0.5 and 0.5 + effect."""
    difficulty = rng.normal(0.5, 0.17, n_questions)
    shifts = rng.normal([[[0.0]], [[effect]]], run_sd, (2, n_runs, 1))
    return rng.binomial(answers, np.clip(difficulty + shifts, 0, 1)) / answers


def test_the_standard_error_of_one_run_is_the_deviation_over_the_root_of_the_questions():
    values = np.random.default_rng(1).exponential(size=300)
    found = runs.interval(values)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(300), rel=0.03)


@pytest.mark.parametrize("run_means", [(0.2, 0.6), (0.3, 0.5, 0.6), (0.1, 0.4, 0.4, 0.7, 0.9)])
def test_a_few_runs_vary_as_much_as_their_unbiased_deviation_says(run_means):
    between = statistics.variance(run_means) / len(run_means)
    error = runs.interval(np.repeat(np.array(run_means)[:, None], 50, axis=1))["error"]
    assert error == pytest.approx(math.sqrt(between), rel=0.03)
    spread = np.random.default_rng(2).normal(
        0, 2, 200
    )  # questions differ as well, the same in all runs: variances add
    error = runs.interval(np.array(run_means)[:, None] + spread)["error"]
    assert error == pytest.approx(math.sqrt(between + statistics.variance(spread) / 200), rel=0.03)


def test_one_run_is_a_plain_bootstrap_over_questions():
    rng, values = (
        random.Random(3),
        np.random.default_rng(3).gamma(0.5, 0.2, 40) - 0.08,
    )  # skewed, and not far from 0
    unbiased, student = (
        math.sqrt(40 / 39),
        2.0227 / 1.9600,
    )  # t's and the normal's 97.5% quantile, 39 degrees of freedom
    drawn_means = (statistics.fmean(rng.choices(values.tolist(), k=40)) for _ in range(20_000))
    means = sorted(values.mean() + (m - values.mean()) * unbiased * student for m in drawn_means)
    found = runs.interval(values)
    assert found["low"] == pytest.approx(means[500], abs=0.002)
    assert found["high"] == pytest.approx(means[19_500], abs=0.002)
    assert found["error"] == pytest.approx(statistics.stdev(means) / student, rel=0.03)
    assert found["p"] == pytest.approx(2 * sum(m <= 0 for m in means) / 20_000, abs=0.015)
    assert 0.01 < found["p"] < 0.5
    assert (found["high"] - found["mean"]) / (
        found["mean"] - found["low"]
    ) > 1.1  # as skewed as the values


def test_nominal_95_percent_intervals_of_one_run_cover_the_truth_as_often():
    rng = np.random.default_rng(4)
    found = [runs.interval(drawn(rng, 1)[0], draws=600) for _ in range(1000)]
    assert 0.93 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) / 1000 <= 0.97


@pytest.mark.parametrize(("n_runs", "run_sd"), [(3, 0.02), (5, 0.02), (3, 0.03)])
def test_intervals_of_a_few_runs_cover_the_truth_about_as_often(n_runs, run_sd):
    rng = np.random.default_rng(5)
    found = [runs.interval(drawn(rng, n_runs, run_sd=run_sd)[0], draws=600) for _ in range(600)]
    assert 0.93 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) / 600 <= 0.97


def test_intervals_of_three_runs_that_differ_more_than_questions_do_cover_it_less_often():
    rng = np.random.default_rng(5)
    found = [runs.interval(drawn(rng, 3, run_sd=0.1)[0], draws=600) for _ in range(600)]
    assert (
        0.88 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) / 600 <= 0.95
    )  # the README says so


@pytest.mark.parametrize(("effect", "low", "high"), [(0, 0.03, 0.07), (0.12, 0.95, 1)])
def test_p_of_a_paired_difference_is_uniform_without_an_effect_and_small_with_one(
    effect, low, high
):
    rng = np.random.default_rng(6)
    found = [
        runs.interval(b - a, draws=600)
        for a, b in (drawn(rng, 1, effect=effect) for _ in range(700))
    ]
    assert low <= sum(f["p"] < 0.05 for f in found) / 700 <= high
    if not effect:
        assert 0.44 <= sum(f["p"] < 0.5 for f in found) / 700 <= 0.56
    disagree = [f for f in found if (f["p"] < 0.05) != (not f["low"] <= 0 <= f["high"])]
    assert all(0.04 < f["p"] < 0.06 for f in disagree)
    assert len(disagree) < 7


def test_pairing_finds_what_the_spread_of_questions_would_hide_and_no_difference_has_p_1():
    rng = np.random.default_rng(7)
    hard_and_easy = rng.random(100)
    better = hard_and_easy + 0.02 + rng.normal(0, 0.02, 100)
    assert runs.interval(better - hard_and_easy)["p"] < 0.001
    assert runs.interval(hard_and_easy - better)["p"] < 0.001  # two-sided
    assert runs.interval(better - 0.5)["p"] > 0.1
    assert runs.interval(np.zeros((2, 30))) == {"mean": 0, "error": 0, "low": 0, "high": 0, "p": 1}


def test_questions_without_a_score_in_any_run_are_left_out():
    values = np.random.default_rng(8).random((2, 50))
    holes = np.insert(values, [0, 7, 50], math.nan, axis=1)
    holes[0, 0] = 0.9  # the other run has no score there
    assert runs.interval(holes) == runs.interval(values)
    assert all(math.isnan(x) for x in runs.interval(np.full((2, 3), math.nan)).values())
    one = runs.interval([0.25])
    assert one["mean"] == 0.25
    assert math.isnan(one["low"])  # of a single question nothing is known about the spread
    assert math.isnan(one["error"])  # one question says nothing about its spread


def test_clipping_is_of_the_mean_and_not_of_the_values():
    found = runs.interval([-1.0, 0.5, -0.2], clip=True)
    assert (found["mean"], found["low"]) == (0, 0)
    values = np.array([1.0] * 20 + [-0.5] * 20)
    assert runs.interval(values, clip=True)["mean"] == pytest.approx(
        0.25
    )  # with clipped values: 0.5
    assert runs.interval(values, clip=True)["error"] == runs.interval(values)["error"]
    assert runs.interval([1.5, 0.9, 1.0], clip=True)["high"] == 1


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer():
    n = 6
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [1.0] * c + [0.0] * (n - c)
        subsets = list(itertools.combinations(right, k))
        expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
        assert float(pass_at_k(torch.tensor([right[::-1], right]), k)[1]) == pytest.approx(
            float(expected), abs=1e-6
        )
    both = pass_at_k(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 0]]), 2)
    assert both.tolist() == pytest.approx([1 / 2, 1])


# ------------------------------------------------------------------------------------------------- mechanism

CASES = [  # label, rollouts, the reference, the other aggregator's; what this case is of
    ("3", ("3", "3", "4", None), "3", "4"),  # differs, right
    ("5", ("6", "6", "7", "7"), "5", "6"),  # differs, new and hopeless, right
    ("1/2", ("0.5", "2", "7", "\\frac{1}{2}"), "2", "1/2"),  # differs, the other is right
    ("8", (None,) * 4, None, None),  # hopeless, without a vote
    ("9", ("9", "9.0", "9", "9"), "9.0", "9"),  # the same
    ("1", ("1", "1", "2", "2"), None, "1"),  # differs: it has no answer; the other is right
    ("3", (None,) * 4, "3", None),  # new and hopeless, right, without a vote
    ("6", ("4", "4", "5", None), "7", "4"),  # differs, new and hopeless
    ("2", ("2", "3", "3", "3"), "2", "3"),  # differs, right
    ("1", ("1", "1", "1", "2"), "2", "1"),  # differs, the other is right
    ("1", ("1", "1", "1", "2"), "2", "1"),
]


def of_cases(cases):
    questions = [Question(QUESTIONS[0].messages, label) for label, *_ in cases]
    made = ([Reference(box(case[i])) for case in cases] for i in (2, 3))
    return mechanism(questions, [rollouts(*case[1]) for case in cases], *made)


def test_the_mechanism_counts_are_those_counted_by_hand_and_what_is_right_is_unknown_without_labels():
    found = of_cases(CASES)
    thirds, quarters, halves = (1 / 3, 2 / 3), (1 / 4, 3 / 4), (1 / 2, 1 / 2)
    shares = [
        thirds,
        halves,
        (1 / 2, 1 / 4, 1 / 4),
        (1,),
        halves,
        thirds,
        quarters,
        quarters,
        quarters,
    ]
    entropies = [-sum(p * math.log(p) for p in each) for each in shares]
    assert found.pop("entropy") == pytest.approx(statistics.fmean(entropies))
    right = {"differs_right": 3, "other_right": 4, "new_right": 2, "hopeless_right": 2}
    assert found == {"voted": 9, "differs": 8, "new": 3, "hopeless": 4} | right
    unlabelled = of_cases([(None, *case[1:]) for case in CASES])
    del unlabelled["entropy"]
    assert unlabelled == {"voted": 9, "differs": 8, "new": 3} | dict.fromkeys([*right, "hopeless"])
    found = of_cases([("8", (None,) * 4, None, None)] * 2)
    assert found == dict.fromkeys(found, 0) | {"hopeless": 2, "entropy": None}


# ------------------------------------------------------------------------------------------------- comparison


class Recorder:
    """The real engine, and what it was asked and said."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def sample(self, prompts, n, **options):
        said = self.engine.sample(prompts, n, **options)
        self.calls.append((prompts, n, options, said))
        return said


def settings_of(**given):
    given = {
        "engine": "transformers",
        "eval_questions": 6,
        "max_new_tokens": 48,
        "group_size": 4,
        **given,
    }
    return argparse.Namespace(**settle(given)[1])


def compared(
    engine,
    aggregators=("synthesis",),
    sizes=(4,),
    trained=False,
    questions=None,
    judge=None,
    **given,
):
    s = settings_of(**given)
    questions = questions or load_questions(s)[1]
    return compare(s, questions, engine, judge, aggregators, sizes, trained=trained), questions


def tokens_of(groups):
    return statistics.fmean(len(o.ids) for group in groups for o in group)


def share_right(questions, rows):
    return [
        statistics.fmean(box(q.answer) in text for text in row)
        for q, row in zip(questions, rows, strict=True)
    ]


def test_every_aggregator_and_size_gets_a_row(engine):
    names = [name for name in AGGREGATORS if name != "single"]
    results, _ = compared(engine, names, (1, 2, 4), eval_questions=3)
    expected = {("initial", None, None): (1, 4)}  # (generations, answers)
    for name, size in itertools.product(names, (1, 2, 4)):
        if size > 1 or name.startswith("synthesis"):
            generates = name in ("synthesis", "synthesis-question", "self-bon")
            expected["inference", name, size] = (size + generates, 4 // size)
    rows = {
        (r["kind"], r.get("aggregator"), r.get("size")): (r["generations"], r["answers"])
        for r in results["rows"]
    }
    assert rows == expected
    assert all(
        len(r["values"]) == 3 and set(r["values"]) <= {k / r["answers"] for k in range(5)}
        for r in results["rows"]
    )
    assert set(results["style"]) == {"rollouts", *names}
    assert set(results["mechanism"]) == {*names} - {"synthesis"}
    assert (results["questions"], results["judged"]) == (3, False)


def test_rows_can_be_computed_again_from_what_the_engine_was_asked_and_said(engine):
    spy = Recorder(engine)
    results, questions = compared(spy, ("synthesis",), (2, 4), trained=True)
    initial, by_2, by_4, trained, on_trained = results["rows"]
    (
        (asked, n, options, before),
        (shown_2, *_, made_2),
        (*_, made_4),
        (*_, after_options, after),
        (shown, *_, on),
    ) = spy.calls
    assert (asked, n, options["policy"], after_options["policy"]) == (
        [q.messages for q in questions],
        4,
        False,
        True,
    )
    assert [options[k] for k in ("temperature", "top_k", "top_p", "max_new_tokens")] == [
        1.0,
        0,
        1.0,
        48,
    ]
    assert initial["values"] == share_right(
        questions, [[o.text for o in group] for group in before]
    )
    assert trained["values"] == share_right(questions, [[o.text for o in group] for group in after])
    assert 0 < sum(initial["values"]) < 6
    assert before != after  # the fixture's adapter does something
    assert by_2["values"] == share_right(
        questions, [[made_2[q + 6 * i][0].text for i in (0, 1)] for q in range(6)]
    )
    assert by_4["values"] == share_right(questions, [[s.text] for [s] in made_4])
    assert on_trained["values"] == share_right(questions, [[s.text] for [s] in on])
    for i, q in itertools.product(
        (0, 1), range(6)
    ):  # each reference is made from its own part of its own question
        attempts = shown_2[q + 6 * i][0]["content"].split("<attempt>\n")[1:]
        assert [a.split("\n</attempt>")[0] for a in attempts] == [
            o.text for o in before[q][2 * i : 2 * i + 2]
        ]
    assert all(
        o.text in messages[0]["content"]
        for messages, group in zip(shown, after, strict=True)
        for o in group
    )
    assert [r["generations"] for r in results["rows"]] == [1, 3, 5, 1, 5]
    assert [r["answers"] for r in results["rows"]] == [4, 2, 1, 4, 1]
    tokens = [
        tokens_of(before),
        2 * tokens_of(before) + tokens_of(made_2),
        4 * tokens_of(before) + tokens_of(made_4),
    ]
    tokens += [tokens_of(after), 4 * tokens_of(after) + tokens_of(on)]
    assert [r["tokens"] for r in results["rows"]] == pytest.approx(tokens)

    right = {"initial": initial["values"], "trained": trained["values"]}
    halves = lambda groups, i: share_right(
        questions, [[o.text for o in g[2 * i : 2 * i + 2]] for g in groups]
    )  # noqa: E731
    unsolved = [q for q in range(6) if halves(before, 0)[q] == 0]
    solved = [
        sum(halves(groups, 1)[q] > 0 for q in unsolved) for groups in (before, after)
    ]  # fresh samples for both
    ((name, counts),) = results["coverage"].items()
    assert name == f"{len(unsolved)} questions that 2 of initial did not solve"
    assert counts == {"solved by 2 of initial": solved[0], "solved by 2 of trained": solved[1]}
    for name, values in right.items():
        assert results["pass"][name]["1"] == pytest.approx(statistics.fmean(values))
        assert results["pass"][name]["4"] == pytest.approx(statistics.fmean(v > 0 for v in values))
        assert list(results["pass"][name]) == ["1", "2", "4"]


def test_an_aggregator_gets_the_right_rollouts_in_parts(engine, monkeypatch):
    calls = []

    def last(questions, groups, anchor, boxed):
        calls.append((questions, groups, boxed))
        return [Reference(group[-1].text, tokens=7, cut=1) for group in groups]

    monkeypatch.setitem(AGGREGATORS, "last", last)
    results, questions = compared(engine, ("last",), (1, 2, 3, 4), trained=True, aggregator="last")
    prompts, sampling = [q.messages for q in questions], {"temperature": 1.0, "max_new_tokens": 48}
    before = engine.sample(prompts, 4, policy=False, seed=seed_of(0, "before"), **sampling)
    after = engine.sample(prompts, 4, policy=True, seed=seed_of(0, "after"), **sampling)
    assert [len(groups) for _, groups, _ in calls] == [
        12,
        6,
        6,
        6,
    ]  # halves; three of four; all; all of pi_t
    assert all(questions * (len(groups) // 6) == asked and boxed for asked, groups, boxed in calls)
    assert calls[0][1] == [group[:2] for group in before] + [group[2:] for group in before]
    assert [groups for _, groups, _ in calls[1:]] == [
        [group[:3] for group in before],
        before,
        after,
    ]
    _, of_2, of_3, *_ = results["rows"]
    assert of_2["values"] == share_right(
        questions, [[group[1].text, group[3].text] for group in before]
    )
    assert of_3["values"] == share_right(questions, [[group[2].text] for group in before])
    assert (of_2["generations"], of_2["cut"], of_3["cut"]) == (3, 12, 6)
    assert of_2["tokens"] == pytest.approx(2 * tokens_of(before) + 7)


def test_a_comparison_is_a_function_of_its_seed(engine):
    spies = [Recorder(engine) for _ in range(3)]
    first, again, other = (
        compared(spy, ("synthesis", "majority"), trained=True, seed=seed)[0]
        for spy, seed in zip(spies, (0, 0, 1), strict=True)
    )
    seeds = [[options["seed"] for *_, options, _ in spy.calls] for spy in spies]
    assert seeds[0] == seeds[1]
    assert (
        len({*seeds[0], *seeds[2]}) == 2 * 4
    )  # rollouts and references of pi_0 and pi_t: none drawn alike
    assert first == again
    assert first["digest"] == other["digest"]
    assert [r["tokens"] for r in first["rows"]] != [r["tokens"] for r in other["rows"]]
    assert compared(engine, (), questions=load_sums(None)[1][6:9])[0]["digest"] != first["digest"]


def test_with_a_judge_one_answer_a_question_is_scored_and_what_it_left_open_is_none(engine):
    questions = [
        Question(q.messages, rubric=(("Is kind", 4.0), ("Is rude", -1.0)))
        for q in load_sums(None)[1][:3]
    ]
    calls = []

    def judge(prompts):
        calls.extend(prompts)
        asks = [messages[0]["content"] for messages in prompts]
        return [
            "hm" if questions[2].messages[0]["content"] in text and "kind" in text else "yes"
            for text in asks
        ]

    spy = Recorder(engine)
    results, _ = compared(
        spy, ("synthesis",), (2, 4), True, questions, judge, reward="judge", eval_questions=3
    )
    assert results["judged"] is True
    assert [(r["answers"], r["values"]) for r in results["rows"]] == [(1, [0.75, 0.75, None])] * 5
    assert len(calls) == 5 * 3 * 2
    assert [len(prompts) for prompts, *_ in spy.calls] == [
        3
    ] * 5  # no reference is made that is not scored
    assert not results.keys() & {"mechanism", "pass", "coverage"}


# ------------------------------------------------------------------------------------------------- tables

SETTINGS = vars(settings_of(model="tiny"))


def measured(seed=0, digest="d", judged=False, initial=(0.5, 0.0, 1.0, 0.5), more=(), **settings):
    rows = [
        {
            "kind": "initial",
            "generations": 1,
            "tokens": 30.4,
            "answers": 2,
            "values": list(initial),
        },
        *more,
    ]
    results = {"questions": 4, "digest": digest, "judged": judged, "rows": rows}
    return results | {"settings": SETTINGS | {"seed": seed} | settings}


def trained(*values):
    return {"kind": "trained", "generations": 1, "tokens": 31, "answers": 2, "values": list(values)}


def synthesised(*values):
    common = {
        "kind": "inference",
        "aggregator": "synthesis",
        "size": 4,
        "cut": 0,
        "generations": 5,
        "tokens": 160,
    }
    return {**common, "answers": 1, "values": list(values)}


def tables(text):
    """[{name of the row: {column: cell}}] of Markdown."""
    parts = [
        [line.strip("| ").split(" | ") for line in part.splitlines()]
        for part in text.split("\n\n")
        if part[:1] == "|"
    ]
    parts = [[[cell.strip() for cell in line] for line in part] for part in parts]
    return [{row[0]: dict(zip(part[0], row, strict=False)) for row in part[2:]} for part in parts]


def test_seeds_of_a_method_are_put_together_and_the_same_one_counts_once():
    one, two = (
        measured(0, more=[trained(1, 1, 0.5, 1)]),
        measured(1, initial=(0, 0, 0, 1), more=[trained(1, 0, 0, 1)]),
    )
    found = runs.methods([one, two, one])
    assert {name: m["runs"].keys() for name, m in found.items()} == {
        "initial policy": {0, 1},
        "trained: CaT": {0, 1},
    }
    assert found["initial policy"]["scores"].tolist() == [[0.5, 0, 1, 0.5], [0, 0, 0, 1]]
    (rows,) = tables(runs.table([one, two, one]))
    first, then = rows["initial policy"], rows["trained: CaT"]
    assert (first["runs"], first["right"], first["accuracy"][:5]) == ("2", "6 of 16", "0.375")
    assert (then["runs"], then["right"], then["accuracy"][:5]) == ("2", "11 of 16", "0.688")
    assert then["minus initial policy"].startswith("+0.312 (")
    assert (first["minus initial policy"], first["generations"], first["tokens"]) == ("", "1", "30")


def test_runs_that_differ_in_a_setting_are_kept_apart_and_named_by_it():
    base = measured(0, more=[trained(1, 1, 1, 1)])
    for key, value in (("lr", 0.1), ("steps", 99)):
        found = runs.methods([base, measured(1, more=[trained(0, 0, 0, 0)], **{key: value})])
        assert set(found) == {
            "initial policy",
            f"trained: CaT, {key} {SETTINGS[key]}",
            f"trained: CaT, {key} {value}",
        }
        assert len(found["initial policy"]["runs"]) == 2  # the setting does not reach pi_0
    found = runs.methods(
        [base, measured(1, more=[trained(0, 0, 0, 0)], micro_batch_tokens=7, engine="vllm")]
    )
    assert len(found["trained: CaT"]["runs"]) == 2  # nor do these reach a result
    assert len(runs.methods([base, measured(1, max_new_tokens=7)])) == 3
    names = [
        dict(aggregator="majority"),
        dict(method="sft"),
        dict(method="sft", aggregator="single"),
        dict(reward="judge"),
    ]
    names = [list(runs.methods([measured(0, more=[trained(1, 1, 1, 1)], **n)]))[1] for n in names]
    assert names == [
        "trained: TTRL",
        "trained: CaT-SFT",
        "trained: sft on single",
        "trained: CaT, reward judge",
    ]


def test_answers_of_the_initial_policy_are_kept_apart_by_judge_prompt_and_group_size():
    for other in (
        dict(judge="server", judge_model="strict"),
        dict(reward="judge"),
        dict(group_size=16),
    ):
        found = runs.methods([measured(0), measured(0, **other)])
        assert len(found) == 2, other
        assert all(name.startswith("initial policy, ") for name in found)
    assert list(runs.methods([measured(0, reward="rubric"), measured(1, reward="physician")])) == [
        "initial policy"
    ]
    two = [measured(0), measured(0, judge="server")]
    assert "minus initial policy, judge anchor" in runs.table(
        two
    )  # the first row, whatever it is called


def test_an_evaluation_names_what_was_trained_by_the_runs_own_settings():
    run = measured(0, more=[trained(1, 1, 1, 1)])
    again = measured(0, more=[trained(1, 1, 1, 1)], group_size=8, reward="judge") | {
        "trained": run["settings"]
    }
    names = [name for name in runs.methods([run, again]) if name.startswith("trained")]
    assert names[0] == "trained: CaT"
    assert names[1].startswith("trained: CaT, evaluated with group_size 8")


def test_p_of_a_few_runs_is_that_of_t_over_them_and_of_no_spread_is_nothing():
    values = np.repeat([[0.10], [0.12], [0.14]], 50, axis=1)
    between = statistics.stdev((0.10, 0.12, 0.14)) / math.sqrt(3)
    assert runs.interval(values)["p"] == pytest.approx(
        2 * scipy.stats.t.sf(0.12 / between, 2), rel=0.1
    )
    assert math.isnan(runs.interval([1, 1, 1])["p"])
    assert runs.interval([0, 0, 0])["p"] == 1


def test_scores_that_are_all_the_same_can_be_drawn(tmp_path):
    more = [
        synthesised(0.6, 0.6, 0.6, 0.6),
        {**synthesised(0.2, 0.2, 0.2, 0.2), "aggregator": "majority", "generations": 4},
    ]
    evaluate.plot(tmp_path / "plot.png", [measured(initial=[0.1] * 4, more=more)])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_difference_is_paired_over_the_seeds_that_both_have():
    a = {"runs": {0: np.array([1.0, 0.5]), 1: np.array([0.0, 0.0]), 2: np.array([0.5, 1.0])}}
    b = {"runs": {2: np.array([0.25, 0.75]), 3: np.array([1.0, 1.0]), 0: np.array([0.5, 0.0])}}
    assert runs.difference(a, b) == runs.interval([[0.5, 0.5], [0.25, 0.25]])
    assert runs.difference(a, {"runs": {4: np.array([0.0, 0.0])}}) is None


def test_each_set_of_questions_has_its_table_and_differences_are_to_the_row_asked_for():
    one = measured(0, more=[synthesised(1, 1, 1, 0), trained(1, 1, 1, 1)])
    other = measured(0, "e", more=[synthesised(1, 0, 0, 0)])
    rows, others = tables(runs.table([one, other], "synthesis of 4, at inference"))
    minus = "minus synthesis of 4, at inference"
    assert (rows["trained: CaT"][minus][:6], rows["initial policy"][minus][:6]) == (
        "+0.250",
        "-0.250",
    )
    assert (
        rows["synthesis of 4, at inference"][minus]
        == rows["synthesis of 4, at inference"]["p"]
        == ""
    )
    assert others["synthesis of 4, at inference"]["right"] == "1 of 4"
    with pytest.raises(
        InputError,
        match=r"no method 'nothing'.*initial policy, synthesis of 4, at inference, trained: CaT",
    ):
        runs.table([one], "nothing")


def test_questions_without_labels_have_a_row_that_says_so():
    (rows,) = tables(runs.table([measured(initial=[None] * 4, more=[synthesised(*[None] * 4)])]))
    for row in rows.values():
        assert row["accuracy"] == "no labels"
        assert row["95% interval"] == row["right"] == row["minus initial policy"] == row["p"] == ""
    (rows,) = tables(runs.table([measured(initial=[0.5, None, None, 1])]))
    assert rows["initial policy"]["accuracy"].startswith("0.750")
    assert rows["initial policy"]["right"] == "3 of 4"


def test_judged_scores_are_clipped_not_counted_and_say_what_was_left_open():
    results = measured(
        judged=True, initial=[-0.5, -0.25, None, 0.1], more=[synthesised(0.2, 0.4, 0.6, 0.8)]
    )
    (rows,) = tables(runs.table([results]))
    first, then = rows["initial policy"], rows["synthesis of 4, at inference"]
    assert first["score"].startswith("0.000 ±")
    assert first["score"].endswith("(of 3 questions)")
    assert first["95% interval"].startswith("0.000 to")
    assert then["score"].startswith("0.500 ±")
    assert "of" not in then["score"]
    assert first["right"] == then["right"] == ""
    assert then["minus initial policy"].startswith("+0.683")  # not clipped: (0.7 + 0.65 + 0.7) / 3


# ------------------------------------------------------------------------------------------------- the command

SMALL = "--group-size 2 --eval-questions 6 --max-new-tokens 48".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, large enough to be seen."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert (
        train.main(
            [
                *SMALL,
                *"--prompts-per-step 4 --steps 1 --lr 0.05 --seed 5".split(),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_and_prints_what_it_found(tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate.main([*SMALL, "--aggregators", "majority", "synthesis", "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, (out / "table.md").read_text()
    assert text.strip() in printed
    rows, *explained = tables(text)
    of = {1: "synthesis of 1, at inference", 2: "synthesis of 2, at inference"}
    assert list(rows) == ["initial policy", "majority of 2, at inference", of[1], of[2]]
    results = json.loads((out / "results.json").read_text())
    assert (
        rows["initial policy"]["right"]
        == f"{sum(2 * v for v in results['rows'][0]['values']):.0f} of 12"
    )
    assert results["questions"] == 6
    assert [*explained[0]] == ["majority"]
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "comparison.png").stat().st_size > 10_000
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["group_size"], settings["model"], settings["seed"]) == (2, "tiny", 0)


def test_a_runs_policy_is_evaluated_with_the_runs_settings_and_put_into_one_table(
    run, tmp_path, capsys
):
    out = tmp_path / "out"
    assert (
        evaluate.main(
            ["--adapter", str(run), "--aggregators", "majority", "synthesis", "--out", str(out)]
        )
        == 0
    )
    then, now = (json.loads((folder / "results.json").read_text()) for folder in (run, out))
    assert (now["adapter"], json.loads((out / "config.json").read_text())["settings"]["seed"]) == (
        str(run),
        5,
    )
    rows = [{r["kind"]: r for r in results["rows"]} for results in (then, now)]
    for kind in ("initial", "trained"):  # the same seed and the same weights
        assert rows[0][kind] == rows[1][kind]
    assert rows[1]["trained"]["tokens"] != rows[1]["initial"]["tokens"]
    (unsolved,) = now["coverage"]
    assert f"| {unsolved} |" in capsys.readouterr().out
    assert now["trained"] == json.loads((run / "config.json").read_text())["settings"]

    assert evaluate.main(["table", str(run), str(out), "--against", "trained: CaT"]) == 0
    (table,) = tables(capsys.readouterr().out)
    assert {row["runs"] for row in table.values()} == {"1"}
    assert "minus trained: CaT" in table["initial policy"]
    assert {"initial policy", "trained: CaT", "synthesis of 1, at inference"} <= table.keys()


def test_show_prints_a_step(run, capsys):
    assert evaluate.main(["show", str(run), "0"]) == 0
    shown = capsys.readouterr().out
    for row in map(json.loads, (run / "rollouts.jsonl").read_text().splitlines()):
        assert all(
            text in shown
            for text in [row["question"][0]["content"], row["reference"], *row["rollouts"]]
        )
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
    (tmp_path / "bare" / "config.json").write_bytes(
        (run / "config.json").read_bytes()
    )  # of a run that has no adapter yet
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"rows": []}')
    before = files(run), files(tmp_path)
    assert evaluate.main(arguments.format(run=run, tmp=tmp_path).split()) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("evaluate.py: error: ")
    assert sentence in error
    assert (files(run), files(tmp_path)) == before
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------- benchmarks/cost.py


def test_what_a_step_costs_against_a_table_made_by_hand(tmp_path, capsys, monkeypatch):
    steps = [
        (9, 8, 0, 0, 9, 1000),
        (2, 1, 0, 1, 4, 1300),
        (2, 2, 1, 3, 8, 1700),
        (5, 1, 0, 4, 10, 2900),
    ]  # the first compiles
    names = (
        "time/rollouts",
        "time/references",
        "time/rewards",
        "time/update",
        "step_time",
        "num_tokens",
    )
    lines = [json.dumps(dict(zip(names, step, strict=True))) + "\n" for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "config.json").write_text('{"device": "NVIDIA H100"}')
    expected = {
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
    assert cost.cost(tmp_path) == expected
    (tmp_path / "results.json").write_text('{"peak_gib": 61.24, "minutes": 9.96}')
    assert cost.cost(tmp_path) == expected | {"peak memory, GiB": "61.2", "minutes in all": "10.0"}
    (tmp_path / "metrics.jsonl").write_text(lines[0])  # one step alone is better than none
    assert cost.cost(tmp_path)["seconds a step"] == "9.0 (9.0 to 9.0)"
    monkeypatch.setattr(sys, "argv", ["cost.py", str(tmp_path), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        cost.main()
    assert stopped.value.code == 2
    assert "nowhere holds no timed steps" in capsys.readouterr().err
