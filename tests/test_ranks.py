"""Several ranks: real processes under the real torchrun, joined by gloo, on the tiny model.

torchrun --nproc-per-node 2 tests/test_ranks.py OUT      one rank of the comparison with a single process
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import settings
import train
from conftest import tiny_policy
from grpo import micro_batches, sequence_kl
from rollout import TransformersEngine
from tasks import RANK, InputError, load_sums
from test_grpo import COMPLETIONS, PROMPTS, A, batch, one_update
from test_judged import Judge
from test_train import SMALL, adapter, lines, metrics, same

ROOT = Path(__file__).resolve().parent.parent

# name: (advantages of batch()'s four rollouts, settings of update)
UPDATES = {
    "two and one micro-batches": (A, {"beta": 0.05, "token_budget": 20}),
    "four micro-batches, by sequence": (
        A,
        {"beta": 0.05, "token_budget": 1, "form": "sequence", "temperature": 0.7},
    ),
    "one micro-batch, so a rank without": (A, {"beta": 0.05, "token_budget": 1000}),
    "all but one advantage zero, so a rank without": (
        torch.tensor([0, 0, 0.4, 0]),
        {"beta": 0.0, "token_budget": 1},
    ),
    "all advantages zero": (torch.zeros(4), {"beta": 0.0, "token_budget": 1}),
    "cut-off rollouts masked": (A, {"beta": 0.05, "token_budget": 1, "mask_truncated": True}),
    "two optimizer steps": (
        A,
        {"beta": 0.05, "token_budget": 20, "updates": 2, "importance_cap": 2.0},
    ),
    "not finite on one rank": (
        torch.tensor([1.2, float("nan"), 0.4, -0.9]),
        {"beta": 0.0, "token_budget": 1},
    ),
}
STEPS_TAKEN = dict.fromkeys(UPDATES, 1) | {
    "all advantages zero": 0,
    "not finite on one rank": 0,
    "two optimizer steps": 2,
}


def measure() -> dict:
    """What this rank, or the only process, computes: all that is to be the same on any number of ranks."""
    model = tiny_policy()[0].double()
    start = {name: p.detach().clone() for name, p in model.state_dict().items()}
    found = {}
    for name, (advantage, options) in UPDATES.items():
        model.load_state_dict(start)
        numbers, gradients = one_update(model, batch(model), advantage, lr=0.1, **options)
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        found[name] = {"numbers": numbers, "gradients": gradients, "weights": weights}
    model.load_state_dict(start)
    model.float()
    found["kl"] = sequence_kl(model, batch(), temperature=0.8, token_budget=12)
    engine = TransformersEngine(model, tiny_policy()[1])
    prompts = [q.messages for q in load_sums(None)[1][:5]]
    greedy = engine.sample(prompts, 2, temperature=0, max_new_tokens=20)
    found["greedy"] = [[o.ids for o in group] for group in greedy]
    found["scores"] = engine.score(prompts, [group[0].ids for group in greedy])
    twice = engine.sample(
        [prompts[0]] * 2, 2, max_new_tokens=30, seed=3
    )  # on two ranks, one prompt each
    found["twice"] = [[o.ids for o in group] for group in twice]
    found["few"] = len(engine.sample(prompts[:1], 3, max_new_tokens=4))  # fewer prompts than ranks
    return found


def torchrun(ranks, *arguments, **options):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        *map(str, arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finished(process, timeout=300):
    """(exit status, stdout, stderr) of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run(ranks, *arguments):
    status, out, err = finished(torchrun(ranks, ROOT / "train.py", *arguments))
    assert status == 0, err
    return out, err


@pytest.fixture(scope="module", params=[2, 3])
def parts(request, tmp_path_factory):
    """What each of several ranks has measured."""
    out = tmp_path_factory.mktemp("ranks")
    status, _, err = finished(torchrun(request.param, __file__, out))
    assert status == 0, err
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return measure()


# ------------------------------------------------------------------------------------------------- one step


def test_the_cases_are_what_their_names_say():
    prompts, ids = PROMPTS, [len(c) for c in COMPLETIONS]
    assert [len(list(micro_batches(ids, budget, prompts))) for budget in (20, 1, 1000)] == [3, 4, 1]


@pytest.mark.parametrize("name", UPDATES)
def test_ranks_take_the_step_that_one_would(parts, alone, name):
    expected = alone[name]
    assert len(expected["gradients"]) == STEPS_TAKEN[name]
    for part in parts:  # every rank, not rank 0 alone
        assert len(part[name]["gradients"]) == len(expected["gradients"])
        for ours, theirs in zip(part[name]["gradients"], expected["gradients"], strict=True):
            assert theirs.norm() > 0
            assert (ours - theirs).norm() / theirs.norm() < 1e-6
        for number, value in expected["numbers"].items():
            near = None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)
            assert part[name]["numbers"][number] == near, number
        torch.testing.assert_close(part[name]["weights"], expected["weights"], rtol=1e-6, atol=1e-9)
        assert torch.equal(part[name]["weights"], parts[0][name]["weights"])  # to the last bit


