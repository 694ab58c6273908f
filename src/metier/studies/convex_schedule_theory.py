"""Does a bound of convex optimisation say how long to cool down, what learning rate another schedule wants, how to go on
from a finished run, and what its loss curve is?

(i) The bound's values against the authors' formula and (v) against the final losses they published (124M, 50k steps: six
cooldowns, three rates, one fitted scale). (ii) Subgradient descent on ``max_i |a_i x - b_i|`` in the plane, 400 steps, 20
problems. (iii), (iv), (vi) A Llama of 0.3 M parameters from scratch, AdamW, 10 steps of warmup: the rate tuned on WSD is moved
to linear decay; a WSD run is continued to twice its steps in three ways; the bound, with a profile of gradient norms, is fitted
to three loss curves and predicts a fourth. Smaller than the card's check: 400 steps of 1024 tokens instead of 600, and the
continued run has 200. It is trained as one run: up to the shorter one's cooldown they are the same.
"""

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from metier.compare.study import Check, Outcome, Study
from metier.core import convexbound as cb
from metier.core import laws, part
from metier.core.guards import NonFiniteError

PARTS = ("law/schedule-bound", "schedule/wsd", "schedule/bound-optimal")
CLAIM = "A last-iterate bound predicts loss curves of schedules, the rate that another cooldown wants, and good extensions."
LRS = (0.002, 0.004, 0.008, 0.016, 0.032)
LINEAR: dict[str, Any] = {"linear": {}}
WSD: dict[str, Any] = {"wsd": {"decay": 0.2, "shape": "linear"}}
PUBLISHED = {
    0.1: (2.9849, 2.9825, 2.9954), 0.2: (2.9728, 2.9660, 2.9742), 0.4: (2.9659, 2.9548, 2.9579),
    0.6: (2.9670, 2.9529, 2.9513), 0.8: (2.9743, 2.9550, 2.9523), 0.9: (2.9771, 2.9580, 2.9532),
}  # fmt: skip
PROFILE = "decaying"
WARMUP = {False: 10, True: 1}  # steps, by study.quick


def run(study: Study) -> Outcome:
    """Computed checks first, then the trained ones."""
    found = [computed(), convex(), *(f(study) for f in (transfer, extension, curves))]
    return Outcome([c for checks, _ in found for c in checks], {k: v for _, figures in found for k, v in figures.items()})


def computed() -> tuple[list[Check], dict[str, Any]]:
    """(i) and (v)."""
    shapes = [np.ones(400), cb.plateau(400, 0.2), cb.plateau(400, 0.2, "sqrt"), cb.plateau(400, 1, "cosine"), cb.plateau(400, 1)]
    table = np.array([20 * cb.tuned(s)[1] for s in shapes])
    off = float(np.abs(table - [2.751, 2.187, 2.146, 2.068, 2.013]).max())
    gain = cb.tuned(cb.plateau(100, 1))[1] / cb.bound(cb.minimiser(100)) - 1
    base, parts = cb.tuned(cb.plateau(5000, 0.2))[0], [cb.terms(cb.plateau(5000, c)) for c in PUBLISHED]
    ranks = {}
    for scale in np.linspace(0.3, 3.0, 136).round(2).tolist():
        bounds = [a / g + g * b for a, b in parts for g in base * scale * np.array([0.5, 1.0, 2.0])]
        ranks[scale] = float(spearmanr(bounds, np.array(list(PUBLISHED.values())).ravel()).statistic)  # type: ignore[attr-defined]
    scale = max(ranks, key=ranks.__getitem__)
    return [
        Check("bound of five tuned schedules at 400 steps, largest difference", "0 to 4 digits", off, off < 6e-4),
        Check("best schedule below tuned linear decay at 100 steps", "within 2 %", gain, 0 <= gain <= 0.02),
        Check("rank correlation with 18 published losses", ">= 0.7", ranks[scale], ranks[scale] >= 0.7),
        Check("scale of the learning rate there", "in [0.7, 1.7]", scale, 0.7 <= scale <= 1.7),
    ], {"bounds_at_400": table.tolist()}  # fmt: skip


def convex() -> tuple[list[Check], dict[str, Any]]:
    """(ii): mean suboptimality of each schedule over problems."""
    gamma = cb.tuned(cb.plateau(400, 0.2))[0]
    etas = {"constant": np.ones(400), "wsd": cb.plateau(400, 0.2), "cosine": 2 * cb.plateau(400, 1, "cosine")}
    found = {name: np.mean([descend(gamma * eta, seed) for seed in range(20)], axis=0) for name, eta in etas.items()}
    last = {name: float(values[-1]) for name, values in found.items()}
    drop = last["wsd"] / float(found["wsd"][240:320].mean())
    return [
        Check("convex problem: loss after the cooldown over that before it", "< 0.5", drop, drop < 0.5),
        Check("convex problem: constant ends above WSD", "> 0", last["constant"] - last["wsd"], last["constant"] > last["wsd"]),
    ], {"convex_final": last}  # fmt: skip


