"""What the README tells people to type: its snippets work as they stand."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import rubrics
import synthesize
import tasks
from rollout import Rollout

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
GROUPS = [
    [
        Rollout(text, [1] * n, [0.0] * n, "stop", [1])
        for text, n in (("\\boxed{1/2}", 9), ("\\boxed{0.5}", 5), ("short", 2))
    ]
]


def run_snippet(module, table):
    """The snippet that adds to `table`, run where the README says to put it; what the table then holds that is new."""
    (snippet,) = (
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if table in code
    )
    namespace = vars(module) | {"itertools": itertools}
    namespace[table] = dict(namespace[table])
    exec(snippet, namespace)
    (name,) = namespace[table].keys() - vars(module)[table].keys()
    assert set(vars(module)[table]) <= set(namespace[table])
    return namespace[table][name]


def test_the_aggregator():
    assert run_snippet(synthesize, "AGGREGATORS")(None, GROUPS, None, True) == [
        synthesize.Reference("\\boxed{0.5}", [1] * 5)
    ]


def test_the_reward():
    values = run_snippet(rubrics, "REWARDS")(
        GROUPS, [synthesize.Reference("\\boxed{0.5}")], None, None, None
    ).values
    assert torch.equal(values, torch.tensor([[0.0, 1.0, 0.0]]))


def test_the_task():
    train, test = run_snippet(tasks, "TASKS").load(None, True)
    assert len(train) + len(test) == 90 * 90
    assert "What is 10 times 10?" in train[0].messages[0]["content"]
    assert train[0].answer == "100"


@pytest.mark.parametrize("name", re.findall(r"^    ([\w/]+(?:\.py|/))  +\S", README, re.MULTILINE))
def test_the_file_tree_names_what_is_there(name):
    assert (Path(__file__).resolve().parent.parent / name).exists()
