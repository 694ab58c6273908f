"""Do low-rank adapters first align with the residual's singular directions, does starting there save that time, and is it of
use to a language model?

(i) Gradient flow (Euler, step 5e-3) of both layers' adapters on ``½ ‖Y - (W₂ + B₂A₂)(W₁ + B₁A₁)‖²``, 20 by 20 by 20, W₂ W₁
balanced with singular values in [0.5, 1.5], 5 seeds. Times: a rank-one shift of norm 1, rank 1, α from 1e-1 to 1e-5, until
the loss is halved; α is the norm of each column of a random B and row of A, and of the spectral ones. Errors: a shift of rank
2 whose singular vectors are turned by 0°, 45° and 90° from those of W₂ W₁, rank 4, after 30 units of time. Exact flow reaches any
error with r >= 2 in all arms, so slopes of log error in log α are shown, not judged. (ii) A Llama of 0.3 M parameters
trained on documentation, then LoRA (r = 4, all linear layers) on source code: zero B, Gaussian, spectral (all compensated) and
PEFT's PiSSA, each arm's learning rate tuned, with AdamW; zero B and spectral with SGD too, where the theory is nearer.

Smaller than the card's check: 150 steps of 1024 tokens instead of 200, 3 learning rates at 60 % length, 2 seeds.
"""

import math
from typing import Any

import numpy as np

from metier.compare import leaderboard
from metier.compare.results import ComparisonResult
from metier.compare.study import Check, Outcome, Study
from metier.lab import loraflow

PARTS = ("adapter/spectral-lora", "probe/lora-alignment")
CLAIM = (
    "Adapters first align with the residual's singular directions; a small spectral start saves that time and still converges."
)
ALPHAS = (1e-1, 1e-2, 1e-3, 1e-5)
ARMS: dict[str, Any] = {
    "default": {"lora": {"rank": 4}},
    "gaussian": {"spectral-lora": {"rank": 4, "directions": "gaussian"}},
    "spectral": {"spectral-lora": {"rank": 4}},
    "pissa": {"peft": {"config": "LoraConfig", "options": {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}}},
}


def run(study: Study) -> Outcome:
    """The simulation, then the comparisons."""
    alphas, length = (ALPHAS[1:2], 8.0) if study.quick else (ALPHAS, 20.0)
    times = {a: loraflow.halving(a, length) for a in alphas}
    errors = {} if study.quick else {angle: slopes(angle) for angle in (0, 45, 90)}
    base = str(study.train(pretraining(study), name="base").folder / "model")
    adam = study.compare(design(study, base, {"adamw": {"lr": 2e-3}}, ARMS), name="adamw")
    few = {n: ARMS[n] for n in ("default", "spectral")}
    sgd = study.compare(design(study, base, {"sgd-momentum": {"lr": 0.3}}, few), name="sgd")
    found = {name: reached(result) for name, result in (("adamw", adam), ("sgd", sgd))}
    return Outcome(
        checks=[*simulated(times), *trained(found["adamw"], "AdamW"), *trained(found["sgd"], "SGD")],
        figures={
            "halving": {f"{a:g}": t for a, t in times.items()}, "slopes": {str(k): v for k, v in errors.items()}, "runs": found,
            "sweeps": {f"{r.name} {t.arm}": {"lrs": t.values, "losses": t.metric} for r in (adam, sgd) for t in r.tuning},
        },
        notes=["The random start's size is ours: columns as long as the spectral ones."]
        + [f"{r.name}: the best learning rate of {t.arm} is at an end." for r in (adam, sgd) for t in r.tuning if t.at_edge],
    )  # fmt: skip


# --- matrix factorisation ------------------------------------------------------------------------------------------


def slopes(angle: float) -> dict[str, Any]:
    """Mean log₁₀ of the loss after 30 units over the first, for every α, and its slope in log₁₀ α."""
    w2, w1, y = loraflow.problems(2, angle)
    first, out = 0.5 * np.square(y - w2 @ w1).sum((1, 2)), {}
    for name in ("random", "spectral"):
        logs = []
        for alpha in ALPHAS:
            *_, (last, _) = loraflow.flow(w2, w1, y, loraflow.starts(w2, w1, y, alpha, 4, name == "spectral"), 30.0)
            logs.append(float(np.log10(np.maximum(last / first, 1e-30)).mean()))
        out[name] = {"log error": logs, "slope": float(np.polyfit(np.log10(ALPHAS), logs, 1)[0])}
    return out


def simulated(times: dict[float, dict[str, float]]) -> list[Check]:
    """The card's predictions of the simulation."""
    at, alphas = times[1e-2], sorted(times)
    ratio, off = at["spectral"] / at["random"], max(t["spectral off"] for t in times.values())
    found = [
        Check("time to halve the loss at α = 1e-2, spectral over random", "<= 0.6", ratio, ratio <= 0.6),
        Check("misalignment of the spectral start when |B₁| is 0.1", "< 1e-3", off, off < 1e-3),
    ]
    if len(alphas) > 1:
        decade = math.log(10) / at["sigma"]
        for arm in ("random", "spectral"):
            slope = -float(np.polyfit(np.log10(alphas), [times[a][arm] for a in alphas], 1)[0]) / decade
            found.append(Check(f"time per decade of α over ln(10)/σ₁, {arm}", "within 20 %", slope, abs(slope - 1) <= 0.2))
    return found


# --- language model ------------------------------------------------------------------------------------------------


def pretraining(study: Study) -> dict[str, Any]:
    """The base: a Llama on documentation."""
    return {
        "model": "lab/llama-50k" if study.quick else "lab/llama-300k",
        "data": {"train": "lab/pydoc", "chunk": True, "max_length": 64},
        "optimizer": {"adamw": {"lr": 4e-3}},
        "schedule": {"cosine": {"warmup": 0.1}},
        "train": {"steps": 4 if study.quick else 300, "batch": 4 if study.quick else 32},
    }


def design(study: Study, base: str, optimizer: dict[str, Any], arms: dict[str, Any]) -> dict[str, Any]:
    """The same base and data for all arms; each has its own sweep."""
    return {
        "run": {
            "model": base,
            "data": {
                "train": "lab/stdlib", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 96, "chunk": True,
                "max_length": 64,
            },
            "optimizer": optimizer,
            "schedule": {"constant": {"warmup": 0.05}},
            "train": {
                "steps": 4 if study.quick else 150, "batch": 2 if study.quick else 16, "eval_every": 2 if study.quick else 10,
            },
        },
        "arms": {name: {"adapter": ref} for name, ref in arms.items()},
        "factor": "adapter",
        "control": "default",
        "tune": {"option": "optimizer.lr", "factors": [1.0] if study.quick else [0.3, 1.0, 3.0], "fraction": 0.6},
        "seeds": 1 if study.quick else 2,
    }  # fmt: skip


def reached(result: ComparisonResult) -> dict[str, Any]:
    """Final loss of each arm, and the share of the tokens after which it is where the default ends."""
    total = result.finals("default")[0].curve.tokens[-1]
    return {p.arm: {"loss": p.mean, "share": None if p.tokens is None else p.tokens / total} for p in leaderboard.places(result)}


def trained(found: dict[str, Any], name: str) -> list[Check]:
    """The card's predictions for the language model."""
    share, gap = found["spectral"]["share"], found["spectral"]["loss"] - found["default"]["loss"]
    return [
        Check(
            f"share of the steps to the default's final loss, spectral, {name}",
            "<= 0.7",
            share,
            share is not None and share <= 0.7,
        ),
        Check(f"final loss of spectral above the default's, {name}", "<= 0.01 nat", gap, gap <= 0.01),
    ]
