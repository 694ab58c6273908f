"""How strong should DPO's leash be, is the reference needed, and does a stronger one help?

The bench's language model on 4000 clean pairs, 80 steps of 32, three seeds. (i) DPO with six β at the learning rate of the best
DPO of (ii). (ii) Three rewards: log-ratio (DPO), ``β log π(y|x)`` and ``β [log π(y|x) - log p(y)]``, where ``p(y)`` is the
fine-tuned model's after a bare question mark; this prior enters as a margin, which is the same loss. (iii) References: the
model trained by DPO on 4000 other pairs, and one fine-tuned on rambling answers in the other set of synonyms (another corpus);
their own gold rewards are in the figures and notes, to tell whether "stronger" is true. Every arm has the same ten settings,
tried with one seed and 40 steps on other prompts than those of the final figures: eight β at learning rate 1e-3, then two other
learning rates at the best β (so pairs of a small β and a small learning rate are not all seen). "Better" and "not better" are
judged by one standard error of the paired seeds. Shorter than the card's check to fit into four minutes of one core.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, wordpairs, words
from metier.studies._arms import LRS, TUNING_SEED, Arm, Arms, Figures, Rows, Try, gap, size, tries

PARTS = ("objective/refdpo", "objective/dpo", "objective/with-margin", "objective/nll")
CLAIM = (
    "The best leash is weaker than usual and too weak a one ruins the answers; the reference is needed; a stronger compatible "
    "reference helps, an incompatible one does not."
)
BETAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
WIDE = (10.0, 3.0, *BETAS)
"""For tuning, in every arm: without a reference, and with a stronger one, β has to be larger."""
LR = LRS[1]


def run(study: Study) -> Outcome:
    """The rewards, the references, the sweep."""
    number = size(study, 4000)
    rows = wordpairs.pairs(number)
    data = {"clean": rows, "prior": with_prior(rows), "others": wordpairs.pairs(number, 1), "corpus": other_corpus(number)}
    bench = Arms(study, data, steps=80, tuning=40)
    made = {"stronger": Try(dpo(0.1), LR, "others"), "mismatched": Try("nll", LR, "corpus")}
    references = {name: bench.weights(setting, TUNING_SEED, 80) for name, setting in made.items()}
    arms = {
        "dpo": tuned(bench, [dpo(b) for b in WIDE]),
        "posterior": tuned(bench, [posterior(b) for b in WIDE]),
        "likelihood": tuned(bench, [likelihood(b) for b in WIDE], data="prior"),
    }
    arms |= {name: tuned(bench, [dpo(b) for b in WIDE], reference=str(where)) for name, where in references.items()}
    lr = arms["dpo"].chosen.lr
    sweep = {b: bench.fixed(Try(dpo(b), lr)) for b in (BETAS[::5] if study.quick else BETAS)}
    own = {name: standing(bench, where) for name, where in references.items()}
    over = {name: (f["gold_reward"] - bench.base["gold_reward"]) / bench.sd for name, f in own.items()}
    notes = [f"The {name} reference's own gold reward over the usual one's, sd: {x:.2f}." for name, x in over.items()]
    figures = {"lr": lr, "references": own, **bench.report(**arms, **{f"beta-{b}": arm for b, arm in sweep.items()})}
    return Outcome([*leash(sweep, bench.sd), *compared(arms, bench.sd)], figures, [*notes, *bench.notes(**arms)])


def tuned(bench: Arms, objectives: list[Any], **how: Any) -> Arm:
    """The best β, then the best learning rate there."""
    return bench.tuned(tries(objectives, [LR], **how), lambda best: [replace(best, lr=x) for x in LRS if x != LR])


def standing(bench: Arms, where: Path) -> Figures:
    """Figures of a reference's own answers, its KL to the usual one among them."""
    from metier.core import models

    assert bench.prompts is not None
    model = models.load(str(where))
    return preferencebench.measure(model, preferencebench.sft(), bench.prompts, samples=bench.samples)


def dpo(beta: float) -> dict[str, Any]:
    """The log-ratio."""
    return {"dpo": {"beta": beta}}


def posterior(beta: float) -> dict[str, Any]:
    """No reference."""
    return {"refdpo": {"reward": "posterior", "beta": beta}}


def likelihood(beta: float) -> dict[str, Any]:
    """Against the prior, whose difference is the margin of the data."""
    return {"with-margin": {"of": posterior(beta)}}


def with_prior(rows: Rows) -> list[dict[str, Any]]:
    """Rows whose margin is ``log p(y_w) - log p(y_l)``."""
    from metier.core.klestimate import answer_stats
    from metier.lab.wordmodel import word_tokenizer

    model = preferencebench.sft().model
    answers = [preferencebench.encode([r[k] for r in rows], end=True) for k in ("chosen", "rejected")]
    mark = preferencebench.encode(["?"]) * len(rows)
    logps = answer_stats(model, model, mark, list(zip(*answers, strict=True)), word_tokenizer().pad_token_id)["logps"]
    kept = ("prompt", "chosen", "rejected")
    return [{**{k: r[k] for k in kept}, "margin": float(w - l)} for r, (w, l) in zip(rows, logps, strict=True)]  # noqa: E741


def other_corpus(number: int) -> list[dict[str, Any]]:
    """Answers as the fine-tuned model hardly gives them, as the chosen ones of pairs."""
    rng, rows = random.Random("other corpus"), []
    for text in words.prompts(number, "other corpus"):
        odd = words.answer(text, rng, synonyms=0.0, style="rambling", follow=0.0)
        rows.append({"prompt": text, "chosen": odd, "rejected": words.answer(text, rng)})
    return [r for r in rows if r["chosen"] != r["rejected"]]


def leash(sweep: dict[float, Arm], sd: float) -> list[Check]:
    """The inverted U."""
    gold = {b: arm.mean() / sd for b, arm in sweep.items()}
    best = max(gold.values())
    under = {b: best - gold[b] for b in (BETAS[0], BETAS[-1])}
    degenerate = {b: arm.mean("degenerate") for b, arm in sweep.items()}
    worst = max(degenerate, key=lambda b: degenerate[b])
    ends = [Check(f"gold reward at β = {b} under the best, sd", ">= 0.2", gap, gap >= 0.2) for b, gap in under.items()]
    return [
        *ends,
        Check("β with the most degenerate answers", "the smallest", worst, worst == BETAS[-1] and degenerate[worst] > 0),
    ]


def compared(arms: dict[str, Arm], sd: float) -> list[Check]:
    """Rewards and references; each observed value is the mean difference and its standard error, in sd."""
    found = {name: gap(arms["dpo"], arms[name], unit=sd) for name in ("posterior", "likelihood")}
    checks = [
        Check(f"DPO over the {name} reward, sd and error", ">= -1 error", [*seen], bool(seen[0] >= -seen[1]))
        for name, seen in found.items()
    ]
    strong, odd = (gap(arms[name], arms["dpo"], unit=sd) for name in ("stronger", "mismatched"))
    return [
        *checks,
        Check("DPO with the stronger reference over DPO, sd and error", "> 1 error", [*strong], strong[0] > strong[1]),
        Check("DPO with the mismatched reference over DPO, sd and error", "<= 1 error", [*odd], odd[0] <= odd[1]),
    ]
