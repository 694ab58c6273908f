"""Does ASGO beat AdamW and stay near Muon, how stale may its roots be, and what is left of it on the diagonal?

A Llama of 0.3 M parameters from scratch, equal tokens, 10 % warmup, cosine to 2 %, weight decay 0.1, clip 1, each arm's learning
rate tuned. Muon has the scale that makes entries as large as AdamW's, as ASGO does; embeddings are moved by AdamW at the
same rate everywhere. Smaller than the card's check: 150 steps of 2048 tokens instead of 400 of 4096, 3 learning rates at half
length instead of 4; no Shampoo, which is not among the parts as such. The low-rank problem is ``½ ‖A W - Y‖²`` with A
``[2, 64]``, W ``[64, 64]``, so that all gradients have rank 2: the plain form of ASGO against diagonal AdaGrad, both at the best
of 13 learning rates, mean of 3 problems, until the loss is 1e-3 of the first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from metier.compare import stats
from metier.compare.study import Check, Outcome, Study
from metier.core import part

PARTS = ("optimizer/asgo", "optimizer/dasgo")
CLAIM = "ASGO matches or beats AdamW and Muon in language-model pre-training; it gains where gradients have a low rank."
LR = 4e-3
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {"adamw": {"beta2": 0.95}},
    "muon": {"muon": {"scale": "rms"}},
    "asgo": {"asgo": {}},
    "asgo-10": {"asgo": {"every": 10}},
    "dasgo": {"dasgo": {}},
}
LONGEST = 1000


def run(study: Study) -> Outcome:
    """One comparison of all arms, and the low-rank problem."""
    result = study.compare(design(study), name="main")
    loss = {a.name: stats.strict_mean(result, a.name) for a in result.arms}
    steps = low_rank(problems=1 if study.quick else 3, longest=50 if study.quick else LONGEST)
    sweeps = {t.arm: {"lrs": t.values, "losses": t.metric} for t in result.tuning}
    seconds = {a.name: sum(r.seconds for r in result.finals(a.name)) for a in result.arms}
    edge = [t.arm for t in result.tuning if t.at_edge]
    return Outcome(
        checks=checks(loss, steps),
        figures={"loss": loss, "sweeps": sweeps, "seconds": seconds, "steps_on_low_rank": steps},
        notes=[f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else [],
    )


def design(study: Study) -> dict[str, Any]:
    """Arms on the same tokens, each with its own sweep of the learning rate."""
    refs = {n: {k: {**o, "lr": LR, "weight_decay": 0.1} for k, o in ref.items()} for n, ref in ARMS.items()}
    return {
        "run": {
            "model": "lab/llama-50k" if study.quick else "lab/llama-300k",
            "data": {
                "train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 128, "chunk": True,
                "max_length": 64,
            },
            "optimizer": "adamw",
            "schedule": {"cosine": {"warmup": 0.1, "final": 0.02}},
            "train": {"steps": 4 if study.quick else 150, "batch": 4 if study.quick else 32},
        },
        "arms": {name: {"optimizer": ref} for name, ref in refs.items()},
        "control": "adamw",
        "tune": {"option": "optimizer.lr", "factors": [1.0] if study.quick else [0.4, 1.0, 2.5], "fraction": 0.5},
        "seeds": 1 if study.quick else 2,
    }  # fmt: skip


def low_rank(problems: int, longest: int) -> dict[str, float]:
    """Mean steps of each method at its best learning rate; ``longest`` when it does not arrive."""
    return {
        name: float(np.mean([min(steps(method, lr, seed, longest) for lr in np.logspace(-3, 1, 13)) for seed in range(problems)]))
        for name, method in {"asgo": plain_asgo, "adagrad": adagrad}.items()
    }


def steps(method: Callable[[Any, dict[str, Any]], Any], lr: float, seed: int, longest: int) -> int:
    """Steps until the loss is 1e-3 of the first."""
    import torch

    source = torch.Generator().manual_seed(seed)
    a, y = (torch.randn(2, 64, generator=source, dtype=torch.float64) for _ in range(2))
    w, state = torch.zeros(64, 64, dtype=torch.float64), {}
    first = float(y.square().sum())
    for t in range(longest):
        off = a @ w - y
        size = float(off.square().sum()) / first
        if size <= 1e-3 or not size < 1e6:
            return t if size <= 1e-3 else longest
        w = w - lr * method(a.T @ off, state)
    return longest


def plain_asgo(g: Any, state: dict[str, Any]) -> Any:
    """The direction of the analysed form."""
    from metier.core.optim import Step

    rule = part.build("optimizer", {"asgo": {"theory": True}}).obj
    if not state:
        state.update({k: v[None] for k, v in rule.init(g).items()})
    return rule.update(g[None], g[None], state, Step(t=1, lr=1.0))[0]


def adagrad(g: Any, state: dict[str, Any]) -> Any:
    """Entries over the root of the sum of their squares."""
    state["v"] = state.get("v", 0.0) + g.square()
    return g / (state["v"].sqrt() + 1e-10)


def checks(loss: dict[str, float], steps: dict[str, float]) -> list[Check]:
    """The card's predictions with its margins."""
    gain, muon, stale = loss["asgo"] - loss["adamw"], loss["asgo"] - loss["muon"], loss["asgo-10"] - loss["asgo"]
    low, high = sorted((loss["adamw"], loss["asgo"]))
    diagonal, ratio = loss["dasgo"], steps["asgo"] / steps["adagrad"]
    between = low <= diagonal <= high or abs(diagonal - loss["adamw"]) <= 0.02
    return [
        Check("ASGO below AdamW", "<= -0.02 nat", gain, gain <= -0.02),
        Check("ASGO apart from Muon", "within 0.02 nat", muon, abs(muon) <= 0.02),
        Check("roots of every tenth step apart from those of every", "within 0.02 nat", stale, abs(stale) <= 0.02),
        Check("DASGO from AdamW", "between AdamW and ASGO, or within 0.02 nat", diagonal - loss["adamw"], between),
        Check("steps of plain ASGO on gradients of rank 2, of diagonal AdaGrad's", "<= 0.5", ratio, ratio <= 0.5),
    ]
