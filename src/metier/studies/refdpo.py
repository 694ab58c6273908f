"""How strong should DPO's leash be, is the reference needed, and does a stronger one help?

The bench's language model on 4000 clean pairs, 80 steps of 32, three seeds. (i) DPO with six β; the learning rate is chosen among
three at β 0.1. (ii) Three rewards: log-ratio (DPO), ``β log π(y|x)`` and ``β [log π(y|x) - log p(y)]``, where ``p(y)`` is the
fine-tuned model's after a bare question mark; this prior enters as a margin, which is the same loss. (iii) References: the
model trained by DPO on 4000 other pairs, and one fine-tuned on rambling answers in the other set of synonyms (another corpus).
Every arm has six β, tried with one seed and 40 steps. "Better" and "not better" are judged by one standard error of the paired
seeds. Shorter than the card's check to fit into four minutes of one core.
"""

import random
from typing import Any

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, wordpairs, words
from metier.studies._arms import TUNING_SEED, Arm, Arms, Rows, Try, gap, size, tries

PARTS = ("objective/refdpo", "objective/dpo", "objective/with-margin", "objective/nll")
CLAIM = (
    "The best leash is weaker than usual and too weak a one ruins the answers; the reference is needed; a stronger compatible "
    "reference helps, an incompatible one does not."
)
BETAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
FREE = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""β without a reference, and with a stronger one: there it has to be larger."""


def run(study: Study) -> Outcome:
    """The sweep, the rewards, the references."""
    number = size(study, 4000)
    rows = wordpairs.pairs(number)
    data = {"clean": rows, "prior": with_prior(rows), "others": wordpairs.pairs(number, 1), "corpus": other_corpus(number)}
    bench = Arms(study, data, steps=80, tuning=40)
    rates = bench.tuned(tries([dpo(0.1)]))
    lr = rates.chosen.lr
    sweep = {b: bench.fixed(Try(dpo(b), lr)) for b in (BETAS[::5] if study.quick else BETAS)}
    arms = {
        "dpo": bench.tuned(tries([dpo(b) for b in BETAS], [lr])),
        "posterior": bench.tuned(tries([posterior(b) for b in FREE], [lr])),
        "likelihood": bench.tuned(tries([likelihood(b) for b in BETAS], [lr], data="prior")),
    }
    for name, objective, rows_of in (("stronger", dpo(0.1), "others"), ("mismatched", "nll", "corpus")):
        where = bench.weights(Try(objective, lr, rows_of), TUNING_SEED, 80)
        arms[name] = bench.tuned(tries([dpo(b) for b in FREE], [lr], reference=str(where)))
    figures = bench.report(**arms, **{f"beta-{b}": arm for b, arm in sweep.items()})
    return Outcome(
        [*leash(sweep, bench.sd), *compared(arms, bench.sd)],
        {"lr": lr, "lrs": list(rates.tried), **figures},
        bench.notes(rates=rates),
    )


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
