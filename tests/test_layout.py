"""The form of the project: six files are the paper, the rest is plumbing. Read off the code."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from plumbing import flags

ROOT = Path(__file__).resolve().parent.parent
SIX = ("train", "rollout", "synthesize", "rewards", "rubrics", "grpo")
TOP = (*SIX, "tasks", "evaluate")
FOLDERS = ("plumbing", "analysis", "recipes", "benchmarks", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path, inside_functions=True):
    """The project's modules that a file imports, type-only imports included."""
    known = {module_of(p) for p in FILES if p.name != "__init__.py"}
    found = tree(path)
    within = {n for f in ast.walk(found) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    named = set()
    for node in ast.walk(found):
        if node in within and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return named & known


def everything_imported(path, inside_functions=True):
    found = tree(path)
    within = {n for f in ast.walk(found) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    nodes = [n for n in ast.walk(found) if inside_functions or n not in within]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}


def docstring_of(node):
    return node.body[0] if ast.get_docstring(node) is not None else None


def test_the_files_at_the_top_are_the_papers_and_two_more():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(TOP)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short_and_narrow(path):
    assert len(lines(path)) <= (250 if module_of(path) in TOP else 300)
    assert [line for line in lines(path) if len(line) > 100] == []


@pytest.mark.parametrize("name", SIX)
def test_functions_of_the_six_are_small(name):
    for node in ast.walk(tree(ROOT / f"{name}.py")):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            assert len(given) <= 7, node.name
            doc = docstring_of(node)
            spared = doc.end_lineno - doc.lineno + 1 if doc else 0
            assert node.end_lineno - node.lineno + 1 - spared <= 60, node.name


@pytest.mark.parametrize("name", SIX)
def test_three_lines_of_ten_in_the_six_explain(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    told = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and docstring_of(node):
            told |= set(range(docstring_of(node).lineno, docstring_of(node).end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    told |= {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    assert len(told) >= 0.3 * len(text.splitlines())


def test_the_loop_fits_on_a_screen_and_knows_nothing_of_ranks_logs_or_flags():
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    (step,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == "cat_step")
    assert step.end_lineno - step.lineno + 1 <= 40
    assert not [n for n in ast.walk(step) if isinstance(n, ast.If | ast.IfExp | ast.Match)]
    names = {n.id for n in ast.walk(step) if isinstance(n, ast.Name)}
    assert not names & {"print", "tqdm", "time", "ranks", "json", "logging"}


def test_ranks_are_known_to_the_plumbing_alone():
    for name in TOP:
        path = ROOT / f"{name}.py"
        code = {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name)}
        assert not code & {"RANK", "WORLD", "gather"}, name
        uses = [line for line in lines(path) if "ranks." in line]
        assert len(uses) == (name == "train"), name  # the function that is passed to `update`


def test_nothing_imports_in_circles():
    graph = {module_of(path): imports(path) for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_eight_files_at_the_top_have_few_ties():
    ties = [(a, b) for a in TOP for b in imports(ROOT / f"{a}.py") if b in TOP]
    assert len(ties) <= 14, ties


@pytest.mark.parametrize("name", SIX)
def test_the_six_do_without_what_measures_them(name):
    path = ROOT / f"{name}.py"
    at_top = everything_imported(path, inside_functions=False)
    anywhere = everything_imported(path)
    measures = {"evaluate", "analysis", "recipes", "matplotlib", "scipy"}
    assert not {n.split(".")[0] for n in at_top} & measures
    allowed = {"evaluate"} if name == "train" else set()  # train.run calls it at the end
    assert not {n.split(".")[0] for n in anywhere} & (measures - allowed)


def test_train_has_32_flags_at_most():
    assert len(flags.FLAGS) <= 32


def test_the_readme_can_be_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    assert len(text.split()) <= 2600


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_page_of_the_docs_is_short_and_linked(path):
    assert len(lines(path)) <= 250
    assert f"docs/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


# --------------------------------------------------------------------------------- copied alone

TEN_LINES = """
import torch, transformers, peft, grpo
from types import SimpleNamespace as Rollout
toy = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
toy |= dict(num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
toy = transformers.LlamaConfig(**toy)
base = transformers.LlamaForCausalLM(toy)
policy = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=0.1)
pair = [dict(prompt_ids=[1, 2], ids=[3, t], logprobs=[-3.4, -3.4]) for t in (4, 5)]
o = [Rollout(finish_reason="stop", **each) for each in pair]
R, cfg = torch.tensor([[1.0, 0.0]]), grpo.GRPOConfig(beta=0.0, importance_cap=None)
for _ in range(30): grpo.update(policy, optimizer, [o], R, cfg)
print(grpo.token_logprobs(policy, o, 1.0)[0][:, 1].tolist())
"""

RUBRIC = """
import rubrics
words = "<rubric><criterion>Names a dose</criterion><criterion>Names a drug</criterion>"
written, numbers = rubrics.write_rubrics(["a chat"], lambda chats: [words] * len(chats))
def judge(chats):
    return ["yes" if "Names a drug" in chat[0]["content"] else "Hm." for chat in chats]
marks = rubrics.mark(written, [["Take aspirin.", "Rest."]], judge)
print(written, marks.verdicts, [rubrics.share_of_yes(v) for v in marks.verdicts[0]])
"""


def run_alone(name, code, folder):
    (folder / f"{name}.py").write_text((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_grpo_copied_alone_takes_a_step_on_a_toy_model(tmp_path):
    good, bad = ast.literal_eval(run_alone("grpo", TEN_LINES, tmp_path))
    assert good > bad + 1  # both began at about log(1/32); what was rewarded is likelier now


def test_rubrics_copied_alone_parses_reads_and_marks(tmp_path):
    expected = "[['Names a dose', 'Names a drug']] [[[None, True], [None, True]]] [1.0, 1.0]"
    assert run_alone("rubrics", RUBRIC, tmp_path) == expected