def test_ranks_share_out_passes_prompts_and_scores(parts, alone):
    for part in parts:
        torch.testing.assert_close(
            part["kl"], alone["kl"], rtol=5e-3, atol=1e-4
        )  # float32, other numbers of threads
        assert part["greedy"] == alone["greedy"]
        torch.testing.assert_close(part["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
        assert part["few"] == 1


def test_ranks_draw_with_seeds_of_their_own_and_know_all_draws(parts, alone):
    first, second = parts[0]["twice"]
    assert first != second  # one prompt, asked on two ranks
    assert all(part["twice"] == parts[0]["twice"] for part in parts)
    assert alone["twice"][0] != alone["twice"][1]


# ------------------------------------------------------------------------------------------------- whole runs

STEPS = 8


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run on two ranks without interruption, and what it printed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, *run(2, *SMALL, "--steps", STEPS, "--out", out)


def test_rank_0_writes_the_run_and_speaks_alone(straight):
    out, printed, err = straight
    assert [row["step"] for row in metrics(out)] == list(range(STEPS))
    assert [len(row["rollouts"]) for row in lines(out / "rollouts.jsonl")] == [4] * 4 * STEPS
    assert printed.count("| trained: CaT |") == printed.count("task sums:") == 1
    assert err.count(f"{STEPS}/{STEPS}") <= 2  # one progress bar
    assert "Traceback" not in err
    assert all(
        row["sampling/logp_difference_max"] < 1e-4 for row in metrics(out)
    )  # all ranks have the newest weights
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == STEPS


def children(pid):
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                    environment = dict(
                        e.split("=", 1)
                        for e in (folder / "environ").read_text().split("\0")
                        if "=" in e
                    )
                    found[int(environment["RANK"])] = int(folder.name)
            except (OSError, KeyError):  # it has ended, or is no rank
                pass
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_within_a_minute_and_the_run_resumes_as_if_unbroken(
    straight, tmp_path, victim
):
    out = tmp_path / "run"
    process = torchrun(2, ROOT / "train.py", *SMALL, "--steps", STEPS, "--out", out)
    try:
        deadline = time.monotonic() + 120
        while (
            not (out / "metrics.jsonl").exists()
            or len((out / "metrics.jsonl").read_text().splitlines()) < 2
        ):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = children(process.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
    finally:
        status, _, _ = finished(process, timeout=60)
    assert status != 0
    assert time.monotonic() - killed < 60
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.1)
    done = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert 1 <= done < STEPS
    run(2, "--resume", "--out", out)
    assert metrics(out) == metrics(straight[0])
    assert same(adapter(out), adapter(straight[0]))
    assert (out / "table.md").read_text().splitlines()[2:] == (
        straight[0] / "table.md"
    ).read_text().splitlines()[2:]


def test_another_number_of_ranks_is_refused(straight, tmp_path, capsys):
    before = (straight[0] / "metrics.jsonl").read_bytes()
    assert train.main(["--resume", "--out", str(straight[0])]) == 2
    assert "was started on 2 ranks, and not on 1" in capsys.readouterr().err
    status, _, err = finished(torchrun(3, ROOT / "train.py", "--resume", "--out", straight[0]))
    assert status != 0
    assert "was started on 2 ranks, and not on 3" in err
    assert (straight[0] / "metrics.jsonl").read_bytes() == before
    single = tmp_path / "single"
    assert train.main([*SMALL, "--steps", "1", "--out", str(single)]) == 0
    status, _, err = finished(torchrun(2, ROOT / "train.py", "--resume", "--out", single))
    assert status != 0
    assert "was started on 1 ranks, and not on 2" in err


UNLIKE = """
import os, sys
sys.path.insert(0, {root!r})
import train
sys.exit(train.main([*sys.argv[1:], *({extra!r}.split() if os.environ["RANK"] == "1" else [])]))
"""


@pytest.mark.parametrize(
    ("extra", "what"),
    [("--lr 0.02", "settings"), ("--data {tmp}/other.jsonl", "settings"), ("--engine auto", "")],
)
def test_ranks_that_were_started_differently_are_refused(tmp_path, extra, what):
    """On several machines the command is typed several times."""
    for name in ("one", "other"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"prompt": "What is {n} + 1?"}}\n' for n in range(8))
        )
    script = tmp_path / "unlike.py"
    script.write_text(UNLIKE.format(root=str(ROOT), extra=extra.format(tmp=tmp_path)))
    arguments = [
        *SMALL,
        "--task",
        "jsonl",
        "--model",
        "tiny",
        "--data",
        tmp_path / "one.jsonl",
        "--steps",
        "1",
    ]
    status, _, err = finished(torchrun(2, script, *arguments, "--out", tmp_path / "run"))
    assert (status == 0) == (what == ""), err
    assert not what or f"the ranks do not have the same {what}" in err
    assert (tmp_path / "run").exists() == (what == "")


