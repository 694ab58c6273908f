"""Does DPO gain more than going on with the chosen answers, and do cDPO and IPO help where labels are flipped?

(i) Tables with exact Bradley-Terry labels: where DPO and IPO end. (ii) The bench's language model, 4000 pairs, clean and with
30 % of the labels flipped: maximum likelihood of the chosen answers (the same tokens, as the rejected ones are read too),
DPO and cDPO with β 0.1, IPO with τ 0.1. Three learning rates each by the gold reward on other prompts than those of the final
figures, among those with at most 10 nats of KL. Accuracies are of 1000 clean held-out pairs. Smaller than the card's check so
that all fits into four minutes of one core: 120 steps instead of 400, and the learning rates are tried with 60.
"""

from metier.compare.study import Check, Outcome, Study
from metier.lab import tabular, wordpairs
from metier.studies._arms import Arm, Arms, gap, size, tries

PARTS = ("objective/dpo", "objective/cdpo", "objective/ipo", "objective/nll")
CLAIM = (
    "A logistic loss on log-ratios to the reference does what reinforcement learning with a KL penalty would, and does it well."
)
FLIPS, MOST_KL = 0.3, 10.0
OBJECTIVES = {
    "sft": "nll", "dpo": {"dpo": {"beta": 0.1}}, "cdpo": {"cdpo": {"beta": 0.1, "label_smoothing": FLIPS}},
    "ipo": {"ipo": {"tau": 0.1}},
}  # fmt: skip


def run(study: Study) -> Outcome:
    """Tables, then the language model."""
    number = size(study, 4000)
    data = {"clean": wordpairs.pairs(number), "flipped": wordpairs.pairs(number, flip=FLIPS)}
    bench = Arms(study, data, steps=120, tuning=60, most_kl=MOST_KL)
    arms = {f"{name}-{kind}": bench.tuned(tries([o], data=kind)) for kind in data for name, o in OBJECTIVES.items()}
    figures, notes = bench.report(**arms), bench.notes(**arms)
    return Outcome([*tables(), *clean(arms, bench.sd), noisy(arms)], figures, notes)


def tables() -> list[Check]:
    """Optima of the population losses."""
    beta = 0.5
    bench = tabular.random_bench(prompts=8, answers=5, seed=0)
    found = tabular.minimise({"dpo": {"beta": beta}}, bench).policy
    off = float(tabular.total_variation(found, bench.optimum(beta)).max())
    two = tabular.random_bench(prompts=8, answers=2, seed=1)
    ratio = tabular.minimise({"ipo": {"tau": 0.5}}, two).policy - two.reference
    ipo = float((ratio[:, 0] - ratio[:, 1] - (two.preference[:, 0, 1] - 0.5) / 0.5).abs().max())
    return [
        Check("tables: DPO from softmax(log μ + r/β), largest total variation", "< 1e-3", off, off < 1e-3),
        Check("tables of two answers: IPO's margin from (P - 1/2)/τ, largest difference", "< 1e-3", ipo, ipo < 1e-3),
    ]


def clean(arms: dict[str, Arm], sd: float) -> list[Check]:
    """DPO against going on with the chosen answers."""
    gain, _ = gap(arms["dpo-clean"], arms["sft-clean"], unit=sd)
    kl = arms["dpo-clean"].mean("kl")
    return [
        Check("clean labels: gold reward of DPO over continued fine-tuning, sd", ">= 0.3", gain, gain >= 0.3),
        Check("clean labels: KL of DPO, nats", "<= 10", kl, kl <= MOST_KL),
    ]


def noisy(arms: dict[str, Arm]) -> Check:
    """cDPO against DPO; equal is within one standard error of the seeds."""
    gain, error = gap(arms["cdpo-flipped"], arms["dpo-flipped"], "accuracy")
    kl, _ = gap(arms["cdpo-flipped"], arms["dpo-flipped"], "kl")
    holds = gain >= 0.02 or (gain >= -error and kl < 0)
    text = "30 % flips: clean held-out accuracy of cDPO over DPO, and its KL over DPO's, nats"
    return Check(text, ">= 0.02, or equal with less KL", [gain, kl], holds)
