"""Does a reward without labels agree with the physicians? On held-out HealthBench rows (asked for by the paper's referees).

    python benchmarks/rubric_validity.py --task healthbench --model M --judge server --judge-url URL --judge-model J

pi_0 answers each question G times; the same responses are scored by the physicians' rubrics (the truth here) and by each
reward that reads no label: the rubric proposed from s, the rubric from q alone, and the judge that compares with s. For
each, Pearson's, Spearman's and Kendall's correlation (tau-b) with the physicians' score, with 95% intervals:

    overall   over all responses: also rises if a reward only knows which questions are hard
    within    inside each question, averaged over questions: what an advantage is made of, and so what training sees.
              A question whose responses a reward cannot tell apart counts as 0; one that the truth cannot, not at all.

The same judge marks by all of these, the physicians' rubrics too, so what is peculiar to it counts as agreement.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runs
from rollout import EngineError
from rubrics import REWARDS, JudgeError
from settings import EVALUATION, load_engine, parser_of, settle
from synthesize import AGGREGATORS, Anchor
from tasks import InputError, add_lora, load_base, load_questions, seed_of

COEFFICIENTS = {"Pearson": stats.pearsonr, "Spearman": stats.spearmanr, "Kendall": stats.kendalltau}


def correlation(coefficient, a: np.ndarray, b: np.ndarray, blind: float = np.nan) -> float:
    """Of the pairs that both have. NaN where `b` is constant, so that nothing can be correlated; `blind` where `a` is."""
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2 or np.ptp(b[both]) == 0:
        return np.nan
    return blind if np.ptp(a[both]) == 0 else float(coefficient(a[both], b[both]).statistic)


def agreement(
    reward: np.ndarray, truth: np.ndarray, draws: int = 1000
) -> dict[tuple[str, str], tuple]:
    """(where, coefficient) -> (estimate, low, high, number of questions). `reward` and `truth` (Q, G).

    The responses of a question belong together, so the bootstrap draws questions, each with all its responses.
    """
    rng, found = np.random.default_rng(0), {}
    for name, coefficient in COEFFICIENTS.items():
        drawn = []
        for _ in range(draws):
            rows = rng.integers(len(truth), size=len(truth))
            drawn.append(correlation(coefficient, reward[rows].ravel(), truth[rows].ravel()))
        known = np.array(drawn)[~np.isnan(drawn)]
        ends = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        used = int((~np.isnan(reward + truth)).any(axis=1).sum())
        found["overall", name] = (
            correlation(coefficient, reward.ravel(), truth.ravel()),
            *ends,
            used,
        )
        each = np.array(
            [correlation(coefficient, r, t, blind=0.0) for r, t in zip(reward, truth, strict=True)]
        )  # (Q,)
        i = runs.interval(each)
        found["within", name] = (i["mean"], i["low"], i["high"], int((~np.isnan(each)).sum()))
    return found


def main(argv: list[str] | None = None) -> int:
    try:
        out, settings, _ = settle(
            vars(parser_of(__doc__.split("\n")[0], EVALUATION).parse_args(argv))
        )
        s = argparse.Namespace(**settings)
        _, questions = load_questions(s)
        if not all(q.rubric for q in questions):
            raise InputError("these questions have no physicians' rubrics: take --task healthbench")
        base, tokenizer = load_base(s.model)
        runs.create(out, settings | {"evaluation": True})
        engine, judge = load_engine(s, add_lora(base, s.lora_rank, s.seed), tokenizer, out.parent)
        sampling = {
            "temperature": s.temperature,
            "max_new_tokens": s.max_new_tokens,
        }  # as in training: its spread is meant
        prompts = [q.messages for q in questions]
        groups = engine.sample(
            prompts, s.group_size, policy=False, seed=seed_of(s.seed, "validity"), **sampling
        )
        anchor = Anchor(engine, partial(seed_of, s.seed, "validity", "anchor"), **sampling)
        references = AGGREGATORS["synthesis"](questions, groups, anchor, False)
        marked = {
            name: REWARDS[name](groups, references, questions, anchor.sample, judge)
            for name in ("physician", "rubric", "rubric-question", "judge")
        }
    except InputError as error:
        print(f"rubric_validity.py: error: {error}", file=sys.stderr)
        return 2
    except (EngineError, JudgeError, FloatingPointError) as error:
        print(f"rubric_validity.py: stopped: {error}", file=sys.stderr)
        return 1
    truth = marked["physician"].values.double().numpy()
    cells = [["reward", "", *COEFFICIENTS, "questions"]]
    for name in ("rubric", "rubric-question", "judge"):
        found = agreement(marked[name].values.double().numpy(), truth)
        for where in ("overall", "within"):
            numbers = [found[where, c] for c in COEFFICIENTS]
            shown = [
                f"{m:+.2f} ({low:+.2f} to {high:+.2f})" if m == m else "none"
                for m, low, high, _ in numbers
            ]
            cells.append([name, where, *shown, f"{numbers[0][3]} of {len(questions)}"])
    rows = {
        name: {"values": r.values.numpy(), "stats": r.stats, "details": r.details}
        for name, r in marked.items()
    }
    for row in rows.values():
        row["values"] = np.where(
            np.isnan(row["values"]), None, row["values"].astype(object)
        ).tolist()
    runs.write_json(out / "validity.json", {"rewards": rows})
    print("\n".join(runs.markdown(cells)))
    print(
        f"\ncorrelation with the physicians' score (95% interval over questions); {out}/validity.json holds every verdict"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