def descend(eta: np.ndarray, seed: int) -> np.ndarray:
    """Values of ``max_i |a_i (x - x*)|`` along subgradient descent, in units of D times the largest gradient."""
    rng = np.random.default_rng(seed)
    a, x = rng.standard_normal((20, 2)), rng.standard_normal(2)
    a, x = a / np.linalg.norm(a, axis=1).max(), x / np.linalg.norm(x)
    values = []
    for step in eta:
        z = a @ x
        i = int(np.abs(z).argmax())
        values.append(abs(z[i]))
        x = x - step * np.sign(z[i]) * a[i]
    return np.array(values)


def train(study: Study, schedule: dict[str, Any], lr: float, steps: int = 400, seed: int = 0) -> Any:
    """A finished run, or ``None`` if it diverged."""
    ((name, options),) = schedule.items()
    quick, every = study.quick, 20 if study.quick else 1
    run = {
        "model": "lab/llama-50k" if quick else "lab/llama-300k",
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 128 // every, "chunk": True, "max_length": 64},
        "optimizer": {"adamw": {"lr": lr, "weight_decay": 0.1}}, "schedule": {name: {**options, "warmup": WARMUP[study.quick]}},
        "train": {"steps": steps // every, "batch": 4 if quick else 16, "seed": seed, "eval_every": 40 // every},
    }  # fmt: skip
    label = "-".join([name, *(str(v) for v in options.values()), f"{lr:g}", str(steps), str(seed)])
    try:
        return study.train(run, name=label)
    except NonFiniteError:
        return None


def loss(study: Study, schedule: dict[str, Any], lr: float, steps: int = 400, seeds: int = 2) -> float:
    """Mean held-out loss over seeds."""
    runs = [train(study, schedule, lr, steps, seed) for seed in range(seeds)]
    return float(np.mean([r.metrics["eval_loss"] if r else np.inf for r in runs]))


def best(study: Study, schedule: dict[str, Any], steps: int = 400) -> float:
    """The learning rate of least loss among :data:`LRS`, on one seed."""
    return min(LRS[:2] if study.quick else LRS, key=lambda lr: loss(study, schedule, lr, steps, 1))


def transfer(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """(iii)."""
    lr, own = best(study, WSD), best(study, LINEAR)
    same, moved, tuned = (loss(study, LINEAR, x) for x in (lr, 1.95 * lr, own))
    return [
        Check("linear decay at 1.95 x WSD's rate above its own tuning", "within 0.01 nat", moved - tuned, moved - tuned <= 0.01),
        Check("linear decay at 1.95 x WSD's rate below the same rate", "< 0", moved - same, moved < same),
    ], {"transfer": {"wsd_lr": lr, "linear_lr": own, "same": same, "moved": moved, "tuned": tuned}}  # fmt: skip


def extension(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """(iv)."""
    lr = best(study, WSD, 200)
    at = 0.8 * (200 - WARMUP[False]) / (400 - WARMUP[False])  # where the shorter run began to cool down
    arms = {"keep": {"decay": 0.2}, "lower": {"decay": 0.2, "drop": 0.53, "drop_at": at}, "longer": {"decay": 0.635}}
    found = {name: loss(study, {"wsd": {**o, "shape": "linear"}}, lr) for name, o in arms.items()}
    found["linear"] = loss(study, LINEAR, best(study, LINEAR))
    gains, gaps = ([found[n] - found[other] for n in ("lower", "longer")] for other in ("keep", "linear"))
    return [
        Check("lower plateau, or longer cooldown, below the same of both", "<= -0.01 nat", gains, max(gains) <= -0.01),
        Check("lower plateau, or longer cooldown, above tuned linear decay", "within 0.02 nat", gaps, max(gaps) <= 0.02),
    ], {"extension": {"lr": lr, **found}}  # fmt: skip


def curves(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """(vi): constant, WSD and cosine are fitted, WSD with ``1 - √y`` is predicted."""
    lr, schedules = best(study, WSD), ({"constant": {}}, WSD, {"cosine": {}}, {"wsd": {"decay": 0.2, "shape": "sqrt"}})
    runs = [(i, done) for i, schedule in enumerate(schedules, 1) if (done := train(study, schedule, lr))]
    evals = [(i, done.step, e) for i, done in runs for e in done.events if e["event"] == "eval" and e["step"] > done.step / 10]
    columns = np.array([(lr, steps, e["step"], i, e["eval_loss"]) for i, steps, e in evals], dtype=float).T
    table = {n: columns[i] for i, n in enumerate(("lr", "steps", "step", "schedule", "loss"))}
    law = part.build("law", {"schedule-bound": {"schedules": schedules, "warmup": WARMUP[study.quick], "profile": PROFILE}}).obj
    found = laws.fit(law, table, starts=6, bootstrap=0, holdout="schedule>3").held_out or {}
    error = float(np.mean(np.abs(np.array(found["predicted"]) - np.array(found["observed"]))))
    return [Check("loss curve of a schedule left out, mean error", "<= 0.03 nat", error, error <= 0.03)], {"curve": found}
