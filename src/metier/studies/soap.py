"""How many steps does SOAP need to AdamW's final loss, and what do stale, one-sided and factorized bases cost?

A Llama of 0.3 M parameters from scratch on Python's sources, equal tokens, cosine with 10 % warmup for every arm, weight decay
0.01, both betas 0.95. Steps to AdamW's final loss come from the evaluation curves, seed by seed, between evaluations by a
straight line; since the curves are of whole cosine runs, SOAP has to get there before its own learning rate has fallen: the
ratio is an upper bound. Smaller than the card's check: 4096 tokens a step instead of 8192, 120 steps instead of 400, 3
learning rates of half length instead of 5 and 4; no Shampoo, which is not among the parts. The batches of the second
comparison have 8 rows instead of 64. In so few steps a basis of f = 50 is renewed twice.
"""

import math
from collections.abc import Mapping
from typing import Any

from metier.compare import stats
from metier.compare.results import ComparisonResult, RunResult
from metier.compare.study import Check, Outcome, Study

PARTS = ("optimizer/soap",)
CLAIM = (
    "SOAP reaches AdamW's loss in over 40% fewer steps at large batches; it stays good with rarely refreshed, one-sided or "
    "factorized bases, and gains less at small batches."
)
STEPS, EVERY, LR = 120, 4, 3e-3
ADAMW = {"adamw": {"lr": LR, "beta1": 0.95, "beta2": 0.95}}


def soap(frequency: int = 10, **options: bool) -> dict[str, dict[str, Any]]:
    """An arm."""
    return {"soap": {"lr": LR, "precondition_frequency": frequency, **options}}


LARGE = {
    "adamw": ADAMW, "soap-f1": soap(1), "soap-f10": soap(), "soap-f50": soap(50), "one-sided": soap(one_sided=True),
    "factorized": soap(factorized=True),
}  # fmt: skip
SMALL = {"adamw": ADAMW, "soap-f10": soap()}


def run(study: Study) -> Outcome:
    """All variants at the large batch, AdamW and SOAP at the small one."""
    large = study.compare(design(study, LARGE, batch=64), name="large")
    small = study.compare(design(study, SMALL, batch=8), name="small")
    loss = {a.name: stats.strict_mean(large, a.name) for a in large.arms}
    ratio = {name: steps_ratio(large, name) for name in loss if name != "adamw"}
    at_small = steps_ratio(small, "soap-f10")
    sweeps = {
        f"{n}/{t.arm}": {"lrs": t.values, "losses": t.metric} for n, r in (("large", large), ("small", small)) for t in r.tuning
    }
    edge = [f"{t.arm} ({n})" for n, r in (("large", large), ("small", small)) for t in r.tuning if t.at_edge]
    figures = {
        "loss": loss, "steps_ratio": ratio, "loss_small_batch": {a.name: stats.strict_mean(small, a.name) for a in small.arms},
        "steps_ratio_small_batch": at_small, "seconds": {a.name: seconds(large, a.name) for a in large.arms}, "sweeps": sweeps,
    }  # fmt: skip
    notes = [f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else []
    return Outcome(checks=checks(loss, ratio, at_small), figures=figures, notes=notes)


def design(study: Study, arms: Mapping[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """Arms on the same tokens, each with its own sweep of the learning rate."""
    refs = {n: {k: {**o, "weight_decay": 0.01} for k, o in ref.items()} for n, ref in arms.items()}
    return {
        "run": {
            "model": "lab/llama-50k" if study.quick else "lab/llama-300k",
            "data": {
                "train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 64, "chunk": True,
                "max_length": 64,
            },
            "optimizer": "adamw",
            "schedule": {"cosine": {"warmup": 0.1}},
            "train": {"steps": 8 if study.quick else STEPS, "batch": 4 if study.quick else batch, "eval_every": EVERY},
        },
        "arms": {name: {"optimizer": ref} for name, ref in refs.items()},
        "control": "adamw",
        "tune": {"option": "optimizer.lr", "factors": [1.0] if study.quick else [0.4, 1.0, 2.5], "fraction": 0.5},
        "seeds": 1 if study.quick else 2,
    }  # fmt: skip


def seconds(result: ComparisonResult, arm: str) -> float:
    """Mean training time of an arm."""
    finals = result.finals(arm)
    return sum(r.seconds for r in finals) / max(1, len(finals))


def steps_ratio(result: ComparisonResult, arm: str) -> float:
    """Steps an arm takes to AdamW's final loss over all of AdamW's, mean of the seeds; infinite when one never gets there."""
    pairs = list(zip(result.finals("adamw"), result.finals(arm), strict=False))
    return sum(reached(there, base) for base, there in pairs) / len(pairs) if pairs else math.inf


def reached(there: RunResult, base: RunResult) -> float:
    """Fraction of ``base``'s steps after which the other's evaluation loss is at ``base``'s last."""
    if there.eval_curve is None or base.eval_curve is None or base.metric is None:
        return math.inf
    step, value, total = there.eval_curve.step, there.eval_curve.value, base.eval_curve.step[-1]
    i = next((i for i, v in enumerate(value) if v <= base.metric), None)
    if i is None:
        return math.inf
    if i == 0:
        return step[0] / total
    part = (value[i - 1] - base.metric) / (value[i - 1] - value[i])
    return (step[i - 1] + part * (step[i] - step[i - 1])) / total


def checks(loss: Mapping[str, float], ratio: Mapping[str, float], small: float) -> list[Check]:
    """The card's predictions with its margins."""

    def apart(name: str) -> float:
        return abs(loss[name] - loss["soap-f10"])

    few = [
        Check(f"steps of {n} to AdamW's final loss, of AdamW's", "<= 0.8", ratio[n], ratio[n] <= 0.8)
        for n in ("soap-f1", "soap-f10")
    ]
    near = [
        Check(f"final loss of {n} from that of f = 10", "within 0.03 nat", apart(n), apart(n) <= 0.03)
        for n in ("soap-f50", "one-sided", "factorized")
    ]
    gain = ratio["soap-f10"] < small
    return [*few, *near, Check("ratio at 64 rows below that at 8", f"< {small:.3g}", ratio["soap-f10"], gain)]
