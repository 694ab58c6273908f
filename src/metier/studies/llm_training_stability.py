"""Which guards let a model bear a higher learning rate?

The card's ladder of learning rates, {2, 4, 8, 16, 32} x 3e-3, with AdamW, clipping at 1.0 and 10 steps of warmup, for a plain
model and nine guards, on a Llama of 0.3 M parameters trained from scratch. An arm climbs until a seed diverges; its largest
stable rate is the last at which none did. Diverged: see ``metier.core.divergence``. Norms are layer norms with gain and bias,
other options the parts' defaults; the rate is constant after the warmup.

Smaller than the card's check: 3 blocks of width 64 instead of 6 of 128, 16 x 64 tokens a step instead of 16 x 128, 60 steps
instead of 250, and no 3e-3. So short a run is likely to miss slow divergence, and the paper's own is of 830 M parameters.
Seeds change the order of the data, not the initial weights. Arms that reach the top of the ladder are not told apart.
"""

import json
from collections.abc import Mapping
from typing import Any

from metier.compare.study import Check, Outcome, Study
from metier.core.divergence import diverged
from metier.core.errors import MetierError, UsageError

PARTS = (
    "model/qk-norm", "model/qk-norm-cap", "model/qkv-norm", "model/qk-fc-norm", "model/soft-cap", "model/soft-temp",
    "model/soft-clip", "model/layer-scale", "model/sigma-reparam", "hook/loss-spike", "hook/max-logit",
)  # fmt: skip
CLAIM = "QKV norm and QK norm with capping converge at 1.5 times the rate that QK norm bears, at no loss at normal rates."
ALONE = ("soft-temp", "soft-clip", "sigma-reparam", "layer-scale", "soft-cap", "qk-fc-norm", "qkv-norm", "qk-norm-cap")
NORM = {"norm": "layer", "bias": True}
ARMS: dict[str, list[Any]] = {"baseline": [], "qk-norm": [{"qk-norm": NORM}], **{n: [n] for n in ALONE}}
LADDER = [6e-3, 12e-3, 24e-3, 48e-3, 96e-3]
Cell = list[dict[str, Any]]


def run(study: Study) -> Outcome:
    """Every arm climbs the ladder; then the card's predictions."""
    arms = ("baseline", "qk-norm") if study.quick else tuple(ARMS)
    ladder, seeds = (LADDER[::4], 1) if study.quick else (LADDER, 2)
    found: dict[str, list[Cell]] = {}
    for arm in arms:
        found[arm] = []
        for i, lr in enumerate(ladder):
            found[arm].append([curve(study, arm, lr, seed, f"{arm}-{i}-{seed}") for seed in range(seeds)])
            if any(c["reason"] for c in found[arm][-1]):
                break
    top = {arm: sum(not any(c["reason"] for c in cell) for cell in cells) - 1 for arm, cells in found.items()}
    stable = {arm: ladder[i] if i >= 0 else None for arm, i in top.items()}
    cells = {arm: [summary(lr, c) for lr, c in zip(ladder, found[arm], strict=False)] for arm in found}
    full = {arm: top.get(arm, -1) for arm in ARMS}
    notes = [f"At the top of the ladder without divergence: {[a for a, i in top.items() if i == len(ladder) - 1]}."]
    return Outcome(checks=[*order(full), loss_at_the_tuned_rate(found), logit_before_loss(found["baseline"])],
                   figures={"ladder": ladder, "largest_stable_lr": stable, "arms": cells}, notes=notes)  # fmt: skip


