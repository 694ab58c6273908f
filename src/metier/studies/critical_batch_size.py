"""Does the critical batch size grow with data rather than with the model, and does averaging stand in for a decay?

(i) The published steps of five models (85M to 1.2B) are fitted again. (ii) and (iii) Two Llamas, 0.05 M and 0.3 M parameters,
from scratch at constant learning rate, after a warmup of 200 sequences; AdamW, beta1 0.95, no weight decay; three averages of
the weights are measured beside the weights. Reference: 8 sequences of 64 tokens. One sweep of the small model serves both of its
data sizes, since nothing depends on the length of a run: the goals are its lowest averaged losses within 100 and 400 steps
(0.05 M and 0.2 M tokens). Steps to a goal are where the line between two evaluations crosses it, the least over learning rates
(three, in steps of 2, moved with the root of the batch) and decays. Smaller than the card's check: a fifth of its tokens, batches
from 4, one seed, one warmup for both data sizes, beta2 of 0.99 everywhere, no cosine runs as a control. "Below B*" are the
batches below it, and flat is the distance from their median of steps times batch.
"""

from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import laws, part
from metier.core.guards import NonFiniteError

PARTS = ("law/critical-batch-size", "hook/ema", "probe/critical-batch-size")
CLAIM = "Critical batch size grows with the amount of data (exponent about 0.47) and is nearly flat in model size at fixed data."
REFERENCE, LENGTH = 8, 64
BATCHES = (4, 8, 16, 32, 64, 128)
FACTORS = (0.5, 1.0, 2.0)
DECAYS = (0.9, 0.98, 0.995)
LR = {"llama-50k": 8e-3, "llama-300k": 4e-3}
GOALS = {"llama-50k": (100, 400), "llama-300k": (100,)}
"""Steps of the reference batch at which the goals are set."""
PUBLISHED = {
    85: (46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600),
    151: (96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300),
    302: (196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879),
    604: (311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800),
    1200: (642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500),
}
PRINTED = (745.3, 955.2, 1393.7, 1888.5, 2533.4)
Curves = dict[tuple[int, float], dict[str, np.ndarray]]


