"""`evaluate.py report`, and the page that a run leaves: of runs in every state.

The browser's driver keeps an event loop running, and the judge's client starts one: no test opens
the browser before its run has ended.
"""

import re
import shutil

import pytest

import evaluate
import train
from analysis import page
from judged_runs_helpers import SMALL as JUDGED
from judged_runs_helpers import health_rows, judges
from page_helpers import Opened, boxed, chromium, measured, row, run_folder
from run_helpers import SMALL, lines, refused


@pytest.fixture
def judge():
    yield from judges()


def rows_of(steps, questions=2, length=1):
    """Rows whose texts have `length` lines each."""
    text = [f"step by step, {n} and on and on and on" for n in range(length - 1)]
    answers = [boxed(n, *text) for n in (1, 1, 2)]
    return [
        row(step, f"Question {step}.{q}?", answers, answers[0], "1")
        for step in range(steps)
        for q in range(questions)
    ]


def report(*arguments):
    return evaluate.main(["report", *map(str, arguments)])


def html_of(out):
    return (out / "report.html").read_text(encoding="utf-8")


def steps_in(out):
    return [int(step) for step in re.findall(r"<h3>Step (\d+)</h3>", html_of(out))]


def test_a_run_leaves_a_page_that_names_the_true_answers(tmp_path):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    rows = lines(out / "rollouts.jsonl")
    with chromium() as browser:
        opened = Opened(browser, out / "report.html")
        assert opened.said == []
        assert opened.shown() == [(row["step"], n % 4 + 1) for n, row in enumerate(rows)]
        cards = opened.page.locator("#questions .question")
        for n, logged in enumerate(rows):
            a, b = map(int, re.findall(r"\d+", logged["question"][0]["content"]))
            assert logged["answer"] == str(a + b)
            assert len(logged["tokens"]) == 4
            assert logged["cut_off"][:4] == [length == 48 for length in logged["tokens"]]
            signs = [f"\\boxed{{{a + b}}}" in text for text in logged["rollouts"]]
            marks = cards.nth(n).locator(".rollout h4").all()
            assert ["✓" in mark.text_content() for mark in marks] == signs
        assert opened.page.locator("svg").count() >= 6
        assert "Finished" in opened.page.inner_text("main")


def test_a_judged_run_leaves_its_verdicts(judge, tmp_path):
    data, out = health_rows(tmp_path / "health.jsonl"), tmp_path / "run"
    arguments = [*JUDGED, "--data", str(data), "--judge-url", judge().url, "--reward", "judge"]
    arguments += "--steps 1 --validate-every 0".split()
    assert train.main([*arguments, "--out", str(out)]) == 0
    rows = lines(out / "rollouts.jsonl")
    physicians = [["Is kind", 5], ["Is right", 10], ["Is rude", -4]]
    assert [logged["physicians"] for logged in rows] == [physicians] * 3
    with chromium() as browser:
        opened = Opened(browser, out / "report.html")
        for n, logged in enumerate(rows):
            cells = opened.page.locator("#questions .question").nth(n).locator("button[data-raw]")
            words = [cell.get_attribute("data-raw") for cell in cells.all()]
            assert words == [said[0] for said in logged["judge"]]
        assert "means the same as the reference." in opened.page.locator("main").text_content()


def test_a_run_that_was_killed_or_is_under_way_has_a_page(tmp_path, capsys):
    out = run_folder(tmp_path / "run", rows_of(3), steps=9)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        with (out / name).open("a") as file:  # cut off in the middle of a line
            file.write((out / name).read_text().split("\n")[0][:40])
    assert report(out) == 0
    assert steps_in(out) == [0, 1, 2]
    assert "3 of 9 steps are logged, and the run is under way or was stopped" in html_of(out)
    assert "report.html (" in capsys.readouterr().out
    # One that has not made a step yet.
    shutil.copytree(out, tmp_path / "new")
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        (tmp_path / "new" / name).unlink()
    assert report(tmp_path / "new") == 0
    assert "0 of 9 steps" in html_of(tmp_path / "new")
    # A whole line that is none is somebody's edit.
    with (out / "rollouts.jsonl").open("a") as file:
        file.write("oops\n")
    assert "rollouts.jsonl has a line that is no step's" in refused(
        evaluate.main, ["report", str(out)], capsys
    )


