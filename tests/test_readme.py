"""What the README and the pages of docs/ tell people to type: it works as it stands."""

import ast
import itertools
import re
import shlex

import pytest
import torch

import evaluate
import rewards
import synthesize
import tasks
from plumbing import flags
from plumbing.settings import EVALUATION
from recipes import cat_sft
from rollout import Rollout
from run_helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
GROUPS = [
    [
        Rollout(text, [1] * n, [0.0] * n, "stop", [1])
        for text, n in (("\\boxed{1/2}", 9), ("\\boxed{0.5}", 5), ("short", 2))
    ]
]

# --------------------------------------------------------------------------- bring your own


def run_snippet(module, table):
    """What the snippet adds to `table`, run where the README says to put it: at a file's end."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (snippet,) = (code for code in snippets if f"{table}[" in code.split("\n\n")[-1])
    namespace = dict(vars(module)) | {"itertools": itertools}
    namespace[table] = dict(namespace[table])
    exec(snippet, namespace)
    (name,) = namespace[table].keys() - vars(module)[table].keys()
    assert set(vars(module)[table]) <= set(namespace[table])
    return namespace[table][name]


def test_the_aggregator():
    questions = [tasks.Question([])]
    shortest = [synthesize.Reference("\\boxed{0.5}", [1] * 5)]
    assert run_snippet(synthesize, "AGGREGATORS")(questions, GROUPS, None) == shortest


def test_the_reward():
    questions, references = [tasks.Question([])], [synthesize.Reference("\\boxed{0.5}")]
    given = run_snippet(rewards, "REWARDS")(questions, GROUPS, references, None, None)
    assert torch.equal(given.values, torch.tensor([[0.0, 1.0, 0.0]]))
    nothing = run_snippet(rewards, "REWARDS")(
        questions, GROUPS, [synthesize.Reference("")], *[0, 0]
    )
    assert torch.equal(nothing.values, torch.zeros(1, 3))  # no answer equals no answer


def test_the_task():
    train, test = run_snippet(tasks, "TASKS").load(None, True)
    assert len(train) + len(test) == 90 * 90
    assert "What is 10 times 10?" in train[0].messages[0]["content"]
    assert train[0].answer == "100"


# --------------------------------------------------------------------------- the commands

PROGRAM = re.compile(r"(?:^|\s)((?:\w+/)*\w+\.py)(?:\s|$)")
STANDS_FOR = {"STEP": "0", "$seed": "0"}  # a number, where the page has a name for one
YOURS = "recipes/NAME.py"


def shell_lines(text):
    """Command lines of a page: those indented or fenced, and those in backticks in the text."""
    fenced = [code for _, code in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = [line for line in prose.splitlines() if line.startswith("    ")]
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    quoted = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    blocks = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [*blocks.splitlines(), *quoted]


def commands(page):
    """[(program, its arguments)] that a page tells people to type."""
    found = []
    for line in shell_lines(page.read_text(encoding="utf-8")):
        for command in re.split(r"&&|\|\||;|\|(?=\s)", line.split("  #")[0].split(" # ")[0]):
            program = PROGRAM.search(command)
            before = command[: program.start(1)] if program else ""
            called = re.search(r"(python3?|torchrun|pytest)\b", before) or " --" in command
            if program and called:
                rest = command[program.end(1) :].replace(" done", "")
                found.append((program[1], rest.strip()))
    return found


COMMANDS = sorted({(page.name, *command) for page in PAGES for command in commands(page)})


def known_to(program, words):
    """Does the program's own parser take these words?"""
    if program == "evaluate.py":
        flags.parse(words, "", EVALUATION, evaluate.more_flags)
    else:
        method = cat_sft.METHOD if program == "recipes/cat_sft.py" else None
        taken = set(flags.FLAGS) - (method.ignores if method else set())
        flags.parse(words, "", taken)


def test_the_pages_tell_people_to_type_something():
    programs = {program for _, program, _ in COMMANDS}
    assert {"train.py", "evaluate.py", "recipes/cat_sft.py"} <= programs
    assert len(COMMANDS) >= 20
    assert ("README.md", "train.py", "--task math500") in COMMANDS


@pytest.mark.parametrize(("page", "program", "rest"), COMMANDS, ids=lambda part: part[:60])
def test_a_command_names_a_program_that_exists_and_flags_that_it_has(page, program, rest):
    if program == YOURS:
        return
    path = ROOT / program
    path = path if path.exists() else ROOT / "benchmarks" / program  # benchmarks/README.md
    assert path.exists(), page
    words = [STANDS_FOR.get(word, word) for word in shlex.split(rest)]
    if program in ("train.py", "evaluate.py", "recipes/cat_sft.py"):
        if "--help" not in words:
            known_to(program, words)
        return
    text = path.read_text(encoding="utf-8")
    if "from work import" in text:  # the flags that benchmarks share
        text += (ROOT / "benchmarks" / "work.py").read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        shared = "flags.parse" in text and flag[2:].replace("-", "_") in flags.FLAGS
        assert f'"{flag}"' in text or shared, flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_files_and_functions_that_a_page_names_are_there(page):
    """`plumbing/folder.py` in a page is a file; "`update` in `grpo.py`" is a name in it."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|png|md))`", text):
        assert path == YOURS or (ROOT / path).exists(), path
    said = re.findall(r"`(\w+)`(?:,\s+`\w+`)?\s+(?:in|of)\s+`((?:\w+/)*\w+\.py)`", text)
    for name, path in said:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        named = {getattr(node, "name", None) for node in ast.walk(tree)}
        named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert name in named, (name, path)


TREE = re.findall(r"^    ([\w/]+(?:\.py|/)) +\S", README, re.MULTILINE)


def test_the_file_tree_names_what_is_there():
    assert {"train.py", "plumbing/", "recipes/"} <= set(TREE)
    for name in TREE:
        assert (ROOT / name).exists(), name
