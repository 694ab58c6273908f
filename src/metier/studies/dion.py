"""Does Dion beat AdamW, is a quarter of the rank enough, is error feedback needed, and does its learning rate carry over widths?

A Llama of 0.3 M parameters (width 64) from scratch, equal tokens, no warmup, linear decay over the last 20 %, weight decay 0.01,
each arm's learning rate tuned; AdamW with betas (0.9, 0.95) has the learning rate of the matrices on all other tensors, in Dion's
and in Muon's arms. Muon's factor is √max(1, m/n), so wide matrices are moved further by it. Smaller than the card's check: 100
steps of 64 × 64 tokens instead of 400 of 64 × 128, 3 learning rates at half length instead of 4. At width 64 rank 1/8 is r = 8 (4
in keys and values), which the card itself calls unrepresentative. Widths 64, 128 and 256 (3, 4 and 8 layers, batches of 8 × 64)
run one seed of 50 steps at 5 learning rates a factor 2 apart; "within one step" is within a factor 2.
"""

import math
from typing import Any

from metier.compare import stats
from metier.compare.study import Check, Outcome, Study

PARTS = ("optimizer/dion",)
CLAIM = (
    "Dion beats AdamW and matches Muon, most at large batches; a quarter of the rank nearly equals full rank, thanks to error "
    "feedback; the learning rate transfers across widths."
)
STEPS = 100
ADAMW: dict[str, Any] = {"adamw": {"lr": 4e-3, "beta2": 0.95}}


def dion(fraction: float = 1.0, **options: Any) -> dict[str, Any]:
    """An arm."""
    return {"dion": {"lr": 1e-2, "rank_fraction": fraction, **options}}


# Muon gives other roles lr × 3e-4 / 0.02; the scales undo that.
MUON: dict[str, Any] = {
    "muon": {"lr": 1e-2, "scale": "spectral", "groups": {r: {"lr_scale": 0.02 / 3e-4} for r in ("embeddings", "rest")}}
}
LARGE = {
    "adamw": ADAMW, "muon": MUON, "full": dion(), "half": dion(0.5), "quarter": dion(0.25), "eighth": dion(0.125),
    "no-feedback": dion(0.25, error_feedback=False),
}  # fmt: skip
SMALL = {"adamw": ADAMW, "full": dion()}
WIDTHS = {64: "lab/llama-300k", 128: "lab/llama-1m", 256: "lab/llama-6m"}
LRS = (0.0025, 0.005, 0.01, 0.02, 0.04)


def run(study: Study) -> Outcome:
    """All arms at the large batch, two at the small one, and a grid of learning rates for each width."""
    large = study.compare(design(study, LARGE, batch=64), name="large")
    small = study.compare(design(study, SMALL, batch=8), name="small")
    losses = [{a.name: stats.strict_mean(r, a.name) for a in r.arms} for r in (large, small)]
    grid = {w: [single(study, w, lr) for lr in LRS] for w in ([64] if study.quick else WIDTHS)}
    best = {w: LRS[min(range(len(LRS)), key=row.__getitem__)] for w, row in grid.items()}
    edge = [f"{t.arm} ({n})" for n, r in (("large", large), ("small", small)) for t in r.tuning if t.at_edge]
    edge += [f"width {w}" for w, lr in best.items() if lr in (LRS[0], LRS[-1])]
    sweeps = {
        f"{n}/{t.arm}": {"lrs": t.values, "losses": t.metric} for n, r in (("large", large), ("small", small)) for t in r.tuning
    }
    return Outcome(
        checks=checks(*losses, best),  # type: ignore[call-arg]
        figures={
            "loss": losses[0], "loss_small_batch": losses[1], "widths": {str(w): row for w, row in grid.items()}, "lrs": LRS,
            "best_lr": {str(w): lr for w, lr in best.items()}, "sweeps": sweeps,
            "seconds": {a.name: sum(r.seconds for r in large.finals(a.name)) for a in large.arms},
        },
        notes=[f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else [],
    )  # fmt: skip


def base(study: Study, model: str, batch: int, steps: int) -> dict[str, Any]:
    """What all runs share."""
    return {
        "model": "lab/llama-50k" if study.quick else model,
        "data": {
            "train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 64, "chunk": True,
            "max_length": 64,
        },
        "optimizer": "adamw",
        "schedule": {"wsd": {"warmup": 0.0, "decay": 0.2, "shape": "linear"}},
        "train": {"steps": 4 if study.quick else steps, "batch": 4 if study.quick else batch},
    }  # fmt: skip


def design(study: Study, arms: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """Arms on the same tokens, each with its own sweep of the learning rate."""
    refs = {n: {k: {**o, "weight_decay": 0.01} for k, o in ref.items()} for n, ref in arms.items()}
    return {
        "run": base(study, WIDTHS[64], batch, STEPS),
        "arms": {name: {"optimizer": ref} for name, ref in refs.items()},
        "control": "adamw",
        "tune": {"option": "optimizer.lr", "factors": [1.0] if study.quick else [0.4, 1.0, 2.5], "fraction": 0.5},
        "seeds": 1 if study.quick else 2,
    }


def single(study: Study, width: int, lr: float) -> float:
    """Final loss of one run of full-rank Dion; infinite when it failed."""
    run = {**base(study, WIDTHS[width], 8, 50), "optimizer": {"dion": {"lr": lr, "weight_decay": 0.01}}}
    found = study.train(run, name=f"width-{width}-{lr}").metrics.get("eval_loss")
    return math.inf if found is None else float(found)


def checks(large: dict[str, float], small: dict[str, float], best: dict[int, float]) -> list[Check]:
    """The card's predictions with its margins."""
    gain, muon = large["full"] - large["adamw"], large["full"] - large["muon"]
    quarter, blind = large["quarter"] - large["full"], large["no-feedback"] - large["quarter"]
    at_small, spread = small["full"] - small["adamw"], max(best.values()) / min(best.values())
    return [
        Check("Dion at full rank below AdamW", "<= -0.03 nat", gain, gain <= -0.03),
        Check("Dion at full rank apart from Muon", "within 0.02 nat", muon, abs(muon) <= 0.02),
        Check("rank 1/4 apart from full rank", "within 0.05 nat", quarter, abs(quarter) <= 0.05),
        Check("rank 1/4 without error feedback above that with it", ">= 0.02 nat", blind, blind >= 0.02),
        Check("Dion minus AdamW at 64 rows below that at 8", f"< {at_small:.3g}", gain, gain < at_small),
        Check("largest over smallest best learning rate of three widths", "<= 2", spread, spread <= 2 + 1e-9),
    ]