def curve(study: Study, arm: str, lr: float, seed: int, name: str) -> dict[str, Any]:
    """Losses, largest logits, final held-out loss of one run and why it diverged, if it did; kept in its folder."""
    kept = study.folder / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    steps, held_out, error = 8 if study.quick else 60, None, None
    try:
        held_out = study.train(settings(study, arm, lr, seed, steps), name).metrics.get("eval_loss")
    except MetierError as e:
        error = e
    if isinstance(error, UsageError):
        raise error
    events = [json.loads(line) for line in (study.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stops = [e["text"] for e in events if e["event"] == "guard" and e.get("action") == "stop"]
    if error and not stops:  # neither the monitor nor a value that is not finite
        raise error
    events = [e for e in events if e["event"] == "step"]
    losses = [e["loss"] for e in events]
    result = {
        "losses": losses, "logits": [e.get("max_logit") for e in events], "eval_loss": held_out,
        "reason": "; ".join(stops) or diverged(losses, steps),
    }  # fmt: skip
    kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def settings(study: Study, arm: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """The run file of one cell."""
    return {
        "model": "lab/llama-50k" if study.quick else "lab/llama-300k",
        "transform": ARMS[arm],
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 64, "chunk": True,
                 "max_length": 64},
        "optimizer": {"adamw": {"lr": lr}},
        "schedule": {"constant": {"warmup": 0.5 if study.quick else 10}},
        "train": {"steps": steps, "batch": 4 if study.quick else 16, "seed": seed, "clip": 1.0, "log_every": 1},
        "hooks": [{"loss-spike": {"action": "stop"}}, {"max-logit": {"every": 1}}],
    }  # fmt: skip


def summary(lr: float, cell: Cell) -> dict[str, Any]:
    """One step of the ladder for the record."""
    return {
        "lr": lr, "diverged": f"{sum(bool(c['reason']) for c in cell)} of {len(cell)}", "reasons": [c["reason"] for c in cell],
        "eval_loss": [c["eval_loss"] for c in cell], "steps": [len(c["losses"]) for c in cell],
        "max_logit": [max((x for x in c["logits"] if x is not None), default=None) for c in cell],
    }  # fmt: skip


def order(top: Mapping[str, int]) -> list[Check]:
    """The card's order of largest stable rates, as places on the ladder (-1: diverges on the first)."""
    chain = [min(top["qk-norm-cap"], top["qkv-norm"]), top["qk-norm"], top["soft-cap"], top["soft-temp"], top["baseline"]]
    return [
        Check("largest stable rate of QK norm + cap and QKV norm, QK norm, soft cap, soft temperature, baseline",
              "in falling order, equal allowed", chain, chain == sorted(chain, reverse=True)),
        Check("QK norm above the baseline", ">= 1 grid step", chain[1] - chain[4], chain[1] - chain[4] >= 1),
        Check("distance of QK + FC norm from QK norm", "<= 1 grid step", abs(top["qk-fc-norm"] - chain[1]),
              abs(top["qk-fc-norm"] - chain[1]) <= 1),
    ]  # fmt: skip


def loss_at_the_tuned_rate(found: Mapping[str, list[Cell]]) -> Check:
    """Held-out loss of QK norm at the baseline's best rate."""
    base, other = [
        [float("inf") if any(c["reason"] for c in cell) else sum(c["eval_loss"] for c in cell) / len(cell) for cell in found[arm]]
        for arm in ("baseline", "qk-norm")
    ]
    best = min(range(len(base)), key=lambda i: base[i])
    gap = other[best] - base[best] if best < len(other) else float("inf")
    return Check("held-out loss of QK norm above the baseline at the baseline's best rate", "<= 0.01 nat", gap, gap <= 0.01)


def logit_before_loss(cells: list[Cell]) -> Check:
    """Does the largest logit leave that of the stable rate (3 x, same step) before the smoothed loss rises?"""
    text, expected = (
        "baseline's max logit at the first diverging rate over that at the stable one, before the loss rises",
        "> 3",
    )
    if len(cells) < 2 or not any(c["reason"] for c in cells[-1]):
        return Check(text, expected, "the baseline did not diverge on the ladder, or at once", False)
    ratios = []
    for stable, wild in zip(cells[-2], cells[-1], strict=True):
        if wild["reason"]:
            before = zip(wild["logits"][: rise(wild["losses"])], stable["logits"], strict=False)
            ratios.append(max((a / b for a, b in before if a and b), default=0.0))
    return Check(text, expected, ratios, all(r > 3 for r in ratios))


def rise(losses: list[float]) -> int:
    """Number of steps until the smoothed loss is 1.1 times its minimum so far."""
    smooth, lowest = 0.0, float("inf")
    for t, loss in enumerate(losses, 1):
        smooth = 0.9 * smooth + 0.1 * loss
        value = smooth / (1 - 0.9**t)
        lowest = min(lowest, value)
        if not value <= 1.1 * lowest:
            return t
    return len(losses)
