"""Do direct losses overoptimise, does the law of the distance describe it, and does the held-out loss show it?

The bench's fine-tuned model and 4000 pairs whose labels come from its gold reward with a bonus for length (about 70 % of the
chosen answers are the longer ones), of which 20 % are flipped; the gold reward knows neither. Losses ``g(β h)`` of the
unaveraged margin h: DPO, hinge, and ``(β h - 1)²``, which is IPO with τ = β/2. Each with five β and two seeds: 128 steps of 32
pairs, a little more than one epoch, learning rate 1e-3. Eight times in each run, at equal distances, 192 held-out prompts, in two
halves of different prompts, are answered once each for the gold reward and the KL to the start (at every position over the
vocabulary), and the same loss is computed on 200 held-out pairs with the same flaws. All checkpoints of an objective are one
curve; rewards are above that of 8 answers of the start to each prompt of the same half.

(i) The law against a straight line with its own intercept, both with two parameters; means of both halves. (ii) How far the last
checkpoint of a run is below its best one, in standard deviations of the gold reward over the start's answers; mean over seeds.
The best one is chosen on one half of the prompts and both are measured on the other: the maximum of eight noisy means, compared
with one of them, would show a loss where there is none. (iii) Spearman's correlation of held-out loss and gold reward (mean of
both halves) after the best checkpoint (on the one half), which itself is left out, where four or more follow, of runs with
β <= 0.03. (iv) The tree of ``metier.lab.treemdp`` with 3 compared pairs, 200 steps. The card's checkpoints have 512 samples each.
"""

from typing import Any

import numpy as np
from scipy.stats import rankdata

from metier.compare.study import Check, Outcome, Study
from metier.core import laws, part
from metier.core.data.rows import open_rows
from metier.lab import preferencebench, treemdp
from metier.studies._checkpoint_halves import HELD_OUT, PROMPTS, STEPS, curve

PARTS = ("law/overoptimization", "objective/dpo", "objective/ipo", "objective/hinge", "hook/answers")
CLAIM = "R(d) = d (a - b log d), d = sqrt(KL), fits three direct objectives; runs with small β peak early, then degrade."
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1)


def run(study: Study) -> Outcome:
    """The law by itself, the runs, the tree."""
    betas, seeds, steps = ((0.01, 1.0), (0,), 8) if study.quick else (BETAS, SEEDS, STEPS)
    number = 8 if study.quick else PROMPTS
    prompts = list(dict.fromkeys(r["prompt"] for r in open_rows(HELD_OUT, limit=None)))
    halves = prompts[:number], prompts[number : 2 * number]
    start = [preferencebench.measure(preferencebench.sft(), None, h, samples=(1 if study.quick else 8) * number) for h in halves]
    curves = {
        (name, beta, seed): curve(study, name, beta, seed, steps, halves[1], [x["gold_reward"] for x in start])
        for name in ("dpo", "ipo", "hinge") for beta in betas for seed in seeds
    }  # fmt: skip
    law, fits = fitted(curves)
    tree, exhibits = exhibited(quick=study.quick)
    figures = {"start": start, "fits": fits, "tree": exhibits,
               "runs": {f"{n} {b:g} {s}": {k: v.tolist() for k, v in c.items()} for (n, b, s), c in curves.items()}}  # fmt: skip
    sd = float(np.mean([x["gold_sd"] for x in start]))
    return Outcome([*exact(), *law, *peaks(curves, sd, betas), *blind(curves), *tree], figures)


def exact() -> list[Check]:
    """Constants from a table without noise; the peak by brute force."""
    law = part.build("law", "overoptimization").obj
    kl = np.linspace(0.05, 9.0, 200_001) ** 2
    reward = np.sqrt(kl) * (1.3 - 0.8 * np.log(np.sqrt(kl)))
    found = laws.fit(law, {"kl": kl[::4000], "reward": reward[::4000]}, bootstrap=0)
    off = float(np.abs(found.theta - [1.3, 0.8]).max())
    shift = float(abs(law.derived(np.array([1.3, 0.8]))["d*"] - np.sqrt(kl[reward.argmax()])))
    return [
        Check("constants of a table made by the law, largest error", "<= 1e-6", off, off <= 1e-6),
        Check("d* = exp(a/b - 1) against the argmax on a grid", "<= 1e-4", shift, shift <= 1e-4),
    ]


