"""Folders like those of runs, with what a test wants in them, and the system's Chromium."""

import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import sync_playwright

from comparison_helpers import settings_of
from plumbing import folder

BROWSER = shutil.which("chromium")


@contextmanager
def chromium():
    """The system's browser; a test that needs it is skipped where there is none."""
    if BROWSER is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


class Opened:
    """A page in a browser, with all that it said on its console and asked of the network."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        size = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def shown(self):
        """(step, number) of the questions in the list that a person sees."""
        cards = self.page.locator("#questions .question:visible small:text('question')")
        words = [text.split() for text in cards.all_inner_texts()]  # "step 0 · question 1"
        return [(int(step), int(number)) for _, step, _, _, number in words]


def boxed(answer, *lines):
    return "\n".join([*lines, f"\\boxed{{{answer}}}"])


def row(step, question, answers, reference, truth=None, **more):
    """A line of rollouts.jsonl whose rollouts are bare answers, rewarded as `match` does."""
    rollouts = [text if "\n" in text else boxed(text) for text in answers]
    reference = reference if "\n" in reference else boxed(reference)
    box = reference.split("\n")[-1]
    made = {"step": step, "question": [{"role": "user", "content": question}]}
    made |= {"rollouts": rollouts, "reference": reference}
    made |= {"rewards": [float(text.split("\n")[-1] == box) for text in rollouts]}
    return made | ({} if truth is None else {"answer": truth}) | more


def run_folder(out, rows, results=None, **settings):
    """`out`, as a run of `rows` leaves it; each step has reward 0.5."""
    settings = settings_of(model="tiny", **settings)
    folder.create(out, settings)
    folder.append(out / "rollouts.jsonl", rows)
    steps = sorted({row["step"] for row in rows})
    numbers = [{"step": step, "reward": 0.5, "step_time": 60.0} for step in steps]
    folder.append(out / "metrics.jsonl", numbers)
    if results:
        folder.write_json(out / "results.json", results)
    return out


def measured(**scores):
    """results.json of two methods on four questions, scored by hand."""
    common = {"generations": 1, "tokens": 30.0, "answers": 1}
    kinds = {"initial": [0.0, 0.0, 1.0, 1.0], "trained": [1.0, 0.0, 1.0, 1.0]} | scores
    rows = [{"kind": kind, **common, "values": values} for kind, values in kinds.items()]
    return {"questions": 4, "digest": "d", "judged": False, "rows": rows, "minutes": 7.0}