def test_a_checkpoint_that_only_one_rank_has_is_refused(tmp_path):
    """As on machines that do not share --out: each rank gets a folder of its own, and rank 1's checkpoint is not there."""
    run(2, *SMALL, "--steps", "1", "--out", tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / "checkpoint" / "state.pt").unlink()
    script = tmp_path / "apart.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nimport runs, train\n"
        "from pathlib import Path\nreal = runs.load_checkpoint\n"
        f"runs.load_checkpoint = lambda out, *a, **k: real(Path({str(tmp_path)!r}) / os.environ['RANK'], *a, **k)\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    before = (tmp_path / "0" / "metrics.jsonl").read_bytes()
    status, _, err = finished(
        torchrun(2, script, "--resume", "--steps", "2", "--out", tmp_path / "0")
    )
    assert status != 0
    assert "the ranks do not have the same checkpoint" in err
    assert (tmp_path / "0" / "metrics.jsonl").read_bytes() == before


def test_what_two_ranks_have_trained_is_evaluated_on_two_as_on_one(straight, tmp_path):
    arguments = [
        "--adapter",
        straight[0],
        "--aggregators",
        "min-ppl",
        "--sizes",
        "4",
        "--eval-questions",
        "5",
    ]
    arguments += ["--eval-sampling", '{"temperature": 0}']
    status, out, err = finished(
        torchrun(2, ROOT / "evaluate.py", *arguments, "--out", tmp_path / "two")
    )
    assert status == 0, err
    assert out.count("| trained: CaT |") == 1
    command = [sys.executable, ROOT / "evaluate.py", *arguments, "--out", tmp_path / "one"]
    subprocess.run(command, check=True, capture_output=True)
    two, one = ((tmp_path / name / "table.md").read_text() for name in ("two", "one"))
    assert two == one


def test_a_judge_behind_a_server_is_asked_once_whatever_the_ranks(tmp_path):
    server, data = Judge(), tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"prompt": "What is {n} + 1?"}}\n' for n in range(6)))
    arguments = [
        "--task",
        "jsonl",
        "--model",
        "tiny",
        "--data",
        data,
        *SMALL,
        "--reward",
        "judge",
        "--steps",
        "2",
    ]
    arguments += ["--judge", "server", "--judge-url", server.url, "--judge-model", "strict"]
    try:
        run(2, *arguments, "--out", tmp_path / "run")
    finally:
        server.shutdown()
        server.server_close()
    assert (
        len(server.calls)
        == len(set(server.calls))
        == len(lines(tmp_path / "run" / "judge.jsonl"))
        > 0
    )
    assert all(row["judge/unknown_rate"] == 0 for row in metrics(tmp_path / "run"))


def test_all_ranks_stop_early_and_go_back_to_the_best_adapter(tmp_path):
    arguments = "--method sft --lr 0.03 --validate-every 1 --patience 2 --steps 9".split()
    greedy = ["--eval-sampling", '{"temperature": 0}']
    run(2, *SMALL, *arguments, *greedy, "--out", tmp_path / "run")
    scores = [row["validation/score"] for row in metrics(tmp_path / "run")]
    assert scores.index(max(scores)) == len(scores) - 3 < 6  # the best is not the last
    assert (
        evaluate.main(
            ["--adapter", str(tmp_path / "run"), *greedy, "--out", str(tmp_path / "alone")]
        )
        == 0
    )
    first, again = (
        json.loads((tmp_path / name / "results.json").read_text())["rows"]
        for name in ("run", "alone")
    )
    (first,), (again,) = (
        [row for row in rows if row["kind"] == "trained"] for rows in (first, again)
    )
    assert first == again  # answers and their lengths: no rank has asked the last adapter


# ------------------------------------------------------------------------------------------------- what it refuses


def test_a_rank_that_is_left_alone_says_so(tmp_path):
    script = tmp_path / "one_dies.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import torch\nfrom tasks import RANK, RankError, exchange, gather\ntorch.distributed.init_process_group('gloo')\n"
        "assert gather(RANK * 'x') == ['', 'x']\n"
        "if RANK: os._exit(7)\n"
        "for call in (lambda: gather(1), lambda: exchange(torch.distributed.all_reduce, torch.ones(3))):\n"
        "    try: call()\n"
        "    except RankError as error: print('SAID', error, flush=True)\n"
    )
    _, out, _ = finished(torchrun(2, script), timeout=60)
    assert out.count("SAID another rank has died") == 2


def test_more_ranks_than_gpus_and_split_engines_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="at most 2"):
        settings.join()
    monkeypatch.setattr(settings, "WORLD", 2)
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)
    for given in (
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"distributed_executor_backend": "uni"},
    ):
        with pytest.raises(InputError, match="start without torchrun"):
            settings.check({"engine": "vllm", "engine_args": given, "sleep": False})


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.save(measure(), Path(sys.argv[1]) / f"{RANK}.pt")
