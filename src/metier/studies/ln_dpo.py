"""Does dividing log-ratios by the length keep answers short, and is it steadier over the grid of hyper-parameters?

Labels prefer longer answers (about 70 % of the chosen ones are the longer), the gold reward has no term of length. DPO, LN-DPO
and SimPO (γ = β/2), each on three learning rates and four β, one seed a cell, then three other seeds at each one's best cell.
Prompts for the measures have topics that no preference data have; cells are compared, and the best one is chosen, on other such
prompts than those of the final figures. Smaller than the card's check: 100 steps. The expected best of k random cells is in the
figures.
"""

import itertools
from math import comb
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.lab import wordpairs, words
from metier.studies._arms import Arm, Arms, fresh, gap, size, tries

PARTS = ("objective/ln-dpo", "objective/dpo", "objective/simpo")
CLAIM = (
    "Dividing log-ratios by the length makes answers shorter without loss of quality and results steadier over "
    "hyper-parameters; at their best points DPO, LN-DPO and SimPO are alike."
)
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"dpo": {"beta": b}} for b in (0.03, 0.1, 0.3, 1.0)],
    "ln-dpo": [{"ln-dpo": {"beta": b}} for b in (1.0, 2.5, 5.0, 10.0)],
    "simpo": [{"simpo": {"beta": b, "gamma": b / 2}} for b in (1.0, 2.5, 5.0, 10.0)],
}


def run(study: Study) -> Outcome:
    """The grid and the best cells."""
    rows = wordpairs.pairs(size(study, 4000), length_bonus=wordpairs.LONG_BONUS)
    prompts = words.prompts(128, "measured", split="shifted")
    others = fresh(prompts, split="shifted")
    bench = Arms(study, {"long": rows}, steps=100, tuning=100, prompts=prompts, tuning_prompts=others)
    arms = {name: bench.tuned(tries(o, data="long")) for name, o in OBJECTIVES.items()}
    grid = {name: spread([t["value"] / bench.sd for t in arm.tried]) for name, arm in arms.items()}
    figures = {"grid_in_sd": grid, **bench.report(**arms)}
    return Outcome([estimator(), *checks(arms, grid, bench)], figures, bench.notes(**arms))


def expected_best(values: list[float]) -> list[float]:
    """``E[max of k draws without replacement]``, k = 1 … n: the i-th smallest is the largest in ``C(i-1, k-1)`` of the draws."""
    n, ranked = len(values), sorted(values)
    return [sum(comb(i, k - 1) * x for i, x in enumerate(ranked)) / comb(n, k) for k in range(1, n + 1)]


def spread(values: list[float]) -> dict[str, Any]:
    """What a practitioner can expect of a grid."""
    return {
        "max": float(np.max(values)), "mean": float(np.mean(values)), "median": float(np.median(values)),
        "lower_quartile": float(np.quantile(values, 0.25)), "expected_best_of_k": expected_best(values),
    }  # fmt: skip


def estimator() -> Check:
    """Against all subsets of six runs."""
    values = [0.3, -1.0, 2.0, 0.3, 1.5, 0.9]
    brute = [float(np.mean([max(s) for s in itertools.combinations(values, k)])) for k in range(1, 7)]
    off = float(np.abs(np.array(expected_best(values)) - brute).max())
    return Check("expected best of k of six runs against all subsets, largest difference", "< 1e-12", off, off < 1e-12)


def checks(arms: dict[str, Arm], grid: dict[str, dict[str, Any]], bench: Arms) -> list[Check]:
    """Length at the best cells, and the grid."""
    shorter = gap(arms["dpo"], arms["ln-dpo"], "length")[0] / bench.base["length"]
    reward = gap(arms["ln-dpo"], arms["dpo"], unit=bench.sd)[0]
    steadier = grid["ln-dpo"]["lower_quartile"] - grid["dpo"]["lower_quartile"]
    return [
        Check("length of DPO's answers over LN-DPO's, share of the start's", ">= 0.1", shorter, shorter >= 0.1),
        Check("gold reward of LN-DPO less DPO's, sd", "within 0.1", reward, abs(reward) <= 0.1),
        Check("lower quartile over the grid, LN-DPO less DPO, sd", ">= 0", steadier, steadier >= 0),
    ]
