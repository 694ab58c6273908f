"""Does a model learn to follow principles from its own answers alone, and does it need both sides of the contrast?

The bench's word model, which follows a control word only about seven times in ten; four attributes, each with its
antithesis, are the principles, one to a constitution, C = 2. Two rounds of 240 queries in steps of 12, each round's answers by
the model at its beginning. Arms: symmetric, row only, column only, and SFT on as many own answers under the same kind of prompts,
renewed for its second round too. The learning rate of each is chosen among three by accuracy with one seed, on held-out queries
that are in no final figure; three other seeds are then run. Accuracy: of held-out answers that show the asked attribute or its
antithesis, the share that shows the asked one. The start has 0.72 and not the card's 0.60, so 0.75 asks for little: the card's
gain of 0.15 is asked for besides. The held-out combination: two principles at once, which neither the model's data nor the
training have. The bound log C - loss is averaged over quarters of the run, after which it is stopped.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.studies import _self_training as own
from metier.studies._principles import ARMS, RATES, SEEDS, TUNE, Bench, quarters

PARTS = ("source/sami", "objective/sami")
CLAIM = "Contrasting own answers with the principles they were written under teaches a model to follow these, without labels."


def run(study: Study) -> Outcome:
    """Tune, run, compare."""
    bench = Bench(study, 24, samples=64) if study.quick else Bench(study)
    seeds, rates, choices = SEEDS[:1] if study.quick else SEEDS, dict.fromkeys(ARMS, RATES[1]), {}
    for arm in () if study.quick else ARMS:
        rates[arm], choices[arm] = own.best_of(RATES, lambda lr, a=arm: bench.accuracy(bench.arm(a, TUNE, lr)))
    folders = {arm: [bench.arm(arm, s, rates[arm]) for s in seeds] for arm in ARMS}
    rows = {arm: [bench.figures(f) for f in found] for arm, found in folders.items()}
    table = {k: {arm: own.mean(f[k] for f in found) for arm, found in rows.items()} for k in rows["row"][0]}
    base = bench.figures(None)
    bound = np.mean([quarters(f) for f in folders["symmetric"]], axis=0).tolist()
    by_seed = {arm: [f["accuracy"] for f in found] for arm, found in rows.items()}
    figures = {**table, "base": base, "bound": bound, "sweeps": choices, "by_seed": by_seed}
    return Outcome(checks(table, base, bound), figures, own.notes(rates, choices))


def checks(table: Mapping[str, Mapping[str, float]], base: Mapping[str, float], bound: Sequence[float]) -> list[Check]:
    """The card's predictions with its margins."""
    accuracy, best = table["accuracy"], table["accuracy"]["symmetric"]
    more, combined = accuracy["sft"] - base["accuracy"], table["combined"]["symmetric"] - base["combined"]
    drift = {arm: abs(length - base["length"]) for arm, length in table["length"].items()}
    sides = [
        Check(f"{side} only: accuracy, length drift", f"below {best:.3g}, or drift above {drift['symmetric']:.3g}",
              [accuracy[side], drift[side]], accuracy[side] < best or drift[side] > drift["symmetric"])
        for side in ("row", "column")
    ]  # fmt: skip
    return [
        Check("accuracy of SAMI", ">= 0.75", best, best >= 0.75),
        Check("accuracy of SAMI over the base's", ">= 0.15", best - base["accuracy"], best - base["accuracy"] >= 0.15),
        Check("accuracy of SFT on own samples over the base's", "<= 0.05", more, more <= 0.05),
        Check("accuracy with two principles over the base's", ">= 0.05", combined, combined >= 0.05),
        *sides,
        Check("bound in quarters of the run", "rises", list(bound), bool(np.all(np.diff(bound) > 0))),
    ]
