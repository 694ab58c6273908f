"""Does the best learning rate of Adam rise and fall with the batch, and does the peak move right as training goes on?

(1) Random quadratics of 6, 30 and 100 coordinates: the exact best rate of sign descent has a peak when off-diagonal curvature is
positive, none when H is diagonal, and agrees with 20 000 drawn signs. (2) A Llama of 0.05 M parameters from a common checkpoint
(200 steps), AdamW without weight decay, beta1 0 and beta2 0.99, constant rate, batches of 2 to 128 sequences of 64 tokens: steps
to two losses, those of a batch of 16 after 40 and 160 steps. The best rate of a batch is the minimum of a parabola in log rate
through the log steps of five rates in steps of 2; rates at an end of the grid are noted. Smaller than the card's check: one
setting of the betas, batches to 128 instead of 256, one seed, rates in steps of 2 instead of √2.
"""

from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import laws, part
from metier.core.guards import NonFiniteError

PARTS = ("law/surge", "law/critical-batch-size")
CLAIM = (
    "The best learning rate of Adam-like optimizers first rises and then falls with the batch; the peak moves right in training."
)
BATCHES = (2, 4, 8, 16, 32, 64, 128)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
REFERENCE, LENGTH, LR = 16, 64, 4e-3
TARGETS = (40, 160)
Losses = dict[tuple[int, float], tuple[np.ndarray, np.ndarray]]


