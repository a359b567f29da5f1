"""Does a reward without labels agree with the physicians? On held-out HealthBench rows.

    python benchmarks/rubric_validity.py --task healthbench --model M --judge-url URL
    --judge-model J

pi_0 answers each question G times; the same responses are scored by the physicians' rubrics (the
truth here) and by each reward that reads no label: the rubric proposed from s, the rubric from q
alone, and the judge that compares with s. For each, Pearson's, Spearman's and Kendall's
correlation (tau-b) with the physicians' score, with 95% intervals:

    overall   over all responses: also rises if a reward only knows which questions are hard
    within    inside each question, averaged over questions: what an advantage is made of, and so
              what training sees. A question whose responses a reward cannot tell apart counts as 0;
              one whose responses the truth cannot tell apart is left out.

The same judge marks by all of these, the physicians' rubrics too, so what is peculiar to it
counts as agreement."""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.statistics import interval
from analysis.tables import markdown
from plumbing import flags, folder
from plumbing.draws import seed_of
from plumbing.engines import load_engine
from plumbing.errors import InputError, exit_status
from plumbing.models import add_lora, load_base
from plumbing.settings import EVALUATION, config, settle
from rewards import REWARDS, physician_scores
from rubrics import share_of_yes
from synthesize import Anchor, synthesis, texts
from tasks import load_questions

NAMES = ("rubric", "rubric-question", "judge")
COEFFICIENTS = {"Pearson": stats.pearsonr, "Spearman": stats.spearmanr, "Kendall": stats.kendalltau}


def correlation(coefficient, a: np.ndarray, b: np.ndarray, blind: float = np.nan) -> float:
    """Of the pairs that both have. NaN where `b` is constant, so that nothing can be correlated;
    `blind` where `a` is.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2 or np.ptp(b[both]) == 0:
        return np.nan
    return blind if np.ptp(a[both]) == 0 else float(coefficient(a[both], b[both]).statistic)


def agreement(
    reward: np.ndarray, truth: np.ndarray, draws: int = 1000
) -> dict[tuple[str, str], tuple]:
    """(where, coefficient) -> (estimate, low, high, number of questions). `reward` and `truth`
    (Q, G).

    The responses of a question belong together, so the bootstrap draws questions, each with all
    its responses."""
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
        i = interval(each)
        found["within", name] = (i["mean"], i["low"], i["high"], int((~np.isnan(each)).sum()))
    return found


def shares(details: list[dict]) -> np.ndarray:
    """(Q, G): each response's share of yes, from what was asked and answered."""
    return np.array([[share_of_yes(verdicts) for verdicts in d["verdicts"]] for d in details])


def measure(given: dict) -> None:
    """The command. Raises InputError and what an engine or a judge raises."""
    out, settings, _ = settle(given)
    cfg = config(settings)
    questions = load_questions(cfg)["test"]
    if not all(q.rubric for q in questions):
        raise InputError("these questions have no physicians' rubrics: take --task healthbench")
    base, tokenizer = load_base(cfg.model)
    folder.create(out, settings | {"evaluation": True})
    policy = add_lora(base, cfg.lora_rank, cfg.seed)
    engine, judge = load_engine(cfg, policy, tokenizer, out.parent)
    prompts, seed = [q.messages for q in questions], seed_of(cfg.seed, "validity")
    # Sampled as in training, because the spread of its rollouts is meant.
    groups = engine.sample(prompts, cfg.group_size, cfg.sampling, policy=False, seed=seed)
    anchor = Anchor(engine, cfg.sampling, (cfg.seed, "validity", "anchor"))
    references = synthesis(questions, groups, anchor)
    truth = physician_scores(questions, [texts(group) for group in groups], judge).numpy()
    made = {name: REWARDS[name](questions, groups, references, anchor, judge) for name in NAMES}
    cells = [["reward", "", *COEFFICIENTS, "questions"]]
    for name in NAMES:
        found = agreement(shares(made[name].details), truth.astype(np.float64))
        for where in ("overall", "within"):
            numbers = [found[where, c] for c in COEFFICIENTS]
            shown = [
                f"{m:+.2f} ({low:+.2f} to {high:+.2f})" if m == m else "none"
                for m, low, high, _ in numbers
            ]
            cells.append([name, where, *shown, f"{numbers[0][3]} of {len(questions)}"])
    physicians = REWARDS["physician"](questions, groups, references, anchor, judge)
    rows = {"physician": (truth, physicians)}
    rows |= {name: (shares(r.details), r) for name, r in made.items()}
    written = {
        name: {"values": nulls(values), "stats": r.stats, "details": r.details}
        for name, (values, r) in rows.items()
    }
    folder.write_json(out / "validity.json", {"rewards": written})
    print("\n".join(markdown(cells)))
    print("\ncorrelation with the physicians' score, 95% interval over questions")
    print(f"{out}/validity.json holds every verdict")


def nulls(values: np.ndarray) -> list:
    return np.where(np.isnan(values), None, values.astype(object)).tolist()


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n")[0]

    def work() -> None:
        measure(flags.parse(argv, about, EVALUATION))

    return exit_status("rubric_validity.py", work, lambda: "")


if __name__ == "__main__":
    sys.exit(main())