Curves = dict[tuple[str, float, int], dict[str, np.ndarray]]


def fitted(curves: Curves) -> tuple[list[Check], dict[str, Any]]:
    """(i) The law and a line on all checkpoints of an objective."""
    law, fits, checks = part.build("law", "overoptimization").obj, {}, []
    for name in dict.fromkeys(n for n, _, _ in curves):
        kl, reward = (np.concatenate([c[k] for (n, _, _), c in curves.items() if n == name]) for k in ("kl", "reward"))
        found = laws.fit(law, {"kl": kl, "reward": reward}, bootstrap=100)
        d = np.sqrt(kl)
        line = np.polyval(np.polyfit(d, reward, 1), d)
        rmse = [float(np.sqrt(np.mean((p - reward) ** 2))) for p in (np.array(found.predicted), line)]
        r2 = 1 - rmse[0] ** 2 / float(np.var(reward))
        fits[name] = {"a, b": found.values, "low": found.low, "high": found.high, "rmse law, line": rmse, "R2": r2,
                      **law.derived(found.theta)}  # fmt: skip
        checks.append(Check(f"{name}: RMSE of the law over that of a line", "< 1", rmse[0] / rmse[1], rmse[0] < rmse[1]))
        checks.append(Check(f"{name}: R² of the law", ">= 0.7", r2, r2 >= 0.7))
    return checks, fits


def peaks(curves: Curves, sd: float, betas: tuple[float, ...]) -> list[Check]:
    """(ii) Reward lost after the best checkpoint."""
    checks = []
    for name in dict.fromkeys(n for n, _, _ in curves):
        lost = {b: float(np.mean([_lost(c) for (n, x, _), c in curves.items() if (n, x) == (name, b)])) / sd for b in betas}
        small = [lost[b] for b in betas if b <= 0.03]
        checks.append(Check(f"{name}: sd lost at the end, β <= 0.03", ">= 0.2 each", small, min(small) >= 0.2))
        checks.append(Check(f"{name}: sd lost at the end, β = 1", "< 0.2", lost[1.0], lost[1.0] < 0.2))
    return checks


def _lost(c: dict[str, np.ndarray]) -> float:
    """Reward of the checkpoint that is best on the one half above that of the last, both on the other half; may be negative."""
    return float(c["measured"][c["chosen_by"].argmax()] - c["measured"][-1])


def blind(curves: Curves) -> list[Check]:
    """(iii) Does a lower held-out loss mean a higher gold reward, once the best is passed?"""
    rho = []
    for (_, beta, _), c in curves.items():
        after = slice(int(c["chosen_by"].argmax()) + 1, None)
        if beta <= 0.03 and len(c["reward"][after]) >= 4 and np.ptp(c["loss"][after]) and np.ptp(c["reward"][after]):
            rho.append(float(np.corrcoef(rankdata(c["loss"][after]), rankdata(c["reward"][after]))[0, 1]))
    mean = float(np.mean(rho)) if rho else float("nan")
    text = f"rank correlation of held-out loss and gold reward past the peak, mean of {len(rho)} runs"
    return [Check(text, "> -0.5 (weak or of the wrong sign)", mean, mean > -0.5)]


def exhibited(quick: bool = False) -> tuple[list[Check], dict[str, Any]]:
    """(iv) Probability of leaves that nobody compared."""
    seeds, steps = (range(2), 5) if quick else (range(10), 200)
    found = {b: [treemdp.exhibit({"dpo": {"beta": b}}, seed=s, steps=steps) for s in seeds] for b in (0.01, 1.0)}
    raised = sum(r["after"] > r["before"] for r in found[0.01])
    small, large = (float(np.mean([r["after"] for r in found[b]])) for b in (0.01, 1.0))
    return [
        Check("tree: seeds where DPO, β = 0.01, raises leaves never compared", ">= 8 of 10", raised, raised >= 0.8 * len(seeds)),
        Check("tree: their mean probability with β = 1 less that with 0.01", "< 0", large - small, large < small),
    ], {f"{b:g}": runs for b, runs in found.items()}  # fmt: skip