def run(study: Study) -> Outcome:
    """The quadratics, then the sweep."""
    checks, figures = quadratics(200 if study.quick else 20_000)
    losses, lr = sweep(study), FACTORS[2]
    steps, seen = losses[REFERENCE, lr]
    fits, notes = [], []
    for at in TARGETS:
        goal = float(seen[steps <= max(1, at // (20 if study.quick else 1))].min()) + 1e-9
        fits.append(fitted(losses, goal))
        notes += [f"loss {goal:.3f}: the best rate of batch {b} is at an end of the grid" for b in fits[-1]["at_end"]]
    return Outcome([*checks, *predictions(fits)], {**figures, "targets": fits}, notes)


def quadratics(count: int) -> tuple[list[Check], dict[str, Any]]:
    """(1): fall behind the peak for coupled and for diagonal curvature, and distance from draws in standard errors."""
    law, batches = part.build("law", "surge").obj, 2.0 ** np.arange(0, 24, 0.5)
    ratio, diagonal, off = [], [], []
    for n in (6, 30, 100):
        rng = np.random.default_rng(n)
        g, sigma, scale = rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n), rng.uniform(20, 60, n), rng.uniform(1, 2, n)
        h = np.diag(scale) + 0.5 * np.outer(np.sign(g), np.sign(g))
        rates = np.array([law.best(g, sigma, h, b) for b in batches])
        ratio.append(float(rates[-1] / rates.max()))
        flat = np.array([law.best(g, sigma, np.diag(scale), b) for b in batches])
        diagonal.append(bool((np.diff(flat) >= -1e-12).all()))
        for batch in (16.0, 256.0):
            signs = np.sign(g + sigma / batch**0.5 * rng.standard_normal((count, n)))
            linear, square = signs @ g, ((signs @ h) * signs).sum(1)
            error = float(np.hypot(linear.std() / linear.mean(), square.std() / square.mean())) / count**0.5
            off.append(abs(float(linear.mean() / square.mean()) / law.best(g, sigma, h, batch) - 1) / error)
    return [
        Check("rate of very large batches, of the largest, with coupled curvature", "< 1", ratio, max(ratio) < 1),
        Check("rate never falls with diagonal curvature", "yes", diagonal, all(diagonal)),
        Check("exact rate from drawn signs, in standard errors", "<= 4", off, max(off) <= 4),
    ], {"fall_behind_peak": ratio}  # fmt: skip


def sweep(study: Study) -> Losses:
    """Held-out losses at the evaluated steps, by batch size and factor of the rate."""
    warm = train(study, "lab/llama-50k", REFERENCE, LR, 200, "warm")
    model, found = str(warm.folder / "model"), {}
    for batch in (4, 16, 32, 64) if study.quick else BATCHES:
        for factor in FACTORS[1:4] if study.quick else FACTORS:
            steps = int(1.25 * TARGETS[-1] * REFERENCE / batch * (1 + batch / 32))
            try:
                done = train(study, model, batch, LR * factor * (batch / REFERENCE) ** 0.5, steps, f"{batch}-{factor:g}")
            except NonFiniteError:
                continue
            evals = [(e["step"], e["eval_loss"]) for e in done.events if e["event"] == "eval"]
            found[batch, factor] = np.array([e[0] for e in evals]), np.array([e[1] for e in evals])
    return found


def train(study: Study, model: str, batch: int, lr: float, steps: int, name: str) -> Any:
    """One run; the data of the warm run and of the others are in different orders."""
    steps = max(2, steps // (20 if study.quick else 1))
    return study.train({
        "model": model,
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 4 if study.quick else 48, "chunk": True,
                 "max_length": LENGTH},
        "optimizer": {"adamw": {"lr": lr, "beta1": 0.0, "beta2": 0.99, "weight_decay": 0.0}},
        "schedule": {"constant": {"warmup": 20 if name == "warm" and not study.quick else 0}},
        "train": {"steps": steps, "batch": batch, "seed": int(name != "warm"), "eval_every": max(1, steps // 60)},
    }, name=name)  # fmt: skip


def fitted(losses: Losses, goal: float) -> dict[str, Any]:
    """Best rates and steps of every batch at one target, the law, and how well it and the two simple rules do."""
    law, curve, cell = (part.build("law", n).obj for n in ("surge", "critical-batch-size", "power-lr"))
    rows, at_end = [], []
    for batch in sorted({b for b, _ in losses}):
        factors = np.array([f for b, f in losses if b == batch])
        steps = np.array([curve.reached(*losses[batch, f], goal, between=True) for f in factors])
        if not np.isfinite(steps).any() or len(steps) < 3:
            continue
        factor, log_steps = cell.best_lr(factors, np.log(steps))
        rows.append((batch, LR * factor * (batch / REFERENCE) ** 0.5, np.exp(log_steps)))
        if factor in (factors.min(), factors.max()):
            at_end.append(batch)
    b, lr, steps = np.array(rows, dtype=float).T
    theta = laws.fit(law, {"B": b, "lr": lr}, bootstrap=0, delta=law.delta).theta
    trade = laws.fit(curve, {"B": b, "steps": steps}, bootstrap=0, delta=curve.delta).values
    logs = np.log(lr)
    shapes = {"surge": law.log_predict(theta, {"B": b}), "root": 0.5 * np.log(b), "linear": np.log(b)}
    squares = {n: float(1 - np.var(logs - s) / np.var(logs)) for n, s in shapes.items()}
    return {"goal": goal, "B": b.tolist(), "lr": lr.tolist(), "steps": steps.tolist(), "lr_max": float(theta[0]),
            "B_noise": float(theta[1]), "B_noise_of_hyperbola": trade[1] / trade[0], "R2": squares, "at_end": at_end}  # fmt: skip


def predictions(fits: list[dict[str, Any]]) -> list[Check]:
    """(2), as the card has it."""
    ordered = [f["R2"]["surge"] > f["R2"]["root"] > f["R2"]["linear"] for f in fits]
    falls = [f["lr"][-1] < max(f["lr"]) for f in fits]
    noise = [f["B_noise"] for f in fits]
    observed = [[round(v, 4) for v in f["R2"].values()] for f in fits]
    return [
        Check(
            "R² of the surge law, the root and the linear rule on log rates",
            "in this order at both targets",
            observed,
            all(ordered),
        ),
        Check("the best rate falls at the largest batch", "at both targets", falls, all(falls)),
        Check("B_noise at the earlier and the later target", "grows", noise, noise[1] > noise[0]),
    ]
