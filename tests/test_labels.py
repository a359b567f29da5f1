"""No label is in the loop: what reaches it has none, and only the watcher, who keeps them, knows.

That training with other labels, or none, makes the same weights is in test_train.py.
"""

import math
import re
from dataclasses import fields, replace

import pytest

import evaluate
import rewards
import synthesize
import train
from aggregator_helpers import SUMS, group
from judged_runs_helpers import CRITERIA, health_rows, judges
from judged_runs_helpers import SMALL as JUDGED
from run_helpers import SMALL, lines
from synthesize import Reference
from tasks import Question, load_sums, without_labels

RUBRIC = (("Names the secret", 5.0), ("Keeps the secret", -3.0))
LABELLED = [
    Question([{"role": "user", "content": "Which?"}], answer="secret", id="a"),
    Question([{"role": "user", "content": "Why?"}], rubric=RUBRIC, id="b", boxed=False),
    Question([{"role": "user", "content": "Both?"}], answer="secret", rubric=RUBRIC, id="c"),
    Question([{"role": "user", "content": "None?"}], id="d"),
]


@pytest.mark.parametrize("oracle", [False, True])
def test_nothing_but_the_oracles_rubric_is_left(oracle):
    bare = without_labels(LABELLED, oracle=oracle)
    assert [q.answer for q in bare] == [None] * 4
    assert [q.rubric for q in bare] == [q.rubric if oracle else None for q in LABELLED]
    assert ("secret" in repr(bare)) is oracle
    # All else is as it was, and the labelled questions are, too.
    for name in {field.name for field in fields(Question)} - {"answer", "rubric"}:
        assert [getattr(q, name) for q in bare] == [getattr(q, name) for q in LABELLED]
    assert LABELLED[2].answer == "secret"


def test_labels_are_off_unless_the_oracle_is_asked_for():
    assert without_labels(LABELLED) == without_labels(LABELLED, oracle=False)


# ---------------------------------------------------------------------------- what reaches the loop


@pytest.fixture
def judge():
    yield from judges()


@pytest.fixture
def seen(monkeypatch):
    """{name: what the aggregator or the reward of a run was given, a tuple a call}.

    The real ones go on working. The final table, which asks aggregators too, is left out.
    """
    calls = {}

    def watch(table, name):
        real = table[name]

        def recording(questions, *others, **options):
            calls.setdefault(name, []).append((questions, *others))
            return real(questions, *others, **options)

        monkeypatch.setitem(table, name, recording)

    for name in synthesize.AGGREGATORS:
        watch(synthesize.AGGREGATORS, name)
    for name in rewards.REWARDS:
        watch(rewards.REWARDS, name)
    monkeypatch.setattr(evaluate, "final_table", lambda *_: None)
    return calls


def sum_of(question) -> str:
    a, b = re.findall(r"\d+", question.messages[0]["content"])
    return str(int(a) + int(b))


def test_the_loops_questions_have_no_answer_and_the_log_has_the_true_accuracy(seen, tmp_path):
    out, labels = tmp_path / "run", {str(q.messages): q.answer for q in load_sums(None)[0]}
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    assert set(seen) == {"synthesis", "match"}
    for name in seen:
        assert len(seen[name]) == 2
        for questions, *_ in seen[name]:
            assert len(questions) == 4
            for q in questions:
                assert labels[str(q.messages)] == sum_of(q)  # there was one to take off
                assert (q.answer, q.rubric) == (None, None)
                assert sum_of(q) not in repr(q)
                assert sum_of(q) not in repr(vars(q))  # nor in what a repr would not show
    # Whoever may read labels says how good the rollouts really were: here, from the log's own.
    for step, numbers in enumerate(lines(out / "metrics.jsonl")):
        rows = [row for row in lines(out / "rollouts.jsonl") if row["step"] == step]
        truths = [labels[str(row["question"])] for row in rows]
        assert [row["answer"] for row in rows] == truths  # for whoever reads the log
        right = [
            f"\\boxed{{{truth}}}" in text
            for row, truth in zip(rows, truths, strict=True)
            for text in row["rollouts"]
        ]
        assert numbers["accuracy/rollouts"] == pytest.approx(sum(right) / len(right))
        assert numbers["accuracy/reference"] is not None


def health_run(reward, judge, tmp_path):
    data, out = health_rows(tmp_path / "health.jsonl"), tmp_path / "run"
    arguments = [*JUDGED, "--data", str(data), "--judge-url", judge().url, "--reward", reward]
    arguments += "--steps 1 --validate-every 0".split()
    assert train.main([*arguments, "--out", str(out)]) == 0


@pytest.mark.parametrize("reward", ["rubric", "rubric-question", "judge"])
def test_rewards_by_a_judge_get_no_rubric_of_the_physicians(reward, judge, seen, tmp_path):
    health_run(reward, judge, tmp_path)
    assert set(seen) == {"synthesis", reward}
    for ((questions, *_),) in seen.values():
        assert [(q.answer, q.rubric) for q in questions] == [(None, None)] * 3
        assert not any(text in repr(questions) for text, _ in CRITERIA)


def test_only_the_oracle_has_the_physicians_rubric_and_no_answer(judge, seen, tmp_path):
    health_run("physician", judge, tmp_path)
    assert set(seen) == {"synthesis", "physician"}
    for ((questions, *_),) in seen.values():
        assert [q.rubric for q in questions] == [CRITERIA] * 3
        assert [q.answer for q in questions] == [None] * 3


# -------------------------------------------------------------------------------------- the watcher


def test_the_watcher_reads_its_own_labels_and_none_of_the_loop():
    """By hand: of the first question 2 of 3 rollouts are right, of the second none is.

    The reference of the first is right, that of the second is wrong and in no rollout.
    """
    first, second, *_ = labelled = SUMS[:5]
    groups = [group(first.answer, first.answer, "1"), group("1", None, "2")]
    references = [Reference(f"\\boxed{{{first.answer}}}"), Reference("\\boxed{3}")]
    watch = evaluate.watcher(labelled)
    numbers, labels = watch(without_labels([first, second]), groups, references)
    assert [label["answer"] for label in labels] == [first.answer, second.answer]
    assert numbers["accuracy/rollouts"] == pytest.approx(2 / 6)
    assert numbers["accuracy/reference"] == 1 / 2
    assert numbers["reference/majority_agreement"] == 1 / 2
    assert numbers["mechanism/new"] == numbers["mechanism/hopeless"] == 1
    # Whatever the loop's questions say is right, the numbers are the same.
    liars = [replace(first, answer="1"), replace(second, answer="3")]
    for given in ([first, second], liars, without_labels(liars, oracle=True)):
        assert watch(given, groups, references) == (numbers, labels)


def test_a_watcher_without_labels_knows_no_accuracy():
    watch = evaluate.watcher(without_labels(SUMS[:1]))
    numbers, labels = watch(SUMS[:1], [group(SUMS[0].answer, "1")], [Reference("\\boxed{1}")])
    assert labels == [{"answer": None, "physicians": None}]
    assert math.isnan(numbers["accuracy/rollouts"])
    assert math.isnan(numbers["accuracy/reference"])
    assert numbers["mechanism/new"] == 0  # which no label is needed for


def test_a_question_that_the_watcher_does_not_know_is_an_error_and_no_guess():
    watch = evaluate.watcher(SUMS[:1])
    with pytest.raises(KeyError):
        watch(SUMS[1:2], [group("1")], [Reference("\\boxed{1}")])
