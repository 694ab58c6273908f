"""Does the best learning rate follow a power of the tokens and grow with the batch; and does a power schedule, tuned on a
short run, serve longer runs and larger batches?

A Llama of 0.3 M parameters from scratch on Python text. (i) WSD runs over 6 learning rates for every pair of length and
batch; the law with a free batch exponent is fitted to the four minima (parabolas in log lr). (ii) Power (its ``a``) and WSD
(its lr) are tuned at the shorter length and smaller batch and moved to the longer length at both batches; cosine takes WSD's
rate. Regret is the loss above the WSD tuned in that very cell; 2 seeds. (iii) Power runs of three lengths, which are one run
decayed from three of its points (all before a decay is shared, by construction), against WSD tuned for each.

Smaller than the card's check: lengths 0.13 M and 0.39 M tokens instead of 0.5 M to 4 M, batches of 1024 and 4096 tokens
instead of 1, 2 and 4 times 4096, so that the batch grows with the length by 4 in (ii) instead of the length by 4 or 8.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import laws, part
from metier.core.guards import NonFiniteError

PARTS = ("schedule/power", "law/power-lr")
CLAIM = "One power schedule, tuned on a short run, serves other lengths and batch sizes about as well as a WSD tuned for each."
TOKENS = (131_072, 262_144, 393_216)
ROWS = (8, 32)
LENGTH = 128
LRS = tuple(float(f"{0.0007 * 2.2**k:.3g}") for k in range(6))
FACTORS = (1.0, 2.0, 4.0, 8.0)
CAP = 0.02


@dataclass(frozen=True)
class Cell:
    """Length and batch of a run."""

    tokens: int
    rows: int


SMALL, LONG, LARGE = Cell(TOKENS[0], ROWS[0]), Cell(TOKENS[2], ROWS[0]), Cell(TOKENS[2], ROWS[1])
MIDDLE = Cell(TOKENS[1], ROWS[0])


@dataclass(frozen=True)
class Bench:
    """Trains runs and remembers nothing: the study's folder does."""

    study: Study

    def loss(self, cell: Cell, schedule: str, value: float, seed: int = 0) -> float:
        """Held-out loss of one run; ``value`` is the learning rate, or ``a`` of a power schedule. Infinite if it diverges."""
        quick = self.study.quick
        lr = CAP if schedule == "power" else value
        own: dict[str, Any] = {"power": {"a": value, "eta_max": CAP}, "wsd": {"decay": 0.1}}.get(schedule, {})
        length = 32 if quick else LENGTH
        data = {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if quick else 128, "chunk": True}
        run = {
            "model": "lab/llama-50k" if quick else "lab/llama-300k",
            "data": {**data, "max_length": length},
            "optimizer": {"adamw": {"lr": lr, "weight_decay": 0.1}},
            "schedule": {schedule: {**own, "warmup": 0.05}},
            "train": {"steps": 3 if quick else cell.tokens // (cell.rows * length), "batch": cell.rows, "seed": seed},
        }
        try:
            done = self.study.train(run, name=f"{schedule}-{value:g}-{cell.tokens}-{cell.rows}-{seed}")
        except NonFiniteError:
            return float("inf")
        return done.metrics.get("eval_loss", float("inf"))

    def mean(self, cell: Cell, schedule: str, value: float) -> float:
        """Over two seeds."""
        return float(np.mean([self.loss(cell, schedule, value, seed) for seed in (0, 1)]))


def run(study: Study) -> Outcome:
    """The grid of WSD runs, the moved schedules, and the power run at three lengths."""
    bench = Bench(study)
    lrs, factors = (LRS[1:4], FACTORS[:2]) if study.quick else (LRS, FACTORS)
    corners = [Cell(t, r) for t, r in product((TOKENS[0], TOKENS[2]), ROWS)]
    sweeps = {cell: {lr: bench.loss(cell, "wsd", lr) for lr in lrs} for cell in corners}
    best = {cell: min(found, key=found.__getitem__) for cell, found in sweeps.items()}
    rough = float(np.sqrt(best[SMALL] * best[LONG]))
    middle = {lr: bench.loss(MIDDLE, "wsd", lr) for lr in (rough / 2, rough, 2 * rough)}
    tuning = {a: bench.loss(SMALL, "power", a) for a in factors}
    a = min(tuning, key=tuning.__getitem__)
    regrets = regret(bench, a, best)
    planned = {SMALL: sweeps[SMALL][best[SMALL]], MIDDLE: min(middle.values()), LONG: sweeps[LONG][best[LONG]]}
    anytime = [bench.loss(cell, "power", a) - loss for cell, loss in planned.items()]
    theta = law(sweeps)
    return Outcome(
        checks=checks(theta, regrets, anytime),
        figures={
            "wsd_sweeps": {f"{c.tokens} tokens, batch {c.rows * LENGTH}": dict(s) for c, s in sweeps.items()},
            "wsd_best_lr": {f"{c.tokens} tokens, batch {c.rows * LENGTH}": lr for c, lr in best.items()},
            "power_a_sweep": tuning, "power_a": a, "law": theta, "regret": regrets, "anytime_gap": anytime,
        },
        notes=notes(sweeps, tuning),
    )  # fmt: skip


def law(sweeps: dict[Cell, dict[float, float]]) -> dict[str, float]:
    """``lr = a beta^p T^b`` through the minima of all cells."""
    rows = [(c.tokens, c.rows * LENGTH / 4096, lr, loss) for c, found in sweeps.items() for lr, loss in found.items()]
    table = dict(zip(("T", "beta", "lr", "loss"), np.array(rows, dtype=float).T, strict=True))
    fitted: Any = part.build("law", {"power-lr": {"batch": "free"}}).obj
    found = laws.fit(fitted, fitted.optima(table), bootstrap=0)
    return dict(zip(found.names, found.values, strict=True))


def regret(bench: Bench, a: float, best: dict[Cell, float]) -> dict[str, float]:
    """Mean loss above the cell's own tuned WSD, over the two cells that were not tuned on."""
    arms = {"power": ("power", a), "wsd-moved": ("wsd", best[SMALL]), "cosine-moved": ("cosine", best[SMALL])}
    own = {cell: bench.mean(cell, "wsd", best[cell]) for cell in (LONG, LARGE)}
    return {
        name: float(np.mean([bench.mean(cell, schedule, value) - own[cell] for cell in own]))
        for name, (schedule, value) in arms.items()
    }


def checks(theta: dict[str, float], regrets: dict[str, float], anytime: list[float]) -> list[Check]:
    """The card's predictions with its margins."""
    b, p, power, moved = theta["b"], theta["p"], regrets["power"], regrets["wsd-moved"]
    return [
        Check("exponent of the best learning rate in tokens", "in [-0.8, -0.25]", b, -0.8 <= b <= -0.25),
        Check("exponent of the best learning rate in the batch", "in [0.5, 1.2]", p, 0.5 <= p <= 1.2),
        Check("regret of Power below that of a moved WSD", "<= -0.02 nat", power - moved, power - moved <= -0.02),
        Check("regret of Power", "<= 0.05 nat", power, power <= 0.05),
        Check("Power decayed at three lengths, above WSD tuned for each", "<= 0.04 nat", anytime, max(anytime) <= 0.04),
    ]


def notes(sweeps: dict[Cell, dict[float, float]], tuning: dict[float, float]) -> list[str]:
    """Which sweeps ended on a side."""
    every = {**{f"WSD {c.tokens}/{c.rows * LENGTH}": s for c, s in sweeps.items()}, "Power a": tuning}
    edge = [name for name, s in every.items() if min(s, key=s.__getitem__) in (min(s), max(s))]
    return [f"The best value is at an end of the sweep for {', '.join(edge)}."] if edge else []
