"""Does SimPER without any coefficient match a tuned SimPO, and keep the chosen answers more likely?

(i) A table: SimPER's optimum is one answer a prompt, DPO's is not. (ii) The bench's language model on 4000 clean pairs: SimPER,
SimPO with three β times three γ/β, DPO with three β, and SimPO at its usual β 2 and γ 1, meant for other models. The same three
learning rates for all, so the card's arms have 3, 27, 9 and 3 settings: that is the claim. Tried with one seed and 40 steps,
then 100 steps of 32 with three seeds: shorter than the card's check, to fit into four minutes of one core.
"""

from typing import Any

import numpy as np
import torch

from metier.compare.study import Check, Outcome, Study
from metier.lab import tabular, wordpairs
from metier.studies._arms import Arm, Arms, gap, size, tries

PARTS = ("objective/simper", "objective/simpo", "objective/dpo")
CLAIM = "A loss of inverse perplexities without coefficients is as good as a tuned SimPO and keeps the chosen answers likely."
USUAL = {"simpo": {"beta": 2.0, "gamma": 1.0}}
ARMS: dict[str, list[Any]] = {
    "simper": ["simper"],
    "simpo": [{"simpo": {"beta": b, "gamma": round(b * ratio, 3)}} for b in (2.0, 5.0, 10.0) for ratio in (0.5, 0.3, 0.6)],
    "simpo-usual": [USUAL],
    "dpo": [{"dpo": {"beta": b}} for b in (0.03, 0.1, 0.3)],
}


def run(study: Study) -> Outcome:
    """The table, then the language model."""
    held_out = wordpairs.pairs(size(study, 1000), "measured", split="held-out")
    bench = Arms(study, {"clean": wordpairs.pairs(size(study, 4000))}, steps=100, tuning=40, held_out=held_out)
    arms = {name: bench.tuned(tries(o)) for name, o in ARMS.items()}
    tokens = float(np.mean([len(r["chosen"].split()) + 1 for r in held_out]))
    figures = {"chosen_tokens": tokens, **bench.report(**arms)}
    return Outcome([*tables(), *checks(arms, bench.sd, tokens)], figures, bench.notes(**arms))


def tables() -> list[Check]:
    """Mode seeking: all mass on the answer that is chosen more often than rejected by most."""
    bench = tabular.random_bench(prompts=6, answers=5, seed=0)
    weights = bench.weights()
    best = (weights.sum(2) - weights.sum(1)).argmax(1)
    found = tabular.minimise("simper", bench, method="adam", steps=2000, lr=0.1).policy.exp()
    mass = float(found.gather(1, best[:, None]).min())
    dpo = tabular.minimise({"dpo": {"beta": 1.0}}, bench).policy.exp()
    most = float(torch.max(dpo))
    return [
        Check("table: SimPER's mass on argmax p_w - p_l, least over prompts", "> 0.99", mass, mass > 0.99),
        Check("table: DPO's largest mass on one answer", "< 0.99", most, most < 0.99),
    ]


def checks(arms: dict[str, Arm], sd: float, tokens: float) -> list[Check]:
    """The card's expectations."""
    tuned, usual = (gap(arms["simper"], arms[name], unit=sd)[0] for name in ("simpo", "simpo-usual"))
    kept = {name: gap(arms["simper"], arms[name], "chosen_change", unit=tokens)[0] for name in ("simpo", "dpo")}
    return [
        Check("gold reward of SimPER less tuned SimPO, sd", ">= -0.1", tuned, tuned >= -0.1),
        Check("gold reward of SimPER over SimPO at its usual coefficients, sd", ">= 0.1", usual, usual >= 0.1),
        *(
            Check(f"chosen log-probability per token, SimPER over {name}, nats", ">= 0.05", seen, seen >= 0.05)
            for name, seen in kept.items()
        ),
    ]
