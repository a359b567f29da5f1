"""report.html in the system's Chromium: what a person sees, presses and prints."""

import json
import re

import pytest

from analysis import page
from page_helpers import Opened, boxed, chromium, measured, row, run_folder

# (step, number) -> (answers of the rollouts, of the reference, the true one)
QUESTIONS = {
    (0, 1): (["1", "1", "2", "3"], "2", "2"),  # right to leave the majority
    (0, 2): (["1", "1", "2", "3"], "2", "1"),  # wrong to
    (0, 3): (["1", "1", "2", "2"], "1", "1"),
    (1, 1): (["1", "1", "1", "1"], "1", "1"),  # teaches nothing
    (1, 2): (["1", "1", "2", "3"], "1", "9"),  # no rollout is right, nor is the reference
    (1, 3): (["1", "1", "2", "3"], "9", "9"),  # the reference alone is; it rewards nobody
}
DIFFER, WRONG = {(0, 1), (0, 2), (1, 3)}, {(0, 2), (1, 2)}
HOPELESS, SILENT = {(1, 2), (1, 3)}, {(1, 1), (1, 3)}
HACK = "window.hacked = 1"
HOSTILE = [
    f"<script>{HACK}</script>",
    f"</textarea></script></style><script>{HACK}</script>",
    f"<img src=x onerror='{HACK}'>",
    f"\"' onmouseover='{HACK}' autofocus onfocus='{HACK}' x=\"",
    f"</details><svg onload='{HACK}'>",
    "{{ 7 * 7 }} {% raw %} <!-- ]]> &lt;b&gt; \u2028 \u202e desrever \x00 end",
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """The page of a finished run of QUESTIONS."""
    rows = [row(step, f"What is {step}.{n}?", *q) for (step, n), q in QUESTIONS.items()]
    out = run_folder(tmp_path_factory.mktemp("runs") / "sums", rows, measured(), lr=0.25)
    page.write(out)
    return out / "report.html"


def judged_rows(words="It says so."):
    rubric = ["Names a dose", "Is kind"]
    verdicts = [[True, True], [False, True], [None, True]]
    judge = [["yes\n" + words, "yes"], ["no", "yes"], ["Hm. " + words, "yes"]]
    more = {"rubric": rubric, "verdicts": verdicts, "judge": judge}
    more |= {"physicians": [["Warns of harm", 7.0]]}
    made = row(
        0, "Hello?", ["Take 5 mg.\nBe well.", "Be well.\nBye.", "No.\nBye."], "Take\n5", **more
    )
    return [made | {"rewards": [1.0, 0.5, 1.0]}]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "judged"
    more = {"task": "healthbench", "reward": "rubric", "judge_model": "strict"}
    page.write(run_folder(out, judged_rows(), **more))
    return out / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_silence_asks_for_nothing_and_fits(browser, sums, judged, width, scheme):
    for path in (sums, judged):
        opened = Opened(browser, path, width, scheme)
        opened.page.click("text=Unfold all")
        root = "document.documentElement"
        assert opened.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        assert opened.said == []
        assert opened.asked == [path.as_uri()]


def luminance(colour):
    """Of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


COLOURS = """() => [...document.querySelectorAll("main *")].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
  let under = e;
  while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)" && under.parentElement)
    under = under.parentElement;
  return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor, e.textContent];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_under_it(browser, sums, judged, scheme):
    for path in (sums, judged):
        opened = Opened(browser, path, scheme=scheme)
        opened.page.click("text=Unfold all")
        found = opened.page.evaluate(COLOURS)
        assert len(found) > 100
        for ink, paper, text in found:
            if "rgba(0, 0, 0, 0)" in (ink, paper):
                continue  # the number of a rollout that has not got a line
            dark, bright = sorted(map(luminance, (ink, paper)))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, text)


def test_it_says_what_was_run_and_measured(browser, sums):
    text = Opened(browser, sums).page.inner_text("main")
    assert "CaT on sums" in text
    assert "lr 0.25" in text
    for score in ("0.500", "0.750"):  # the means of page_helpers.measured, by hand
        assert score in text
    assert "\n7.0\n" in text  # minutes
    assert "Finished" in text


def test_it_starts_with_a_right_and_a_wrong_decision(browser, sums):
    opened = Opened(browser, sums)
    right, wrong = (opened.page.locator("section > h3 + details.question").nth(n) for n in (0, 1))
    assert "What is 0.1?" in right.inner_text()
    assert "✓ Right to leave the majority" in right.inner_text()
    assert "What is 0.2?" in wrong.inner_text()
    assert "✗ Wrong to leave the majority" in wrong.inner_text()
    told = "wrong lesson: rollouts 1 and 2 had the true answer"
    assert told in wrong.inner_text()
    # Rollout 3 is rewarded, 1 against three 0s: 0.75 / 0.5 and -0.25 / 0.5.
    advantages = wrong.locator(".A b").all_inner_texts()
    assert advantages == ["▼ −0.50", "▼ −0.50", "▲ +1.50", "▼ −0.50"]
    signs = wrong.locator(".rollout").nth(0).locator(".line").all_inner_texts()
    assert [text.replace("\n", "") for text in signs] == ["≠\\boxed{1}"]
    assert wrong.locator(".rollout").nth(2).locator(".line").all_inner_texts() == ["\\boxed{2}"]


