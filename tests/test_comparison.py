"""The comparison on the tiny model: every number again from what the engine was asked and said."""

import itertools
import statistics

import pytest

from comparison_helpers import Recorder, compared, share_right, tokens_of
from conftest import tiny_policy
from plumbing.decoding import TransformersEngine
from plumbing.draws import seed_of
from rollout import Sampling
from synthesize import AGGREGATORS, Reference
from tasks import Question, load_sums


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
    for r in results["rows"]:
        assert len(r["values"]) == 3
        assert set(r["values"]) <= {k / r["answers"] for k in range(5)}
    assert set(results["style"]) == {"rollouts", *names}
    assert set(results["mechanism"]) == {*names} - {"synthesis"}
    assert (results["questions"], results["judged"]) == (3, False)


@pytest.fixture(scope="module")
def whole():
    """(results, questions, calls of the engine) of synthesis of 2 and of 4, before and after."""
    spy = Recorder(TransformersEngine(*tiny_policy()))
    results, questions = compared(spy, ("synthesis",), (2, 4), trained=True)
    return results, questions, spy.calls


def test_rows_can_be_computed_again_from_what_the_engine_was_asked_and_said(whole):
    results, questions, calls = whole
    initial, by_2, by_4, trained, on_trained = results["rows"]
    (asked, n, sampling, options, before), of_2, of_4, after_call, on_call = calls
    assert (asked, n) == ([q.messages for q in questions], 4)
    assert (options["policy"], after_call[3]["policy"]) == (False, True)
    assert sampling == Sampling(temperature=1.0, max_new_tokens=48, top_k=0, top_p=1.0)
    made_2, made_4, after, on = of_2[-1], of_4[-1], after_call[-1], on_call[-1]
    said = [[[o.text for o in group] for group in groups] for groups in (before, after)]
    assert initial["values"] == share_right(questions, said[0])
    assert trained["values"] == share_right(questions, said[1])
    assert 0 < sum(initial["values"]) < 6
    assert before != after  # the fixture's adapter does something
    pairs = [[made_2[q + 6 * i][0].text for i in (0, 1)] for q in range(6)]
    assert by_2["values"] == share_right(questions, pairs)
    assert by_4["values"] == share_right(questions, [[s.text] for [s] in made_4])
    assert on_trained["values"] == share_right(questions, [[s.text] for [s] in on])
    assert [r["generations"] for r in results["rows"]] == [1, 3, 5, 1, 5]
    assert [r["answers"] for r in results["rows"]] == [4, 2, 1, 4, 1]
    tokens = [tokens_of(before), 2 * tokens_of(before) + tokens_of(made_2)]
    tokens += [4 * tokens_of(before) + tokens_of(made_4)]
    tokens += [tokens_of(after), 4 * tokens_of(after) + tokens_of(on)]
    assert [r["tokens"] for r in results["rows"]] == pytest.approx(tokens)


def test_each_reference_is_made_from_its_own_part_of_its_own_question(whole):
    _, _, calls = whole
    before, shown_2, after, shown = calls[0][-1], calls[1][0], calls[3][-1], calls[4][0]
    for i, q in itertools.product((0, 1), range(6)):
        attempts = shown_2[q + 6 * i][0]["content"].split("<attempt>\n")[1:]
        part = before[q][2 * i : 2 * i + 2]
        assert [a.split("\n</attempt>")[0] for a in attempts] == [o.text for o in part]
    for messages, group in zip(shown, after, strict=True):
        assert all(o.text in messages[0]["content"] for o in group)


def test_coverage_and_pass_at_k_can_be_computed_again(whole):
    results, questions, calls = whole
    before, after = calls[0][-1], calls[3][-1]

    def half(groups, i):
        texts = [[o.text for o in group[2 * i : 2 * i + 2]] for group in groups]
        return share_right(questions, texts)

    unsolved = [q for q in range(6) if half(before, 0)[q] == 0]
    # fresh samples for both
    solved = [sum(half(groups, 1)[q] > 0 for q in unsolved) for groups in (before, after)]
    ((name, counts),) = results["coverage"].items()
    assert name == f"{len(unsolved)} questions that 2 of initial did not solve"
    assert counts == {"solved by 2 of initial": solved[0], "solved by 2 of trained": solved[1]}
    initial, _, _, trained, _ = results["rows"]
    for row in (initial, trained):
        passed, values = results["pass"][row["kind"]], row["values"]
        assert passed["1"] == pytest.approx(statistics.fmean(values))
        assert passed["4"] == pytest.approx(statistics.fmean(v > 0 for v in values))
        assert list(passed) == ["1", "2", "4"]


def test_an_aggregator_gets_the_right_rollouts_in_parts(engine, monkeypatch):
    calls = []

    def last(questions, groups, anchor):
        calls.append((questions, groups))
        return [Reference(group[-1].text, tokens=7, cut=1) for group in groups]

    monkeypatch.setitem(AGGREGATORS, "last", last)
    results, questions = compared(engine, ("last",), (1, 2, 3, 4), trained=True, aggregator="last")
    prompts, sampling = [q.messages for q in questions], Sampling(max_new_tokens=48)
    before = engine.sample(prompts, 4, sampling, policy=False, seed=seed_of(0, "before"))
    after = engine.sample(prompts, 4, sampling, policy=True, seed=seed_of(0, "after"))
    # halves; three of four; all; all of pi_t
    assert [len(groups) for _, groups in calls] == [12, 6, 6, 6]
    for asked, groups in calls:
        assert questions * (len(groups) // 6) == asked
        assert all(q.boxed for q in asked)
    assert calls[0][1] == [group[:2] for group in before] + [group[2:] for group in before]
    threes = [group[:3] for group in before]
    assert [groups for _, groups in calls[1:]] == [threes, before, after]
    _, of_2, of_3, *_ = results["rows"]
    lasts = [[group[1].text, group[3].text] for group in before]
    assert of_2["values"] == share_right(questions, lasts)
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
    # rollouts and references of pi_0 and pi_t: none drawn alike
    assert len({*seeds[0], *seeds[2]}) == 2 * 4
    assert first == again
    assert first["digest"] == other["digest"]
    assert [r["tokens"] for r in first["rows"]] != [r["tokens"] for r in other["rows"]]
    others = load_sums(None)[1][6:9]
    assert compared(engine, (), questions=others)[0]["digest"] != first["digest"]


def test_with_a_judge_one_answer_a_question_is_scored_and_what_it_left_open_is_none(engine):
    rubric = (("Is kind", 4.0), ("Is rude", -1.0))
    questions = [Question(q.messages, rubric=rubric, boxed=False) for q in load_sums(None)[1][:3]]
    calls, open_question = [], questions[2].messages[0]["content"]

    def judge(prompts):
        calls.extend(prompts)
        asked = [messages[0]["content"] for messages in prompts]
        return ["hm" if open_question in text and "kind" in text else "yes" for text in asked]

    spy = Recorder(engine)
    given = {"reward": "judge", "eval_questions": 3}
    results, _ = compared(spy, ("synthesis",), (2, 4), True, questions, judge, **given)
    assert results["judged"] is True
    assert [(r["answers"], r["values"]) for r in results["rows"]] == [(1, [0.75, 0.75, None])] * 5
    assert len(calls) == 5 * 3 * 2
    # no reference is made that is not scored
    assert [len(prompts) for prompts, *_ in spy.calls] == [3] * 5
    assert not results.keys() & {"mechanism", "pass", "coverage"}
