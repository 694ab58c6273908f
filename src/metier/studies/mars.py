"""Does the corrected gradient of MARS lower the loss, or do its betas and its clip; and is the exact form worth its second pass?

A Llama of 0.3 M parameters from scratch, equal tokens, cosine with 5 % warmup, weight decay 0.1 and a global clip of 1 in
all arms (both gradients of the exact form get it too). The control has MARS's own betas; MARS with γ = 0 is AdamW with the
clip of every tensor alone. "Equal compute" is the exact form at half the steps, tuned and scheduled for them. Smaller than
the card's check: 120 steps of 2048 tokens instead of 500 of 4096; 3 learning rates instead of 4, each tried at half length;
2 seeds for Lion and Shampoo forms. The lab model's gains are moved by AdamW at half the rate under MARS, as in the release.
So short a run is mostly the phase in which gradients change fastest, and its batches of 32 rows are noisier than the paper's 480.
"""

from collections.abc import Mapping
from typing import Any

from metier.compare import stats
from metier.compare.results import ComparisonResult
from metier.compare.study import Check, Outcome, Study

PARTS = ("optimizer/mars", "optimizer/mars-exact")
CLAIM = (
    "MARS reaches a lower validation loss than AdamW and Muon at equal tokens; its exact form, at twice the compute, is hardly "
    "better than its approximate one."
)
STEPS = 120
LR = 4e-3
MAIN: dict[str, dict[str, Any]] = {
    "adamw-95-99": {"adamw": {"lr": LR, "beta1": 0.95, "beta2": 0.99}},
    "adamw-9-95": {"adamw": {"lr": LR, "beta1": 0.9, "beta2": 0.95}},
    "adamw-clipped": {"mars": {"lr": LR, "gamma": 0.0}},
    "mars": {"mars": {"lr": LR}},
    "mars-exact": {"mars-exact": {"lr": LR}},
}
HALF: dict[str, dict[str, Any]] = {"mars": MAIN["mars"], "mars-exact": MAIN["mars-exact"]}
SIGNS: dict[str, dict[str, Any]] = {
    "signum": {"signum": {"lr": 1e-3, "beta": 0.95}},
    "mars-lion": {"mars": {"lr": 1e-3, "base": "lion"}},
}
MATRICES: dict[str, dict[str, Any]] = {
    "muon": {"muon": {"lr": 1e-2}},
    "mars-shampoo": {"mars": {"lr": 2e-2, "base": "shampoo"}},
}


def run(study: Study) -> Outcome:
    """Four comparisons: AdamW's relatives, the exact form at half the steps, the sign methods, the orthogonalized ones."""
    results = {
        "main": study.compare(design(study, MAIN), name="main"),
        "half": study.compare(design(study, HALF, steps=STEPS // 2), name="half"),
        "signs": study.compare(design(study, SIGNS, seeds=2), name="signs"),
        "matrices": study.compare(design(study, MATRICES, seeds=2), name="matrices"),
    }
    loss = {name: {a.name: stats.strict_mean(r, a.name) for a in r.arms} for name, r in results.items()}
    edge = [f"{t.arm} ({name})" for name, r in results.items() for t in r.tuning if t.at_edge]
    notes = [f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else []
    return Outcome(checks=checks(loss), figures=figures(results, loss), notes=notes)


def design(study: Study, arms: Mapping[str, dict[str, Any]], steps: int = STEPS, seeds: int = 3) -> dict[str, Any]:
    """Arms on the same tokens, each with its own sweep of the learning rate; the first is the control."""
    refs = {n: {k: {**o, "weight_decay": 0.1} for k, o in ref.items()} for n, ref in arms.items()}
    return {
        "run": {
            "model": "lab/llama-50k" if study.quick else "lab/llama-300k",
            "data": {
                "train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 128, "chunk": True,
                "max_length": 64,
            },
            "optimizer": "adamw",
            "schedule": {"cosine": {"warmup": 0.05}},
            "train": {"steps": 4 if study.quick else steps, "batch": 4 if study.quick else 32},
        },
        "arms": {name: {"optimizer": ref} for name, ref in refs.items()},
        "control": next(iter(arms)),
        "tune": {"option": "optimizer.lr", "factors": [1.0] if study.quick else [0.4, 1.0, 2.5], "fraction": 0.5},
        "seeds": 1 if study.quick else seeds,
    }  # fmt: skip


def checks(loss: Mapping[str, Mapping[str, float]]) -> list[Check]:
    """The card's predictions with its margins."""
    main = loss["main"]
    gain, forms = main["mars"] - main["adamw-95-99"], main["mars-exact"] - main["mars"]
    compute = loss["half"]["mars-exact"] - main["mars"]
    return [
        Check("MARS below AdamW with the same betas", "<= -0.02 nat", gain, gain <= -0.02),
        Check("exact form apart from the approximate at equal steps", "within 0.01 nat", forms, abs(forms) <= 0.01),
        Check("exact form at half the steps above the approximate", "> 0", compute, compute > 0),
    ]


def figures(results: Mapping[str, ComparisonResult], loss: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Every arm's losses and sweep; how much of the gain the clip has; the two forms without a margin on the card."""
    arms = {
        f"{name}/{t.arm}": {
            "loss": loss[name][t.arm], "losses": stats.values(r, t.arm), "best_lr": t.best, "lrs": t.values, "sweep": t.metric,
        }
        for name, r in results.items() for t in r.tuning
    }  # fmt: skip
    main = loss["main"]
    return {
        "arms": arms,
        "clip_alone_minus_adamw": main["adamw-clipped"] - main["adamw-95-99"],
        "mars_minus_clip_alone": main["mars"] - main["adamw-clipped"],
        "mars_minus_adamw_9_95": main["mars"] - main["adamw-9-95"],
        "mars_minus_muon": main["mars"] - loss["matrices"]["muon"],
        "mars_lion_minus_signum": loss["signs"]["mars-lion"] - loss["signs"]["signum"],
        "mars_shampoo_minus_muon": loss["matrices"]["mars-shampoo"] - loss["matrices"]["muon"],
    }
