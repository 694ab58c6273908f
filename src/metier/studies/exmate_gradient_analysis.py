"""Is a bounded penalty on the bad answer a better companion of the likelihood, alone and beside DPO?

The bench's language model on 4000 clean pairs, in half of which both answers begin with the same 60 % of their words; 100 steps
of 32, three seeds. Maximum likelihood of the chosen answers, unlikelihood of the rejected ones, ExMATE, DPO, DPO with
likelihood, DPO (β 0.1) with ExMATE (λ 0.05). Nine settings each, tried with one seed and 40 steps: three learning rates times
three coefficients (α, λ, β, and the weight of the companion), or nine learning rates for maximum likelihood, which has none.
Log-probabilities are of 1000 held-out pairs of the same kind. Shorter than the card's check to fit into four minutes of one core.
"""

from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.lab import wordpairs
from metier.studies._arms import LRS, Arm, Arms, gap, size, tries

PARTS = ("objective/exmate", "objective/unlikelihood", "objective/combined", "objective/dpo", "objective/nll")
CLAIM = "ExMATE, likelihood with a bounded penalty, is a better surrogate than likelihood, alone and added to DPO."
DPO = {"dpo": {"beta": 0.1}}
WEIGHTS = (0.1, 0.3, 1.0)


def beside_dpo(other: str | dict[str, Any]) -> list[Any]:
    """DPO and a companion with each weight."""
    return [{"combined": {"losses": [DPO, other], "weights": [1.0, w]}} for w in WEIGHTS]


ARMS: dict[str, list[Any]] = {
    "mle": ["nll"],
    "unlikelihood": [{"unlikelihood": {"alpha": a}} for a in WEIGHTS],
    "exmate": [{"exmate": {"lam": x}} for x in (0.05, 0.2, 1.0)],
    "dpo": [{"dpo": {"beta": b}} for b in (0.03, 0.1, 0.3)],
    "dpo+mle": beside_dpo("nll"),
    "dpo+exmate": beside_dpo({"exmate": {"lam": 0.05}}),
}


def run(study: Study) -> Outcome:
    """Six arms."""
    how: dict[str, Any] = {"prefix_share": 0.5}
    held_out = wordpairs.pairs(size(study, 1000), "measured", split="held-out", **how)
    bench = Arms(study, {"clean": wordpairs.pairs(size(study, 4000), **how)}, steps=100, tuning=40, held_out=held_out)
    nine = [float(x) for x in np.geomspace(LRS[0], LRS[-1], 9)]
    arms = {name: bench.tuned(tries(o, LRS if len(o) > 1 else nine)) for name, o in ARMS.items()}
    return Outcome(checks(arms, bench.sd), bench.report(**arms), bench.notes(**arms))


def checks(arms: dict[str, Arm], sd: float) -> list[Check]:
    """The card's expectations."""
    change = {name: arms[name].mean("chosen_change") for name in ("dpo", "dpo+mle", "dpo+exmate")}
    margin, _ = gap(arms["dpo+exmate"], arms["dpo+mle"], "margin")
    gold, _ = gap(arms["dpo+exmate"], arms["dpo+mle"], unit=sd)
    over, _ = gap(arms["dpo+exmate"], arms["mle"], unit=sd)
    kept = [
        Check(f"change of the chosen log-probability with {name}, nats", ">= 0", change[name], change[name] >= 0)
        for name in ("dpo+mle", "dpo+exmate")
    ]
    return [
        Check("change of the chosen log-probability with DPO, nats", "< 0", change["dpo"], change["dpo"] < 0),
        *kept,
        Check("margin of DPO+ExMATE over DPO+MLE, nats", ">= 0", margin, margin >= 0),
        Check("gold reward of DPO+ExMATE less DPO+MLE, sd", ">= -0.05", gold, gold >= -0.05),
        Check("gold reward of DPO+ExMATE over maximum likelihood, sd", "> 0.2", over, over > 0.2),
    ]
