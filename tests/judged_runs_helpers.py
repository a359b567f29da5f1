"""What whole runs with a judge start from: HealthBench-like rows, flags, and servers that end."""

import json

from judge_server import Judge

SMALL = "--model tiny --task healthbench --judge-model strict --max-new-tokens 24".split()
SMALL += "--prompts-per-step 3 --group-size 3 --eval-questions 2".split()
CRITERIA = (("Is kind", 5), ("Is right", 10), ("Is rude", -4))


def judges():
    """For a fixture: yields what starts a judge_server.Judge; ends them all."""
    servers = []

    def make(answer=None):
        servers.append(Judge(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def health_rows(path, count=30):
    """`path`, with `count` questions of one turn, each with the rubric CRITERIA."""
    rubric = [{"criterion": text, "points": points} for text, points in CRITERIA]
    prompts = [[{"role": "user", "content": f"{n} + 1?"}] for n in range(count)]
    rows = [{"prompt_id": f"q{n}", "prompt": p, "rubrics": rubric} for n, p in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def points(verdicts) -> float:
    """HealthBench's score of a response by CRITERIA, all of whose verdicts are known."""
    return (5 * verdicts[0] + 10 * verdicts[1] - 4 * verdicts[2]) / 15