def test_labels_are_not_made_up_where_the_log_has_none(tmp_path):
    rows = [{k: v for k, v in each.items() if k != "answer"} for each in rows_of(1)]
    out = run_folder(tmp_path / "old", rows)
    assert report(out) == 0
    assert "With the majority" in html_of(out)
    assert "no label" in html_of(out)
    assert "✓" not in re.sub(r"<(details class=\"more help|script).*?</\1", "", html_of(out))


@pytest.mark.parametrize(("steps", "shown"), [(4, 4), (10, 10), (30, 10)])
def test_the_steps_are_the_first_the_last_and_between_unless_named(steps, shown, tmp_path, capsys):
    out = run_folder(tmp_path / "run", rows_of(steps))
    assert report(out) == 0
    assert len(steps_in(out)) == shown
    assert {0, steps - 1} <= set(steps_in(out))
    assert report(out, "--steps", 3, 1, 3) == 0
    assert steps_in(out) == [1, 3]
    error = refused(evaluate.main, ["report", str(out), "--steps", "99"], capsys)
    assert "has no step 99: it has" in error
    assert report(tmp_path / "nothing") == 2


def test_a_page_is_about_5_mb_at_most_unless_steps_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 200_000)
    bare = run_folder(tmp_path / "bare", rows_of(1))
    report(bare)
    frame = len(html_of(bare))  # style, script and curves
    out = run_folder(tmp_path / "long", rows_of(20, questions=3, length=20))
    assert report(out) == 0
    assert len(html_of(out)) < 200_000 + 2 * frame
    assert 2 <= len(steps_in(out)) < 10
    assert {0, 19} <= set(steps_in(out))
    # So long that not even two steps fit: some questions of each.
    out = run_folder(tmp_path / "longer", rows_of(3, questions=6, length=60))
    assert report(out) == 0
    assert len(html_of(out)) < 200_000 + 2 * frame
    assert steps_in(out) == [0, 2]
    assert re.search(r"[1-5] of 6 questions, to keep the page small", html_of(out))
    assert report(out, "--steps", 0, 1, 2) == 0
    assert steps_in(out) == [0, 1, 2]
    assert "to keep the page small" not in html_of(out)


def test_several_runs_have_their_curves_in_one_plot(tmp_path):
    one = run_folder(tmp_path / "one", rows_of(2), measured())
    other = run_folder(tmp_path / "other", rows_of(2), measured(), lr=0.5)
    going = run_folder(tmp_path / "a & b" / "one", rows_of(3))
    assert report(one, other, going, "--to", tmp_path / "all.html") == 0
    with chromium() as browser:
        opened = Opened(browser, tmp_path / "all.html")
        assert opened.said == []
        texts = opened.page.locator("svg").first.locator("text").all_text_contents()
        assert {"one", "other", "one (2)"} <= set(texts)
        titles = opened.page.locator("h2").all_inner_texts()
        assert titles[-3:] == ["one: CaT", "other: CaT", "one: CaT"]
        # One for all, and one each of the two that are finished.
        assert opened.page.locator("table.grid").count() == 3
        links = [link.evaluate("a => a.href") for link in opened.page.locator("a").all()]
        assert links == [(run / "report.html").as_uri() for run in (one, other, going)]


def test_an_evaluation_has_a_page(tmp_path):
    out = run_folder(tmp_path / "evaluation", [], measured(), evaluation=True)
    (out / "metrics.jsonl").unlink()
    (out / "rollouts.jsonl").unlink()
    assert report(out) == 0
    assert "0.750" in html_of(out)
    assert "<svg" not in html_of(out)
