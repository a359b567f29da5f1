"""What tests of the comparison share: settings without a command line, and the real engine seen."""

import statistics

from evaluate import compare
from plumbing.settings import config, settle
from tasks import load_questions


class Recorder:
    """The real engine, and what it was asked and said."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def sample(self, prompts, n, sampling, **options):
        said = self.engine.sample(prompts, n, sampling, **options)
        self.calls.append((prompts, n, sampling, options, said))
        return said


def settings_of(**given):
    small = {"eval_questions": 6, "max_new_tokens": 48, "group_size": 4}
    named = {"judge_model": given.pop("judge_model", None)}  # not settled: no server is there
    return settle({"engine": "transformers", **small, **given})[1] | named


def compared(
    engine, aggregators=("synthesis",), sizes=(4,), trained=False, questions=None, judge=None,
    **given,
):  # fmt: skip
    """(what the comparison measured, the questions that it asked)."""
    cfg = config(settings_of(**given))
    questions = questions or load_questions(cfg)["test"]
    return compare(cfg, questions, engine, judge, aggregators, sizes, trained=trained), questions


def tokens_of(groups):
    return statistics.fmean(len(o.ids) for group in groups for o in group)


def share_right(questions, rows):
    """Of each row of texts, the share that has the label in a box, as a string."""
    boxes = [f"\\boxed{{{q.answer}}}" for q in questions]
    pairs = zip(boxes, rows, strict=True)
    return [statistics.fmean(box in text for text in row) for box, row in pairs]


def tables(text):
    """[{name of the row: {column: cell}}] of Markdown."""
    parts = [part.splitlines() for part in text.split("\n\n") if part[:1] == "|"]
    found = []
    for part in parts:
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part]
        found.append({row[0]: dict(zip(rows[0], row, strict=False)) for row in rows[2:]})
    return found
