"""What the steps of runs cost: seconds and their shares, generated tokens a second, peak memory.

    python benchmarks/cost.py runs/NAME...

Medians over a run's steps, with their ranges, without its first step, in which kernels are
compiled and caches filled. Generated tokens are those of rollouts and references. Peak memory and
minutes are those of results.json, which a run that was stopped does not have."""

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.tables import markdown

PHASES = ("rollouts", "references", "rewards", "update")  # of a step: time/... in metrics.jsonl


def cost(run: Path) -> dict[str, str]:
    """The run's column of the table, row by row. Raises OSError or KeyError for a folder without
    timed steps.
    """
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    results = (
        json.loads(end.read_text(encoding="utf-8"))
        if (end := run / "results.json").exists()
        else {}
    )
    tokens = [
        after - before for before, after in pairwise([0, *(row["num_tokens"] for row in rows)])
    ]
    if len(rows) > 1:  # the first step warms up
        rows, tokens = rows[1:], tokens[1:]
    seconds = [row["step_time"] for row in rows]
    sampling = [row["time/rollouts"] + row["time/references"] for row in rows]

    def spread(values: list[float], form: str = ".0f") -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    found = {"device": config.get("device", "not known"), "steps measured": f"{len(rows)}"}
    found["seconds a step"] = spread(seconds, ".1f")
    for phase in PHASES:
        found[f"... of it {phase}"] = spread(
            [row[f"time/{phase}"] / row["step_time"] for row in rows], ".0%"
        )
    found["generated tokens a step"] = spread(tokens)
    found["... a second of sampling"] = spread(
        [n / s for n, s in zip(tokens, sampling, strict=True)]
    )
    found["... a second of the step"] = spread(
        [n / s for n, s in zip(tokens, seconds, strict=True)]
    )
    found["peak memory, GiB"] = f"{results['peak_gib']:.1f}" if results else "not measured"
    found["minutes in all"] = f"{results['minutes']:.1f}" if results else "not measured"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="their folders")
    columns = {}
    for run in parser.parse_args().runs:
        try:
            columns[f"{run}"] = cost(run)
        except (OSError, KeyError) as error:
            parser.error(
                f"{run} holds no timed steps ({error!r}): name folders of runs of train.py"
            )
    first = next(iter(columns.values()))
    print(
        "\n".join(
            markdown(
                [["", *columns], *([name, *(c[name] for c in columns.values())] for name in first)]
            )
        )
    )


if __name__ == "__main__":
    main()