def test_filters_leave_what_they_say(browser, sums):
    opened = Opened(browser, sums)
    assert opened.shown() == list(QUESTIONS)
    boxes = {"differs": DIFFER, "wrong": WRONG, "hopeless": HOPELESS, "silent": SILENT}
    for name, expected in boxes.items():
        opened.page.check(f"[name={name}]")
        assert set(opened.shown()) == expected
        assert opened.page.inner_text("output") == f"{len(expected)} shown"
        opened.page.uncheck(f"[name={name}]")
    opened.page.check("[name=differs]")
    opened.page.check("[name=hopeless]")
    assert set(opened.shown()) == DIFFER & HOPELESS
    opened.page.select_option("[name=step]", "0")
    assert opened.shown() == []
    assert opened.page.is_visible("text=No question passes these filters")
    opened.page.uncheck("[name=hopeless]")
    opened.page.uncheck("[name=differs]")
    assert opened.shown() == [key for key in QUESTIONS if key[0] == 0]


def test_it_works_from_the_keyboard(browser, sums, judged):
    opened = Opened(browser, sums)
    for _ in range(80):  # every stop of the Tab key, until the first question of the list
        opened.page.keyboard.press("Tab")
        inside = "document.activeElement.matches('#questions .question summary')"
        if opened.page.evaluate("document.activeElement.name === 'differs'"):
            opened.page.keyboard.press("Space")
            assert set(opened.shown()) == DIFFER
        if opened.page.evaluate(inside):
            break
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.activeElement.parentElement.open")

    opened = Opened(browser, judged)
    cell = opened.page.locator("button[data-raw]").first
    cell.focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.is_visible("dialog[open]")
    opened.page.keyboard.press("Escape")
    assert not opened.page.is_visible("dialog")
    assert opened.page.evaluate("document.activeElement.dataset.raw") == "yes\nIt says so."


def test_a_cell_opens_the_judges_words(browser, judged):
    opened = Opened(browser, judged)
    assert "1 of 2 criteria tell the rollouts apart" in opened.page.inner_text("main")
    table = opened.page.locator(".verdicts table").first
    cells = table.locator("button").all_inner_texts()
    assert cells == ["✓", "✗", "?", "✓", "✓", "✓"]
    marks = ["tells no rollouts apart" in text for text in table.locator("tr").all_inner_texts()]
    assert marks == [False, False, True, False, False]  # of a head, two criteria, two sums
    table.locator("button").nth(2).click()
    text = opened.page.inner_text("dialog[open]")
    for part in ("rollout 3: unknown", "Names a dose", "Hm. It says so."):
        assert part in text
    opened.page.click("text=Close")
    assert not opened.page.is_visible("dialog")
    assert opened.page.is_visible("text=Warns of harm")  # what a question is unfolded with
    opened.page.click("text=What physicians ask for")
    assert not opened.page.is_visible("text=Warns of harm")


def test_hostile_text_is_text(browser, tmp_path):
    """In whatever a model, a judge, a file or a person wrote."""
    everything = "\n".join(HOSTILE)
    rows = judged_rows(everything)
    rows[0] |= {"question": [{"role": f"<b>{HACK}", "content": everything}] * 2}
    rows[0] |= {"rollouts": [everything] * 3, "reference": everything, "rubric": HOSTILE[:2]}
    rows[0] |= {"physicians": [[everything, 7.0]]}
    plain = row(0, everything, [boxed(everything, everything)] * 3, everything, everything)
    more = {"reward": "rubric", "data": HOSTILE[0], "judge_model": HOSTILE[2]}
    judged = run_folder(tmp_path / "<img src=x onerror=hacked=1>", rows, task="healthbench", **more)
    match = run_folder(tmp_path / "match", [plain])
    for out in (judged, match):
        page.write(out)
        opened = Opened(browser, out / "report.html")
        opened.page.click("text=Unfold all")
        for cell in opened.page.locator("button[data-raw]:visible").all()[:2]:
            cell.click()
            opened.page.keyboard.press("Escape")
        opened.page.mouse.move(300, 300)
        assert opened.page.evaluate("window.hacked") is None
        assert opened.said == []
        assert opened.page.locator("img, textarea, iframe").count() == 0
        assert opened.page.locator("script").count() == 1
        lines = opened.page.locator("#questions .rollout").first.locator(".line")
        written = [line.evaluate("e => e.lastChild.textContent") for line in lines.all()]
        for text in HOSTILE[:-1]:
            assert text in written
        assert any(text.startswith("{{ 7 * 7 }}") for text in written)
    # The second lock: what got past the first would not run.
    opened.page.evaluate(f"document.body.innerHTML += \"<img src=x onerror='{HACK}'>\"")
    inject = "s => document.body.append(Object.assign(document.createElement('script'), {text: s}))"
    opened.page.evaluate(inject, HACK)
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.hacked") is None
    assert "Content Security Policy" in "".join(opened.said)


def test_it_prints_what_is_unfolded(browser, sums, tmp_path):
    opened = Opened(browser, sums)
    opened.page.emulate_media(media="print")
    assert not opened.page.is_visible(".filters")
    assert opened.shown() == []
    opened.page.emulate_media(media="screen")
    opened.page.locator("#questions summary").nth(2).click()
    opened.page.emulate_media(media="print")
    assert opened.shown() == [(0, 3)]
    assert opened.page.pdf().startswith(b"%PDF")


def test_without_a_script_all_can_be_read(browser, sums):
    context = browser.new_context(java_script_enabled=False)
    found = context.new_page()
    found.goto(sums.as_uri())
    assert not found.is_visible(".filters")
    found.locator("#questions summary").nth(3).click()
    assert found.locator("#questions .question").nth(3).locator(".rollout").first.is_visible()
    context.close()


def test_the_page_holds_no_path_of_this_machine(judged):
    assert str(page.HERE) not in judged.read_text(encoding="utf-8")
    assert json.loads((judged.parent / "config.json").read_text())  # and the run is as it was
