"""Is a bounded penalty on the bad answer a better companion of the likelihood, alone and beside DPO?

The bench's language model on 4000 clean pairs, in half of which both answers begin with the same 60 % of their words; 100 steps
of 32, three seeds. Maximum likelihood of the chosen answers, unlikelihood of the rejected ones, ExMATE, DPO, DPO with
likelihood, DPO with ExMATE (β 0.1 in both). Nine settings each, tried with one seed and 40 steps on other prompts than those of
the final figures: three learning rates times three coefficients (α, λ, β, the weight γ of the likelihood beside DPO, λ beside
DPO), or nine learning rates for maximum likelihood, which has none. ExMATE beside DPO has the γ that was best for the
likelihood beside DPO, so these two arms differ in the penalty λ exp(a_l) and the learning rate only. How large the penalty is at
the end, relative to the likelihood term, is in the figures and notes. The premise is weak: rejected answers of this bench have
exp(a_l) of about 0.06 at the start, against a likelihood term of 2.8, so that even λ = 1 adds 2 % to the loss, the two arms
beside DPO are nearly the same loss, and "at least as good" says little. Log-probabilities are of 1000 held-out pairs of the same
kind. Shorter than the card's check to fit into four minutes of one core.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, wordpairs
from metier.studies._arms import LRS, Arm, Arms, gap, size, tries

PARTS = ("objective/exmate", "objective/unlikelihood", "objective/combined", "objective/dpo", "objective/nll")
CLAIM = "ExMATE, likelihood with a bounded penalty, is a better surrogate than likelihood, alone and added to DPO."
DPO = {"dpo": {"beta": 0.1}}
WEIGHTS = (0.1, 0.3, 1.0)
LAMBDAS = (0.05, 0.2, 1.0)


def beside_dpo(other: str | dict[str, Any], weight: float) -> dict[str, Any]:
    """DPO and a companion."""
    return {"combined": {"losses": [DPO, other], "weights": [1.0, weight]}}


ARMS: dict[str, list[Any]] = {
    "mle": ["nll"],
    "unlikelihood": [{"unlikelihood": {"alpha": a}} for a in WEIGHTS],
    "exmate": [{"exmate": {"lam": x}} for x in LAMBDAS],
    "dpo": [{"dpo": {"beta": b}} for b in (0.03, 0.1, 0.3)],
    "dpo+mle": [beside_dpo("nll", w) for w in WEIGHTS],
}


def run(study: Study) -> Outcome:
    """Six arms."""
    how: dict[str, Any] = {"prefix_share": 0.5}
    held_out = wordpairs.pairs(size(study, 1000), "measured", split="held-out", **how)
    rows = wordpairs.pairs(size(study, 4000), **how)
    bench = Arms(study, {"clean": rows}, steps=100, tuning=40, held_out=held_out, more=terms)
    nine = [float(x) for x in np.geomspace(LRS[0], LRS[-1], 9)]
    arms = {name: bench.tuned(tries(o, LRS if len(o) > 1 else nine)) for name, o in ARMS.items()}
    gamma = float(arms["dpo+mle"].chosen.objective["combined"]["weights"][1])  # type: ignore[index]
    arms["dpo+exmate"] = bench.tuned(tries([beside_dpo({"exmate": {"lam": x}}, gamma) for x in LAMBDAS]))
    shares = {name: penalty_share(arms[name]) for name in ("exmate", "dpo+exmate")}
    notes = [f"{name}: the penalty ends at {x:.2g} of the likelihood term." for name, x in shares.items()]
    return Outcome(
        checks(arms, bench.sd), {"gamma": gamma, "penalty_share": shares, **bench.report(**arms)}, [*bench.notes(**arms), *notes]
    )


def terms(bundle: Any, base: Any) -> Mapping[str, float]:
    """Means of ``-a_w`` and ``exp(a_l)`` over held-out pairs, ``a = log π(y)/|y|``: the two terms of ExMATE without λ."""
    from metier.core.klestimate import answer_stats
    from metier.lab.wordmodel import word_tokenizer

    rows = wordpairs.pairs(250, "terms", split="held-out", prefix_share=0.5)
    answers = [preferencebench.encode([r[k] for r in rows], end=True) for k in ("chosen", "rejected")]
    asked, pad = preferencebench.encode([r["prompt"] for r in rows]), word_tokenizer().pad_token_id
    seen = answer_stats(bundle.model, base.model, asked, list(zip(*answers, strict=True)), pad)
    chosen, rejected = (seen["logps"] / seen["length"]).T
    return {"likelihood_term": float(-chosen.mean()), "penalty_term": float(np.exp(rejected).mean())}


def penalty_share(arm: Arm) -> float:
    """``λ exp(a_l)`` over ``-a_w`` at the end of training."""
    objective: Any = arm.chosen.objective
    own = objective if "exmate" in objective else objective["combined"]["losses"][1]
    return own["exmate"]["lam"] * arm.mean("penalty_term") / arm.mean("likelihood_term")


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