def run(study: Study) -> Outcome:
    """The published table, then the sweeps."""
    checks, figures = published()
    arms: dict[str, dict[str, Any]] = {}
    for model, goals in GOALS.items():
        curves = sweep(study, model)
        for number, at in enumerate(goals):
            arms[f"{model} {4**number}x"] = measured(curves, at // 20 if study.quick else at)
    checks += predictions(arms)
    lost = [f"{n}: batch {b} never reaches the goal" for n, arm in arms.items() for b in BATCHES if b not in arm["B"]]
    return Outcome(checks, {**figures, "arms": arms}, [] if study.quick else lost)


def published() -> tuple[list[Check], dict[str, Any]]:
    """(i)."""
    rows = [(n, 2.0**e, y) for n, steps in PUBLISHED.items() for e, y in enumerate(steps, 6)]
    columns = dict(zip(("size", "B", "steps"), np.array(rows, dtype=float).T, strict=True))
    law, growth = (part.build("law", {"critical-batch-size": {"level": level}}).obj for level in ("curve", "growth"))
    table = law.critical(columns, reference=256)
    off = float(np.abs(table["B"] / PRINTED - 1).max())
    c, p = laws.fit(growth, table, bootstrap=0, delta=law.delta).values
    interval = laws.fit(growth, table, bootstrap=200, delta=law.delta)
    return [
        Check("B* of five published tables, largest difference", "<= 0.1 %", off, off <= 1e-3),
        Check("growth 93.20 N^0.468 of these", "within 0.5 %", [c, p], abs(c / 93.20 - 1) <= 5e-3 and abs(p / 0.468 - 1) <= 5e-3),
    ], {"published": {"B*": table["B"].tolist(), "exponent": [interval.low[1], p, interval.high[1]]}}  # fmt: skip


def sweep(study: Study, model: str) -> Curves:
    """Losses of the weights (``live``) and of the averages at the evaluated steps, by batch size and factor."""
    found: Curves = {}
    for batch in (8, 32) if study.quick else BATCHES:
        for factor in FACTORS[:1] if study.quick else FACTORS:
            try:
                found[batch, factor] = curves(study, model, batch, factor)
            except NonFiniteError:
                continue
    return found


def curves(study: Study, model: str, batch: int, factor: float) -> dict[str, np.ndarray]:
    """One run, long enough for the last goal at a critical batch of 32 or more."""
    steps = int(1.15 * GOALS[model][-1] * REFERENCE / batch * (1 + batch / 32)) // (20 if study.quick else 1)
    hooks = [{"ema": {"decay": d, "start": "debias", "use": False, "log": True}} for d in DECAYS]
    lr = LR[model] * factor * (batch / 32) ** 0.5
    done = study.train({
        "model": f"lab/{'llama-50k' if study.quick else model}",
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 4 if study.quick else 32, "chunk": True,
                 "max_length": LENGTH},
        "optimizer": {"adamw": {"lr": lr, "beta1": 0.95, "beta2": 0.99, "weight_decay": 0.0}},
        "schedule": {"constant": {"warmup": min(max(1, 200 // batch), steps)}}, "hooks": hooks,
        "train": {"steps": max(steps, 2), "batch": batch, "eval_every": max(1, steps // 40)},
    }, name=f"{model}-{batch}-{factor:g}")  # fmt: skip
    evals = {e["step"]: e["eval_loss"] for e in done.events if e["event"] == "eval"}
    logged = [e for e in done.events if e["event"] == "step" and f"ema_{DECAYS[0]:g}_loss" in e and e["step"] in evals]
    averages = {f"{d:g}": np.array([e[f"ema_{d:g}_loss"] for e in logged]) for d in DECAYS}
    steps_of = np.array([e["step"] for e in logged])
    return {"step": steps_of, "live": np.array([evals[int(s)] for s in steps_of]), **averages}


def measured(found: Curves, at: int) -> dict[str, Any]:
    """Goal, steps with and without averages, and the law of one arm."""
    law = part.build("law", "critical-batch-size").obj
    decays = [f"{d:g}" for d in DECAYS]
    goal = min(float(c[d][c["step"] <= max(at, 1)].min()) for (b, _), c in found.items() if b == REFERENCE for d in decays)
    goal += 1e-9  # the reference itself gets there

    def least(batch: int, kinds: list[str]) -> float:
        runs = [c for (b, _), c in found.items() if b == batch]
        return min((law.reached(c["step"], c[k], goal, between=True) for c in runs for k in kinds), default=np.inf)

    all_steps = {b: (least(b, decays), least(b, ["live"])) for b in sorted({b for b, _ in found})}
    batches = [b for b, (y, _) in all_steps.items() if np.isfinite(y)]
    steps = [all_steps[b][0] for b in batches]
    table = {"B": np.array(batches, dtype=float), "steps": np.array(steps)}
    fitted = laws.fit(law, table, bootstrap=0, delta=law.delta).values if len(batches) > 2 else [1.0, 1.0]
    live = [all_steps[b][1] for b in batches]
    return {"goal": goal, "B": batches, "steps": steps, "steps_unaveraged": live, "a": fitted[0], "b": fitted[1],
            "B*": law.optimal(np.array(fitted), REFERENCE)["B*"]}  # fmt: skip


def predictions(arms: dict[str, dict[str, Any]]) -> list[Check]:
    """(ii) and (iii), with the card's margins."""
    flat, rise, gain = [], [], []
    for arm in arms.values():
        batches, steps = np.array(arm["B"], dtype=float), np.array(arm["steps"])
        work, below = batches * steps, batches < arm["B*"]
        middle = float(np.median(work[below])) if below.any() else float(work[0])
        flat.append(float(np.abs(work[below] / middle - 1).max()) if below.any() else np.inf)
        rise.append(float(work[-1] / middle) if not below[-1] else 0.0)
        gain += (1 - steps / np.array(arm["steps_unaveraged"])).tolist()
    star = {name: arm["B*"] for name, arm in arms.items()}
    data, size = star["llama-50k 4x"] / star["llama-50k 1x"], star["llama-300k 1x"] / star["llama-50k 1x"]
    return [
        Check("steps times batch below B*", "flat within 15 %", flat, max(flat) <= 0.15),
        Check("steps times batch at the largest batch above B*, of the flat part", "> 1.15", rise, min(rise) > 1.15),
        Check("B* at 4 times the data, of that at 1", ">= 1.4", data, data >= 1.4),
        Check("B* of the larger model, of the smaller one's, at equal data", "in [0.75, 1.4]", size, 0.75 <= size <= 1.4),
        Check("steps that averaging saves, least over batches", ">= 10 %", min(gain), min(gain) >= 0.1),
    ]
